"""results.jsonl: what every trial of a sweep came to, a line a trial, only ever added to.

A line is found by `key`, the hash of the trial's spec. Lines are written whole, under a lock, so
that several sweeps may share a folder; a line that a killed process left half written is ignored,
and the next one starts on a line of its own.
"""

import fcntl
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from glactl.console import finite
from glactl.sweep.grid import Trial

ERRORS = ("diverged", "failed")
LATER = {"slices": None, "curve": None, "pruned": None}  # what older lines lack
Curve = tuple[tuple[int, float], ...]  # (step, accuracy)
Ended = Literal["done", "pruned", "diverged", "failed"]
Status = Literal["done", "pruned", "diverged", "failed", "skipped", "missing"]


@dataclass(frozen=True)
class Result:
    """How a trial ended.

    status: done; pruned (see prune.py), with the reason; diverged (the loss was not finite)
    or failed (another error), with the error's line. accuracy and loss (nats a target) are of the
    last validation, steps those taken, seconds those of computing; accuracy and loss are None where
    it was never validated. slices: of a mixture, the accuracy of each length and number of pairs,
    by "L/n". curve: the accuracy of every validation.
    """

    key: str
    status: Ended
    accuracy: float | None
    loss: float | None
    steps: int
    seconds: float
    error: str | None = None
    slices: dict[str, float] | None = None
    curve: Curve | None = None
    pruned: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What there is to say about a trial of a sweep; `result` is None where it did not run.

    status: the result's, or skipped (another rate of its cell is good enough) or missing.
    """

    trial: Trial
    status: Status
    result: Result | None = None
    cached: bool = False  # it had ended before this sweep began

    @property
    def passed(self) -> bool:
        """Whether the trial passed its goal."""
        return passed(self.trial, self.result)


class Results:
    """The file at `path`, which need not exist yet.

    Attributes:
        lines: key -> the line, from 0, of the result that `load` found last.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[str, int] = {}

    def load(self) -> dict[str, Result]:
        """Key -> result, as the file stands now.

        Of several lines with one key the last counts, but an error never hides a trial that is
        done.
        """
        found: dict[str, Result] = {}
        if not self.path.exists():
            return found
        for i, line in enumerate(self.path.read_bytes().split(b"\n")):
            result = _parsed(line)
            if result is None:
                continue
            before = found.get(result.key)
            if result.status == "done" or before is None or before.status != "done":
                found[result.key], self.lines[result.key] = result, i
        return found

    def add(self, result: Result, details: dict[str, Any]) -> None:
        """Append `result`, with `details` for people to read, and flush it to the disk."""
        record = json.dumps(finite(asdict(result) | details), allow_nan=False)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab+") as f:
            fcntl.flock(f, fcntl.LOCK_EX)  # until the file is closed
            torn = False
            if f.seek(0, os.SEEK_END):
                f.seek(-1, os.SEEK_END)
                torn = f.read(1) != b"\n"
            f.write(b"\n" * torn + record.encode() + b"\n")
            f.flush()
            os.fsync(f.fileno())


def passed(trial: Trial, result: Result | None) -> bool:
    """Whether the trial ended above its train.stop_accuracy."""
    goal = trial.spec.train.stop_accuracy
    if goal is None or result is None or result.status != "done" or result.accuracy is None:
        return False
    return result.accuracy > goal


def pending(
    cell: list[Trial], known: dict[str, Result], retry_failed: bool = False, prune: bool = False
) -> list[Trial]:
    """The trials of a cell that are still to run: none once one has passed.

    Those that ended in an error only with retry_failed; those that were pruned unless `prune`.
    """
    if any(passed(t, known.get(t.key)) for t in cell):
        return []
    again = (*(ERRORS if retry_failed else ()), *(() if prune else ("pruned",)))
    return [t for t in cell if t.key not in known or known[t.key].status in again]


def _parsed(line: bytes) -> Result | None:
    """The result in a line; None for a line that is none, such as half of one."""
    try:
        record = json.loads(line)
        record = LATER | record
        if record["curve"] is not None:
            record["curve"] = tuple((int(step), float(x)) for step, x in record["curve"])
        result = Result(**{field.name: record[field.name] for field in fields(Result)})
    except (ValueError, KeyError, TypeError):
        return None
    has_number = isinstance(result.accuracy, (int, float))
    return result if has_number or result.status in ERRORS else None
