"""report.html of an evaluation: tables, and every document's prompt, gold and output.

One file without references to others. Of each task the documents come from the worst: with two
models, first those that one of them has right and the other wrong. At most SHOWN are there;
TASK.samples.jsonl has all.
"""

from collections.abc import Sequence
from html import escape
from typing import Any

from glactl.console import cell
from glactl.page import STYLE as LOOK
from glactl.tasks.outcome import Metric, Outcome, Row

SHOWN = 200  # documents of a task
OPENING = 160  # characters of a prompt's end that its closed form shows
STYLE = (
    LOOK
    + """
td, th { vertical-align: top }
pre { margin: .2em 0 }
details, section { border-left: 4px solid #bbb; margin: .6em 0; padding: 0 .8em }
.wrong { border-color: #c33 } .right { border-color: #393 }
summary { cursor: pointer } .quiet { color: #666 } mark { background: #fe8 }
"""
)


def page(
    names: Sequence[str],
    tables: Sequence[tuple[str, list[str], list[list[Any]]]],
    tasks: Sequence[Sequence[Outcome]],
) -> str:
    """The page as text.

    Args:
        names: of the models.
        tables: heading, columns and rows of each.
        tasks: the outcomes of every task, one for each model.
    """
    title = escape(" against ".join(names))
    parts = [f"<h1>{title}</h1>"]
    for heading, columns, rows in tables:
        parts += [f"<pre>{escape(heading)}</pre>", _table(columns, rows)]
    for outcomes in tasks:
        if outcomes[0].rows:
            parts += _task(names, outcomes)
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def worst_first(outcomes: Sequence[Outcome]) -> list[int]:
    """The documents of a task, by index, from the one to look at first.

    Those that models differ in come first, then by the sum of the metric that counts.
    """
    metric, chief = next(iter(outcomes[0].metrics.items()))
    sign = -1.0 if chief.higher_is_better is False else 1.0
    rows = list(zip(*(o.rows for o in outcomes), strict=True))

    def place(i: int) -> tuple[bool, float]:
        scores = [sign * _number(row.scores.get(metric)) for row in rows[i]]
        return len(set(scores)) == 1, sum(scores)

    return sorted(range(len(rows)), key=place)


def _task(names: Sequence[str], outcomes: Sequence[Outcome]) -> list[str]:
    first = outcomes[0]
    order = worst_first(outcomes)
    more = len(order) - SHOWN
    note = f"; {more} more in {first.task}.samples.jsonl" if more > 0 else ""
    parts = [
        f"<h2>{escape(first.task)}</h2>",
        f'<p class="quiet">{len(order)} documents, the worst first{note}</p>',
    ]
    for i in order[:SHOWN]:
        parts.append(_document(names, first.metrics, [o.rows[i] for o in outcomes]))
    return parts


def _document(names: Sequence[str], metrics: dict[str, Metric], rows: Sequence[Row]) -> str:
    first, metric = rows[0], next(iter(metrics))
    scores = [_number(row.scores.get(metric)) for row in rows]
    known = all(s in (0.0, 1.0) for s in scores)
    colour = ("right" if min(scores) == 1 else "wrong") if known else ""
    shown = first.prompt[-OPENING:].strip()
    told = "".join(
        f'<p class="quiet">{escape(name)}: {escape(_scores(row.scores))}</p>{_output(row)}'
        for name, row in zip(names, rows, strict=True)
    )
    return (
        f'<section class="{colour}"><details><summary>{escape(first.doc_id)} '
        f"<code>{escape(shown)}</code></summary><pre>{_marked(first)}</pre></details>"
        f"<p>gold</p><pre>{escape(_gold(first.gold))}</pre>{told}</section>"
    )


def _marked(row: Row) -> str:
    """The prompt, with the first place of an answer marked."""
    golds = row.gold if isinstance(row.gold, list) else [row.gold]
    text = row.prompt
    for gold in golds:
        at = text.lower().find(gold.lower()) if isinstance(gold, str) and gold else -1
        if at >= 0:
            end = at + len(gold)
            marked = f"<mark>{escape(text[at:end])}</mark>"
            return escape(text[:at]) + marked + escape(text[end:])
    return escape(text)


def _gold(gold: Any) -> str:
    return "\n".join(map(str, gold)) if isinstance(gold, list) else str(gold)


def _output(row: Row) -> str:
    """What the model made: text, or a table of likelihoods."""
    if isinstance(row.output, str):
        return f"<pre>{escape(row.output)}</pre>"
    return _table(["continuation", "nats", "greedy"], [[*one, ""][:3] for one in row.output])


def _scores(scores: dict[str, Any]) -> str:
    return ", ".join(f"{name} {cell(value)}" for name, value in scores.items())


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    head = "".join(f"<th>{escape(c)}</th>" for c in columns)
    lines = [
        "<tr>" + "".join(f"<td>{escape(cell(value))}</td>" for value in row) + "</tr>"
        for row in rows
    ]
    return f"<table><tr>{head}</tr>\n" + "\n".join(lines) + "</table>"
