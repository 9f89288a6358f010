"""One trial of a sweep: steps in blocks, validations, the goal, and a state to go on from.

A trial is a function of its spec, however often it was stopped: what is kept is the state after a
step, and all that is random in a step follows from (seed, step). Where it has a folder, two files
are kept there until it has ended:

    KEY.pt      the weights, the optimizer and the step that they are of
    KEY.json    what has come of it so far (a `Record`), for the sweep and for people

each written whole or not at all, every SAVE_EVERY seconds, when the trial is stopped and where it
pauses. A process that is killed loses the steps since.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from glactl.spec import RunSpec, with_vocab
from glactl.sweep.stop import never
from glactl.sweep.trial_steps import BLOCK, TrialSteps
from glactl.tasks.mqar import MQARTask
from glactl.train.loop import MAX_SKIPPED, Stopped, validate

SAVE_EVERY = 60.0  # seconds


@dataclass(frozen=True)
class Record:
    """What has come of a trial so far.

    step: those taken. seconds: of computing, over all runs. loss: of the latest step, nats a
    target. curve: (step, accuracy) of each validation. valid: the numbers of the latest one. skips:
    steps in a row, the latest among them, that were not finite. done: the trial has ended.
    captured: its steps are a CUDA graph.
    """

    step: int = 0
    seconds: float = 0.0
    loss: float = math.nan
    curve: tuple[tuple[int, float], ...] = ()
    valid: dict[str, float] = field(default_factory=dict)
    skips: int = 0
    done: bool = False
    captured: bool = False


class Kept:
    """The files of the trial with this key in `folder`, which need not exist."""

    def __init__(self, folder: Path, key: str) -> None:
        self.state, self.record = folder / f"{key}.pt", folder / f"{key}.json"

    @classmethod
    def of(cls, sweep: Path, key: str) -> "Kept":
        """Those in the folder of a sweep."""
        return cls(sweep / ".progress", key)

    def read(self) -> Record:
        """What has come of the trial so far; an empty record where nothing is kept."""
        try:
            found = json.loads(self.record.read_text())
            curve = tuple((int(step), float(accuracy)) for step, accuracy in found["curve"])
            return Record(**found | {"curve": curve})
        except (OSError, ValueError, KeyError, TypeError):
            return Record()

    def load(self, device: torch.device) -> tuple[dict[str, Any], Record] | None:
        """The state and the record of its step; None where there is none that can be read."""
        try:
            kept = torch.load(self.state, map_location=device, weights_only=True)
            record = Record(**kept["record"])
        except (OSError, RuntimeError, KeyError, TypeError, EOFError, UnpicklingError):
            return None
        return kept["steps"], record

    def save(self, steps: TrialSteps, record: Record) -> None:
        """Keep both."""
        kept = {"steps": steps.state(), "record": asdict(record)}
        _replaced(self.state, lambda path: torch.save(kept, path))
        self.note(record)

    def note(self, record: Record) -> None:
        """Keep the record alone, which may then be ahead of the state."""
        text = json.dumps(asdict(record))
        _replaced(self.record, lambda path: path.write_text(text))

    def drop(self) -> None:
        """Keep nothing; and no folder once it is empty."""
        for path in (self.state, self.record):
            path.unlink(missing_ok=True)
        try:
            self.state.parent.rmdir()
        except OSError:  # others are in it, or it never was
            return


def run_trial(
    spec: RunSpec,
    *,
    device: torch.device | str,
    task: MQARTask,
    kept: Kept | None = None,
    stop: Callable[[], bool] = never,
    pause: int | None = None,
) -> Iterator[Record]:
    """Train the model of `spec` on recall, to train.stop_accuracy or to the end.

    Args:
        spec: what to do; without `init`.
        device: where.
        task: its data.
        kept: files to go on from and to keep the state in; they are left when the trial ends.
        stop: asked between blocks of steps; True ends the trial, with its state kept.
        pause: a step after which it is left, with its state kept, unless it has ended.

    Yields:
        Record, after each block of at most BLOCK steps; the last one is done, or at `pause`.

    Raises:
        Stopped: `stop` said so.
        FloatingPointError: MAX_SKIPPED steps in a row had a loss or gradient that is not finite.
    """
    where = torch.device(device)
    spec = with_vocab(spec, task.vocab_size)
    steps, record = TrialSteps(spec, task, where), Record()
    found = None if kept is None else kept.load(where)
    if found is not None:
        steps.load(found[0])
        record = found[1]
    clock, saved = _Clock(record.seconds), time.monotonic()
    end = spec.train.steps if pause is None else min(pause, spec.train.steps)
    while not record.done and record.step < end:
        if stop():
            if kept is not None:
                kept.save(steps, record)
            raise Stopped(record.step, None)
        record = replace(_block(spec, steps, record, end), seconds=clock.now())
        if kept is not None and record.curve and record.curve[-1][0] == record.step:
            kept.note(record)
        if kept is not None and time.monotonic() - saved > SAVE_EVERY:
            kept.save(steps, record)
            saved = time.monotonic()
        if kept is not None and record.step == end and not record.done:
            kept.save(steps, record)
        yield record


def _block(spec: RunSpec, steps: TrialSteps, record: Record, end: int) -> Record:
    """The next steps, and the validation that is due after them; seconds are left as they are."""
    plan, first = spec.train, record.step
    due = first - first % plan.valid_every + plan.valid_every
    most = BLOCK if steps.device.type == "cuda" else 1  # a GPU is looked at once in a while
    losses, norms = steps.take(min(most, due - first, end - first))
    skips = record.skips
    for i, (loss, norm) in enumerate(zip(losses, norms, strict=True), 1):
        skips = 0 if math.isfinite(loss) and math.isfinite(norm) else skips + 1
        if skips == MAX_SKIPPED:
            raise FloatingPointError(
                f"the loss or its gradient was not finite in {skips} steps in a row, the last of "
                f"them step {first + i} (loss {loss}, gradient norm {norm}); a lower optim.lr helps"
            )
    step = first + len(losses)
    record = replace(record, step=step, loss=losses[-1], skips=skips, captured=steps.captured)
    record = replace(record, done=step == plan.steps)
    if not record.done and step != due:
        return record
    rows = spec.rows // spec.parts
    valid = validate(steps.model, steps.task, rows, steps.device, precision=plan.precision)
    assert valid is not None  # no signal is listened to within
    passed = plan.stop_accuracy is not None and valid["accuracy"] > plan.stop_accuracy
    curve = (*record.curve, (step, valid["accuracy"]))
    return replace(record, curve=curve, valid=valid, done=record.done or passed)


class _Clock:
    """Seconds of this run and of those before."""

    def __init__(self, before: float) -> None:
        self._start = time.monotonic() - before

    def now(self) -> float:
        return time.monotonic() - self._start


def _replaced(path: Path, make: Callable[[Path], object]) -> None:
    """Put what `make` writes at `path`, on the disk and at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.getpid()}.{path.name}")
    make(part)
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    part.replace(path)
