"""The files of one `glactl profile`.

profiles/DATE-TIME-DEVICE/
  results.json   all of it
  results.csv    a line a row, those that were not measured and those for the crossover too
  seqlen         time a token against length, and the part of the floor (svg, png)
  roofline       FLOP/s against FLOP a byte, below what the machine reaches (svg, png)
  report.html    tables and figures in one file
"""

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from glactl import page
from glactl.console import finite
from glactl.profile.cases import SLOWEST, Failed, Measured
from glactl.profile.tables import COLUMNS, cells, foot, head, label, short
from glactl.run import new_folder

COLOURS = {"attention": "#444444", "gla": "#1f77b4", "decay": "#2ca02c", "gsa": "#d62728"}
MARKS = {"operator": "o", "layer": "s", "model": "^"}
FIGURES = ("seqlen", "roofline")


def write(
    out: Path,
    device: str,
    report: dict[str, Any],
    rows: Sequence[Measured],
    failed: Sequence[Failed],
    scanned: Sequence[Measured],
) -> tuple[Path, list[str]]:
    """Write the report to a new folder in `out`; returns it and the names of its files."""
    folder = new_folder(out / f"{datetime.now():%Y%m%d-%H%M%S}-{device}")
    (folder / "results.json").write_text(json.dumps(finite(report), indent=1) + "\n")
    _csv(folder / "results.csv", [*rows, *failed, *scanned])
    if rows:
        _save(folder, "seqlen", lambda figure: _by_length(figure, report, [*rows, *scanned]))
        _save(folder, "roofline", lambda figure: _roofline(figure, report, rows))
    (folder / "report.html").write_text(html(folder), encoding="utf-8")
    figures = [f"{name}.{end}" for name in FIGURES if rows for end in ("svg", "png")]
    return folder, ["results.json", "results.csv", *figures, "report.html"]


def html(folder: Path) -> str:
    """The page of a profile's folder, made of its results.json and figures."""
    report = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    rows = [Measured(**row) for row in report["results"]]
    parts = [page.paragraph(line) for line in head(report)]
    parts.append(page.table(COLUMNS, [cells(row) for row in rows]))
    for row in report["failed"]:
        text = f"{label(row['part'], row['name'])}, {short(row['work'])}, T {row['T']:,}: "
        parts.append(page.paragraph(text + row["reason"], "bad"))
    parts += [page.paragraph(line, "note") for line in foot(report, rows)]
    if "baseline" in report:
        parts += _beside(report["baseline"])
    for name in FIGURES:
        if (folder / f"{name}.svg").exists():
            parts.append(page.inline((folder / f"{name}.svg").read_text(encoding="utf-8"), name))
    for row in rows:
        if row.kernels:
            title = f"Kernels of {label(row.part, row.name)}, {short(row.work)}, T {row.T:,}"
            lines = [[k["name"], k["calls"], 1e3 * k["seconds"]] for k in row.kernels]
            parts += [page.heading(title), page.table(["kernel", "calls", "ms"], lines)]
    parts += [page.heading("Settings"), page.block(json.dumps(report["settings"], indent=1))]
    return page.document(f"Profile: {report['device']}, {report['dtype']}", parts)


def _beside(baseline: dict[str, Any]) -> list[str]:
    rows = [
        [
            " ".join(map(str, one["key"][:4])),
            1e3 * one["before"],
            None if one["now"] is None else 1e3 * one["now"],
            None if one["change"] is None else f"{100 * one['change']:+.1f} %",
            None if one["noise"] is None else f"±{100 * one['noise']:.1f} %",
            "regression" if one["failed"] else "ok",
        ]
        for one in baseline["rows"]
    ]
    columns = ["", "ms then", "ms now", "change", "noise", ""]
    return [page.heading(f"Beside {baseline['path']}"), page.table(columns, rows)]


def _csv(path: Path, rows: Sequence[Measured | Failed]) -> None:
    names = [field.name for field in fields(Measured) if field.name != "kernels"]
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, [*names, "reason"], extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def _save(folder: Path, name: str, draw: Callable[[Any], None]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    draw(figure)
    for suffix in ("svg", "png"):
        figure.savefig(folder / f"{name}.{suffix}", dpi=150)


def _colour(name: str) -> str:
    """Of a mixer, by the first word of the row's name."""
    return COLOURS.get(name.split()[0], "#888888")


def _by_length(figure: Any, report: dict[str, Any], rows: Sequence[Measured]) -> None:
    """Time a token against length, one panel for each part; on the right the part of the floor."""
    from matplotlib.ticker import LogLocator

    lengths_of = {
        part: {r.T for r in rows if (r.part, r.work) == (part, work)}
        for part, work in SLOWEST.items()
    }
    parts = [part for part, lengths in lengths_of.items() if len(lengths) > 1]
    figure.set_size_inches(4.2 + 3.9 * len(parts), 4.4)
    panels = figure.subplots(1, len(parts) + 1, squeeze=False)[0]
    for axes, part in zip(panels, parts, strict=False):
        mine = [r for r in rows if (r.part, r.work) == (part, SLOWEST[part])]
        for i, name in enumerate(dict.fromkeys(r.name for r in mine)):
            line = sorted((r for r in mine if r.name == name), key=lambda r: r.T)
            T, per_token = [r.T for r in line], [1e6 * r.median / (r.batch * r.T) for r in line]
            style = "-" if " " not in name else ("--", ":")[i % 2]
            axes.plot(T, per_token, style, marker="o", color=_colour(name), label=name)
        for name, at in report["crossover"].get(part, {}).items():
            if at["length"] is not None:
                axes.axvline(at["length"], color=_colour(name), linestyle=":", linewidth=1)
        lengths = sorted({r.T for r in mine})
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, [f"{T:,}" for T in lengths], rotation=45, fontsize=8)
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))  # a decade is rare
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        axes.set_xlabel("sequence length T (tokens)")
        axes.set_ylabel("µs a token")
        axes.set_title(f"{part}s, {SLOWEST[part]}", fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    longest = max(r.T for r in rows)
    _floors(panels[-1], [r for r in rows if longest == r.T])
    figure.suptitle(f"{report['device']}, {report['dtype']}", fontsize=10)


def _floors(axes: Any, rows: Sequence[Measured]) -> None:
    labels = [f"{label(r.part, r.name)} {short(r.work)}" for r in rows]
    shares = [100 * r.of_floor for r in rows]
    axes.barh(labels, shares, color=[_colour(r.name) for r in rows])
    for i, share in enumerate(shares):
        axes.text(share, i, f" {share:.0f}", va="center", fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("% of the floor (100: nothing is wasted)")
    axes.set_title(f"T = {rows[0].T:,}", fontsize=10)


def _roofline(figure: Any, report: dict[str, Any], rows: Sequence[Measured]) -> None:
    """Every row below min(matrix rate, copy rate x FLOP a byte)."""
    axes = figure.subplots()
    copy, matmul = report["rates"]["copy"], report["rates"]["matmul"]
    at = [r.flops / r.moved for r in rows]
    low, high = min(*at, matmul / copy) / 2, max(*at, matmul / copy) * 2
    corner = [low, matmul / copy, high]
    axes.plot(corner, [min(matmul, copy * x) / 1e9 for x in corner], color="#000000", linewidth=1)
    for row, x in zip(rows, at, strict=True):
        y = row.flops / row.median / 1e9
        kept = "none" if row.work in ("forward", "prefill") else _colour(row.name)
        axes.plot(
            x,
            y,
            MARKS[row.part],
            markeredgecolor=_colour(row.name),
            markerfacecolor=kept,
            label=f"{label(row.part, row.name)} {short(row.work)}, {row.T:,}",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("least FLOP a least byte moved")
    axes.set_ylabel("GFLOP/s reached")
    axes.set_title(f"roofline of {report['device']}, {report['dtype']}", fontsize=10)
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right upper", fontsize=6, frameon=False)
