"""Multi-query associative recall (MQAR): key-value pairs, then each key asked for once.

A row of L tokens with n pairs and a vocabulary of V; the first one for L 16, n 2, V 20 and seed 0:

    index   0  1  2  3 | 4  5  6  7  8  9 10 11 12 13 14 15
    token   9 13  2 10 | 9  0  0  0  0  0  0  0  0  0  2  0
    target  .  .  .  . |13  .  .  .  .  .  .  .  .  . 10  .      (. is -100: nothing is asked)

The keys are n of [1, V/2) without replacement, the values n of [V/2, V) without replacement; they
stand in turn in the first 2n places. The rest has (L - 2n) / 2 slots, the even indices; the keys
take distinct ones, drawn in turn without replacement with probabilities

    p(s) proportional to s^(a - 1),   s = 1, 2, ..., (L - 2n) / 2,   a = power_a          (1)

so that most queries come soon. A key's value is the target where the key stands again, and is not
put into the row. All other places hold 0 or, with random_non_queries, a token of [0, V).

Every draw has a number, and is that element of a SplitMix64 sequence,

    x_i = mix(start + i * 0x9E3779B97F4A7C15 mod 2^64)                                    (2)

with `start` from (seed, split): any row can be made alone, and the same wherever it stands. To take
n items in turn with probabilities p without replacement, take the n least of E_s / p(s), where the
E_s are exponential, in ascending order                                                   (3)
(the first is s with probability p(s), and what remains of the others is exponential again).

Source: Arora et al., "Zoology", ICLR 2024, arXiv:2312.04927; its generator's distribution, not its
numbers (it fills from a generator that the seed does not reach). (2): Steele, Lea and Flood, "Fast
Splittable Pseudorandom Number Generators", OOPSLA 2014, Fig. 17.
"""

import hashlib
from collections.abc import Iterator
from typing import Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator

from glactl.models.spec import Spec
from glactl.tasks.task import Batch, RowOrder
from glactl.tasks.tokenizer import Tokenizer

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
TABLE = 2**21  # entries of the largest table of choices: what a batch needs beside itself


class MQARSpec(Spec):
    """Multi-query associative recall; the defaults are Zoology's Figure 2 at its shortest."""

    kind: Literal["mqar"] = "mqar"
    vocab_size: int = Field(8192, ge=1)  # tokens; more than seq_len
    seq_len: int = Field(64, ge=1)  # tokens a row; even
    pairs: int = Field(4, ge=1)  # keys a row, each asked for once; at most seq_len / 4
    n_train: int = Field(100_000, ge=1)  # rows of an epoch
    n_valid: int = Field(3_000, ge=1)
    power_a: float = Field(0.01, gt=0)  # (1): small asks soon, 1 anywhere
    random_non_queries: bool = False  # fill with random tokens instead of 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.seq_len % 2:
            raise ValueError(f"seq_len {self.seq_len} is odd; allowed: even numbers")
        if 4 * self.pairs > self.seq_len:
            raise ValueError(
                f"pairs {self.pairs} do not fit seq_len {self.seq_len}; allowed: at most a quarter "
                f"of it, {self.seq_len // 4}"
            )
        if self.vocab_size <= self.seq_len:
            raise ValueError(
                f"vocab_size {self.vocab_size} is too small; allowed: more than "
                f"seq_len {self.seq_len}"
            )
        return self


class MQARTask:
    """The rows of `spec`, made when they are asked for; a `Task` (see there).

    Args:
        spec: what to make.
        seed: at least 0. Another seed gives other rows and another order.

    Cost: O(rows (L + V + n)) time; no row is kept.
    """

    tokenizer: Tokenizer | None = None

    def __init__(self, spec: MQARSpec, seed: int) -> None:
        self.spec, self.seed = spec, seed
        self.vocab_size, self.n_train = spec.vocab_size, spec.n_train
        self._order = RowOrder(spec.n_train, seed)
        # The rows follow from the settings and this code; the first ones stand for the code.
        digest = hashlib.sha256(f"{spec.model_dump_json()} {seed}".encode())
        for split in ("train", "valid"):
            for part in make_rows(spec, seed, split, np.arange(16)):
                digest.update(part.tobytes())
        self.fingerprint = digest.hexdigest()

    def train_batch(self, index: int, batch_size: int) -> Batch:
        """Rows index * batch_size and following of the epochs, each epoch in an order of its own.

        Returns:
            tokens and targets (batch_size, seq_len), and pairs (batch_size,).
        """
        return self._batch("train", self._order.rows(index, batch_size))

    def valid_batches(self, batch_size: int) -> Iterator[Batch]:
        """The n_valid rows of the validation split, which no seed shares with training."""
        for start in range(0, self.spec.n_valid, batch_size):
            stop = min(start + batch_size, self.spec.n_valid)
            yield self._batch("valid", np.arange(start, stop))

    def floors(self) -> dict[str, float]:
        """None: the rows are no text to be compressed."""
        return {}

    def _batch(self, split: Literal["train", "valid"], rows: np.ndarray) -> Batch:
        tokens, targets = map(torch.from_numpy, make_rows(self.spec, self.seed, split, rows))
        pairs = torch.full((len(rows),), self.spec.pairs)
        return Batch(tokens=tokens, targets=targets, pairs=pairs)


def make_rows(
    spec: MQARSpec, seed: int, split: Literal["train", "valid"], rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a split with the numbers `rows`.

    Args:
        spec: the distribution; n_train and n_valid have no influence.
        seed: at least 0.
        split: one of two sequences of rows without end.
        rows: (B,) integers, each at least 0, in any order.

    Returns:
        tokens (B, L) int64 and targets (B, L) int64, -100 where nothing is asked.

    Cost: O(B (L + V + n)) time, in blocks of which each needs at most about 2 TABLE numbers.
    """
    L, V = spec.seq_len, spec.vocab_size
    sequence = np.random.SeedSequence((seed, int(split == "valid")))
    start = sequence.generate_state(1, np.uint64)[0]
    tokens = np.zeros((len(rows), L), np.int64)
    targets = np.full((len(rows), L), -100, np.int64)
    block = max(1, TABLE // max(V, L))
    for at in range(0, len(rows), block):
        part = slice(at, at + block)
        _fill(spec, start, rows[part].astype(np.uint64), tokens[part], targets[part])
    return tokens, targets


def _fill(
    spec: MQARSpec, start: np.uint64, rows: np.ndarray, tokens: np.ndarray, targets: np.ndarray
) -> None:
    """Write the given rows into tokens (B, L), which is zero, and targets, which is -100."""
    L, V, n = spec.seq_len, spec.vocab_size, spec.pairs
    slots = (L - 2 * n) // 2
    # As many draws a row whatever is used of them: n keys, n values, the slots, L fillings.
    first = rows * np.uint64(2 * n + slots + L)
    keys = 1 + _choose(_draws(start, first, n), V // 2 - 1)
    values = V // 2 + _choose(_draws(start, first + np.uint64(n), n), V - V // 2)
    uniform = _draws(start, first + np.uint64(2 * n), slots) >> np.uint64(11)
    exponential = -np.log((uniform + 0.5) * 2.0**-53)
    arrival = exponential * np.arange(1, slots + 1) ** (1 - spec.power_a)  # (3) with (1)
    asked = 2 * n + 2 * np.argsort(arrival, axis=1)[:, :n]  # (B, n): where key i stands again
    if spec.random_non_queries:
        tokens[:] = _below(V, _draws(start, first + np.uint64(2 * n + slots), L))
    tokens[:, 0 : 2 * n : 2] = keys
    tokens[:, 1 : 2 * n : 2] = values
    np.put_along_axis(tokens, asked, keys, axis=1)
    np.put_along_axis(targets, asked, values, axis=1)


def _draws(start: np.uint64, first: np.ndarray, count: int) -> np.ndarray:
    """Elements first, ..., first + count - 1 of the sequence (2): (B, count) uint64."""
    x = (first[:, None] + np.arange(count, dtype=np.uint64)) * GOLDEN + start  # mod 2^64
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _below(limit: int, draws: np.ndarray) -> np.ndarray:
    """Integers of [0, limit), int64; limit < 2^31. No one is likelier by more than limit / 2^32."""
    return ((draws >> np.uint64(32)) * np.uint64(limit) >> np.uint64(32)).astype(np.int64)


def _choose(draws: np.ndarray, limit: int) -> np.ndarray:
    """n of [0, limit) without replacement for each row, in random order.

    The first n steps of Fisher and Yates' shuffle, one for each column of draws (B, n).

    Returns:
        (B, n) int32.
    """
    B, n = draws.shape
    table = np.tile(np.arange(limit, dtype=np.int32), (B, 1))
    row = np.arange(B)
    for i in range(n):
        j = i + _below(limit - i, draws[:, i])
        table[row, i], table[row, j] = table[row, j], table[row, i]
    return table[:, :n]
