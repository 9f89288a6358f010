r"""How far two models differ on the same documents: the paired bootstrap.

For documents 1 .. n with results a_i and b_i of two models, and a metric m of a list of results,

    d = m(b) - m(a)                                                                    (1)
    d* = m(b_J) - m(a_J),  J = n indices drawn from 1 .. n with replacement            (2)

and the interval is that of the 2.5 % and the 97.5 % quantile of d* over many draws: where a
document is hard for both models, it moves both in (2), and the interval is narrower than that of
two standard errors.

Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, ch. 13 (percentile interval);
paired, for systems on one test set: Koehn 2004, aclanthology.org/W04-3250.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from glactl.tasks.outcome import Aggregate, Outcome, mean

RESAMPLES = 10_000  # of means; other metrics are taken list by list
SLOW_RESAMPLES = 1000
CHUNK = 2**22  # indices drawn at once


@dataclass(frozen=True)
class Difference:
    """(1) with the 95 % interval of (2).

    low and high are None where there are fewer than two documents. resamples: draws.
    """

    value: float
    low: float | None
    high: float | None
    documents: int
    resamples: int


def difference(
    a: Sequence[Any], b: Sequence[Any], aggregate: Aggregate = mean, seed: int = 0
) -> Difference:
    """The difference of two models on the same documents, b - a.

    Args:
        a, b: the result of every document, in one order.
        aggregate: m.
        seed: of the draws.

    Raises:
        ValueError: not the same number of documents.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} documents cannot be compared with {len(b)}")
    n, value = len(a), aggregate(b) - aggregate(a)
    if n < 2:
        return Difference(value, None, None, n, 0)
    generator = np.random.default_rng(seed)
    if _is_mean(a, b, aggregate):
        drawn = _means(np.asarray(b, float) - np.asarray(a, float), generator)
    else:
        drawn = np.array(
            [
                aggregate([b[j] for j in index]) - aggregate([a[j] for j in index])
                for index in generator.integers(n, size=(SLOW_RESAMPLES, n))
            ]
        )
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Difference(value, float(low), float(high), n, len(drawn))


def differences(first: Outcome, second: Outcome) -> dict[str, Difference]:
    """metric -> second - first, of every metric that both outcomes of one task have by document.

    Raises:
        ValueError: they are not of the same protocol, version and documents.
    """
    for name in ("task", "protocol", "version", "revision", "context_length"):
        one, two = getattr(first, name), getattr(second, name)
        if one != two:
            raise ValueError(f"{first.task}: results of {name} {one} and {two} do not compare")
    if [row.doc_id for row in first.rows] != [row.doc_id for row in second.rows]:
        raise ValueError(f"{first.task}: the documents differ")
    found = {}
    for metric in first.metrics:
        aggregate = first.aggregate.get(metric)
        pairs = [
            (x.scores.get(metric), y.scores.get(metric))
            for x, y in zip(first.rows, second.rows, strict=True)
        ]
        if aggregate is None or not pairs or any(None in pair for pair in pairs):
            continue
        a, b = zip(*pairs, strict=True)
        found[metric] = difference(a, b, aggregate)
    return found


def _is_mean(a: Sequence[Any], b: Sequence[Any], aggregate: Aggregate) -> bool:
    """Whether `aggregate` is a mean of numbers, ours or lm-eval's."""
    numbers = all(isinstance(x, (int, float, np.number)) for x in (*a, *b))
    return numbers and (aggregate is mean or getattr(aggregate, "__name__", "") == "mean")


def _means(d: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The mean of d over RESAMPLES draws."""
    rows = max(1, CHUNK // len(d))
    counts = [min(rows, RESAMPLES - at) for at in range(0, RESAMPLES, rows)]
    return np.concatenate([d[generator.integers(len(d), size=(k, len(d)))].mean(1) for k in counts])
