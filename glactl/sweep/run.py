"""Running the trials of a sweep, one after another, in one process.

The order is dims, mixers, seeds, learning rates. The rates of a cell (dim, mixer, seed) are tried
as they are listed; once one passes train.stop_accuracy the others are skipped: a cell that is
solved has nothing left to find. What has ended is in results.jsonl under the hash of its spec, and
what was stopped is in `.progress` (see trial.py), so the same command goes on where it was and
computes nothing twice. Several processes may share a folder: each claims a trial before it runs it,
and takes cells first that no other is at; see claims.py.
"""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace

import torch

from glactl import console
from glactl.sweep.claims import Claims
from glactl.sweep.estimate import STEPS, Clock
from glactl.sweep.grid import Grid, Trial
from glactl.sweep.outcome import details, result_of, sentence, standing
from glactl.sweep.prune import Prune
from glactl.sweep.results import ERRORS, Ended, Outcome, Result, Results, pending
from glactl.sweep.stop import Stop
from glactl.sweep.trial import Kept, Record, run_trial
from glactl.tasks.mqar import MQARTask
from glactl.train.loop import Stopped

POLL = 1.0  # seconds between two looks at what other sweeps run


class SweepStopped(Exception):
    """A signal or the deadline ended the sweep; what is finished is kept, and what was begun."""

    exit_code = 6


class Sweep:
    """What there is to run, and what one process does of it.

    Args:
        grid: the sweep.
        results: read again before each trial: another sweep may have run it meanwhile.
        device: where.
        again: key -> line of the errors that are to be run again as long as they stand.
        prune: when a rate is given up; None: never.
        stop: asked between blocks of steps and between trials.
        quiet: no progress.
        tell: hears of every block of steps.
    """

    def __init__(
        self,
        grid: Grid,
        results: Results,
        device: torch.device,
        *,
        again: dict[str, int] | None = None,
        prune: Prune | None = None,
        stop: Stop | None = None,
        quiet: bool = False,
        tell: Callable[[Trial, Record], None] | None = None,
    ) -> None:
        self.grid, self.results, self.device, self.quiet = grid, results, device, quiet
        self.prune, self.stop, self.tell = prune, stop or Stop(), tell
        self.claims = Claims(results.path.parent)
        self.clock, self._data = Clock(), _Data()
        self.goes_on = (
            f"what has ended is kept in {results.path}: the same command goes on from there"
        )
        self._again = again or {}
        self._shown: set[str] = set()
        self._given_up: str | None = None  # why the trial at hand is, once it is

    def run(self) -> Iterator[Outcome]:
        """Run what waits; what other sweeps run is waited for.

        Yields:
            Outcome, one a trial, in the grid's order but for what other sweeps were at.

        Raises:
            SweepStopped: `stop` said so, or Ctrl-C came between trials.
        """
        todo, eager = list(self.grid.cells), False
        try:
            while todo:
                shown = 0
                for cell in todo:
                    for outcome in self.visit(cell, eager):
                        shown += 1
                        yield outcome
                todo = [cell for cell in todo if not self.done(cell)]
                if todo and eager and not shown:
                    self._check()
                    time.sleep(POLL)  # all that is left runs in other sweeps
                eager = not shown
        except KeyboardInterrupt:
            raise SweepStopped(f"stopped; {self.goes_on}") from None

    def waits(self, cell: list[Trial], known: dict[str, Result] | None = None) -> list[Trial]:
        """The trials of the cell that are still to run, by whomever."""
        found = self.results.load() if known is None else known
        lines = self.results.lines
        counted = {k: r for k, r in found.items() if self._again.get(k) != lines[k]}
        waiting = pending(cell, counted, prune=self.prune is not None)
        return [t for t in waiting if t.key not in self._shown]

    def ahead(self) -> list[Trial]:
        """All trials that are still to run."""
        known = self.results.load()
        return [t for cell in self.grid.cells for t in self.waits(cell, known)]

    def done(self, cell: list[Trial]) -> bool:
        """Whether every trial of the cell has its outcome."""
        return all(t.key in self._shown for t in cell)

    def standing(self, cell: list[Trial]) -> Iterator[Outcome]:
        """The outcomes of a cell of which nothing is run."""
        known = self.results.load()
        for trial in cell:
            waits = trial in self.waits(cell, known)
            yield standing(trial, known.get(trial.key), "missing" if waits else "skipped")

    def visit(self, cell: list[Trial], eager: bool) -> Iterator[Outcome]:
        """Run what waits in the cell, in order; trials that had ended have their turn too.

        At one that another sweep runs the rest of the cell is left for later, as it may solve it;
        an eager visit goes on with the next.
        """
        for trial, pause in self._turns(cell):
            if trial.key in self._shown:
                continue
            result = None
            if trial in self.waits(cell):
                self._check()
                with self.claims.hold(trial.key) as mine:
                    if not mine:
                        if eager:
                            continue
                        return
                    if trial in self.waits(cell):  # nobody was faster
                        result = self._run(trial, cell, pause)
                        if result is None:
                            continue  # it pauses
            elif pause is not None:
                continue  # its turn is still to come
            self._shown.add(trial.key)
            if result is None:
                yield standing(trial, self.results.load().get(trial.key), "skipped")
            else:
                self.clock.add(trial, result.seconds)
                if not self.quiet:
                    console.note(sentence(trial, result) + self._left())
                yield Outcome(trial, result.status, result)

    def estimate(self) -> None:
        """Say what is ahead, before it begins."""
        ahead = self.ahead()
        if self.quiet or not ahead:
            return
        self.clock.measure(ahead, self.device)
        seconds = self.clock.seconds(ahead)
        if seconds is not None:
            console.note(
                f"estimate, from {STEPS} steps of each mixer and width: at most about "
                f"{console.clock(seconds)}, if no trial ends early"
            )

    def _turns(self, cell: list[Trial]) -> Iterator[tuple[Trial, int | None]]:
        """Trials in the order of their turns, and the step where a turn ends."""
        if self.prune is None:
            yield from ((trial, None) for trial in cell)
            return
        for trial in cell:
            rung = self.prune.rung(trial.spec)
            if self._kept(trial).read().step < rung:
                yield trial, rung
        at = {t.key: self._curve(t) for t in cell}
        yield from (
            (trial, None)
            for trial in sorted(cell, key=lambda t: -max((a for _, a in at[t.key]), default=0.0))
        )

    def _check(self) -> None:
        """Raises SweepStopped where it is time."""
        if self.stop():
            why = "the time is over" if self.stop.late else "stopped"
            raise SweepStopped(f"{why}; {self.goes_on}")

    def _kept(self, trial: Trial) -> Kept:
        return Kept.of(self.results.path.parent, trial.key)

    def _curve(self, trial: Trial) -> tuple[tuple[int, float], ...]:
        result = self.results.load().get(trial.key)
        return (result and result.curve) or self._kept(trial).read().curve

    def _behind(self, trial: Trial, cell: list[Trial], record: Record) -> str | None:
        """Why the trial is given up now; None: it is not."""
        if self.prune is None or record.done:
            return None
        others = {t.lr: self._curve(t) for t in cell if t.key != trial.key}
        return self.prune.reason(trial.spec, record.curve, others)

    def _run(self, trial: Trial, cell: list[Trial], pause: int | None) -> Result | None:
        """The trial's result, also in the file; None where it pauses. Raises SweepStopped."""
        kept = self._kept(trial)
        record, error = kept.read(), None
        status: Ended = "done"
        self._given_up = self._behind(trial, cell, record)
        try:
            if self._given_up is None:
                for now in self._records(trial, kept, pause):
                    record = now
                    if record.curve and record.curve[-1][0] == record.step:
                        self._given_up = self._behind(trial, cell, record)
        except Stopped as stop:
            if self._given_up is None:
                raise SweepStopped(
                    f"stopped inside {trial.label} ({stop}), its state kept; {self.goes_on}"
                ) from None
        except BrokenPipeError:  # nobody reads the progress any more
            raise
        except Exception as caught:
            status = "diverged" if isinstance(caught, FloatingPointError) else "failed"
            error = " ".join(f"{type(caught).__name__}: {caught}".split())[:300]
        finally:
            if self.device.type == "cuda":
                gc.collect()
                with suppress(RuntimeError):  # where the device is lost this fails too
                    torch.cuda.empty_cache()
        if self._given_up is not None:
            status = "pruned"
        elif error is None and not record.done:
            return None
        result = replace(result_of(trial, status, record), error=error, pruned=self._given_up)
        self.results.add(result, details(trial, self._data.fingerprint, self.device, record))
        if status != "failed":
            kept.drop()
        return result

    def _records(self, trial: Trial, kept: Kept, pause: int | None) -> Iterator[Record]:
        """What comes of the trial. Raises Stopped, also once it is given up."""
        task, steps, begun = self._data.task(trial), trial.spec.train.steps, kept.read().step
        if self.tell is not None:
            self.tell(trial, Record(begun))
        with (
            self.stop.listening(),
            console.progress(steps, trial.label, done=begun, quiet=self.quiet) as advance,
        ):
            for record in run_trial(
                trial.spec,
                device=self.device,
                task=task,
                kept=kept,
                stop=lambda: self._given_up is not None or self.stop(),
                pause=pause,
            ):
                shown = {"accuracy": record.curve[-1][1]} if record.curve else {}
                advance(max(record.step - begun, 0), loss=record.loss, **shown)
                begun = max(record.step, begun)
                if self.tell is not None:
                    self.tell(trial, record)
                yield record

    def _left(self) -> str:
        ahead = self.ahead()
        seconds = self.clock.seconds(ahead)
        if not ahead or seconds is None:
            return ""
        return f"; {len(ahead)} or fewer to go, about {console.clock(seconds)}"


def run_sweep(
    grid: Grid,
    results: Results,
    device: torch.device,
    retry_failed: bool = False,
    plot_only: bool = False,
    quiet: bool = False,
    prune: Prune | None = None,
    stop: Stop | None = None,
) -> Iterator[Outcome]:
    """Run what `results` lacks, adding to it; see `Sweep`.

    Args:
        retry_failed: run trials again whose result is an error.
        plot_only: run nothing.
    """
    again = standing_errors(results) if retry_failed else {}
    sweep = Sweep(grid, results, device, again=again, prune=prune, stop=stop, quiet=quiet)
    if plot_only:
        for cell in grid.cells:
            yield from sweep.standing(cell)
        return
    sweep.estimate()
    yield from sweep.run()


def standing_errors(results: Results) -> dict[str, int]:
    """The lines of errors that stand now: one that comes later is a retry that failed."""
    return {k: results.lines[k] for k, r in results.load().items() if r.status in ERRORS}


class _Data:
    """The task of the latest trial, kept while the next one has the same data."""

    def __init__(self) -> None:
        self._of: object = None
        self._task: MQARTask | None = None

    def task(self, trial: Trial) -> MQARTask:
        of = (trial.data, trial.spec.seed)
        if self._task is None or self._of != of:
            self._task = None
            self._task, self._of = MQARTask(*of), of
        return self._task

    @property
    def fingerprint(self) -> str | None:
        return None if self._task is None else self._task.fingerprint
