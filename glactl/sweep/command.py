"""`glactl mqar`: recall over widths, mixers and learning rates.

The grid (grid.py) is checked whole before anything starts; its trials are run by this process
or by several (run.py, jobs.py); what came of them is shown and drawn (report.py).
"""

import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from glactl import console
from glactl.device import pick_device
from glactl.sweep.grid import Grid, make_grid
from glactl.sweep.jobs import Jobs, default_jobs
from glactl.sweep.prune import Prune, parse_prune
from glactl.sweep.report import current, print_table, write
from glactl.sweep.results import Outcome, Results, pending
from glactl.sweep.rows import edge_warnings, summarise
from glactl.sweep.run import SweepStopped, run_sweep, standing_errors
from glactl.sweep.stop import Stop


class SweepFailed(Exception):
    """A cell of the sweep has errors and no trial that ended."""

    exit_code = 1


def mqar_command(
    file: Path | None = None,
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
    jobs: int | None = None,
    minutes: float | None = None,
    prune: str | None = None,
    retry_failed: bool = False,
    plot_only: bool = False,
    json: bool = False,
    quiet: bool = False,
) -> None:
    """Run `glactl mqar`; the arguments are the command's options.

    Raises:
        ValueError: an option, or a spec that the options make; before any trial starts.
        SweepStopped: a signal came, or `minutes` are over, after tables and figures are written.
        SweepFailed: a cell has nothing but errors.
    """
    until = None if minutes is None else time.time() + 60 * minutes
    rule = parse_prune(prune)
    grid = make_grid(
        preset,
        file=file,
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
    left = sum(len(pending(c, known, retry_failed, rule is not None)) for c in grid.cells)
    count = default_jobs(where) if jobs is None else jobs
    axes = {"dim": grid.dims, "mixer": grid.mixers, "seed": grid.seeds, "rate": grid.lrs}
    product = " x ".join(console.counted(len(found), what) for what, found in axes.items())
    console.note(
        f"preset {grid.preset}: {console.counted(len(grid.trials), 'trial')} = {product}; "
        f"at most {left} to run on {where}{f', {count} at once' if count > 1 else ''}; results in "
        f"{folder}; Ctrl-C stops, the same command goes on"
    )
    stopped = None
    if not plot_only and left:
        stop = Stop(until)
        try:
            for outcome in _run(grid, results, where, count, retry_failed, rule, stop, quiet):
                if json:
                    console.result({"event": "trial", **_plain(outcome)})
        except SweepStopped as caught:
            if not stop.late:
                raise
            stopped = caught
    outcomes = list(run_sweep(grid, results, where, plot_only=True, prune=rule))
    if json and (plot_only or not left):
        for outcome in outcomes:
            console.result({"event": "trial", **_plain(outcome)})
    _show(grid, outcomes, folder, json, draw=plot_only or left > 0 or not current(folder, grid))
    if stopped is not None:
        raise stopped


def _run(
    grid: Grid,
    results: Results,
    device: torch.device,
    count: int,
    retry_failed: bool,
    prune: Prune | None,
    stop: Stop,
    quiet: bool,
) -> Iterator[Outcome]:
    """By this process, or by workers: on a GPU always, where an error may leave a process lost."""
    if count == 1 and device.type == "cpu":
        return run_sweep(grid, results, device, retry_failed, False, quiet, prune, stop)
    again = standing_errors(results) if retry_failed else {}
    jobs = Jobs(grid, results, device, count, again=again, prune=prune, stop=stop, quiet=quiet)
    return jobs.run()


def _show(grid: Grid, outcomes: list[Outcome], folder: Path, json: bool, draw: bool) -> None:
    """The best of each cell, as a table, as files, and what is to be said of it."""
    rows = summarise(outcomes)
    files = write(folder, grid, rows) if draw else []
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
    console.note(
        f"wrote {folder}: {', '.join(files)}"
        if files
        else f"nothing new since {folder / 'report.html'} was written; --plot-only draws it again"
    )
    broken = [f"{row.mixer} d {row.dim}" for row in rows if row.status == "failed"]
    if broken:
        raise SweepFailed(
            f"no trial of {', '.join(broken)} ended; --retry-failed runs those with errors again"
        )


def _plain(outcome: Outcome) -> dict[str, Any]:
    """The outcome as one JSON object."""
    t = outcome.trial
    where = {"mixer": t.mixer, "dim": t.dim, "lr": t.lr, "seed": t.seed}
    sizes = {"params": t.params, "state_bytes": t.state_bytes}
    found = asdict(outcome.result) if outcome.result else {"key": t.key}
    return {**where, **sizes, **found, "status": outcome.status, "cached": outcome.cached}
