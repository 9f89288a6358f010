"""report.html of a sweep: its tables and figures in one file, which needs no network."""

from collections.abc import Sequence
from html import escape

from glactl import page
from glactl.sweep.grid import Grid
from glactl.sweep.rows import Row, edge_warnings


def html(grid: Grid, rows: list[Row], pictures: Sequence[str]) -> str:
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
    parts = [
        f"<p>Preset {escape(grid.preset)}, form {grid.form}, seeds "
        f"{', '.join(map(str, grid.seeds))}. Of each mixer and width the learning rate with the "
        f"highest accuracy. Sweep <code>{grid.key}</code></p>",
        *(page.paragraph(f"Warning: {line}", "bad") for line in edge_warnings(rows, grid.lrs)),
        page.table(columns, best),
    ]
    if any(row.slices for row in rows):
        cut = [[r.mixer, r.dim, *(_slice(r, name) for name in grid.slices)] for r in rows]
        head = page.heading("By tokens/pairs of a row")
        parts += [head, page.table(["mixer", "dim", *grid.slices], cut)]
    parts += [page.inline(svg, f"f{i}") for i, svg in enumerate(pictures)]
    keys = [[row.mixer, row.dim, key] for row in rows for key in row.keys]
    parts.append(page.heading("Trials that count"))
    parts.append(page.table(["mixer", "dim", "spec"], keys, code=True))
    return page.document(grid.title, parts)


def _slice(row: Row, name: str) -> str:
    part = row.slices.get(name)
    if part is None:
        return "-"
    spread = f" ({part.lowest:.3f} to {part.highest:.3f})" if row.seeds > 1 else ""
    return f"{part.mean:.4f}{spread}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
