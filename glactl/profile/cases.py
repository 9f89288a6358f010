"""What `glactl profile` measures, as data: cases, their rows, and where attention falls behind.

A case is an operator, a layer or a model with all its rows, and has a process of its own. Every
length is measured with the same number of tokens in a call, so shorter sequences come in larger
batches and the times of one mixer are those of the same work.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from glactl.measure import Rates
from glactl.models.lm import LMSpec
from glactl.profile.operators import Shape

BOTH = "forward+backward"
WORKS = {"operator": ("forward", BOTH), "layer": ("forward", BOTH)}
PHASES = ("train", "prefill", "decode")  # of a model
SLOWEST = {"operator": BOTH, "layer": BOTH, "model": "train"}  # what crossovers are told for


@dataclass(frozen=True)
class Case:
    """Rows of one operator, layer or model, to be measured in one process.

    items: (work, T) of each row. shape: of a call; its batch and T are those of the first row, and
    every row has about shape.tokens tokens. scan: quickly, without memory and error. kernels: with
    the time of every kernel. warm: once, for the sake of what is compiled.
    """

    part: str
    name: str
    items: tuple[tuple[str, int], ...]
    shape: Shape
    device: str
    rates: Rates
    seconds: float
    spec: LMSpec | None = None
    scan: bool = False
    kernels: bool = False
    warm: bool = False

    def at(self, T: int) -> Shape:
        """The shape of a row of length T."""
        s = self.shape
        return Shape(max(1, s.tokens // T), T, s.heads, s.width, s.slots, s.dtype)


@dataclass(frozen=True)
class Measured:
    """One measured row; times in seconds, memory in bytes.

    A call of decode is one token of every row of the batch, after T tokens. moved and flops are
    the least that a call needs, floor the least time for them here, of_floor its part of the
    median (1 is the best possible). bound: which of the two the floor is of, or "host" where the
    host takes 90 % of the time to give the call to the device. saved: kept for the backward pass.
    error: relative, against fp64, at most `allowed` where the row is right.
    """

    part: str  # operator, layer or model
    name: str
    work: str
    T: int
    batch: int
    median: float
    p10: float
    p90: float
    repeats: int
    tokens_per_s: float
    flops: float
    moved: float
    floor: float
    of_floor: float
    bound: str
    peak: int | None = None
    saved: int | None = None
    error: float | None = None
    error_T: int | None = None
    allowed: float | None = None
    kernels: list[dict[str, Any]] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, str, str, int, int]:
        """What a row of another profile has too if it is of the same call."""
        return self.part, self.name, self.work, self.T, self.batch

    @property
    def wrong(self) -> bool:
        """Whether the error is more than is allowed, or no number."""
        return self.error is not None and not self.error <= (self.allowed or 0.0)


@dataclass(frozen=True)
class Failed:
    """A row that could not be measured, and why."""

    part: str
    name: str
    work: str
    T: int
    batch: int
    reason: str

    @property
    def key(self) -> tuple[str, str, str, int, int]:
        """As of Measured."""
        return self.part, self.name, self.work, self.T, self.batch


def allowed_error(dtype: torch.dtype, layers: int = 1) -> float:
    """The root of the spacing of numbers at 1: halfway, in digits, from rounding to all wrong.

    The errors of layers add up like those of independent draws: times the root of their number.
    """
    return math.sqrt(torch.finfo(dtype).eps * layers)


def crossovers(rows: Iterable[Measured]) -> dict[str, dict[str, dict[str, Any]]]:
    """`crossover` of each part, of training or of forward and backward together."""
    found = {}
    for part, work in SLOWEST.items():
        mine = [row for row in rows if row.part == part and row.work == work]
        if at := crossover(mine):
            found[part] = at
    return found


def crossover(rows: Sequence[Measured]) -> dict[str, dict[str, Any]]:
    """For each linear mixer: the length at which softmax attention's time passes its own.

    Of the fastest attention at each length. The length is interpolated between the two measured
    ones around it, both times taken as powers of the length. `length` is None where one of the two
    is faster at every length measured, and `faster` says which is at the longest, `ratio` how much.
    """
    times: dict[str, dict[int, float]] = {}
    for row in rows:
        name = "attention" if row.name.startswith("attention") else row.name
        seconds = row.median / (row.batch * row.T)
        of = times.setdefault(name, {})
        of[row.T] = min(seconds, of.get(row.T, math.inf))
    attention = times.pop("attention", {})
    found: dict[str, dict[str, Any]] = {}
    for name, own in times.items():
        lengths = sorted(attention.keys() & own.keys())
        if not lengths:
            continue
        # log of attention's time over the mixer's, per length; positive: the mixer is faster
        ratio = {T: math.log(attention[T] / own[T]) for T in lengths}
        length = None
        for a, b in pairwise(lengths):
            if ratio[a] < 0 <= ratio[b]:
                share = ratio[a] / (ratio[a] - ratio[b])
                length = round(a * (b / a) ** share)
        last = ratio[lengths[-1]]
        found[name] = {
            "length": length,
            "faster": name if last >= 0 else "attention",
            "ratio": math.exp(abs(last)),
            "from": lengths[0],
            "to": lengths[-1],
        }
    return found
