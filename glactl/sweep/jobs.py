"""Several trials at once: processes that share a sweep's folder, and one that looks after them.

Each worker is a sweep of its own (run.py) on one device, with a CUDA context and graphs of
its own; claims keep them apart, so nothing here hands out work. Kernels of different processes take
turns on a GPU, and what one leaves idle another fills; NVIDIA's MPS, a service of the machine that
lets them run side by side, is not needed and not started.

A worker tells of its trials through a pipe of its own, which no other's death can block. One that
dies inside a trial is replaced, and the trial taken up from its state; a trial that has killed
DEATHS workers has failed. After an error on a GPU the worker ends too, for an error there may leave
the context useless. Workers stop, with states kept, at a signal, at the deadline, and when the
process that began them is gone.
"""

import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from glactl import console
from glactl.sweep.grid import Grid, Trial
from glactl.sweep.outcome import details, result_of, sentence
from glactl.sweep.prune import Prune
from glactl.sweep.results import Outcome, Result, Results
from glactl.sweep.run import Sweep, SweepStopped
from glactl.sweep.stop import Stop
from glactl.sweep.trial import Kept, Record

PER_GPU = 1  # two at once, H100, d 128, 512 tokens: 0.94 times the steps a second of one
DEATHS = 2
AGAIN = 20  # exit code of a worker that wants to be replaced
TELL_EVERY = 1.0  # seconds between two words of a worker about its trial
COLUMNS = ["mixer", "dim", "lr", "seed", "device", "steps", "loss", "accuracy"]
CONTEXT = multiprocessing.get_context("spawn")  # a CUDA context does not survive a fork


@dataclass(frozen=True)
class Orders:
    """What a worker is told: see `Sweep`; threads: of the CPU, for each; parent: this process."""

    grid: Grid
    path: Path
    again: dict[str, int]
    prune: Prune | None
    until: float | None
    threads: int
    parent: int


@dataclass
class _Worker:
    device: str
    process: Any
    pipe: Connection
    key: str | None = None  # of the trial that it is in
    record: Record = Record()  # noqa: RUF009 (frozen)


def devices_of(device: torch.device) -> list[str]:
    """The devices that workers are spread over: every GPU where none has been named."""
    if device.type == "cuda" and device.index is None:
        return [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return [str(device)]


def default_jobs(device: torch.device) -> int:
    """Workers where --jobs does not say: one process on a CPU, PER_GPU for each GPU."""
    return PER_GPU * len(devices_of(device)) if device.type == "cuda" else 1


class Jobs:
    """A sweep by `count` workers; arguments as of `Sweep`."""

    def __init__(
        self,
        grid: Grid,
        results: Results,
        device: torch.device,
        count: int,
        *,
        again: dict[str, int] | None = None,
        prune: Prune | None = None,
        stop: Stop | None = None,
        quiet: bool = False,
    ) -> None:
        self.stop, self.quiet = stop or Stop(), quiet
        self.results, self.device, self.count = results, device, count
        self._all = Sweep(grid, results, device, again=again, prune=prune, quiet=True)
        threads = max(1, torch.get_num_threads() // count)
        until, parent = self.stop.until, os.getpid()
        self._orders = Orders(grid, results.path, again or {}, prune, until, threads, parent)
        self._trials = {trial.key: trial for trial in grid.trials}
        self._deaths: Counter[str | None] = Counter()
        self._workers: list[_Worker] = []
        self._view = _View(self._all.ahead())

    def run(self) -> Iterator[Outcome]:
        """Run what waits.

        Yields:
            Outcome: of trials as they end, then of those that had ended or were not needed.

        Raises:
            SweepStopped: a signal or the deadline.
            RuntimeError: workers end before any trial begins.
        """
        seen: set[str] = set()
        count = min(self.count, len(self._all.ahead()))
        names = devices_of(self.device)
        with self.stop.listening(), console.live(COLUMNS, self.quiet) as show:
            try:
                self._workers = [self._start(names[i % len(names)]) for i in range(count)]
                for outcome in self._look(show):
                    seen.add(outcome.trial.key)
                    yield outcome
            finally:
                self._end()
        if self.stop() and self._all.ahead():
            why = "the time is over" if self.stop.late else "stopped"
            raise SweepStopped(f"{why}, states of what ran are kept; {self._all.goes_on}")
        for cell in self._all.grid.cells:
            yield from (o for o in self._all.standing(cell) if o.trial.key not in seen)

    def _start(self, device: str) -> _Worker:
        here, there = CONTEXT.Pipe(duplex=False)
        arguments = (self._orders, device, there)
        process = CONTEXT.Process(target=work, args=arguments, daemon=True)
        process.start()
        there.close()
        return _Worker(device, process, here)

    def _look(self, show: Callable[..., None]) -> Iterator[Outcome]:
        """Hear the workers until all have ended."""
        told = False
        while self._workers:
            pipes = {w.pipe: w for w in self._workers}
            wait(list(pipes), timeout=TELL_EVERY)
            if self.stop.signalled and not told:
                told = True
                for worker in self._workers:
                    worker.process.terminate()  # SIGTERM: it saves and ends
            for worker in list(self._workers):
                yield from self._hear(worker)
            if not self.quiet:
                show(*self._view(self._trials, self._workers, self._all.ahead()))

    def _hear(self, worker: _Worker) -> Iterator[Outcome]:
        """What a worker has said since; and its end."""
        try:
            while worker.pipe.poll():
                key, said = worker.pipe.recv()
                if isinstance(said, Record):
                    worker.key, worker.record = key, said
                    continue
                worker.key, worker.record = None, Record()
                yield self._ended(self._trials[key], said)
        except EOFError:
            self._workers.remove(worker)
            worker.process.join()
            yield from self._after(worker, worker.process.exitcode)

    def _ended(self, trial: Trial, result: Result) -> Outcome:
        if not self.quiet:
            console.note(sentence(trial, result))
        return Outcome(trial, result.status, result)

    def _after(self, worker: _Worker, code: int | None) -> Iterator[Outcome]:
        """Replace a worker that ended before its work did."""
        if code in (0, SweepStopped.exit_code) or self.stop():
            return
        if code != AGAIN:
            self._deaths[worker.key] += 1
            if self._deaths[worker.key] == DEATHS:
                said = f"the process ended with {_by(code)}, {DEATHS} times"
                if worker.key is None:
                    raise RuntimeError(f"a worker of the sweep: {said}, before any trial")
                yield self._failed(self._trials[worker.key], said)
        if self._all.ahead():
            self._workers.append(self._start(worker.device))

    def _failed(self, trial: Trial, error: str) -> Outcome:
        record = Kept.of(self.results.path.parent, trial.key).read()
        result = replace(result_of(trial, "failed", record), error=error)
        about = details(trial, None, torch.device("cpu"), record)  # no context on a GPU for this
        self.results.add(result, about | {"device": str(self.device), "threads": None})
        return self._ended(trial, result)

    def _end(self) -> None:
        """Leave no worker behind."""
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join()


def work(orders: Orders, device: str, pipe: Connection) -> None:
    """The life of a worker; ends the process."""
    torch.set_num_threads(orders.threads)
    where, last, at = torch.device(device), 0.0, ""
    if where.type == "cuda":
        torch.cuda.set_device(where)

    def tell(trial: Trial, record: Record) -> None:
        nonlocal last, at
        if trial.key != at or time.monotonic() - last > TELL_EVERY:
            last, at = time.monotonic(), trial.key
            pipe.send((trial.key, record))

    sweep = Sweep(
        orders.grid, Results(orders.path), where, again=orders.again, prune=orders.prune,
        stop=Stop(orders.until, orders.parent), quiet=True, tell=tell,
    )  # fmt: skip
    try:
        for outcome in sweep.run():
            if not outcome.cached:
                pipe.send((outcome.trial.key, outcome.result))
                if outcome.status == "failed" and where.type == "cuda":
                    sys.exit(AGAIN)
    except (SweepStopped, KeyboardInterrupt, BrokenPipeError):
        sys.exit(SweepStopped.exit_code)


class _View:
    """Rows of COLUMNS, one a worker that is in a trial, and a line of all with the time left."""

    def __init__(self, ahead: list[Trial]) -> None:
        self._start = time.monotonic()
        self._work = sum(trial.work for trial in ahead)

    def __call__(
        self, trials: dict[str, Trial], workers: list[_Worker], ahead: list[Trial]
    ) -> tuple[list[list[object]], str]:
        left, rows = sum(trial.work for trial in ahead), []
        for worker in workers:
            if worker.key is None:
                continue
            trial, record = trials[worker.key], worker.record
            share = record.step / trial.spec.train.steps
            left -= trial.work * share
            seen = record.curve[-1][1] if record.curve else None
            where = [trial.mixer, trial.dim, trial.lr, trial.seed, worker.device]
            rows.append([*where, f"{share:.0%}", record.loss, seen])
        done = self._work - left
        eta = console.clock((time.monotonic() - self._start) * left / done) if done > 0 else "-"
        parts = (f"{r[0]} d {r[1]} lr {r[2]:g} {r[5]} {_shown(r[7])}".strip() for r in rows)
        return rows, f"{len(ahead)} to go, eta at most {eta}; {'; '.join(parts)}".rstrip("; ")


def _shown(accuracy: Any) -> str:
    return "" if accuracy is None else f"{accuracy:.3f}"


def _by(code: int | None) -> str:
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
