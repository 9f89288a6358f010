"""The papers' tables, with the rows measured here among theirs.

A model has a row in a table where its size, protocol and context length are the table's, and no
row of the data was left out. Numbers are in percent, perplexities apart, as the papers print them.
"""

from collections.abc import Sequence
from typing import Any

from glactl.tasks.outcome import Metric, Outcome
from glactl.tasks.papers import PERPLEXITIES, Group, Table, tables

Shown = tuple[str, list[str], list[list[Any]]]  # heading, columns, rows


def paper_tables(models: Sequence[Any], sample: bool, limit: int | None) -> list[Shown]:
    """Every table of a paper that some model has a row in.

    Args:
        models: evaluate_report.Measured of each.
        sample, limit: of the evaluation; with either, no table.
    """
    if sample or limit is not None:
        return []
    kinds = dict.fromkeys((o.protocol, o.context_length) for o in models[0].outcomes)
    found = (_table(table, models) for kind in kinds for table in tables(*kind))
    return [shown for shown in found if shown is not None]


def _table(table: Table, models: Sequence[Any]) -> Shown | None:
    measured: list[list[Any]] = []
    groups: dict[str, Group] = {}
    for one in models:
        metrics = _metrics(table, one.outcomes)
        beside = table.beside(one.facts["parameters"])
        if beside and metrics:
            size = f"{one.facts['parameters'] / 1e6:,.0f}M"
            measured.append([one.name, size, *_own(table, metrics)])
            groups |= {group.size: group for group in beside}
    if not measured:
        return None
    window = "" if table.context_length is None else f", context length {table.context_length}"
    lines = [f"{table.title} ({table.source}); protocol {table.protocol}{window}, in percent"]
    if table.tokenizer is not None:
        lines.append(f"its models' tokenizer: {table.tokenizer}")
    rows = list(measured)
    for group in groups.values():
        rows += [[name, group.size, *values] for name, values in group.models.items()]
        lines += [f"{name} {group.size}: {note}" for name, note in group.notes.items()]
    return "\n".join(lines), ["model", "size", *table.columns], rows


def _metrics(table: Table, outcomes: Sequence[Outcome]) -> dict[str, Metric]:
    """column -> what was measured for it."""
    of = {
        (o.task, name): metric
        for o in outcomes
        if (o.protocol, o.context_length) == (table.protocol, table.context_length)
        for name, metric in o.metrics.items()
    }
    return {
        heading: of[column]
        for heading, column in table.columns.items()
        if column != "average" and column in of
    }


def _own(table: Table, metrics: dict[str, Metric]) -> list[str | float | None]:
    """The cells of a model measured here: with standard errors, as text."""
    cells: list[str | float | None] = []
    averaged: list[float | None] = []
    for heading, column in table.columns.items():
        if column == "average":
            known = [x for x in averaged if x is not None]
            cells.append(f"{sum(known) / len(known):.1f}" if len(known) == len(averaged) else None)
            continue
        metric = metrics.get(heading)
        perplexity = column[1] in PERPLEXITIES
        unit = 1 if perplexity else 100
        if not perplexity:
            averaged.append(None if metric is None else unit * metric.value)
        cells.append(None if metric is None else _with_error(metric, unit))
    return cells


def _with_error(metric: Metric, unit: int) -> str:
    error = "" if metric.stderr is None else f" ± {unit * metric.stderr:.1f}"
    return f"{unit * metric.value:.1f}{error}"
