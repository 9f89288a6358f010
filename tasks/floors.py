r"""What simple models of bytes reach on held-out text: the floors that a language model must pass.

An n-gram model of order N gives each byte w behind the bytes h, its last N, the probability p_N,
built up from the shorter contexts by Witten and Bell's interpolation, h' being h without its first:

    p_m(w | h) = (c(h w) + t(h) p_{m-1}(w | h')) / (c(h) + t(h)),   m = 0, ..., N          (1)
    p_{-1}(w) = 1/256                                                                      (2)

with c(h w) the times that w followed h in training, c(h) = sum_w c(h w), and t(h) the number of
different bytes that followed h. As sum_w c(h w) = c(h), each p_m sums to 1 if p_{m-1} does; where
h was not seen, c(h) = t(h) = 0, p_m is p_{m-1}. A context ends with the text before it: the first
bytes of the text have shorter ones.

Documents end with a NUL, whose probability counts as theirs, while it is no byte of the text:

    bits per byte = -sum log2 p / (bytes without the NULs)                                 (3)

Source: Witten and Bell, "The zero-frequency problem", IEEE Trans. Inf. Theory 37(4), 1991, method
C; interpolated as in Chen and Goodman, arXiv:cmp-lg/9606011, Sec. 2.4.
"""

import gzip
from dataclasses import dataclass

import numpy as np

MAX_TEXT = 8_000_000  # bytes of training text above which n-grams are left out
LONGEST = 7  # bytes of context: with the byte behind, all that a 64-bit integer holds


@dataclass(frozen=True)
class _Counts:
    """Of one length of context: each h w and each h as an integer, sorted, with its counts."""

    pairs: np.ndarray  # h w, uint64
    of_pair: np.ndarray  # c(h w)
    contexts: np.ndarray  # h, uint64
    of_context: np.ndarray  # c(h)
    kinds: np.ndarray  # t(h)


class NGram:
    """The model (1) of a text.

    Args:
        text: to count in.
        order: N, bytes of context, 0 to 7.

    Raises:
        ValueError: order is out of range.

    Cost: O(N n log n) time and O(N n) memory for n bytes: 2 MB at order 5 take 1.5 s.
    """

    def __init__(self, text: bytes, order: int) -> None:
        if not 0 <= order <= LONGEST:
            raise ValueError(f"order is {order}; allowed: 0 to {LONGEST}")
        self.order = order
        self._counts = [_count(_windows(text, m + 1)) for m in range(order + 1)]

    def probabilities(self, text: bytes) -> np.ndarray:
        """p_N of each byte of `text` behind those before it: (len(text),) float64."""
        p = np.full(len(text), 1 / 256)  # (2)
        for m, counts in enumerate(self._counts):
            pairs = _windows(text, m + 1)
            c_pair = _find(counts.pairs, counts.of_pair, pairs)
            contexts = pairs >> np.uint64(8)
            c = _find(counts.contexts, counts.of_context, contexts)
            t = _find(counts.contexts, counts.kinds, contexts)
            part = p[m:]  # the first m bytes have no context of m bytes
            np.divide(c_pair + t * part, c + t, out=part, where=c > 0)  # (1)
        return p

    def bits_per_byte(self, text: bytes) -> float:
        """(3) of documents that each end with a NUL."""
        return float(-np.log2(self.probabilities(text)).sum() / _n_bytes(text))


def _windows(text: bytes, n: int) -> np.ndarray:
    """Every n bytes of `text` as one integer: (len(text) - n + 1,) uint64, or none."""
    data = np.frombuffer(text, np.uint8)
    length = max(0, len(data) - n + 1)
    packed = np.zeros(length, np.uint64)
    for i in range(n):
        packed = packed << np.uint64(8) | data[i : i + length]
    return packed


def _count(windows: np.ndarray) -> _Counts:
    pairs, of_pair = np.unique(windows, return_counts=True)
    contexts, first = np.unique(pairs >> np.uint64(8), return_index=True)
    of_context = np.add.reduceat(of_pair, first) if len(first) else of_pair
    kinds = np.diff(first, append=len(pairs))
    return _Counts(pairs, of_pair, contexts, of_context, kinds)


def _find(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key, 0 where it is not among the sorted `keys`."""
    if not len(keys):
        return np.zeros(len(wanted), np.int64)
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)


def floors(train: bytes | None, valid: bytes) -> dict[str, float]:
    """Bits per byte of the held-out text.

    Args:
        train: the training documents, each with a NUL behind; None leaves the n-grams out.
        valid: the held-out ones, likewise.

    Returns:
        "gzip -9", of the held-out text alone; "bigram" and "order-5 n-gram", (1) of order 1 and 5
        counted in the training text.

    Cost: see NGram.
    """
    found = {"gzip -9": 8 * len(gzip.compress(valid, 9, mtime=0)) / _n_bytes(valid)}
    if train is not None:
        for name, order in (("bigram", 1), ("order-5 n-gram", 5)):
            found[name] = NGram(train, order).bits_per_byte(valid)
    return found


def _n_bytes(text: bytes) -> int:
    return len(text) - text.count(0)
