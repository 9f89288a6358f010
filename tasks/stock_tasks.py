"""lm-eval's tasks, loaded: each knows its documents, prompts, answers and metrics.

The revision of a task's data is resolved when it is first read: the commit of the hub's data set,
asked for before loading and pinned in the task, or read off the cache where the hub is away; of a
data folder the sha256 of the file that the task is measured on.
"""

import hashlib
import logging
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from glactl.tasks import hub, stock
from glactl.tasks.errors import DataUnavailable
from glactl.tasks.pins import Pins


def load_tasks(
    names: list[str],
    data: Path | None,
    revisions: dict[str, str] | None = None,
    pins: Pins | None = None,
) -> dict[str, Any]:
    """lm-eval's tasks, their data read, as lm_eval.evaluate takes them.

    Args:
        names: from stock.resolve.
        data: a data folder; None: the hub or its cache.
        revisions: name -> commit, branch or tag of the hub's data set; of the others the one in
            pins, or the newest. pins: keeps what was read first.

    Returns:
        tasks: name -> task object, in order; groups and group_map: of the groups among the names.

    Raises what stock.write_tasks raises; ValueError: rows that lack a field of the task, or a
    revision of a group of tasks; DataUnavailable.
    """
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # a fork of a process that runs torch may hang
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    pins = pins or Pins()
    asked = {} if data is not None else _asked(names, revisions or {}, pins)
    told: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        if data is None:
            stock.reach_data(names)
            told = _commits(names, asked)
            stock.write_tasks(names, Path(folder), None, asked | told)
        else:
            stock.write_tasks(names, Path(folder), data)

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
        manager = TaskManager(include_path=folder, include_defaults=any(map(stock.is_group, names)))
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
    for name in names if data is None else ():
        repository, task = stock.hub_name(name), loaded["tasks"].get(name)
        if repository is None:
            continue  # a group: its tasks' data are not pinned
        if name in asked and name not in told:
            _check_cached(name, task, asked[name])
        pins.keep(repository, data_revision(name, task, None))
    return loaded


def data_revision(name: str, task: Any, data: Path | None) -> str | None:
    """The revision of the rows that a task of load_tasks is measured on.

    Args:
        name, task: from load_tasks. data: as given to it.

    Returns:
        a commit, "sha256:..." of a local file, or None where the place of the rows does not tell.
    """
    if data is not None:
        file = stock.measured_file(name, data)
        return f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}"
    pinned = (task.config.dataset_kwargs or {}).get("revision")
    return str(pinned) if pinned and hub.is_commit(pinned) else _cached_commit(task)


def _asked(names: list[str], revisions: dict[str, str], pins: Pins) -> dict[str, str]:
    """name -> the revision that its data must have, of those with one."""
    asked = {}
    for name in names:
        repository = stock.hub_name(name)
        if repository is None and name in revisions:
            raise ValueError(f"{name} is a group of tasks; with a revision name single tasks")
        revision = revisions.get(name) or (pins.get(repository) if repository else None)
        if revision is not None:
            asked[name] = revision
    return asked


def _commits(names: list[str], asked: dict[str, str]) -> dict[str, str]:
    """name -> the commit of its data set, where the hub tells it."""
    found = {}
    for name in names:
        repository = stock.hub_name(name)
        sha = None if repository is None else hub.commit(repository, asked.get(name))
        if sha is not None:
            found[name] = sha
    return found


def _cached_commit(task: Any) -> str | None:
    splits = getattr(task, "dataset", None)
    return hub.loaded_commit(next(iter(splits.values()))) if splits else None


def _check_cached(name: str, task: Any, revision: str) -> None:
    """What was read without the hub is what was asked for. Raises DataUnavailable."""
    found = _cached_commit(task)
    if found != revision:
        raise DataUnavailable(
            f"data set {stock.hub_name(name)} of task {name} at {revision}: the hub does not "
            f"answer, and its cache has {found or 'no commit that it tells'}"
        )
