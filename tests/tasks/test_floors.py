import gzip
import math

import numpy as np
import pytest

from glactl.tasks.floors import LONGEST, NGram, floors

TRAIN = b"the cat sat on the mat\0the dog sat\0" * 3 + bytes(range(256))


@pytest.mark.parametrize("order", [0, 1, 2, 5, LONGEST])
@pytest.mark.parametrize(
    "context", [b"", b"t", b"the c", b"qqqqqqqq", b"e qqthe", b"\xff\x00", b"the dog sat"]
)
def test_the_probabilities_of_the_next_byte_sum_to_one(order, context):
    model = NGram(TRAIN, order)
    p = [model.probabilities(context + bytes([w]))[-1] for w in range(256)]
    assert min(p) > 0
    # (1) rounds a few times an order, each time by at most eps / 2 of a probability
    assert sum(p) == pytest.approx(1, rel=8 * (order + 1) * np.finfo(float).eps)


def counted(text, context, byte):
    return sum(
        text[i : i + len(context)] == context and text[i + len(context)] == byte
        for i in range(len(text) - len(context))
    )


def witten_bell(text, context, byte, order):
    """(1) and (2), in plain Python."""
    p = 1 / 256
    for m in range(min(order, len(context)) + 1):
        h = context[len(context) - m :]
        c = [counted(text, h, w) for w in range(256)]
        kinds = sum(n > 0 for n in c)
        if kinds:
            p = (c[byte] + kinds * p) / (sum(c) + kinds)
    return p


@pytest.mark.parametrize("order", [0, 1, 3])
def test_against_the_definition(order):
    text = b"abracadabra\0abrac"
    held_out = b"cadabrx\0"
    found = NGram(text, order).probabilities(held_out)
    expected = [witten_bell(text, held_out[:i], w, order) for i, w in enumerate(held_out)]
    assert found == pytest.approx(expected, rel=1e-14)


def test_bits_count_the_end_of_a_document_and_bytes_do_not():
    model = NGram(b"abab\0" * 20, 1)
    p = model.probabilities(b"ab\0")
    assert model.bits_per_byte(b"ab\0") == pytest.approx(-np.log2(p).sum() / 2)


def test_uniform_bytes_are_not_compressed():
    """No model knows more of them than their range, and the two simplest come near to it."""
    rng = np.random.default_rng(0)
    train, held_out = (rng.integers(65, 97, n, np.uint8).tobytes() for n in (100_000, 10_000))
    found = floors(train, held_out)
    assert set(found) == {"gzip -9", "bigram", "order-5 n-gram"}
    # 32 letters: 5 bits. Counts of about n = 3,000 a letter and context, each off by its root,
    # cost about (32 - 1) / (2 n ln 2) bits a byte
    assert NGram(train, 1).bits_per_byte(held_out) == pytest.approx(5, abs=4 * 31 / 6000 / 0.69)
    assert min(found.values()) > 5


def test_longer_contexts_help_where_words_repeat():
    rng = np.random.default_rng(0)
    train, held_out = (
        b"".join(
            b"%b and %b\0" % tuple(rng.choice([b"red", b"great", b"rest"], 2)) for _ in range(n)
        )
        for n in (2000, 100)
    )
    found = floors(train, held_out)
    least = 200 * np.log2(3) / (len(held_out) - 100)  # one of three words, twice a document
    assert least < found["order-5 n-gram"] < found["bigram"]
    size = len(held_out) - 100
    assert found["gzip -9"] == 8 * len(gzip.compress(held_out, 9, mtime=0)) / size


def test_without_training_text_only_gzip_is_left():
    assert set(floors(None, b"some text\0")) == {"gzip -9"}


def test_texts_shorter_than_the_context():
    assert NGram(b"", 5).probabilities(b"ab").tolist() == [1 / 256, 1 / 256]
    assert NGram(b"a", 5).probabilities(b"").tolist() == []
    (p,) = NGram(b"a", 5).probabilities(b"a")
    assert p == (1 + 1 / 256) / 2
    assert math.isfinite(NGram(b"a", 5).bits_per_byte(b"b\0"))


def test_an_order_out_of_range():
    with pytest.raises(ValueError, match="order is 8; allowed: 0 to 7"):
        NGram(b"a", 8)
