from collections import Counter

import numpy as np
import pytest

from glactl.tasks.mixture import Mixture, Shuffle


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 15, 16, 17, 64, 65, 1000])
def test_each_epoch_is_a_permutation_of_its_own(n):
    order = Shuffle(n, (7, 0)).rows(np.arange(3 * n))
    epochs = [order[i * n : (i + 1) * n].tolist() for i in range(3)]
    assert all(sorted(e) == list(range(n)) for e in epochs)
    if n > 15:
        assert len({tuple(e) for e in epochs}) == 3
        assert Shuffle(n, (8, 0)).rows(np.arange(n)).tolist() != epochs[0]
        assert Shuffle(n, (7, 1)).rows(np.arange(n)).tolist() != epochs[0]


def test_a_place_gives_its_row_whatever_else_is_asked_for():
    whole = Shuffle(100, (0,)).rows(np.arange(250))
    for places in ([3], [249, 3, 100, 99], range(90, 210, 7)):
        places = np.array(places)
        assert Shuffle(100, (0,)).rows(places).tolist() == whole[places].tolist()


def test_every_order_of_few_rows_is_equally_likely():
    """chi2 of 23 degrees: above 60 once in 30,000 times; the seeds are fixed."""
    n, draws = 4, 2400
    found = Counter(tuple(Shuffle(n, (s,)).rows(np.arange(n))) for s in range(draws))
    assert len(found) == 24
    assert sum((c - draws / 24) ** 2 / (draws / 24) for c in found.values()) < 60


def test_neighbours_do_not_stay_neighbours():
    """Of n - 1 pairs of places one on average stays a pair of rows; above 8 once in a million."""
    order = Shuffle(10_000, (0,)).rows(np.arange(10_000))
    assert (np.diff(order) == 1).sum() <= 8
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.05  # 5 deviations of 1 / 100


@pytest.mark.parametrize("weights", [[1], [1, 1], [5, 3, 2], [0.7, 0.299, 0.001], [3, 1e-6, 4, 4]])
def test_a_mixture_has_its_weights_at_any_length(weights):
    n = 3000
    source, number = Mixture(weights).rows(0, n)
    counts = np.cumsum(source[:, None] == np.arange(len(weights)), 0)
    wanted = np.arange(1, n + 1)[:, None] * np.array(weights) / sum(weights)
    assert np.abs(counts - wanted).max() <= 1 + len(weights) / 2
    for i in range(len(weights)):  # and of each source every row, in order
        assert number[source == i].tolist() == list(range(counts[-1, i]))


def test_any_part_of_a_mixture_is_what_it_is_in_the_whole():
    mixture = Mixture([0.5, 0.3, 0.15, 0.05])
    source, number = mixture.rows(0, 2000)
    for first, count in [(0, 1), (1, 7), (777, 100), (1990, 10)]:
        a, b = mixture.rows(first, count)
        assert a.tolist() == source[first : first + count].tolist()
        assert b.tolist() == number[first : first + count].tolist()
    far, _ = mixture.rows(10**12, 100)
    assert len(far) == 100


def test_only_ratios_of_weights_count():
    a, b = Mixture([1, 3]).rows(5, 50), Mixture([0.25, 0.75]).rows(5, 50)
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
