"""`glactl mqar`: recall over widths, mixers and learning rates.

Trials run one after another, in the order dims, mixers, seeds, learning rates. The rates of a cell
(dim, mixer, seed) are tried as they are listed; once one passes train.stop_accuracy the others are
skipped: a cell that is solved has nothing left to find. What has run is in results.jsonl under the
hash of its spec, so the same command goes on where it was stopped and computes nothing twice.
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
from glactl.sweep_grid import Grid, Trial, make_grid
from glactl.sweep_report import edge_warnings, print_table, summarise, write
from glactl.sweep_results import Ended, Outcome, Result, Results, Status, pending
from glactl.tasks import Task, load_task
from glactl.train import Stopped, train


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
        preset, dims=dims, mixers=mixers, lrs=lrs, seeds=seeds, pairs=pairs, seqlen=seqlen
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
        results: read again before each trial: another sweep may have run it meanwhile.
        device: where.
        retry_failed: run trials again whose result is an error.
        plot_only: run nothing.
        quiet: no progress.

    Yields:
        Outcome, one a trial, in the grid's order.

    Raises:
        SweepStopped: SIGINT or SIGTERM.
    """
    data, clock = _Data(), _Clock()
    todo = grid.cells
    try:
        while todo:
            cell, *todo = todo
            for trial in cell:
                known = results.load()
                waits = pending(cell, known, retry_failed)
                before = known.get(trial.key)
                if trial not in waits or plot_only:
                    status: Status = "missing" if trial in waits else "skipped"
                    yield Outcome(trial, before.status if before else status, before, cached=True)
                    continue
                result = _run(trial, data, device, quiet)
                results.add(result, _details(trial, data.fingerprint, device))
                clock.add(trial, result.seconds)
                if not quiet:
                    console.note(_sentence(trial, result) + clock.left([cell, *todo], results))
                yield Outcome(trial, result.status, result)
    except (Stopped, KeyboardInterrupt) as stop:
        inside = f" inside {trial.label} ({stop})" if isinstance(stop, Stopped) else ""
        raise SweepStopped(
            f"stopped{inside}; what has ended is kept in {results.path}: the same command goes on "
            "from there"
        ) from None


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


class _Clock:
    """What the trials ahead take at most, at the rate of floating point operations so far."""

    def __init__(self) -> None:
        self._work = self._seconds = 0.0

    def add(self, trial: Trial, seconds: float) -> None:
        self._work += trial.work
        self._seconds += seconds

    def left(self, cells: list[list[Trial]], results: Results) -> str:
        known = results.load()
        ahead = [t for cell in cells for t in pending(cell, known)]
        if not ahead:
            return ""
        seconds = self._seconds / self._work * sum(t.work for t in ahead)
        return f"; {len(ahead)} or fewer to go, about {console.clock(seconds)}"


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
