r"""Sequences cut into chunks of C rows, and the walk of a state over them.

A tensor of rows (B, T, H, D) becomes (Z, C, D): one entry of Z for each chunk and head, heads
innermost. Chunks are ordered by their place in the sequence first and by sequence second, the
sequences with most chunks in front; at every place the sequences that have a chunk there are then
the first ones, and a step of the walk is a slice whether or not sequences are packed. Rows behind
the end of a sequence are zero, which is a gate of 1 and a key and a value of 0.

The walk, for n = first .. last chunk of a sequence (or back), with factors a_n and b_n in [0, 1]:

    X~_n = a_n X_n        X_{n+1} = b_n X~_n + a_n U_n                                      (1)

serves S (U_n = k'^T v) and its gradient (U_n = q'^T do) alike. X_n is the state itself; X~_n, the
state in the frame of its chunk, is what the products of the chunk read.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor


class Chunks:
    """How B sequences of T rows, or the packed sequences between `bounds`, are cut.

    Attributes: rows C of a chunk, a power of two; counts, the number of sequences that have an
    n-th chunk, for every n; filled, the number of rows of every chunk that are of its sequence; N
    sequences.
    """

    def __init__(self, B: int, T: int, bounds: list[int] | None, largest: int) -> None:
        self.B, self.T = B, T
        ends = bounds or [0, T]
        lengths = [b - a for a, b in pairwise(ends)]
        self.N = len(lengths) if bounds else B
        self.rows = min(largest, 1 << max(max(lengths) - 1, 0).bit_length())
        C = self.rows
        if bounds is None:
            self.order = None
            self.counts = [B] * -(-T // C)
            self.filled = (T - C * torch.arange(-(-T // C))).clamp_(max=C).repeat_interleave(B)
            return
        self.order = sorted(range(self.N), key=lambda n: -lengths[n])
        first = [n * C for n in range(-(-max(lengths) // C))]
        self.counts = [sum(length > at for length in lengths) for at in first]
        # Row of every slot of the chunks (T: none, a zero row), and slot of every row.
        starts = torch.tensor(
            [ends[n] + at for at, m in zip(first, self.counts, strict=True) for n in self.order[:m]]
        )
        stops = torch.tensor([ends[n + 1] for m in self.counts for n in self.order[:m]])
        slots = starts[:, None] + torch.arange(C)
        inside = slots < stops[:, None]
        self.filled = inside.sum(1)
        self.row_of_slot = slots.masked_fill(~inside, T).flatten()
        self.slot_of_row = torch.empty(T, dtype=torch.int64)
        self.slot_of_row[slots[inside]] = inside.flatten().nonzero().flatten()

    def _pairs(self, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of x (B, T, H, D) and y (n, B, H, C, D) that hold the same rows."""
        whole, rest = divmod(self.T, self.rows)
        body = x[:, : whole * self.rows].unflatten(1, (whole, self.rows))
        yield body.permute(1, 0, 3, 2, 4), y[:whole]
        if rest:
            yield x[:, whole * self.rows :].transpose(1, 2), y[whole, :, :, :rest]

    def fold(self, x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
        """(B, T, H R, D) -> (chunks * H, R C, D) in dtype, contiguous, H = heads."""
        B, T, H, D = x.shape
        C, n = self.rows, sum(self.counts)
        if self.order is None:
            y = x.new_empty((len(self.counts), B, H, C, D), dtype=dtype)
            for rows, slots in self._pairs(x, y):
                slots.copy_(rows)
            if T % C:
                y[-1, :, :, T % C :] = 0
        else:
            rows = torch.cat((x[0], x.new_zeros(1, H, D)))[self.row_of_slot.to(x.device)]
            y = rows.view(n, C, H, D).transpose(1, 2).to(dtype).contiguous()
        return y.view(n * heads, (H // heads) * C, D)

    def unfold(self, y: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
        """The inverse of fold, with heads H R: (chunks * H, R C, D) -> (B, T, H R, D)."""
        C, D = self.rows, y.shape[-1]
        if self.order is None:
            x = y.new_empty((self.B, self.T, heads, D), dtype=dtype)
            for rows, slots in self._pairs(x, y.view(len(self.counts), self.B, heads, C, D)):
                rows.copy_(slots)
            return x
        slots = y.view(-1, heads, C, D).transpose(1, 2).reshape(-1, heads, D)
        return slots[self.slot_of_row.to(y.device)].to(dtype)[None]

    def sort(self, state: Tensor | None, like: Tensor, size: tuple[int, ...]) -> Tensor:
        """A copy of a state (N, H, K, V), zero if None, in the order of the walk."""
        if state is None:
            return like.new_zeros(size)
        return state.to(like.dtype, copy=True) if self.order is None else state[self.order].to(like)

    def unsort(self, state: Tensor) -> Tensor:
        """The inverse of sort."""
        if self.order is None:
            return state
        out = torch.empty_like(state)
        out[self.order] = state
        return out

    def walk(
        self, U: Tensor, a: Tensor, b: Tensor, X: Tensor, back: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The recurrence (1), from X (N, H, K, V).

        U (Z, K, V); a and b broadcast against it. Returns X~ of every chunk, (Z, K, V), in the
        memory of U, and X behind the last one.
        """
        heads = X.shape[1]
        framed = U.mul_(a).view(-1, *X.shape[1:])
        factors = (x.view(-1, heads, *x.shape[1:]) for x in (a, a * b))
        steps = list(zip(*(x.split(self.counts) for x in (framed, *factors)), strict=True))
        x, done = X[:0] if back else X, []
        for u, a_n, both in reversed(steps) if back else steps:
            if len(x) > len(u):  # some sequences have ended
                done.append(x[len(u) :])
                x = x[: len(u)]
            elif len(x) < len(u):  # the walk back comes to their last chunks
                x = torch.cat((x, X[len(x) : len(u)]))
            after = torch.addcmul(u, x, both)  # (1), two operations a step where T is long
            torch.mul(x, a_n, out=u)
            x = after
        return U, torch.cat((x, *([X[len(x) :]] if back else reversed(done))))
