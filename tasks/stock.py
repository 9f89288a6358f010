"""lm-eval's own tasks by name, on the hub's data, on a folder of ours, or on the sample rows.

lm-eval indexes 14,000 files before it knows a name, which takes seconds. Here the few files of a
task are looked for where tasks of that name lie, and a folder of task files is written that
includes them and overrides what must differ. lm-eval then reads that folder alone.

A data folder has the layout DIR/<task>/<split>.jsonl with the field names of the public data set,
<task> being our name (swde, squad, lambada, ...) or lm-eval's.
"""

import json
import re
from difflib import get_close_matches
from functools import cache
from importlib import metadata, util
from pathlib import Path
from typing import Any

import yaml

from glactl.tasks.errors import DataUnavailable
from glactl.tasks.hub import reach, reason

PROTOCOL = "stock"  # the prompts and metrics of lm-eval's own tasks
ALIASES: dict[str, tuple[str, ...]] = {  # our name -> lm-eval's
    "squad": ("squad_completion",),
    "nq": ("nq_open",),
    "arc": ("arc_easy", "arc_challenge"),
    "lambada": ("lambada_openai",),
}
FOLDERS = {"squad_completion": "squad", "nq_open": "nq", "lambada_openai": "lambada"}
CLASSES = {"swde": "SWDE", "fda": "FDA", "squad_completion": "SQUADCompletion"}
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
SAMPLE = Path(__file__).parent / "sample"


def lm_eval_version() -> str:
    """The version of lm-eval."""
    return metadata.version("lm_eval")


def resolve(names: str) -> list[str]:
    """lm-eval's task names for a list such as "swde,arc", in order and each once.

    Raises:
        ValueError: an empty list, or a name that is no task; names the nearest ones.
    """
    wanted = [n.strip() for n in names.split(",") if n.strip()]
    if not wanted:
        raise ValueError("tasks is empty; name some, e.g. swde,squad")
    found: list[str] = []
    for name in wanted:
        for task in ALIASES.get(name, (name,)):
            _find(task)
            if task not in found:
                found.append(task)
    return found


def write_tasks(
    tasks: list[str],
    folder: Path,
    data: Path | None = None,
    revisions: dict[str, str] | None = None,
) -> None:
    """Write the task files that lm_eval.tasks.TaskManager(include_path=folder) reads.

    Args:
        tasks: names from `resolve`.
        folder: an empty folder.
        data: a data folder; None: the data sets that lm-eval names, from the hub or its cache.
        revisions: task -> the revision of its data set that is read; of the others the newest.

    Raises:
        FileNotFoundError: `data`, a task's folder in it, or the split that the task needs is
            missing.
        ValueError: a file of `data` is not JSON lines, or has no rows.
    """
    if data is not None and not data.is_dir():
        raise FileNotFoundError(f"--data-dir {data} is not a folder")
    for task in tasks:
        if is_group(task):  # lm-eval's full index knows what it stands for
            if data is not None:
                raise ValueError(f"{task} is a group of tasks; with --data-dir name single tasks")
            continue
        own: dict[str, Any] = {"task": task, "include": str(_file(task))}
        functions: dict[str, str] = {}
        if task in CLASSES:
            functions["class"] = f"glactl.tasks.cloze.{CLASSES[task]}"
            # squad_completion means these, but without them runs to a blank line, 256 tokens
            own["generation_kwargs"] = {"until": ["\n"], "max_gen_toks": 48}
        if data is not None:
            functions["custom_dataset"] = "glactl.tasks.stock.read_rows"
            files = _data_files(task, data)
            own |= {"dataset_path": None, "dataset_name": None, "dataset_kwargs": {"files": files}}
            own |= {key: None for key, split in _splits(task).items() if split not in files}
        elif revisions and task in revisions:
            given = {} if task in CLASSES else _config(_file(task)).get("dataset_kwargs") or {}
            own["dataset_kwargs"] = given | {"revision": revisions[task]}
        text = yaml.safe_dump(own, sort_keys=False)
        text += "".join(f"{key}: !function {name}\n" for key, name in functions.items())
        (folder / f"{task}.yaml").write_text(text)


def reach_data(tasks: list[str]) -> None:
    """Find out at once whether the hub has the tasks' data; see `hub.reach`."""
    import datasets
    from huggingface_hub import constants

    reach("dataset", next(filter(None, map(hub_name, tasks)), "EleutherAI/lambada_openai"))
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE


def unavailable(error: Exception, task: str) -> DataUnavailable:
    """The one-line error for the data set of `task`, which could not be loaded."""
    if is_group(task):
        return DataUnavailable(
            f"a data set of {task}: {reason(error)}; with a network it can be had"
        )
    return DataUnavailable(
        f"data set {hub_name(task)} of task {task}: {reason(error)}; give --data-dir DIR with "
        f"DIR/{_folder(task)}/*.jsonl, or --sample for a few rows of our own, or a network"
    )


def hub_name(task: str) -> str | None:
    """The data set that lm-eval loads for `task`, or None where its file names none."""
    if task in CLASSES:
        from glactl.tasks import cloze

        return str(getattr(cloze, CLASSES[task]).DATASET_PATH)
    if is_group(task):
        return None
    name = _config(_file(task)).get("dataset_path")
    return None if name is None else str(name)


def read_rows(files: dict[str, str], **_: Any) -> dict[str, Any]:
    """The splits in `files` (split -> path of JSON lines) as datasets.Dataset; for lm-eval."""
    from datasets import Dataset

    found = {}
    for split, path in files.items():
        try:
            found[split] = Dataset.from_list(read_jsonl(Path(path)))
        except (ValueError, TypeError) as error:  # pyarrow's are among them
            raise ValueError(f"{path}: fields differ from row to row: {error}") from None
    return found


def _data_files(task: str, data: Path) -> dict[str, str]:
    """split -> file for the splits of `task` that `data` holds, all of them readable."""
    folder = _data_folder(task, data)
    files = {
        split: str((folder / f"{split}.jsonl").resolve())
        for split in _splits(task).values()
        if (folder / f"{split}.jsonl").is_file()
    }
    measured_file(task, data)
    for file in files.values():
        read_jsonl(Path(file))
    return files


def measured_file(task: str, data: Path) -> Path:
    """The file of a data folder that `task` is measured on. Raises FileNotFoundError."""
    folder = _data_folder(task, data)
    splits = _splits(task)
    # lm-eval measures on the test split of a task that has one, else on the validation split
    needed = splits.get("test_split") or splits.get("validation_split")
    file = folder / f"{needed}.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no {needed}.jsonl, which {task} is measured on")
    return file


def _data_folder(task: str, data: Path) -> Path:
    options = [data / name for name in dict.fromkeys((_folder(task), task))]
    folder = next((f for f in options if f.is_dir()), None)
    if folder is None:
        there = sorted(p.name for p in data.iterdir() if p.is_dir())
        raise FileNotFoundError(
            f"--data-dir {data} has no folder {_folder(task)}; it has: {', '.join(there) or 'none'}"
        )
    return folder


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines. Raises ValueError with the line that is no JSON object."""
    rows = []
    # not splitlines: a string of JSON may hold other line ends than \n
    for n, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{n}: not JSON: {error.msg}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{n}: a row must be a JSON object, not {line[:40]!r}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def _folder(task: str) -> str:
    return FOLDERS.get(task, task)


def _splits(task: str) -> dict[str, str]:
    """The split keys of a task's file and the splits they name."""
    if task in CLASSES:
        return {"validation_split": "validation"}
    config = _config(_file(task))
    return {key: config[key] for key in SPLITS if config.get(key) is not None}


def _root() -> Path:
    spec = util.find_spec("lm_eval")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "tasks"


def is_group(task: str) -> bool:
    """Whether `task` is one of lm-eval's groups or tags, which stand for several tasks."""
    return _find(task)[0] != "task"


def _file(task: str) -> Path:
    return _find(task)[1]


def _find(task: str) -> tuple[str, Path]:
    """The kind of `task` (task, group or tag) and the file that defines it. Raises ValueError."""
    found = _known().get(task) or _known(everything=True).get(task)
    if found is None:
        near = get_close_matches(task, [*ALIASES, *_known(everything=True)], n=3, cutoff=0.6)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"task {task!r} is not known to lm-eval {lm_eval_version()}{hint}")
    return found


_NAME = re.compile(
    r"""^["']?(task|group|tag)["']?:[ \t]*["']?([\w.+-]+)["']?[ \t]*(?:#.*)?$""", re.M
)
_TAGS = re.compile(r"^tag:[ \t]*\n((?:[ \t]*-[ \t]*\S+[ \t]*\n)+)", re.M)  # a list of them
COMMON: tuple[str, ...] = ("arc", "drop", "fda", "hellaswag", "lambada", "nq_open", "openbookqa")
COMMON += ("piqa", "sciq", "squad_completion", "super_glue", "swde", "triviaqa", "wikitext")
COMMON += ("winogrande",)


@cache
def _known(everything: bool = False) -> dict[str, tuple[str, Path]]:
    """Name -> its kind and file, of the folders COMMON or, in about 2 s, of all."""
    found: dict[str, tuple[str, Path]] = {}
    for root in [_root()] if everything else [_root() / name for name in COMMON]:
        for path in sorted(root.rglob("*.yaml")):
            text = path.read_text(encoding="utf-8", errors="replace")
            tags = [("tag", tag) for of in _TAGS.findall(text) for tag in of.split() if tag != "-"]
            for kind, name in [*_NAME.findall(text), *tags]:
                if kind == "task" or name not in found:  # some tasks have the name of their tag
                    found[name] = (kind, path)
    return found


class _Plain(yaml.SafeLoader):
    """YAML with lm-eval's !function tags read as text."""


_Plain.add_constructor("!function", lambda loader, node: str(node.value))


def _config(path: Path) -> dict[str, Any]:
    """A task file with what it includes."""
    config: dict[str, Any] = yaml.load(path.read_text(encoding="utf-8"), Loader=_Plain)
    merged: dict[str, Any] = {}
    included = config.pop("include", [])
    for name in included if isinstance(included, list) else [included]:
        merged |= _config(path.parent / name)
    return merged | config
