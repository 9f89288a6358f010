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

The rows are made by mqar_rows.py, on any device, and mqar_device.py makes batches of them there.

A mixture is made of segments, each of rows of one length and number of pairs. An epoch has the
segments in the order of the list; a batch whose rows have one length is a table of them, and one
that reaches from one length into the next is packed, its rows end to end in one.

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
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, ValidationError, model_validator

from glactl.models.spec import Spec
from glactl.tasks.mqar_rows import Rows
from glactl.tasks.task import Batch, RowOrder
from glactl.tasks.tokenizer import Tokenizer

Split = Literal["train", "valid"]
SPLITS: tuple[Split, Split] = ("train", "valid")
TABLE = 2**21  # numbers of the largest table that making a block of rows needs


class Segment(Spec):
    """Rows of one kind in a mixture."""

    seq_len: int = Field(ge=1)
    pairs: int = Field(ge=1)
    rows: int = Field(ge=1)


class MQARSpec(Spec):
    """Multi-query associative recall; the defaults are Zoology's Figure 2 at its shortest.

    train and valid make a mixture, both or neither; seq_len and pairs are then the largest of both,
    n_train and n_valid the sums of rows, and are filled in.
    """

    kind: Literal["mqar"] = "mqar"
    vocab_size: int = Field(8192, ge=1)  # tokens; more than seq_len
    seq_len: int = Field(64, ge=1)  # tokens a row; even
    pairs: int = Field(4, ge=1)  # keys a row, each asked for once; at most seq_len / 4
    n_train: int = Field(100_000, ge=1)  # rows of an epoch
    n_valid: int = Field(3_000, ge=1)
    power_a: float = Field(0.01, gt=0)  # (1): small asks soon, 1 anywhere
    random_non_queries: bool = False  # fill with random tokens instead of 0
    train: tuple[Segment, ...] | None = Field(None, min_length=1)
    valid: tuple[Segment, ...] | None = Field(None, min_length=1)
    shuffle: bool = True  # the rows of a segment stand in another order in every epoch

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        """The fields that follow from a mixture; what is wrong with its segments is said later."""
        if not isinstance(data, dict) or not (data.get("train") and data.get("valid")):
            return data
        try:
            train, valid = (
                [Segment.model_validate(part) for part in data[name]] for name in ("train", "valid")
            )
        except (TypeError, ValidationError):
            return data
        follows = {
            "seq_len": max(part.seq_len for part in train + valid),
            "pairs": max(part.pairs for part in train + valid),
            "n_train": sum(part.rows for part in train),
            "n_valid": sum(part.rows for part in valid),
        }
        for name, value in follows.items():
            if data.get(name, value) != value:
                raise ValueError(
                    f"{name} is {data[name]}, but the segments of train and valid make it {value}; "
                    "allowed: to leave it out"
                )
        return data | follows

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.train is None) != (self.valid is None):
            lone = "train" if self.valid is None else "valid"
            raise ValueError(f"{lone} has segments alone; allowed: train and valid, or neither")
        for part in [*self.segments("train"), *self.segments("valid")]:
            if part.seq_len % 2:
                raise ValueError(f"seq_len {part.seq_len} is odd; allowed: even numbers")
            if 4 * part.pairs > part.seq_len:
                raise ValueError(
                    f"pairs {part.pairs} do not fit seq_len {part.seq_len}; allowed: at most a "
                    f"quarter of it, {part.seq_len // 4}"
                )
        if self.vocab_size <= self.seq_len:
            raise ValueError(
                f"vocab_size {self.vocab_size} is too small; allowed: more than "
                f"seq_len {self.seq_len}"
            )
        return self

    def segments(self, split: Split) -> tuple[Segment, ...]:
        """Those of a split; one where there is no mixture."""
        mixture = self.train if split == "train" else self.valid
        rows = self.n_train if split == "train" else self.n_valid
        return mixture or (Segment(seq_len=self.seq_len, pairs=self.pairs, rows=rows),)


class MQARTask:
    """The rows of `spec`, made when they are asked for; a `Task` (see there).

    Args:
        spec: what to make.
        seed: at least 0. Another seed gives other rows and another order.

    Cost: O(rows (L + n log n)) time; of the rows, those of the latest validation are kept.
    """

    tokenizer: Tokenizer | None = None

    def __init__(self, spec: MQARSpec, seed: int) -> None:
        self.spec, self.seed = spec, seed
        self.vocab_size, self.n_train = spec.vocab_size, spec.n_train
        parts = spec.segments("train")
        self._first = np.cumsum([0, *(part.rows for part in parts)])  # row of each segment; n_train
        self._orders = [RowOrder(part.rows, seed) for part in parts]
        self._valid: tuple[int, list[Batch]] = 0, []  # batches of so many rows
        # The rows follow from the settings and this code; the first ones stand for the code.
        # A field of the mixture at its default is left out: it changes no fingerprint.
        later = {name for name in ("train", "valid") if getattr(spec, name) is None}
        later |= {"shuffle"} if spec.shuffle else set()
        digest = hashlib.sha256(f"{spec.model_dump_json(exclude=later)} {seed}".encode())
        for split in SPLITS:
            for segment in range(len(spec.segments(split))):
                for part in make_rows(spec, seed, split, np.arange(16), segment):
                    digest.update(part.tobytes())
        self.fingerprint = digest.hexdigest()

    def train_batch(self, index: int, batch_size: int) -> Batch:
        """Rows index * batch_size and following of the epochs.

        In every epoch the segments stand in their order; the rows of one in another order each
        time, or as they are numbered where the spec has shuffle false.

        Returns:
            tokens and targets (batch_size, L) where the rows have one length L, or (1, sum of L),
            packed, with cu_seqlens; pairs and lengths (batch_size,).
        """
        at = index * batch_size + np.arange(batch_size)
        epoch, place = np.divmod(at, self.n_train)
        segment = np.searchsorted(self._first, place, side="right") - 1
        cuts = np.flatnonzero(np.diff(segment) | np.diff(epoch)) + 1
        parts = []
        for rows in np.split(np.arange(batch_size), cuts):
            i, first = int(segment[rows[0]]), int(place[rows[0]])
            places = first - self._first[i] + np.arange(len(rows))
            numbers = self.order(i, int(epoch[rows[0]]), places)
            parts.append(self._batch("train", i, numbers))
        return _joined(parts)

    def valid_batches(self, batch_size: int) -> Iterator[Batch]:
        """The n_valid rows of the validation split, which no seed shares with training.

        A batch has rows of one segment, and no more tokens than batch_size of the longest rows
        that are trained on, unless one row has; the last of each may be smaller.
        """
        if self._valid[0] != batch_size:
            self._valid = batch_size, list(self._validation(batch_size))
        yield from self._valid[1]

    def order(self, segment: int, epoch: int, places: np.ndarray) -> np.ndarray:
        """The numbers of the rows at these places, from 0, of a segment in an epoch."""
        return self._orders[segment].of(epoch, places) if self.spec.shuffle else places

    def _validation(self, batch_size: int) -> Iterator[Batch]:
        longest = max(part.seq_len for part in self.spec.segments("train"))
        for i, part in enumerate(self.spec.segments("valid")):
            size = max(1, min(batch_size, batch_size * longest // part.seq_len))
            for start in range(0, part.rows, size):
                rows = np.arange(start, min(start + size, part.rows))
                yield self._batch("valid", i, rows)

    def floors(self) -> dict[str, float]:
        """None: the rows are no text to be compressed."""
        return {}

    def _batch(self, split: Split, segment: int, rows: np.ndarray) -> Batch:
        made = make_rows(self.spec, self.seed, split, rows, segment)
        part = self.spec.segments(split)[segment]
        return Batch(
            tokens=torch.from_numpy(made[0]),
            targets=torch.from_numpy(made[1]),
            pairs=torch.full((len(rows),), part.pairs),
            lengths=torch.full((len(rows),), part.seq_len),
        )


def _joined(parts: list[Batch]) -> Batch:
    """One batch of the rows of all, packed where their lengths differ."""
    if len(parts) == 1:
        return parts[0]
    pairs = torch.cat([part.pairs for part in parts if part.pairs is not None])
    lengths = torch.cat([part.lengths for part in parts if part.lengths is not None])
    tables = [[part.tokens for part in parts], [part.targets for part in parts]]
    if len(lengths.unique()) == 1:
        tokens, targets = map(torch.cat, tables)
        return Batch(tokens, targets, pairs=pairs, lengths=lengths)
    tokens, targets = (torch.cat([t.flatten() for t in table])[None] for table in tables)
    bounds = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    bounds[1:] = lengths.cumsum(0)
    return Batch(tokens, targets, cu_seqlens=bounds, pairs=pairs, lengths=lengths)


def rows_of(
    spec: MQARSpec, seed: int, split: Split, segment: int = 0, device: torch.device | str = "cpu"
) -> Rows:
    """What makes the rows of a split, or of one segment of a mixture, on `device`."""
    part = spec.segments(split)[segment]
    which = () if spec.train is None else (1 + segment,)
    sequence = np.random.SeedSequence((seed, int(split == "valid"), *which))
    start = int(sequence.generate_state(1, np.uint64)[0])
    filled, power = spec.random_non_queries, spec.power_a
    return Rows(spec.vocab_size, part.seq_len, part.pairs, power, filled, start, device)


def make_rows(
    spec: MQARSpec, seed: int, split: Split, rows: np.ndarray, segment: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a split with the numbers `rows`.

    Args:
        spec: the distribution; numbers of rows have no influence.
        seed: at least 0.
        split: one of two sequences of rows without end; a mixture has two for each segment.
        rows: (B,) integers, each at least 0, in any order.
        segment: of the mixture, from 0.

    Returns:
        tokens (B, L) int64 and targets (B, L) int64, -100 where nothing is asked.

    Cost: O(B (L + n log n)) time, in blocks of which each needs at most about TABLE numbers.
    """
    made = rows_of(spec, seed, split, segment)
    block = max(1, TABLE // made.length)
    tokens = np.empty((len(rows), made.length), np.int64)
    targets = np.full((len(rows), made.length), -100, np.int64)
    for at in range(0, len(rows), block):
        cut = slice(at, at + block)
        row, asked, wanted = made(torch.from_numpy(rows[cut].astype(np.int64)))
        tokens[cut] = row.numpy()
        np.put_along_axis(targets[cut], asked.numpy(), wanted.numpy(), axis=1)
    return tokens, targets
