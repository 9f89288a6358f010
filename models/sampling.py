r"""How the next token of a row is drawn.

For logits z, R the tokens that the row has read or made, a penalty r > 0, a temperature c > 0 and
u uniform in [0, 1):

    z_j = z_j / r where z_j > 0, else r z_j, for j in R                                (1)
    p = softmax(z / c), kept for the top_k largest only                                (2)
    p = kept for the fewest of the largest whose sum reaches top_p times the sum       (3)
    p = kept where p_j >= min_p max(p)                                                 (4)
    token = the first j with p_1 + ... + p_j > u * sum(p)                              (5)

(5) goes from the largest p on where (2) or (3) ask for their order, else by number. Temperature 0
takes the largest z of (1). u is output number `place` of a SplitMix64 that starts at a key made of
(seed, row), place being the tokens that the row has read; modulo 2^64:

    x = key + (place + 1) 0x9e3779b97f4a7c15
    x = (x ^ x >> 30) 0xbf58476d1ce4e5b9,   x = (x ^ x >> 27) 0x94d049bb133111eb
    u = ((x ^ x >> 31) >> 40) / 2^24                                                   (6)

So u is the same on every device, in every batch, and however the row came to its place. Nothing
here waits for a GPU, and `draw` can be captured in a CUDA graph.

Sources: (1) Keskar et al. 2019, arXiv:1909.05858, Sec. 4.1, which has no case for z <= 0, where a
quotient would favour what was seen; (3) Holtzman et al. 2020, arXiv:1904.09751; (4) Nguyen et al.
2024, arXiv:2407.01082; (6) Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glactl.models.layers import to_device

GAMMA, MIX1, MIX2 = (  # of (6), as signed numbers
    x - 2**64 for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    temperature divides the logits, 0 takes the largest; top_k keeps that many tokens (None: all);
    top_p keeps the most probable tokens up to that share, in (0, 1]; seed is any integer; min_p
    keeps tokens with at least that share of the largest probability, in [0, 1];
    repetition_penalty is r of (1), above 0, and 1 changes nothing.

    Raises:
        ValueError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; allowed: 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; allowed: 1 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; allowed: more than 0, at most 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; allowed: 0 to 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(
                f"repetition_penalty is {self.repetition_penalty}; allowed: more than 0"
            )

    @property
    def largest(self) -> bool:
        """Whether the token is that of the largest logit, whatever was read before and u is."""
        return self.temperature == 0 and self.repetition_penalty == 1


class Sampler:
    """Draws the next token of each of N rows.

    Args:
        sampling: how.
        rows: the number of each row; rows of one number and seed draw the same u at a place.
        read: the tokens that each row has read, for (1); None: none.
    """

    def __init__(
        self,
        sampling: Sampling,
        rows: Sequence[int],
        read: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.sampling = sampling
        self._key = torch.tensor([_key(sampling.seed, row) for row in rows], dtype=torch.int64)
        self._read = [()] * len(rows) if read is None else read
        self._seen: Tensor | None = None  # R of (1), (N, vocab)

    def start(self, device: torch.device, vocab: int) -> "Sampler":
        """Move to the device of logits (N, vocab); returns self."""
        self._key = to_device(self._key, device)
        if self.sampling.repetition_penalty != 1:
            seen = torch.zeros(len(self._key), vocab, dtype=torch.bool)
            for row, tokens in zip(seen, self._read, strict=True):
                row[torch.tensor(sorted({t for t in tokens if t < vocab}), dtype=torch.int64)] = 1
            self._seen = to_device(seen, device)
        return self

    def keep(self, index: Tensor) -> "Sampler":
        """The sampler of the rows at these indices alone."""
        kept = Sampler(self.sampling, ())
        kept._key = self._key[index]
        kept._seen = None if self._seen is None else self._seen[index]
        return kept

    def alike(self, other: "Sampler") -> bool:
        """Whether both draw the same way, whatever the rows, and remember nothing of them."""
        return self.sampling == other.sampling and self._seen is None and other._seen is None

    def uniform(self, place: Tensor) -> Tensor:
        """u at places (N, ...), fp32: (6)."""
        key = self._key.view(-1, *[1] * (place.ndim - 1))
        x = key + (place + 1) * GAMMA
        x = (x ^ _shift(x, 30)) * MIX1
        x = (x ^ _shift(x, 27)) * MIX2
        return _shift(x ^ _shift(x, 31), 40).float() / 2**24  # (6)

    def draw(self, logits: Tensor, u: Tensor) -> Tensor:
        """The next tokens (N,) int64 of logits (N, vocab) and u (N,); rows remember them for (1).

        Cost: a sort of every row where (2) or (3) leave tokens out. The sums of (5) are in fp64, so
        that the order in which a device adds up does not choose the token.
        """
        s = self.sampling
        if s.largest:
            return logits.argmax(-1)
        z = logits.float()
        if self._seen is not None:
            r = s.repetition_penalty
            z = torch.where(self._seen, torch.where(z > 0, z / r, z * r), z)  # (1)
        chosen = z.argmax(-1) if s.temperature == 0 else self._drawn(z, u)
        if self._seen is not None:
            self._seen.scatter_(1, chosen[:, None], True)
        return chosen

    def _drawn(self, z: Tensor, u: Tensor) -> Tensor:
        s, number = self.sampling, None
        if s.top_k is not None or s.top_p < 1:
            z, number = z.sort(dim=-1, descending=True, stable=True)
        p = torch.softmax(z / s.temperature, -1).double()
        if s.top_k is not None:
            p[:, s.top_k :] = 0  # (2)
        if s.top_p < 1:
            before = p.cumsum(-1) - p
            p = p.where(before < s.top_p * p.sum(-1, keepdim=True), 0)  # (3)
        if s.min_p > 0:
            p = p.where(p >= s.min_p * p.amax(-1, keepdim=True), 0)  # (4)
        total = p.cumsum(-1)
        j = torch.searchsorted(total, u[:, None].double() * total[:, -1:], right=True)  # (5)
        return (j if number is None else number.gather(-1, j)).squeeze(-1)


def _key(seed: int, row: int) -> int:
    """64 bits of (seed, row), as a signed number."""
    digest = hashlib.sha256(f"{seed}/{row}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def _shift(x: Tensor, bits: int) -> Tensor:
    """x >> bits of int64 x as a number without a sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
