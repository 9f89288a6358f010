"""`glactl eval`: a trained model measured by lm-eval's own tasks.

evals/RUN@STEP/             -2, -3, ... where the name is taken
  summary.json              what was measured, on what, by which versions
  swde.samples.jsonl        a line a document: prompt, gold answer, output, metrics
"""

import io
import json as jsons
import logging
import os
import random
import tempfile
import time
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from glactl import __version__, console
from glactl.device import pick_device
from glactl.run import Run, new_folder
from glactl.tasks import stock

BOOTSTRAP = 1000  # resamplings for the standard error of a metric that has no formula for it


def eval_command(
    run: str | None,
    *,
    tasks: str,
    data_dir: Path | None = None,
    sample: bool = False,
    limit: int | None = None,
    batch_tokens: int = 16_384,
    out: Path = Path("evals"),
    device: str | None = None,
    json: bool = False,
    quiet: bool = False,
) -> None:
    """Run `glactl eval`; the arguments are the command's options.

    Raises:
        ValueError: an unknown task, rows that do not fit it, or a run that is not about text.
        FileNotFoundError: no run, or no such data folder, file or split.
        DataUnavailable: a data set that is neither on the hub, as far as it can be reached, nor in
            its cache.
    """
    if sample and data_dir is not None:
        raise ValueError(f"--sample and --data-dir {data_dir} exclude each other")
    names = stock.resolve(tasks)
    opened = Run.newest() if run is None else Run.open(run)
    if run is None:
        console.note(f"run {opened.path} (the newest)")
    where = pick_device(device)
    lm, tokenizer, _ = opened.load_model(where)
    if tokenizer is None:
        raise ValueError(f"{opened.path} has no tokenizer, its data is not text; eval needs text")
    began = time.monotonic()
    loaded = load_tasks(names, stock.SAMPLE if sample else data_dir)

    from glactl.tasks.harness import HarnessLM

    harness = HarnessLM(lm, tokenizer, batch_tokens, partial(_progress, quiet=quiet))
    found = evaluate(harness, loaded, limit)
    step = opened.newest_checkpoint().name.removeprefix("step-").lstrip("0") or "0"
    summary = {
        "protocol": stock.PROTOCOL,
        "lm_eval": stock.lm_eval_version(),
        "glactl": __version__,
        "run": str(opened.path),
        "step": int(step),
        "data": "sample" if sample else "hub" if data_dir is None else str(data_dir),
        "comparable": not sample and data_dir is None and limit is None,
        "limit": limit,
        "bootstrap": BOOTSTRAP,
        "truncated": harness.truncated,
        "device": str(where),
        "seconds": round(time.monotonic() - began, 3),
        "tasks": _metrics(found),
    }
    folder = _write(out / f"{opened.path.resolve().name}@{step}", summary, found["samples"])
    if harness.truncated:
        console.note(
            f"{harness.truncated} contexts were cut from the left to the model's "
            f"{harness.max_length} positions"
        )
    if json:
        console.result(summary | {"path": str(folder)})
    else:
        _table(summary)
    console.note(f"wrote {folder}/summary.json")


def load_tasks(names: list[str], data: Path | None) -> dict[str, Any]:
    """lm-eval's tasks, their data read, as lm_eval.evaluate takes them.

    Args:
        names: from stock.resolve.
        data: a data folder; None: the hub or its cache.

    Returns:
        tasks: name -> task object, in order; groups and group_map: of the groups among the names.

    Raises what stock.write_tasks raises; ValueError: rows that lack a field of the task;
    DataUnavailable.
    """
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # a fork of a process that runs torch may hang
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    with tempfile.TemporaryDirectory() as folder:
        stock.write_tasks(names, Path(folder), data)
        if data is None:
            stock.reach_data(names)

        import datasets
        from jinja2 import UndefinedError
        from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
        from lm_eval.tasks import TaskManager

        # as lm_eval.simple_evaluate does: some tasks shuffle with the global generators
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        datasets.disable_progress_bars()
        for logger in ("lm_eval", "datasets", "huggingface_hub"):
            logging.getLogger(logger).setLevel(logging.ERROR)
        groups = any(map(stock.is_group, names))
        if groups:
            console.note("a group of tasks is named: indexing all of lm-eval's tasks (about 6 s)")
        manager = TaskManager(include_path=folder, include_defaults=groups)
        for name in names:
            try:
                for part, found in manager.load([name]).items():
                    loaded[part] |= found
            except (KeyError, UndefinedError) as error:
                raise ValueError(f"the rows of {name} lack a field: {error}") from None
            except (OSError, ValueError) as error:
                if data is not None:
                    raise
                raise stock.unavailable(error, name) from None
    return loaded


def evaluate(harness: Any, loaded: dict[str, Any], limit: int | None = None) -> dict[str, Any]:
    """lm_eval.evaluate, set up as by lm_eval.simple_evaluate; what it prints is dropped.

    simple_evaluate itself also imports transformers where it is installed, and runs other programs
    to describe the machine.
    """
    from lm_eval import evaluate as run
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    with redirect_stdout(io.StringIO()):  # "bootstrapping for stddev: ..." is no result
        found: dict[str, Any] = run(
            lm=harness, task_dict=loaded, limit=limit, bootstrap_iters=BOOTSTRAP
        )
    return found


def _progress(total: int, label: str, quiet: bool) -> Any:
    return console.progress(total, label, quiet=quiet)


def _metrics(found: dict[str, Any]) -> dict[str, Any]:
    """task -> version, documents and metric -> value, standard error, higher_is_better."""
    tasks: dict[str, Any] = {}
    for name, results in found["results"].items():
        metrics = {}
        for key, value in results.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = results.get(f"{metric}_stderr,{chosen}")
            label = metric if chosen == "none" else f"{metric} ({chosen})"
            metrics[label] = {
                "value": float(value),
                "stderr": float(error) if isinstance(error, (int, float)) else None,
                "higher_is_better": found["higher_is_better"].get(name, {}).get(metric),
            }
        if metrics:
            counts = found["n-samples"].get(name, {})
            tasks[name] = {
                "version": found["versions"].get(name),
                "documents": counts.get("effective"),
                "of": counts.get("original"),
                "metrics": metrics,
            }
    return tasks


def _table(summary: dict[str, Any]) -> None:
    data = {"sample": "our sample rows", "hub": "the hub's data"}.get(
        summary["data"], f"rows of {summary['data']}"
    )
    title = (
        f"protocol {summary['protocol']}, lm-eval {summary['lm_eval']}, {data}"
        f"; {summary['run']} at step {summary['step']}"
    )
    if not summary["comparable"]:
        title += "\nNOT comparable with published results: other or fewer documents"
    rows = []
    for task, result in summary["tasks"].items():
        for metric, value in result["metrics"].items():
            numbers = [value["value"], value["stderr"]]
            rows.append([task, str(result["version"]), result["documents"], metric, *numbers])
    console.table(["task", "version", "docs", "metric", "value", "stderr"], rows, title)


def _write(stem: Path, summary: dict[str, Any], samples: dict[str, list[Any]]) -> Path:
    """Write the results to a new folder `stem`, with a suffix where it is taken."""
    folder = new_folder(stem)
    for task, documents in samples.items():
        lines = []
        for one in documents:
            inputs = [list(a) if isinstance(a, tuple) else a for a in one["arguments"]]
            shown = {"doc_id": one["doc_id"], "requests": inputs, "target": one["target"]}
            shown |= {"outputs": one["filtered_resps"]}
            shown |= {metric: one[metric] for metric in one["metrics"]}
            lines.append(jsons.dumps(console.finite(shown), default=str, ensure_ascii=False))
        (folder / f"{task}.samples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    text = jsons.dumps(console.finite(summary), indent=1)
    (folder / "summary.json").write_text(text + "\n")
    return folder
