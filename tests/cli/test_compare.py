import math
import random

import numpy as np
import pytest

from glactl.evaluate.compare import RESAMPLES, difference, differences
from glactl.tasks.outcome import Metric, Outcome, Row, mean, mean_metric


def test_the_interval_of_a_mean_is_that_of_the_normal_law_for_many_documents():
    generator = np.random.default_rng(0)
    a = generator.normal(0.3, 1.0, 4000)
    b = a + generator.normal(0.1, 0.5, 4000)  # hard documents are hard for both
    found = difference(list(a), list(b))
    error = np.std(b - a, ddof=1) / math.sqrt(4000)
    assert found.value == pytest.approx(np.mean(b - a))
    # a quantile of R draws is off by about 2.7 error / sqrt(R)
    slack = 5 * 2.7 * error / math.sqrt(RESAMPLES)
    assert found.low == pytest.approx(found.value - 1.96 * error, abs=slack)
    assert found.high == pytest.approx(found.value + 1.96 * error, abs=slack)
    # far narrower than what two separate standard errors would give
    apart = 1.96 * math.sqrt(np.var(a) / 4000 + np.var(b) / 4000)
    assert found.high - found.low < apart


def test_nineteen_of_twenty_intervals_hold_the_true_difference():
    """Of 200 samples 190 +- 3.1 are expected; five standard deviations, and a little for n = 60."""
    generator = random.Random(1)
    held = 0
    for seed in range(200):
        a = [float(generator.random() < 0.5) for _ in range(60)]
        b = [x if generator.random() < 0.6 else float(generator.random() < 0.7) for x in a]
        found = difference(a, b, seed=seed)
        held += found.low <= 0.4 * 0.2 <= found.high
    assert 172 <= held <= 200


def test_other_metrics_are_taken_list_by_list():
    def perplexity(nats):
        return math.exp(-mean(nats))

    a, b = [-1.0, -2.0, -3.0, -2.5], [-1.1, -1.9, -2.7, -2.5]
    found = difference(a, b, perplexity)
    assert found.value == pytest.approx(perplexity(b) - perplexity(a))
    assert found.low < found.value < found.high
    assert found.resamples == 1000
    words = [(-10.0, 3), (-20.0, 5)]
    weighted = difference(words, words, lambda x: -sum(n for n, _ in x) / sum(w for _, w in x))
    assert (weighted.value, weighted.low, weighted.high) == (0, 0, 0)


def test_the_draws_are_a_function_of_the_seed():
    a, b = [0.1, 0.9, 0.4, 0.2, 0.7], [0.8, 0.3, 0.35, 0.0, 0.95]
    assert difference(a, b) == difference(a, b) != difference(a, b, seed=1)


def test_too_few_documents():
    found = difference([1.0], [0.0])
    assert (found.value, found.low, found.high) == (-1.0, None, None)
    with pytest.raises(ValueError, match="2 documents cannot be compared with 1"):
        difference([1.0, 2.0], [1.0])


def outcome(scores, **fields):
    rows = [Row(str(n), "p", "g", "o", {"contains": x}) for n, x in enumerate(scores)]
    known = {
        "task": "swde",
        "protocol": "jrt",
        "version": "1",
        "data": "hub",
        "revision": "abc",
        "context_length": 2000,
        "documents": len(rows),
        "of": len(rows),
        "metrics": {"contains": mean_metric(scores), "other": Metric(1.0, None, None)},
        "rows": rows,
        "aggregate": {"contains": mean},
    }
    return Outcome(**(known | fields))


def test_outcomes_are_compared_by_document():
    found = differences(outcome([0.0, 1.0, 0.0]), outcome([1.0, 1.0, 0.0]))
    assert found.keys() == {"contains"}
    assert found["contains"].value == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"protocol": "based"}, "swde: results of protocol jrt and based do not compare"),
        ({"context_length": 1000}, "results of context_length 2000 and 1000 do not compare"),
        ({"revision": "def"}, "results of revision abc and def do not compare"),
        ({"rows": []}, "swde: the documents differ"),
    ],
)
def test_what_does_not_mean_the_same_is_not_compared(fields, message):
    with pytest.raises(ValueError, match=message):
        differences(outcome([0.0, 1.0]), outcome([0.0, 1.0], **fields))


def test_the_standard_error_of_a_mean():
    assert mean_metric([0.0, 1.0, 1.0, 0.0]) == Metric(0.5, pytest.approx(0.5 / math.sqrt(3)), True)
    assert mean_metric([1.0]).stderr is None
