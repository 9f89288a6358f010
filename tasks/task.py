"""What training asks of data: batches that are a pure function of (spec, seed, index)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from glactl.tasks.tokenizer import Tokenizer


@dataclass(frozen=True)
class Batch:
    """B rows of T tokens, on the CPU.

    tokens (B, T) int64; targets (B, T) int64, targets[b, t] being what follows tokens[b, t], and
    -100 where nothing is asked. n_bytes: the bytes of UTF-8 text that the targets stand for, where
    the task counts them. cu_seqlens (N+1,) int32, where the rows are made of N packed documents:
    their bounds in the B T tokens laid end to end; every row begins a document. Of associative
    recall, pairs and lengths (B,) int64 are the key-value pairs and the tokens of each row, or
    (N,), of each document, where rows of several lengths are packed.
    """

    tokens: Tensor
    targets: Tensor
    n_bytes: int | None = None
    cu_seqlens: Tensor | None = None
    pairs: Tensor | None = None
    lengths: Tensor | None = None


class Task(Protocol):
    """Data for training and validation.

    vocab_size: every token is below it. tokenizer: None where the data is not text. n_train: rows
    of an epoch. fingerprint: sha256 (64 hex digits) of the data and the settings that shape it.
    """

    vocab_size: int
    tokenizer: Tokenizer | None
    n_train: int
    fingerprint: str

    def train_batch(self, index: int, batch_size: int) -> Batch:
        """Rows index * batch_size and following of the epochs laid end to end.

        A pure function of (spec, seed, index, batch_size); the rows are those that any other
        batch_size gives at the same row numbers.
        """

    def valid_batches(self, batch_size: int) -> Iterator[Batch]:
        """The whole validation split in order, each target once; a batch may be smaller."""

    def floors(self) -> dict[str, float]:
        """What simple compressors reach on the validation split, bits per byte; {} if not text."""


class RowOrder:
    """The rows of all epochs: epoch e is the permutation of n rows drawn from (seed, e).

    Source: shuffled without replacement anew in each epoch, as torch's RandomSampler and Zoology.
    Cost: O(n) time and memory once an epoch.
    """

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed = n, seed
        self._epochs: dict[int, np.ndarray] = {}

    def rows(self, index: int, batch_size: int) -> np.ndarray:
        """The rows (batch_size,) int64 of batch `index`; it may reach into the next epoch."""
        at = index * batch_size + np.arange(batch_size)
        found = np.empty(batch_size, np.int64)
        for epoch in np.unique(at // self.n):
            inside = at // self.n == epoch
            found[inside] = self.of(int(epoch), at[inside] % self.n)
        return found

    def of(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """The rows at these places, each from 0 to n - 1, of an epoch."""
        return self._epoch(epoch)[places]

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            if len(self._epochs) > 1:  # a batch at the border needs two
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = np.random.default_rng((self.seed, epoch)).permutation(self.n)
        return self._epochs[epoch]
