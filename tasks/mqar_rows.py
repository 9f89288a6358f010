"""Rows of associative recall as tensors of any device; mqar.py says what they are made of.

Nothing here loops over rows or waits for a GPU, and all of it can be captured in a CUDA graph.
Keys and values are what the first n steps of Fisher and Yates' shuffle of 0 .. N - 1 leave in
front: step i swaps places i and j_i >= i. Place i is not touched again, so with c_i what it held
before step i,

    c_i = c_t for the latest t < i with j_t = i, or i where there is none               (1)
    y_i = c_t for the latest t < i with j_t = j_i, or j_i where there is none           (2)

y_i being what step i brings to place i. (1) is a forest whose roots are found by doubling, in
log2(n) steps: no table of N numbers a row is needed.

Every draw is exact integer arithmetic but for the logarithm that orders the slots, and the order of
two slots can differ between devices only where their arrivals agree to a rounding of fp64.
"""

import numpy as np
import torch
from torch import Tensor

from glactl.models.sampling import GAMMA, MIX1, MIX2


class Rows:
    """Rows of L tokens with n pairs.

    Args:
        vocab: V.
        length: L.
        pairs: n.
        power: a of the law of the slots.
        filled: whether the rest is random tokens and not 0.
        start: of the sequence of draws, any 64 bits without a sign.
        device: where.
    """

    def __init__(
        self,
        vocab: int,
        length: int,
        pairs: int,
        power: float,
        filled: bool,
        start: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.vocab, self.length, self.pairs, self.filled = vocab, length, pairs, filled
        self.slots, self.device = (length - 2 * pairs) // 2, torch.device(device)
        self._draws = 2 * pairs + self.slots + length  # of a row, whatever is used of them
        used = self._draws if filled else 2 * pairs + self.slots
        self._start = start - 2**64 if start >= 2**63 else start
        self._number = torch.arange(used, device=device)
        weight = np.arange(1, self.slots + 1) ** (1 - power)  # 1 / p of a slot
        self._weight = torch.from_numpy(weight).to(device)
        self._place = torch.arange(pairs, device=device)
        sizes = torch.tensor([[vocab // 2 - 1], [vocab - vocab // 2]], device=device)
        self._left = sizes - self._place  # (2, n): keys and values still in the urn at each step
        self._first = torch.tensor([[1], [vocab // 2]], device=device)

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The rows with these numbers.

        Args:
            rows: (B,) int64, each at least 0.

        Returns:
            tokens (B, L), the n places of each row where something is asked, ascending, (B, n), and
            the targets there (B, n); all int64.

        Cost: O(B (L + n log n)) time, O(B L) memory.
        """
        n, B = self.pairs, len(rows)
        x = self._mixed(rows[:, None] * self._draws + self._number)
        chosen = self._first + self._chosen(x[:, : 2 * n].view(B, 2, n))
        keys, values = chosen[:, 0], chosen[:, 1]
        uniform = _shift(x[:, 2 * n : 2 * n + self.slots], 11).double()
        arrival = -((uniform + 0.5) * 2.0**-53).log() * self._weight
        asked = 2 * n + 2 * arrival.argsort(1)[:, :n]  # (B, n): where key i stands again
        if self.filled:
            tokens = _below(self.vocab, x[:, 2 * n + self.slots :])
        else:
            tokens = torch.zeros(B, self.length, dtype=torch.int64, device=self.device)
        tokens[:, : 2 * n] = torch.stack([keys, values], 2).flatten(1)
        tokens.scatter_(1, asked, keys)
        asked, order = asked.sort(1)
        return tokens, asked, values.gather(1, order)

    def _mixed(self, number: Tensor) -> Tensor:
        """The elements of the sequence with these numbers, as signed int64: mqar.py (2)."""
        x = number * GAMMA + self._start
        x = (x ^ _shift(x, 30)) * MIX1
        x = (x ^ _shift(x, 27)) * MIX2
        return x ^ _shift(x, 31)

    def _chosen(self, draws: Tensor) -> Tensor:
        """y of (2), of each row n of as many numbers as are in the urn: (B, 2, n)."""
        i, n = self._place, self.pairs
        j = i + _below(self._left, draws)
        # (1): by the place that step t swaps with, where that is another of the first n; the other
        # steps write where no one reads, each to a place of its own, or a GPU would take turns
        to = torch.where((j < n) & (j != i), j, n + i)
        root = torch.full_like(j[..., :1], -1).repeat(1, 1, 2 * n)
        root = root.scatter_reduce_(-1, to, i.expand_as(j), "amax")[..., :n]
        root = torch.where(root < 0, i, root)
        for _ in range((n - 1).bit_length()):
            root = root.gather(-1, root)
        # (2): in the order of j, of those that are equal each has the one before it
        ordered, t = j.sort(dim=-1, stable=True)
        equal = ordered[..., 1:] == ordered[..., :-1]
        before = torch.full_like(j, -1)
        before.scatter_(-1, t[..., 1:], t[..., :-1].masked_fill(~equal, -1))
        return torch.where(before < 0, j, root.gather(-1, before.clamp(min=0)))


def _below(limit: int | Tensor, draws: Tensor) -> Tensor:
    """Integers of [0, limit); limit < 2^31. No one is likelier by more than limit / 2^32."""
    return (_shift(draws, 32) * limit) >> 32


def _shift(x: Tensor, bits: int) -> Tensor:
    """x >> bits of int64 x as a number without a sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
