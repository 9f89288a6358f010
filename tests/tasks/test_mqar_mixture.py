"""Recall on rows of several lengths: order, packing, what follows from the segments."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from glactl.spec import RunSpec
from glactl.tasks import load_task
from glactl.tasks.mqar import MQARSpec, make_rows

RECORDED = Path(__file__).parent / "golden" / "mqar-before-mixtures.jsonl"
TRAIN = [(8, 1, 5), (8, 2, 4), (16, 2, 6)]  # length, pairs, rows
VALID = [(8, 2, 3), (32, 8, 4)]


def mixture(**more):
    parts = {
        name: [{"seq_len": L, "pairs": n, "rows": rows} for L, n, rows in segments]
        for name, segments in (("train", TRAIN), ("valid", VALID))
    }
    return MQARSpec.model_validate({"vocab_size": 64, **parts, **more})


def rows_of(batch):
    """(tokens, targets) of each row as lists, whether packed or not."""
    lengths = batch.lengths.tolist()
    assert batch.tokens.numel() == sum(lengths)
    if batch.cu_seqlens is None:
        assert set(lengths) == {batch.tokens.shape[1]}
    else:
        assert batch.tokens.shape[0] == 1
        assert batch.cu_seqlens.dtype == torch.int32
        assert batch.cu_seqlens.tolist() == np.cumsum([0, *lengths]).tolist()
    return [
        (tokens.tolist(), targets.tolist())
        for tokens, targets in zip(
            batch.tokens.flatten().split(lengths),
            batch.targets.flatten().split(lengths),
            strict=True,
        )
    ]


def made(segment, split="train", seed=0):
    """The rows of a segment as they are numbered."""
    rows = (TRAIN if split == "train" else VALID)[segment][2]
    tokens, targets = make_rows(mixture(), seed, split, np.arange(rows), segment)
    return list(zip(tokens.tolist(), targets.tolist(), strict=True))


def test_what_follows_from_the_segments():
    spec = mixture()
    assert (spec.seq_len, spec.pairs, spec.n_train, spec.n_valid) == (32, 8, 15, 7)
    assert MQARSpec.model_validate(spec.model_dump(mode="json")) == spec
    assert load_task(spec, 0).n_train == 15


def test_an_epoch_has_the_segments_in_their_order_and_every_row_once():
    task = load_task(mixture(), 3)
    epochs = [rows_of(task.train_batch(e, 15)) for e in range(2)]
    for rows in epochs:
        for segment, (first, last) in enumerate([(0, 5), (5, 9), (9, 15)]):
            assert sorted(rows[first:last]) == sorted(made(segment, seed=3))
    assert epochs[0] != epochs[1]


def test_without_shuffling_every_epoch_is_the_list():
    task = load_task(mixture(shuffle=False), 0)
    listed = [row for segment in range(3) for row in made(segment)]
    assert rows_of(task.train_batch(0, 15)) == rows_of(task.train_batch(1, 15)) == listed


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("size", [1, 2, 4, 7, 40])
def test_any_batch_size_gives_the_same_rows(size, shuffle):
    task = load_task(mixture(shuffle=shuffle), 0)
    whole = rows_of(task.train_batch(0, 80))
    again = load_task(mixture(shuffle=shuffle), 0)
    for index in reversed(range(80 // size)):  # in any order
        rows = rows_of(again.train_batch(index, size))
        assert rows == whole[size * index : size * (index + 1)]


def test_a_batch_of_one_length_is_a_table_and_others_are_packed():
    task = load_task(mixture(), 0)
    table, both = task.train_batch(0, 8), task.train_batch(1, 8)
    assert table.tokens.shape == (8, 8)  # 1 and 2 pairs in rows of one length
    assert table.cu_seqlens is None
    assert table.pairs.tolist() == [1] * 5 + [2] * 3
    assert both.tokens.shape == (1, 8 + 6 * 16 + 8)  # the next epoch begins in it
    assert both.pairs.tolist() == [2] * 7 + [1]
    for batch in (table, both):
        asked = [sum(t != -100 for t in targets) for _, targets in rows_of(batch)]
        assert asked == batch.pairs.tolist()


def test_validation_goes_by_segments():
    batches = list(load_task(mixture(), 0).valid_batches(2))
    assert [tuple(b.tokens.shape) for b in batches] == [(2, 8), (1, 8)] + [(1, 32)] * 4
    assert [b.pairs.tolist() for b in batches] == [[2, 2], [2]] + [[8]] * 4
    rows = [row for b in batches for row in rows_of(b)]
    assert rows == made(0, "valid") + made(1, "valid")
    sizes = [len(b.tokens) for b in load_task(mixture(), 0).valid_batches(7)]
    assert sizes == [3, 3, 1]  # 7 rows of 16 tokens, the longest trained on, are 3 of 32
    sizes = [len(b.tokens) for b in load_task(mixture(), 0).valid_batches(1)]
    assert sizes == [1] * 7


def test_segments_of_one_shape_have_rows_of_their_own():
    part = {"seq_len": 8, "pairs": 2, "rows": 20}
    spec = MQARSpec.model_validate({"vocab_size": 64, "train": [part, part], "valid": [part]})
    tokens = [
        make_rows(spec, 0, split, np.arange(20), i)[0]
        for split, i in (("train", 0), ("train", 1), ("valid", 0))
    ]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (tokens[a] != tokens[b]).any(1).all()


def test_fingerprints():
    specs = [mixture(), mixture(shuffle=False), MQARSpec(vocab_size=64, seq_len=32, pairs=8)]
    assert len({load_task(spec, 0).fingerprint for spec in specs}) == 3
    record = json.loads(RECORDED.read_text().splitlines()[0])  # written before there were mixtures
    spec = RunSpec.model_validate(record["spec"])
    assert load_task(spec.data, spec.seed).fingerprint == record["fingerprint"]


PART = {"seq_len": 16, "pairs": 2, "rows": 4}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train": [PART]}, "train has segments alone; allowed: train and valid, or neither"),
        ({"valid": [PART]}, "valid has segments alone"),
        (
            {"train": [PART], "valid": [PART], "seq_len": 64},
            "seq_len is 64, but the segments of train and valid make it 16; allowed: to leave it",
        ),
        ({"train": [PART], "valid": [PART | {"pairs": 5}]}, "pairs 5 do not fit seq_len 16"),
        ({"train": [PART | {"seq_len": 17}], "valid": [PART]}, "seq_len 17 is odd"),
        ({"train": [PART], "valid": [PART], "vocab_size": 16}, "vocab_size 16 is too small"),
        ({"train": [PART | {"row": 1}], "valid": [PART]}, "Extra inputs"),
        ({"train": [PART | {"rows": 0}], "valid": [PART]}, "greater than or equal to 1"),
        ({"train": [], "valid": [PART]}, "at least 1 item"),
        ({"train": 3, "valid": [PART]}, "valid tuple"),
    ],
)
def test_bad_mixtures(fields, message):
    with pytest.raises(ValueError, match=message):
        MQARSpec.model_validate(fields)
