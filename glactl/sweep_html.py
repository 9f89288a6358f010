"""report.html of a sweep: its tables and figures in one file, which needs no network."""

import re
from collections.abc import Sequence
from html import escape

from glactl.sweep_grid import Grid
from glactl.sweep_rows import Row, edge_warnings

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 62em; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0 }
td, th { border-bottom: 1px solid #ccc; padding: .2em .8em; text-align: right }
td:first-child, th:first-child { text-align: left }
code { font-size: 12px; overflow-wrap: anywhere }
svg { height: auto; max-width: 100% }
"""


def page(grid: Grid, rows: list[Row], pictures: Sequence[str]) -> str:
    """The page as text.

    Args:
        grid: the sweep.
        rows: of its table.
        pictures: SVG files, whose references must hold within each of them.
    """
    best = [
        [
            row.mixer,
            row.dim,
            f"{row.state_bytes:,}",
            f"{row.params:,}",
            ", ".join(f"{x:g}" for x in row.lr),
            _number(row.accuracy),
            f"{_number(row.lowest)} to {_number(row.highest)}" if row.seeds > 1 else "",
            row.seeds,
            row.status,
        ]
        for row in rows
    ]
    columns = ["mixer", "dim", "state bytes", "parameters", "best rate", "accuracy"]
    columns += ["over the seeds", "seeds", "status"]
    title = escape(grid.title)
    parts = [
        f"<h1>{title}</h1>",
        f"<p>Preset {escape(grid.preset)}, form {grid.form}, seeds "
        f"{', '.join(map(str, grid.seeds))}. Of each mixer and width the learning rate with the "
        f"highest accuracy. Sweep <code>{grid.key}</code></p>",
        *(f"<p>Warning: {escape(line)}</p>" for line in edge_warnings(rows, grid.lrs)),
        _table(columns, best),
    ]
    if any(row.slices for row in rows):
        cut = [[r.mixer, r.dim, *(_slice(r, name) for name in grid.slices)] for r in rows]
        parts += ["<h2>By tokens/pairs of a row</h2>", _table(["mixer", "dim", *grid.slices], cut)]
    parts += [_inline(svg, f"f{i}") for i, svg in enumerate(pictures)]
    keys = [[row.mixer, row.dim, key] for row in rows for key in row.keys]
    parts += ["<h2>Trials that count</h2>", _table(["mixer", "dim", "spec"], keys, code=True)]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]], code: bool = False) -> str:
    head = "".join(f"<th>{escape(c)}</th>" for c in columns)
    lines = []
    for row in rows:
        cells = [escape(str(cell)) for cell in row]
        if code:
            cells[-1] = f"<code>{cells[-1]}</code>"
        lines.append("<tr>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
    return f"<table><tr>{head}</tr>\n" + "\n".join(lines) + "</table>"


def _inline(svg: str, prefix: str) -> str:
    """The <svg> element; its ids, which other figures have too, become its own.

    The description of the file goes: it names vocabularies by their addresses.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)


def _slice(row: Row, name: str) -> str:
    part = row.slices.get(name)
    if part is None:
        return "-"
    spread = f" ({part.lowest:.3f} to {part.highest:.3f})" if row.seeds > 1 else ""
    return f"{part.mean:.4f}{spread}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
