"""What `glactl mqar` shows: the best of each cell, as tables, files and figures.

sweep.yaml                 the grid of the latest sweep in the folder, and its key
results.jsonl              every trial that has run, see results.py
table.csv                  a line a mixer and width: its best learning rate, its trials' keys
slices.csv                 a line a mixer, width, length and number of pairs
accuracy, dims, slices     figures, see plot.py
report.html                tables and figures in one file, see html.py
"""

import csv
from dataclasses import asdict, fields
from pathlib import Path

from glactl import console
from glactl.sweep.grid import Grid
from glactl.sweep.html import html
from glactl.sweep.plot import draw
from glactl.sweep.rows import Row, Spread, replaced


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
        notes += [f"{row.pruned} pruned"] * (row.pruned > 0)
        notes += [f"{row.errors} failed"] * (row.errors > 0 and row.status != "failed")
        table.append([*cells, steps, row.seconds, ", ".join([row.status, *notes])])
    console.table(columns, table)
    names = list(dict.fromkeys(name for row in rows for name in row.slices))
    if names:
        parts = [
            [row.mixer, row.dim, *(_shown(row.slices.get(name), spread) for name in names)]
            for row in rows
        ]
        console.table(["mixer", "dim", *names], parts, title="accuracy by length/pairs")


def _shown(part: Spread | None, spread: bool) -> object:
    if part is None or not spread:
        return None if part is None else part.mean
    return f"{part.mean:.3f} ({part.lowest:.3f}–{part.highest:.3f})"


def write(folder: Path, grid: Grid, rows: list[Row]) -> list[str]:
    """Write the files above into `folder`; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    replaced(folder / "sweep.yaml", lambda path: path.write_text(grid.resolved()))
    replaced(folder / "table.csv", lambda path: _csv(path, grid, rows))
    replaced(folder / "slices.csv", lambda path: _slices_csv(path, grid, rows))
    figures = draw(folder, grid, rows)
    pictures = [(folder / f"{name}.svg").read_text() for name in figures]
    replaced(folder / "report.html", lambda path: path.write_text(html(grid, rows, pictures)))
    drawn = [f"{name}.{end}" for name in figures for end in ("svg", "png")]
    return ["results.jsonl", "table.csv", "slices.csv", *drawn, "report.html", "sweep.yaml"]


def current(folder: Path, grid: Grid) -> bool:
    """Whether the files in `folder` are of this grid and of all its results."""
    try:
        drawn = (folder / "report.html").stat().st_mtime_ns  # the last that is written
        known = (folder / "results.jsonl").stat().st_mtime_ns
        return drawn > known and (folder / "sweep.yaml").read_text() == grid.resolved()
    except FileNotFoundError:
        return False


def _csv(path: Path, grid: Grid, rows: list[Row]) -> None:
    names = [field.name for field in fields(Row) if field.name not in ("slices", "keys")]
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, [*names, "keys", "sweep"], extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            lists = {"lr": " ".join(f"{x:g}" for x in row.lr), "keys": " ".join(row.keys)}
            writer.writerow(asdict(row) | lists | {"sweep": grid.key})


def _slices_csv(path: Path, grid: Grid, rows: list[Row]) -> None:
    """Where there is no mixture, the one slice is all of the rows."""
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        head = ["mixer", "dim", "seq_len", "pairs", "accuracy", "lowest", "highest"]
        writer.writerow([*head, "keys", "sweep"])
        for row in rows:
            for name in grid.slices:
                part = row.slices.get(name)
                if not row.slices:
                    numbers = [row.accuracy, row.lowest, row.highest]
                else:
                    numbers = [part.mean, part.lowest, part.highest] if part else [None] * 3
                where = [row.mixer, row.dim, *name.split("/")]
                writer.writerow([*where, *numbers, " ".join(row.keys), grid.key])
