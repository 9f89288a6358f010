"""The rows of a recall task: from the hub, from a folder, or the sample of our own.

A data folder has DIR/<task>/validation.jsonl with the fields of the public data set (see
glactl.tasks.recall). The stock tasks nq, triviaqa and drop have other rows under the same names:
DIR/<task>_jrt therefore comes first, then the data set's own name (DIR/based_drop).

Every result names its rows: those of the hub by the commit, resolved when they are first read, and
local ones by the sha256 of the file.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glactl.tasks import hub
from glactl.tasks.errors import DataUnavailable
from glactl.tasks.pins import Pins
from glactl.tasks.recall import Row
from glactl.tasks.stock import SAMPLE, read_jsonl

SPLIT = "validation"
LISTS = ("answers", "alt_answers")
OPTIONAL = ("alt_answers", "tok_pos")  # fields of the public sets that a row may lack


@dataclass(frozen=True)
class Rows:
    """The rows of one task.

    Attributes:
        data: the hub's data set, the folder, or "sample". revision: a commit, or "sha256:...".
        where: what an error names.
    """

    rows: list[Row]
    data: str
    revision: str
    where: str


@dataclass(frozen=True)
class Source:
    """Where rows come from: a data folder, the sample, or neither, the hub at a revision.

    Without a revision that is the one in `pins`, or, the first time, the newest, which pins keeps.

    Raises:
        ValueError: two of them, or a revision of a folder.
    """

    data_dir: Path | None = None
    sample: bool = False
    revision: str | None = None
    pins: Pins | None = None

    def __post_init__(self) -> None:
        if self.sample and self.data_dir is not None:
            raise ValueError(f"--sample and --data-dir {self.data_dir} exclude each other")
        if self.revision is not None and self.folder is not None:
            what = "the sample" if self.sample else self.data_dir
            raise ValueError(f"revision {self.revision} is one of the hub's data; {what} has none")

    @property
    def folder(self) -> Path | None:
        """The folder that has the rows; None: the hub has them."""
        return SAMPLE if self.sample else self.data_dir

    def name(self, hub_set: str | None) -> str:
        """What results call the data."""
        return "sample" if self.sample else str(self.data_dir or hub_set)


def read(task: str, hub_set: str, source: Source) -> Rows:
    """The validation rows of `task`, on the hub in `hub_set`.

    Raises:
        ValueError: rows that are not JSON objects.
        FileNotFoundError: no such folder or file.
        DataUnavailable: the hub has no such data set or revision, or does not answer.
    """
    if source.folder is None:
        pins = source.pins or Pins()
        rows = _from_hub(task, hub_set, source.revision or pins.get(hub_set))
        pins.keep(hub_set, rows.revision)
        return rows
    file = _file(source.folder, task, hub_set)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return Rows(read_jsonl(file), source.name(None), f"sha256:{digest[:16]}", str(file))


def check(rows: Rows, needs: Sequence[str], what: str) -> None:
    """Every row has the fields, and of the right kind: a number of tokens in tok_pos, else text.

    Args:
        needs: the fields. what: whose they are.

    Raises:
        ValueError: a field is missing, or is something else.
    """
    for n, row in enumerate(rows.rows, 1):
        for field in (*needs, *(f for f in OPTIONAL if row.get(f) is not None)):
            if field not in row:
                raise ValueError(
                    f"{rows.where}: row {n} lacks the field {field}; {what} needs "
                    f"{', '.join(needs)}"
                )
            if not _fits(field, row[field]):
                kinds = dict.fromkeys(LISTS, "a list of strings") | {"tok_pos": "an integer"}
                raise ValueError(
                    f"{rows.where}: {field} of row {n} is {row[field]!r:.40}; "
                    f"allowed: {kinds.get(field, 'a string')}"
                )


def _fits(field: str, value: Any) -> bool:
    if field == "tok_pos":
        return isinstance(value, int)
    texts = value if field in LISTS else [value]
    return isinstance(texts, list) and all(isinstance(text, str) for text in texts)


def _file(folder: Path, task: str, hub_set: str) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"--data-dir {folder} is not a folder")
    names = (f"{task}_jrt", hub_set.rpartition("/")[2], task)
    found = next((folder / name for name in names if (folder / name).is_dir()), None)
    if found is None:
        there = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_dir())) or "none"
        raise FileNotFoundError(f"--data-dir {folder} has no folder {task}; it has: {there}")
    file = found / f"{SPLIT}.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"{found} has no {SPLIT}.jsonl, which {task} is measured on")
    return file


def _from_hub(task: str, hub_set: str, revision: str | None) -> Rows:
    import datasets

    try:
        folder, commit = hub.snapshot(hub_set, revision)
        datasets.disable_progress_bars()
        rows = datasets.load_dataset(str(folder), split=SPLIT).to_list()
    except Exception as error:  # huggingface_hub's and datasets' have no common class
        at = "" if revision is None else f" at {revision}"
        raise DataUnavailable(
            f"data set {hub_set}{at} of task {task}: {hub.reason(error)}; give --data-dir DIR with "
            f"DIR/{task}/{SPLIT}.jsonl, or --sample for a few rows of our own, or a network"
        ) from None
    return Rows(rows, hub_set, commit, f"{hub_set}@{commit}")
