"""The rows of `glactl mqar`'s tables: of each mixer and width the best learning rate."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from glactl.sweep.grid import Trial, slice_names
from glactl.sweep.results import ERRORS, Outcome, Result


@dataclass(frozen=True)
class Spread:
    """Accuracies of several seeds."""

    mean: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class Row:
    """The best that a mixer of one width came to.

    Of each seed the trial with the highest accuracy counts; one that was pruned as far as it came,
    once those it was behind have ended.
    lr lists their learning rates (one, where the seeds agree); accuracy, steps and seconds are
    means over the seeds, lowest and highest the extreme accuracies. seconds_all is the time of
    every trial of the row. status: solved (each seed passed the goal), unsolved, failed (errors
    only) or not run; skipped, pruned and errors count trials. slices: of a mixture, by "L/n", None
    where no trial has that one. keys: of the trials that count.
    """

    mixer: str
    dim: int
    state_bytes: int
    params: int
    lr: tuple[float, ...]
    accuracy: float | None
    lowest: float | None
    highest: float | None
    seeds: int
    steps: float | None
    seconds: float | None
    seconds_all: float
    goal: float | None
    status: str
    skipped: int
    pruned: int
    errors: int
    slices: dict[str, Spread | None]
    keys: tuple[str, ...]


def summarise(outcomes: list[Outcome]) -> list[Row]:
    """One row a mixer and width, mixers in the grid's order, widths ascending."""
    groups: dict[tuple[str, int], list[Outcome]] = {}
    for o in outcomes:
        groups.setdefault((o.trial.mixer, o.trial.dim), []).append(o)
    order = list(dict.fromkeys(mixer for mixer, _ in groups))
    return [
        _row(groups[key]) for key in sorted(groups, key=lambda key: (order.index(key[0]), key[1]))
    ]


def _row(group: list[Outcome]) -> Row:
    first = group[0].trial
    best: dict[int, Outcome] = {}
    for o in group:
        if o.status in ("done", "pruned"):
            now = best.get(o.trial.seed)
            if now is None or _accuracy(o) > _accuracy(now):
                best[o.trial.seed] = o
    unended = {o.trial.seed for o in group if o.status == "missing"}
    for seed in unended & {seed for seed, o in best.items() if o.status == "pruned"}:
        del best[seed]
    errors = sum(o.status in ERRORS for o in group)
    seeds = {o.trial.seed for o in group}
    if not best:
        status = "failed" if errors else "not run"
    else:
        whole = best.keys() == seeds and all(o.passed for o in best.values())
        status = "solved" if whole else "unsolved"
    found = [o.result for o in best.values() if o.result is not None]
    accuracies = [_accuracy(o) for o in best.values()]
    return Row(
        mixer=first.mixer,
        dim=first.dim,
        state_bytes=first.state_bytes,
        params=first.params,
        lr=tuple(sorted({o.trial.lr for o in best.values()})),
        accuracy=fmean(accuracies) if found else None,
        lowest=min(accuracies, default=None),
        highest=max(accuracies, default=None),
        seeds=len(best),
        steps=fmean(r.steps for r in found) if found else None,
        seconds=fmean(r.seconds for r in found) if found else None,
        seconds_all=sum(o.result.seconds for o in group if o.result is not None),
        goal=first.spec.train.stop_accuracy,
        status=status,
        skipped=sum(o.status == "skipped" for o in group),
        pruned=sum(o.status == "pruned" for o in group),
        errors=errors,
        slices=_slices(first, found),
        keys=tuple(o.trial.key for o in best.values()),
    )


def _slices(trial: Trial, found: list[Result]) -> dict[str, Spread | None]:
    """Over the seeds, in the order of the validation split; {} where it has rows of one kind."""
    spreads: dict[str, Spread | None] = {}
    for name in slice_names(trial.data):
        values = [r.slices[name] for r in found if r.slices is not None and name in r.slices]
        known = bool(values)
        spreads[name] = Spread(fmean(values), min(values), max(values)) if known else None
    return spreads if len(spreads) > 1 else {}


def _accuracy(outcome: Outcome) -> float:
    return (outcome.result and outcome.result.accuracy) or 0.0


def edge_warnings(rows: list[Row], lrs: list[float]) -> list[str]:
    """A line a row whose best rate is the smallest or the largest: a better one may lie outside.

    Solved rows have none: their other rates were not tried, and need not be.
    """
    lines = []
    for row in rows:
        for edge, beyond in ((min(lrs), min(lrs) / 3), (max(lrs), max(lrs) * 3)):
            if len(lrs) > 1 and row.status == "unsolved" and edge in row.lr:
                lines.append(
                    f"{row.mixer} d {row.dim}: the best rate, {edge:g}, is at the edge of the "
                    f"grid; try --lrs with {beyond:.1g} too"
                )
    return lines


def replaced(path: Path, make: Callable[[Path], object]) -> None:
    """Put what `make` writes at `path`, at once: another sweep may be at it too."""
    part = path.with_name(f".{os.getpid()}.{path.name}")
    make(part)
    part.replace(path)
