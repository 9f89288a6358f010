"""What one model did on one task: numbers, and every document behind them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Aggregate = Callable[[Sequence[Any]], float]  # a metric of many documents from that of each


@dataclass(frozen=True)
class Metric:
    """A metric of all documents.

    value; stderr: its standard error, None where there is none to be had; higher_is_better: None
    where nobody says.
    """

    value: float
    stderr: float | None
    higher_is_better: bool | None


@dataclass(frozen=True)
class Row:
    """One document: what was asked, what would be right, what came, and each metric of it.

    output: the text that was made; of a likelihood, a list of (continuation, nats, is_greedy).
    """

    doc_id: str
    prompt: str
    gold: Any
    output: Any
    scores: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """A task's result.

    Attributes:
        task, protocol, version: what was measured.
        data, revision: on which rows; revision None: not known.
        context_length: tokens of the protocol's window; None: it has no limit.
        documents, of: how many were asked, and how many rows the data have.
        dropped, cut, inside: rows that the protocol leaves out, prompts with less than the whole
            passage, prompts with an answer in them; None: not counted.
        metrics: by name, the one that counts first.
        rows: the documents; none of a group of tasks.
        aggregate: by metric, as far as known.
    """

    task: str
    protocol: str
    version: str
    data: str
    revision: str | None
    context_length: int | None
    documents: int
    of: int
    metrics: dict[str, Metric]
    dropped: int | None = None
    cut: int | None = None
    inside: int | None = None
    rows: list[Row] = field(default_factory=list)
    aggregate: dict[str, Aggregate] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """All but the documents, as JSON can hold it."""
        names = ("protocol", "version", "data", "revision", "context_length", "documents", "of")
        counts = ("dropped", "cut", "inside")
        found = {name: getattr(self, name) for name in names}
        found |= {n: getattr(self, n) for n in counts if getattr(self, n) is not None}
        return found | {"metrics": {name: vars(m) for name, m in self.metrics.items()}}


def mean(values: Sequence[float]) -> float:
    """The mean, nan of none."""
    return math.fsum(values) / len(values) if values else math.nan


def mean_metric(values: Sequence[float]) -> Metric:
    """The mean with its standard error, sqrt(sum (x - mean)^2 / (n - 1) / n)."""
    n, m = len(values), mean(values)
    error = None
    if n > 1:
        error = math.sqrt(math.fsum((x - m) ** 2 for x in values) / (n - 1) / n)
    return Metric(m, error, True)
