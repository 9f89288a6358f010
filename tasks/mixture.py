"""The global order of rows: each source shuffled anew in each epoch, sources mixed by weight.

A permutation of n rows is a Feistel network on pairs of h bits, 4^h >= n, with round keys c_i drawn
from (seed, epoch) and the last step of splitmix64 as round function F,

    (l, r) <- (r, l ^ (F(r + c_i) mod 2^h)),   i = 1 .. ROUNDS                         (1)

repeated until the result is below n. So a place of an epoch gives its row in O(1), without a table
of all rows, on whatever machine and in whatever order places are asked for.

In a mixture with shares p_i, the weights over their sum, the k-th row of source i stands at

    t = (k + 1/2) / p_i                                                                (2)

and the rows of all sources are taken in the order of t. Before t source i has had p_i t rows to
within 1/2, so that of the first n rows p_i n are of source i to within 1 + S / 2 for S sources, at
any n, and no table or random state is needed to know which. Row k of a source is place k mod n of
its epoch k div n: a source that is short for its weight is read again, in another order.

Sources: (1) Luby and Rackoff 1988; the repetition: Black and Rogaway 2002, "Ciphers with arbitrary
finite domains"; F: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators".
"""

from collections.abc import Sequence

import numpy as np

ROUNDS = 8


class Shuffle:
    """Permutations of n rows, one for each epoch, drawn from `seed`."""

    def __init__(self, n: int, seed: tuple[int, ...]) -> None:
        self.n, self.seed = n, seed
        half = max(1, ((n - 1).bit_length() + 1) // 2)
        self._half, self._mask = np.uint64(half), np.uint64(2**half - 1)

    def rows(self, places: np.ndarray) -> np.ndarray:
        """The rows at these places of the epochs laid end to end, (m,) int64."""
        epochs, inside = np.divmod(places, self.n)
        found = np.empty(len(places), np.int64)
        for epoch in np.unique(epochs):
            mine = epochs == epoch
            found[mine] = self._permuted(int(epoch), inside[mine].astype(np.uint64))
        return found

    def _permuted(self, epoch: int, x: np.ndarray) -> np.ndarray:
        draw = np.random.default_rng((*self.seed, epoch))
        keys = draw.integers(2**64, size=ROUNDS, dtype=np.uint64)
        x = self._network(x, keys)
        while (beyond := x >= self.n).any():  # at most 3 of 4 places are beyond n
            x[beyond] = self._network(x[beyond], keys)
        return x.astype(np.int64)

    def _network(self, x: np.ndarray, keys: np.ndarray) -> np.ndarray:
        left, right = x >> self._half, x & self._mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & self._mask)  # (1)
        return (left << self._half) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's last step, modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Mixture:
    """Which source each row of the global order is of.

    weights: of the sources, each above 0; only their ratios count.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.shares = np.array(weights, np.float64) / sum(weights)

    def rows(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The source of each of the rows first .. first + count - 1, and its number there.

        Returns:
            (count,) int64 each. Cost: O(count + sources).
        """
        margin = len(self.shares) / 2 + 1
        low = [self._before(i, first - margin) for i in range(len(self.shares))]
        high = [self._before(i, first + count + margin) for i in range(len(self.shares))]
        numbers = [np.arange(a, b) for a, b in zip(low, high, strict=True)]
        source = np.repeat(np.arange(len(numbers)), [len(n) for n in numbers])
        number = np.concatenate(numbers)
        order = np.lexsort((source, self._time(source, number)))
        kept = order[first - sum(low) :][:count]
        return source[kept], number[kept]

    def _time(self, source: int | np.ndarray, number: int | np.ndarray) -> np.ndarray:
        return np.asarray((number + 0.5) / self.shares[source])  # (2)

    def _before(self, source: int, t: float) -> int:
        """How many rows of a source stand before t, by their times as they are rounded."""
        n = max(0, int(t * self.shares[source]))
        while n > 0 and self._time(source, n - 1) >= t:
            n -= 1
        while self._time(source, n) < t:
            n += 1
        return n
