"""The figures of `glactl mqar`: accuracy against state, against width, and for each slice.

accuracy.svg, .png     against the bytes of state, a line a mixer, a marker a width
dims.svg, .png         against the width, a line a mixer
slices.svg, .png       of a mixture: for each length and number of pairs, a panel a width

A point is the mean over the seeds, its bar reaches from the lowest to the highest. At the foot of
each stands the key of the sweep whose trials it shows.
"""

import math
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

from glactl.profile.report import COLOURS
from glactl.sweep.grid import Grid
from glactl.sweep.rows import Row, replaced

MARKERS = "os^DvPX*"  # a width each, in ascending order
GREY: dict[str, Any] = {"color": "#666666", "linestyle": "none", "markersize": 8}
DOTS: dict[str, Any] = {"color": "#888888", "linestyle": ":", "linewidth": 1}


def draw(folder: Path, grid: Grid, rows: list[Row]) -> list[str]:
    """Write the figures into `folder`; returns the names of the files without their ends."""
    makers: dict[str, Callable[[Grid, list[Row]], Any]] = {"accuracy": by_state, "dims": by_dim}
    if any(row.slices for row in rows) and len(grid.slices) > 1:
        makers["slices"] = by_slice
    for name, make in makers.items():
        _save(folder, name, make(grid, rows), grid)
    return list(makers)


def by_state(grid: Grid, rows: list[Row]) -> Any:
    """Accuracy against bytes of state."""
    from matplotlib.lines import Line2D

    dims = sorted({row.dim for row in rows})
    marker = {dim: MARKERS[i % len(MARKERS)] for i, dim in enumerate(dims)}
    figure = _figure(7.2)
    axes = figure.subplots()
    _lines(axes, rows, lambda row: row.state_bytes, lambda row: marker[row.dim])
    # more than twice as much on both sides: two powers of two lie between, whatever the sizes
    left = min(r.state_bytes for r in rows) / 2.1
    right = max(r.state_bytes for r in rows) * 2.1
    ticks = _powers_of_two(left, right)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [_bytes(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(left, right)
    axes.set_xlabel(f"state of one sequence after {grid.trials[0].data.seq_len} tokens (fp32)")
    handles = [Line2D([], [], marker=marker[d], label=f"d {d}", **GREY) for d in dims]
    _finish(figure, axes, grid, rows, handles)
    return figure


def by_dim(grid: Grid, rows: list[Row]) -> Any:
    """Accuracy against the width of the model."""
    dims = sorted({row.dim for row in rows})
    figure = _figure(7.2)
    axes = figure.subplots()
    _lines(axes, rows, lambda row: row.dim, lambda row: "o")
    axes.set_xscale("log", base=2)
    axes.set_xticks(dims, [str(dim) for dim in dims])
    axes.minorticks_off()
    axes.set_xlim(dims[0] / 1.2, dims[-1] * 1.2)
    axes.set_xlabel("width of the model")
    _finish(figure, axes, grid, rows, [])
    return figure


def by_slice(grid: Grid, rows: list[Row]) -> Any:
    """Accuracy for each length and number of pairs, a panel a width."""
    dims = sorted({row.dim for row in rows})
    figure = _figure(2.4 + 3.6 * len(dims))
    panels = figure.subplots(1, len(dims), sharey=True, squeeze=False)[0]
    for axes, dim in zip(panels, dims, strict=True):
        for row in (row for row in rows if row.dim == dim and row.slices):
            parts = [(i, row.slices.get(name)) for i, name in enumerate(grid.slices)]
            shown = [(i, part) for i, part in parts if part is not None]
            x, y = [i for i, _ in shown], [part.mean for _, part in shown]
            spread = [[p.mean - p.lowest for _, p in shown], [p.highest - p.mean for _, p in shown]]
            style: dict[str, Any] = {"color": _colours(rows)[row.mixer], "marker": "o"}
            axes.errorbar(x, y, yerr=spread, capsize=3, markerfacecolor="none", **style)
        axes.set_xticks(range(len(grid.slices)), grid.slices, rotation=45)
        axes.set_xlabel("tokens/pairs of a row")
        axes.set_title(f"d {dim}", fontsize=10)
    _finish(figure, panels[0], grid, rows, [], panels)
    return figure


def _figure(width: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, 4.4), layout="constrained")


def _colours(rows: list[Row]) -> dict[str, str]:
    """Of each mixer; those of the other reports where they have one."""
    import matplotlib as mpl
    import matplotlib.colors

    names = list(dict.fromkeys(row.mixer for row in rows))
    tab10 = (mpl.colors.to_hex(colour) for colour in mpl.color_sequences["tab10"])
    others = cycle(colour for colour in tab10 if colour not in COLOURS.values())
    return {name: COLOURS.get(name) or next(others) for name in names}


def _lines(
    axes: Any, rows: list[Row], at: Callable[[Row], float], shape: Callable[[Row], str]
) -> None:
    """A line a mixer through the means, with the bars of the spread."""
    colour = _colours(rows)
    for i, name in enumerate(colour):
        # rings in rings, lines on wider lines: mixers at one place stay visible
        wider = (len(colour) - 1 - i) / max(len(colour) - 1, 1)
        points = [
            (at(r), r.accuracy, r.lowest, r.highest, shape(r))
            for r in rows
            if r.mixer == name
            and r.accuracy is not None
            and r.lowest is not None
            and r.highest is not None
        ]
        x, y = [p[0] for p in points], [p[1] for p in points]
        axes.plot(x, y, color=colour[name], linewidth=1.5 + 5 * wider, alpha=0.5)
        for place, mean, low, high, marker in points:
            style: dict[str, Any] = {"color": colour[name], "marker": marker, "capsize": 4}
            style |= {"markersize": 6 + 10 * wider, "markerfacecolor": "none"}
            spread = [[mean - low], [high - mean]]
            axes.errorbar([place], [mean], yerr=spread, markeredgewidth=2, **style)


def _finish(
    figure: Any, axes: Any, grid: Grid, rows: list[Row], handles: list[Any], panels: Any = None
) -> None:
    """What all figures have: the goal, the axis of accuracy, the title and the legend."""
    from matplotlib.lines import Line2D

    goal = rows[0].goal
    for panel in [axes] if panels is None else panels:
        panel.set_ylim(-0.03, 1.05)
        panel.grid(alpha=0.3)
        if goal is not None:
            panel.axhline(goal, **DOTS)
    axes.set_ylabel("accuracy on held-out queries")
    if panels is None:
        axes.set_title(f"{grid.title}\nthe best learning rate", fontsize=10)
    else:
        figure.suptitle(f"{grid.title}: the best learning rate", fontsize=10)
    colour = _colours(rows)
    handles = [Line2D([], [], color=colour[n], linewidth=2, label=n) for n in colour] + handles
    if goal is not None:
        handles.append(Line2D([], [], label=f"goal {goal:g}", **DOTS))
    figure.legend(handles=handles, loc="outside right upper", frameon=False)


def _save(folder: Path, name: str, figure: Any, grid: Grid) -> None:
    import matplotlib as mpl

    figure.supxlabel(f"sweep {grid.key[:12]}", fontsize=7, color="#888888", x=0.99, ha="right")
    # fixed names and no date: the same results make the same file
    with mpl.rc_context({"svg.hashsalt": "glactl", "svg.fonttype": "none"}):
        svg: dict[str, Any] = {
            "format": "svg",
            "metadata": {"Date": None, "Description": f"sweep {grid.key}"},
        }
        replaced(folder / f"{name}.svg", lambda path: figure.savefig(path, **svg))
    png: dict[str, Any] = {"format": "png", "dpi": 150}
    png["metadata"] = {"Description": f"sweep {grid.key}"}
    replaced(folder / f"{name}.png", lambda path: figure.savefig(path, **png))


def _powers_of_two(low: float, high: float) -> list[int]:
    """The powers of two from `low` to `high`; every second, third, ... where they are many."""
    first, last = math.ceil(math.log2(low)), math.floor(math.log2(high))
    return [2**n for n in range(max(first, 0), last + 1, (last - first) // 8 + 1)]


def _bytes(n: int) -> str:
    return f"{n // 2**20} MiB" if n >= 2**20 else f"{n // 2**10} KiB" if n >= 2**10 else f"{n} B"
