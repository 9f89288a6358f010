"""What `glactl mqar` shows: the best of each cell, as a table, a file and a plot.

sweep.yaml                 the grid of the latest sweep in the folder
results.jsonl              every trial that has run, see sweep_results.py
table.csv                  a line a mixer and width: its best learning rate
accuracy.svg, .png         accuracy against the bytes of state
"""

import csv
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from glactl import console
from glactl.profile_report import COLOURS
from glactl.sweep_grid import Grid
from glactl.sweep_results import ERRORS, Outcome

MARKERS = "os^DvPX*"  # a width each, in ascending order


@dataclass(frozen=True)
class Row:
    """The best that a mixer of one width came to.

    Of each seed the trial with the highest accuracy counts. lr lists their learning rates (one,
    where the seeds agree); accuracy, steps and seconds are means over the seeds, lowest and highest
    the extreme accuracies. seconds_all is the time of every trial of the row. status: solved (each
    seed passed the goal), unsolved, failed (errors only) or not run; skipped and errors count
    trials.
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
    errors: int


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
        if o.status == "done":
            now = best.get(o.trial.seed)
            if now is None or _accuracy(o) > _accuracy(now):
                best[o.trial.seed] = o
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
        errors=errors,
    )


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


def print_table(rows: list[Row]) -> None:
    """The rows on stdout; the spread only where there are several seeds."""
    spread = any(row.seeds > 1 for row in rows)
    columns = ["mixer", "dim", "state bytes", "best lr", "accuracy"]
    columns += ["min–max"] * spread + ["steps", "seconds", "status"]
    table: list[list[object]] = []
    for row in rows:
        lr = row.lr[0] if len(row.lr) == 1 else ", ".join(f"{x:g}" for x in row.lr) or None
        cells: list[object] = [row.mixer, row.dim, row.state_bytes, lr, row.accuracy]
        if spread:
            cells.append(None if row.lowest is None else f"{row.lowest:.3f}–{row.highest:.3f}")
        steps = None if row.steps is None else round(row.steps)
        notes = [f"{row.skipped} skipped"] * (row.skipped > 0)
        notes += [f"{row.errors} failed"] * (row.errors > 0 and row.status != "failed")
        table.append([*cells, steps, row.seconds, ", ".join([row.status, *notes])])
    console.table(columns, table)


def write(folder: Path, grid: Grid, rows: list[Row]) -> list[str]:
    """Write sweep.yaml, table.csv and the plot into `folder`; returns all the files' names."""
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / "sweep.yaml", lambda path: path.write_text(grid.resolved()))
    _replace(folder / "table.csv", lambda path: _csv(path, rows))
    _plot(folder, grid, rows)
    return ["results.jsonl", "table.csv", "accuracy.svg", "accuracy.png", "sweep.yaml"]


def _replace(path: Path, make: Callable[[Path], object]) -> None:
    """Put what `make` writes at `path`, at once: another sweep may be at it too."""
    part = path.with_name(f".{os.getpid()}.{path.name}")
    make(part)
    part.replace(path)


def _csv(path: Path, rows: list[Row]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, [field.name for field in fields(Row)])
        writer.writeheader()
        for row in rows:
            writer.writerow(asdict(row) | {"lr": " ".join(f"{x:g}" for x in row.lr)})


def _plot(folder: Path, grid: Grid, rows: list[Row]) -> None:
    """Accuracy against bytes of state: a line a mixer, a marker a width."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    dims = sorted({row.dim for row in rows})
    marker = {dim: MARKERS[i % len(MARKERS)] for i, dim in enumerate(dims)}
    names = list(dict.fromkeys(row.mixer for row in rows))
    others = [c for c in mpl.color_sequences["tab10"] if c not in COLOURS.values()]
    colour = {n: COLOURS.get(n, others[i % len(others)]) for i, n in enumerate(names)}

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(names):
        # rings in rings, lines on wider lines: mixers with one size of state stay visible
        wider = (len(names) - 1 - i) / max(len(names) - 1, 1)
        points = [
            (r.state_bytes, r.accuracy, r.lowest, r.highest, marker[r.dim])
            for r in rows
            if r.mixer == name
            and r.accuracy is not None
            and r.lowest is not None
            and r.highest is not None
        ]
        x, y = [p[0] for p in points], [p[1] for p in points]
        axes.plot(x, y, color=colour[name], linewidth=1.5 + 5 * wider, alpha=0.5)
        for size, mean, low, high, shape in points:
            style: dict[str, Any] = {"color": colour[name], "marker": shape, "capsize": 4}
            style |= {"markersize": 6 + 10 * wider, "markerfacecolor": "none"}
            spread = [[mean - low], [high - mean]]
            axes.errorbar([size], [mean], yerr=spread, markeredgewidth=2, **style)
    # half as much again on both sides: a power of two lies between, whatever the sizes
    left = min(r.state_bytes for r in rows) / 1.5
    right = max(r.state_bytes for r in rows) * 1.5
    ticks = _powers_of_two(left, right)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [_bytes(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(left, right)
    axes.set_ylim(-0.03, 1.05)
    goal = rows[0].goal
    if goal is not None:
        axes.axhline(goal, color="#888888", linestyle=":", linewidth=1)
    data = grid.trials[0].data
    axes.set_xlabel(f"state of one sequence after {data.seq_len} tokens (fp32)")
    axes.set_ylabel("accuracy on held-out queries")
    title = f"MQAR, {data.pairs} pairs in {data.seq_len} tokens, vocabulary {data.vocab_size:,}"
    axes.set_title(f"{title}: the best learning rate", fontsize=10)
    axes.grid(alpha=0.3)
    grey: dict[str, Any] = {"color": "#666666", "linestyle": "none", "markersize": 8}
    handles = [Line2D([], [], color=colour[n], linewidth=2, label=n) for n in names]
    handles += [Line2D([], [], marker=marker[d], label=f"d {d}", **grey) for d in dims]
    if goal is not None:
        line: dict[str, Any] = {"color": "#888888", "linestyle": ":", "linewidth": 1}
        handles.append(Line2D([], [], label=f"goal {goal:g}", **line))
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    # fixed names and no date: the same results make the same file
    with mpl.rc_context({"svg.hashsalt": "glactl"}):
        svg: dict[str, Any] = {"format": "svg", "metadata": {"Date": None}}
        _replace(folder / "accuracy.svg", lambda path: figure.savefig(path, **svg))
    _replace(folder / "accuracy.png", lambda path: figure.savefig(path, format="png", dpi=150))


def _powers_of_two(low: float, high: float) -> list[int]:
    """The powers of two from `low` to `high`; every second, third, ... where they are many."""
    first, last = math.ceil(math.log2(low)), math.floor(math.log2(high))
    return [2**n for n in range(max(first, 0), last + 1, (last - first) // 8 + 1)]


def _bytes(n: int) -> str:
    return f"{n // 2**20} MiB" if n >= 2**20 else f"{n // 2**10} KiB" if n >= 2**10 else f"{n} B"
