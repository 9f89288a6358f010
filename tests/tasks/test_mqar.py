import math
import time
import tracemalloc

import numpy as np
import pytest
import torch

from glactl.tasks import load_task
from glactl.tasks.mqar import MQARSpec, make_rows

SHAPES = [  # vocabulary, row, pairs: published ones, the least possible, an odd vocabulary
    (8192, 64, 4),
    (8192, 512, 64),
    (5, 4, 1),
    (33, 32, 8),
    (20, 16, 2),
]


def rows_of(V, L, n, count=200, seed=0, split="train", **more):
    spec = MQARSpec(vocab_size=V, seq_len=L, pairs=n, **more)
    return make_rows(spec, seed, split, np.arange(count))


@pytest.mark.parametrize(("V", "L", "n"), SHAPES)
@pytest.mark.parametrize("filled", [False, True])
def test_a_row(V, L, n, filled):
    """Every property of the published generator, row by row."""
    tokens, targets = rows_of(V, L, n, random_non_queries=filled)
    assert tokens.shape == targets.shape == (200, L)
    assert tokens.dtype == targets.dtype == np.int64
    assert tokens.min() >= 0
    assert tokens.max() < V
    for row, asked in zip(tokens, targets, strict=True):
        keys, values = row[0 : 2 * n : 2], row[1 : 2 * n : 2]
        assert len(set(keys)) == len(set(values)) == n
        assert keys.min() >= 1
        assert keys.max() < V // 2
        assert values.min() >= V // 2
        assert values.max() < V
        (places,) = (asked != -100).nonzero()
        assert len(places) == n
        assert places.min() >= 2 * n
        assert not (places % 2).any()
        assert sorted(row[places]) == sorted(keys)  # each key once
        value_of = dict(zip(keys, values, strict=True))
        assert [value_of[k] for k in row[places]] == list(asked[places])
        others = np.delete(row[2 * n :], places - 2 * n)
        if not filled:
            assert not others.any()


def test_the_row_drawn_in_the_docstring():
    (tokens,), (targets,) = rows_of(20, 16, 2, count=1)
    assert tokens.tolist() == [9, 13, 2, 10, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0]
    assert {i: t for i, t in enumerate(targets.tolist()) if t != -100} == {4: 13, 14: 10}


def chi_square(found, expected):
    """Pearson's statistic in standard deviations from its mean: about normal, mean 0, sd 1."""
    assert expected.min() >= 5  # else the statistic is no chi-square
    freedom = len(expected) - 1
    return (((found - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


LIMIT = 5  # standard deviations; the seeds are fixed, so a pass stays one


def slots(V, L, n, count, **more):
    """The slot of each key in order, (count, n), from 0."""
    tokens, _ = rows_of(V, L, n, count, **more)
    after = tokens[:, 2 * n :: 2]
    return (after[:, None, :] == tokens[:, 0 : 2 * n : 2, None]).argmax(-1)


@pytest.mark.parametrize("power_a", [0.01, 0.5, 1.0])
def test_the_first_query_follows_the_power_law(power_a):
    found = np.bincount(slots(256, 64, 4, 20_000, power_a=power_a)[:, 0], minlength=28)
    weight = np.arange(1, 29) ** (power_a - 1)
    assert abs(chi_square(found, 20_000 * weight / weight.sum())) < LIMIT
    for wrong in (power_a - 1.1, power_a - 0.9):  # the test can tell them apart
        weight = np.arange(1, 29) ** wrong
        assert abs(chi_square(found, 20_000 * weight / weight.sum())) > LIMIT


def test_later_queries_are_drawn_without_replacement():
    """All ordered triples of 5 slots, against the product of the conditional probabilities."""
    found = slots(64, 16, 3, 40_000) @ [25, 5, 1]
    weight = np.arange(1, 6) ** -0.99
    p = np.zeros(125)
    for a in range(5):
        for b in {*range(5)} - {a}:
            for c in {*range(5)} - {a, b}:
                p[25 * a + 5 * b + c] = (
                    weight[a]
                    / weight.sum()
                    * weight[b]
                    / (weight.sum() - weight[a])
                    * weight[c]
                    / (weight.sum() - weight[a] - weight[b])
                )
    assert p.sum() == pytest.approx(1)
    counts = np.bincount(found, minlength=125)
    assert not counts[p == 0].any()
    assert abs(chi_square(counts[p > 0], 40_000 * p[p > 0])) < LIMIT


def test_queries_crowd_as_published():
    """At (64, 4), 39 % in the first tenth, 3 of 28 slots; the median is slot 4, counted from 0."""
    found = slots(8192, 64, 4, 20_000).ravel()
    assert (found < 3).mean() == pytest.approx(0.39, abs=0.005)  # as it was rounded
    assert np.median(found) == 4


def test_keys_values_and_filling_are_uniform():
    tokens, _ = rows_of(33, 32, 8, 20_000, random_non_queries=True)
    for place, low, high in [(0, 1, 16), (14, 1, 16), (1, 16, 33), (15, 16, 33), (17, 0, 33)]:
        found = np.bincount(tokens[:, place], minlength=33)
        assert found.sum() == found[low:high].sum()
        expected = np.full(high - low, 20_000 / (high - low))
        assert abs(chi_square(found[low:high], expected)) < LIMIT, place


def test_a_row_depends_on_its_number_and_the_seed_alone():
    spec = MQARSpec(vocab_size=64, seq_len=32, pairs=4, random_non_queries=True)
    tokens, targets = make_rows(spec, 0, "train", np.arange(50))
    some = np.array([49, 3, 3, 0])
    again = make_rows(spec, 0, "train", some)
    assert (again[0] == tokens[some]).all()
    assert (again[1] == targets[some]).all()
    for other in (make_rows(spec, 1, "train", some), make_rows(spec, 0, "valid", some)):
        assert (other[0] != tokens[some]).any(1).all()


def test_blocks_do_not_show(monkeypatch):
    whole = rows_of(64, 32, 4)
    monkeypatch.setattr("glactl.tasks.mqar.TABLE", 64 * 7)
    for a, b in zip(whole, rows_of(64, 32, 4), strict=True):
        assert (a == b).all()


SMALL = MQARSpec(vocab_size=64, seq_len=16, pairs=2, n_train=10, n_valid=5)


def rows_in(batch):
    return {tuple(row) for row in torch.cat([batch.tokens, batch.targets], 1).tolist()}


def test_an_epoch_is_every_row_once_in_an_order_of_its_own():
    task = load_task(SMALL, 0)
    assert (task.vocab_size, task.n_train, task.tokenizer) == (64, 10, None)
    first, second = task.train_batch(0, 10), task.train_batch(1, 10)
    assert len(rows_in(first)) == 10
    assert rows_in(first) == rows_in(second)
    assert not torch.equal(first.tokens, second.tokens)


def test_a_batch_is_a_function_of_its_index():
    rows = torch.cat([load_task(SMALL, 0).train_batch(i, 10).tokens for i in range(3)])
    task = load_task(SMALL, 0)
    for index in (6, 0, 3, 6):  # 4 rows at a time reach from one epoch into the next
        batch = task.train_batch(index, 4)
        assert torch.equal(batch.tokens, rows[4 * index : 4 * index + 4])
    assert torch.equal(task.train_batch(0, 30).tokens, rows)


def test_a_batch_carries_pairs_and_asks_for_them():
    batch = load_task(SMALL, 0).train_batch(0, 4)
    assert batch.pairs.tolist() == [2] * 4
    assert (batch.targets != -100).sum(1).tolist() == [2] * 4
    assert batch.n_bytes is batch.cu_seqlens is None


def test_validation_is_all_rows_in_order():
    task = load_task(SMALL, 0)
    sizes = [len(b.tokens) for b in task.valid_batches(2)]
    assert sizes == [2, 2, 1]
    (whole,) = task.valid_batches(9)
    assert torch.equal(torch.cat([b.tokens for b in task.valid_batches(2)]), whole.tokens)
    assert not rows_in(whole) & rows_in(task.train_batch(0, 10))
    assert task.floors() == {}


def test_the_fingerprint_tells_data_apart():
    specs = [SMALL, SMALL.model_copy(update={"pairs": 3}), MQARSpec()]
    prints = {load_task(spec, seed).fingerprint for spec in specs for seed in (0, 1)}
    assert len(prints) == 6
    assert load_task(SMALL, 0).fingerprint in prints
    assert {len(p) for p in prints} == {64}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seq_len": 65}, "seq_len 65 is odd; allowed: even numbers"),
        ({"pairs": 17}, "pairs 17 do not fit seq_len 64; allowed: at most a quarter of it, 16"),
        ({"vocab_size": 64}, "vocab_size 64 is too small; allowed: more than seq_len 64"),
        ({"pairs": 0}, "greater than or equal to 1"),
        ({"power_a": 0}, "greater than 0"),
        ({"n_train": 0}, "greater than or equal to 1"),
        ({"pair": 4}, "Extra inputs"),
    ],
)
def test_bad_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        MQARSpec(**fields)


@pytest.mark.slow
def test_a_hundred_thousand_long_rows():
    """Published settings at their largest; a few seconds, and little beside the rows themselves."""
    spec = MQARSpec(seq_len=512, pairs=64)
    tracemalloc.start()
    began = time.monotonic()
    for at in range(0, 100_000, 10_000):
        make_rows(spec, 0, "train", np.arange(at, at + 10_000))
    seconds = time.monotonic() - began
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 30  # 2 s measured on one core
    assert peak < 300e6  # of which 10,000 rows are 82 MB
