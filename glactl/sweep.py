"""`glactl mqar`: recall over widths, mixers and learning rates.

Trials run one after another, in the order dims, mixers, seeds, learning rates. The rates of a cell
(dim, mixer, seed) are tried as they are listed; once one passes train.stop_accuracy the others are
skipped: a cell that is solved has nothing left to find. What has run is in results.jsonl under the
hash of its spec, so the same command goes on where it was stopped and computes nothing twice.
Several sweeps may share a folder: each claims a trial before it runs it, and takes cells first that
no other is at; see sweep_claims.py.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from glactl import __version__, console
from glactl.device import pick_device
from glactl.slices import of_slices
from glactl.sweep_claims import Claims
from glactl.sweep_estimate import STEPS, Clock
from glactl.sweep_grid import Grid, Trial, make_grid
from glactl.sweep_report import print_table, write
from glactl.sweep_results import ERRORS, Ended, Outcome, Result, Results, Status, pending
from glactl.sweep_rows import edge_warnings, summarise
from glactl.tasks import Task, load_task
from glactl.train import Stopped, train

POLL = 1.0  # seconds between two looks at what other sweeps run


class SweepStopped(Exception):
    """A signal ended the sweep; what is finished is kept."""

    exit_code = 6


class SweepFailed(Exception):
    """A cell of the sweep has errors and no trial that ended."""

    exit_code = 1


def mqar_command(
    *,
    preset: str | None = None,
    dims: str | None = None,
    mixers: str | None = None,
    lrs: str | None = None,
    seeds: str | None = None,
    pairs: int | None = None,
    seqlen: int | None = None,
    form: str | None = None,
    out: Path | None = None,
    device: str | None = None,
    retry_failed: bool = False,
    plot_only: bool = False,
    json: bool = False,
    quiet: bool = False,
) -> None:
    """Run `glactl mqar`; the arguments are the command's options.

    Raises:
        ValueError: an option, or a spec that the options make; before any trial starts.
        SweepStopped: a signal came.
        SweepFailed: a cell has nothing but errors.
    """
    grid = make_grid(
        preset,
        dims=dims,
        mixers=mixers,
        lrs=lrs,
        seeds=seeds,
        pairs=pairs,
        seqlen=seqlen,
        form=form,
    )
    where = pick_device(device)
    folder = out if out is not None else Path("sweeps") / grid.preset
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file; allowed: a folder, or a new name")
    results = Results(folder / "results.jsonl")
    known = results.load()
    left = sum(len(pending(cell, known, retry_failed)) for cell in grid.cells)
    console.note(
        f"preset {grid.preset}: {len(grid.trials)} trials = {len(grid.dims)} dims x "
        f"{len(grid.mixers)} mixers x {len(grid.seeds)} seeds x {len(grid.lrs)} rates; "
        f"at most {left} to run on {where}; results in {folder}; Ctrl-C stops, the same command "
        "goes on"
    )
    outcomes = []
    for outcome in run_sweep(grid, results, where, retry_failed, plot_only, quiet):
        outcomes.append(outcome)
        if json:
            console.result({"event": "trial", **_plain(outcome)})
    order = {trial.key: i for i, trial in enumerate(grid.trials)}
    outcomes.sort(key=lambda outcome: order[outcome.trial.key])
    rows = summarise(outcomes)
    files = write(folder, grid, rows)
    if json:
        for row in rows:
            console.result({"event": "best", **asdict(row)})
        console.result({"event": "end", "path": str(folder)})
    else:
        print_table(rows)
    for line in edge_warnings(rows, grid.lrs):
        console.note(f"warning: {line}")
    for o in outcomes:
        if o.result is not None and o.result.error is not None:
            console.note(f"{o.status}: {o.trial.label}: {o.result.error}")
    console.note(f"wrote {folder}: {', '.join(files)}")
    broken = [f"{row.mixer} d {row.dim}" for row in rows if row.status == "failed"]
    if broken:
        raise SweepFailed(
            f"no trial of {', '.join(broken)} ended; --retry-failed runs those with errors again"
        )


def run_sweep(
    grid: Grid,
    results: Results,
    device: torch.device,
    retry_failed: bool = False,
    plot_only: bool = False,
    quiet: bool = False,
) -> Iterator[Outcome]:
    """Run what `results` lacks, adding to it.

    Args:
        grid: the sweep.
        results: read again before each trial: another sweep may have run it meanwhile. What others
            run is waited for.
        device: where.
        retry_failed: run trials again whose result is an error.
        plot_only: run nothing.
        quiet: no progress.

    Yields:
        Outcome, one a trial, in the grid's order but for what other sweeps were at.

    Raises:
        SweepStopped: SIGINT or SIGTERM.
    """
    sweep = _Sweep(grid, results, device, retry_failed, quiet)
    todo = list(grid.cells)
    try:
        if plot_only:
            for cell in todo:
                yield from sweep.standing(cell)
            return
        sweep.estimate()
        eager = False
        while todo:
            shown = 0
            for cell in todo:
                for outcome in sweep.visit(cell, eager):
                    shown += 1
                    yield outcome
            todo = [cell for cell in todo if not sweep.done(cell)]
            if todo and eager and not shown:
                time.sleep(POLL)  # all that is left runs in other sweeps
            eager = not shown
    except KeyboardInterrupt:
        raise SweepStopped(f"stopped; {sweep.goes_on}") from None


class _Sweep:
    """What run_sweep knows between one trial and the next."""

    def __init__(
        self, grid: Grid, results: Results, device: torch.device, retry_failed: bool, quiet: bool
    ) -> None:
        self.grid, self.results, self.device, self.quiet = grid, results, device, quiet
        self.claims = Claims(results.path.parent)
        self.data, self.clock = _Data(), Clock()
        self.goes_on = (
            f"what has ended is kept in {results.path}: the same command goes on from there"
        )
        # an error that stands now is retried; one that comes meanwhile is another sweep's retry
        before = results.load().items()
        self._again = {k: r for k, r in before if retry_failed and r.status in ERRORS}
        self._shown: set[str] = set()

    def waits(self, cell: list[Trial], known: dict[str, Result]) -> list[Trial]:
        """The trials of the cell that are still to run, by whomever."""
        counted = {k: r for k, r in known.items() if self._again.get(k) != r}
        return [t for t in pending(cell, counted) if t.key not in self._shown]

    def done(self, cell: list[Trial]) -> bool:
        """Whether every trial of the cell has its outcome."""
        return all(t.key in self._shown for t in cell)

    def standing(self, cell: list[Trial]) -> Iterator[Outcome]:
        """The outcomes of a cell of which nothing is run."""
        known = self.results.load()
        for trial in cell:
            waits = trial in self.waits(cell, known)
            yield _standing(trial, known.get(trial.key), "missing" if waits else "skipped")

    def visit(self, cell: list[Trial], eager: bool) -> Iterator[Outcome]:
        """Run what waits in the cell, in order; trials that had ended have their turn too.

        At one that another sweep runs the rest of the cell is left for later, as it may solve it;
        an eager visit goes on with the next.
        """
        for trial in cell:
            if trial.key in self._shown:
                continue
            result = None
            if trial in self.waits(cell, self.results.load()):
                with self.claims.hold(trial.key) as mine:
                    if not mine:
                        if eager:
                            continue
                        return
                    if trial in self.waits(cell, self.results.load()):  # nobody was faster
                        result = self._run(trial)
            self._shown.add(trial.key)
            if result is None:
                yield _standing(trial, self.results.load().get(trial.key), "skipped")
            else:
                self.clock.add(trial, result.seconds)
                if not self.quiet:
                    console.note(_sentence(trial, result) + self._left())
                yield Outcome(trial, result.status, result)

    def estimate(self) -> None:
        """Say what is ahead, before it begins."""
        ahead = self._ahead()
        if self.quiet or not ahead:
            return
        self.clock.measure(ahead, self.device)
        seconds = self.clock.seconds(ahead)
        if seconds is not None:
            console.note(
                f"estimate, from {STEPS} steps of each mixer and width: at most about "
                f"{console.clock(seconds)}, if no trial ends early"
            )

    def _run(self, trial: Trial) -> Result:
        try:
            result = _run(trial, self.data, self.device, self.quiet)
        except Stopped as stop:
            raise SweepStopped(f"stopped inside {trial.label} ({stop}); {self.goes_on}") from None
        self.results.add(result, _details(trial, self.data.fingerprint, self.device))
        return result

    def _ahead(self) -> list[Trial]:
        known = self.results.load()
        return [t for cell in self.grid.cells for t in self.waits(cell, known)]

    def _left(self) -> str:
        ahead = self._ahead()
        seconds = self.clock.seconds(ahead)
        if not ahead or seconds is None:
            return ""
        return f"; {len(ahead)} or fewer to go, about {console.clock(seconds)}"


def _standing(trial: Trial, before: Result | None, otherwise: Status) -> Outcome:
    return Outcome(trial, before.status if before else otherwise, before, cached=True)


class _Data:
    """The task of the latest trial, kept while the next one has the same data."""

    def __init__(self) -> None:
        self._of: object = None
        self._task: Task | None = None

    def task(self, trial: Trial) -> Task:
        of = (trial.spec.data, trial.spec.seed)
        if self._task is None or self._of != of:
            self._task = None
            self._task, self._of = load_task(*of), of
        return self._task

    @property
    def fingerprint(self) -> str | None:
        return None if self._task is None else self._task.fingerprint


def _run(trial: Trial, data: _Data, device: torch.device, quiet: bool) -> Result:
    """Train the model of the trial; an error becomes its result. Raises Stopped."""
    start, step, valid, error = time.monotonic(), 0, None, None
    status: Ended = "done"
    try:
        task = data.task(trial)
        with console.progress(trial.spec.train.steps, trial.label, quiet=quiet) as advance:
            for now in train(trial.spec, device=device, task=task, signals=True):
                step, valid = now.step, now.valid or valid
                shown = {"accuracy": valid["accuracy"]} if valid else {}
                advance(loss=now.loss, **shown)
    except (Stopped, BrokenPipeError):  # the latter: nobody reads the progress any more
        raise
    except Exception as caught:
        status = "diverged" if isinstance(caught, FloatingPointError) else "failed"
        error = " ".join(f"{type(caught).__name__}: {caught}".split())[:300]
    numbers = valid or {}
    seconds = round(time.monotonic() - start, 2)
    return Result(
        trial.key,
        status,
        numbers.get("accuracy"),
        numbers.get("loss"),
        step,
        seconds,
        error,
        of_slices(numbers) or None,
    )


def _details(trial: Trial, fingerprint: str | None, device: torch.device) -> dict[str, Any]:
    return {
        "mixer": trial.mixer,
        "dim": trial.dim,
        "lr": trial.lr,
        "seed": trial.seed,
        "params": trial.params,
        "state_bytes": trial.state_bytes,
        "device": str(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "fingerprint": fingerprint,
        "glactl": __version__,
        "torch": torch.__version__,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "spec": trial.spec.model_dump(mode="json"),
    }


def _sentence(trial: Trial, result: Result) -> str:
    if result.error is not None:
        return f"{trial.label}: {result.status} after step {result.steps}: {result.error}"
    took = f"{result.steps} steps, {result.seconds:.0f} s"
    return f"{trial.label}: accuracy {result.accuracy:.4f}, {took}"


def _plain(outcome: Outcome) -> dict[str, Any]:
    """The outcome as one JSON object."""
    t = outcome.trial
    where = {"mixer": t.mixer, "dim": t.dim, "lr": t.lr, "seed": t.seed}
    sizes = {"params": t.params, "state_bytes": t.state_bytes}
    found = asdict(outcome.result) if outcome.result else {"key": t.key}
    return {**where, **sizes, **found, "status": outcome.status, "cached": outcome.cached}
