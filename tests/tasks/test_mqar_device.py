"""Batches made on the device: the same rows, in captured order, without a question to values."""

import numpy as np
import pytest
import torch

from glactl.tasks import load_task
from glactl.tasks.mqar import MQARSpec, rows_of
from glactl.tasks.mqar_device import DeviceBatches
from glactl.tasks.mqar_rows import Rows

META = torch.device("meta")
ONE = {"vocab_size": 64, "seq_len": 16, "pairs": 3, "n_train": 20, "n_valid": 5}
PARTS = [{"seq_len": 8, "pairs": 1, "rows": 9}, {"seq_len": 16, "pairs": 2, "rows": 11}]
MIXED = {"vocab_size": 64, "train": PARTS, "valid": PARTS}
GOLDEN, MASK = 0x9E3779B97F4A7C15, 2**64 - 1


def draw(start, number):
    """Element `number` of SplitMix64, in whole numbers without a limit."""
    x = (start + number * GOLDEN) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def shuffled(draws, size):
    """The first steps of Fisher and Yates' shuffle of range(size), on a list of all of it."""
    urn = list(range(size))
    for i, x in enumerate(draws):
        j = i + ((x >> 32) * (size - i) >> 32)
        urn[i], urn[j] = urn[j], urn[i]
    return urn[: len(draws)]


@pytest.mark.parametrize("start", [0, 2**63 + 12345, MASK])
@pytest.mark.parametrize(("V", "L", "n"), [(5, 4, 1), (33, 32, 8), (600, 512, 128)])
def test_rows_are_those_of_a_shuffle_one_step_at_a_time(V, L, n, start):
    """Of numbers, not of tensors; also where many swaps meet in one place."""
    slots, rows = (L - 2 * n) // 2, [0, 1, 7, 10**9]
    tokens, asked, wanted = Rows(V, L, n, 0.1, False, start)(torch.tensor(rows))
    for at, row in enumerate(rows):
        x = [draw(start, row * (2 * n + slots + L) + i) for i in range(2 * n + slots)]
        keys = [1 + key for key in shuffled(x[:n], V // 2 - 1)]
        values = [V // 2 + value for value in shuffled(x[n : 2 * n], V - V // 2)]
        assert tokens[at, : 2 * n : 2].tolist() == keys
        assert tokens[at, 1 : 2 * n : 2].tolist() == values
        arrival = [
            -np.log(((u >> 11) + 0.5) * 2.0**-53) * (s + 1) ** 0.9 for s, u in enumerate(x[2 * n :])
        ]
        places = [2 * n + 2 * int(s) for s in np.argsort(arrival)[:n]]
        assert asked[at].tolist() == sorted(places)
        value_at = dict(zip(places, values, strict=True))
        assert wanted[at].tolist() == [value_at[place] for place in sorted(places)]


def whole(batches, step):
    segment = batches.segment(step)
    batches.prepare(step, segment)
    return batches.draw(torch.tensor([step]), segment)


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("fields", "size"), [(ONE, 6), (ONE, 20), (MIXED, 4), (MIXED, 1)])
def test_batches_are_those_of_the_task(fields, size, shuffle, filled):
    more = {"shuffle": shuffle, "random_non_queries": filled}
    task = load_task(MQARSpec.model_validate(fields | more), 3)
    batches, seen = DeviceBatches(task, size, torch.device("cpu")), set()
    for step in [*range(14), 5, 0, 13]:  # over several epochs, and back
        segment = batches.segment(step)
        expected = task.train_batch(step, size)
        if segment is None:  # rows of two segments, which are packed where lengths differ
            assert len(expected.pairs.unique()) > 1
            continue
        seen.add(segment)
        tokens, asked, wanted = whole(batches, step)
        assert torch.equal(tokens, expected.tokens)
        (places,) = (expected.targets.flatten() >= 0).nonzero(as_tuple=True)
        assert torch.equal(asked, places)
        assert torch.equal(wanted, expected.targets.flatten()[places])
    assert seen == set(range(len(task.spec.segments("train"))))


def test_a_batch_of_more_than_an_epoch_is_left_to_the_task():
    task = load_task(MQARSpec.model_validate(ONE), 0)
    assert DeviceBatches(task, 21, torch.device("cpu")).segment(0) is None


def test_nothing_asks_for_values():
    """On tensors that have none: keys, values, slots, orders and the number of the step."""
    task = load_task(MQARSpec.model_validate(ONE | {"random_non_queries": True}), 0)
    made = rows_of(task.spec, 0, "train", device=META)(torch.zeros(4, dtype=torch.int64).to(META))
    assert [tuple(part.shape) for part in made] == [(4, 16), (4, 3), (4, 3)]
    batches = DeviceBatches(task, 4, META)
    tokens, asked, wanted = batches.draw(torch.zeros(1, dtype=torch.int64, device=META), 0)
    assert (tuple(tokens.shape), tuple(asked.shape), tuple(wanted.shape)) == ((4, 16), (12,), (12,))


@pytest.mark.gpu
def test_a_gpu_makes_the_same_rows():
    spec = MQARSpec(seq_len=512, pairs=64, random_non_queries=True)
    rows = torch.arange(2000)
    here = rows_of(spec, 0, "train")(rows)
    there = rows_of(spec, 0, "train", device="cuda")(rows.cuda())
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a, b.cpu())
