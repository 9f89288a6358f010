r"""Softmax attention as a layer, the baseline.

For x_t (d), heads of width D = d / heads, position p of t in its sequence:

    q, k, v = rotate(W_q x, p), rotate(W_k x, p), W_v x                                (1)
    o_t = sum_s softmax_s(q_t k_s^T / sqrt(D)) v_s,  over s <= t and s > t - window     (2)
    y = W_o concat_h(o_h)                                                              (3)

No product has a bias; without rope the rotation is left out. With kv_heads, that many heads have k
and v, and each is read by heads / kv_heads heads of q.

Source: LLaMA's attention, Touvron et al. 2023, arXiv:2302.13971; kv_heads: Ainslie et al. 2023,
arXiv:2305.13245. (2) itself is torch's scaled_dot_product_attention, and of one token
`glactl.kernels.attention`.

No mask is ever quadratic in more than a sequence. Packed sequences on a GPU are one call of a fused
kernel that reads their bounds on the device (`glactl.models.varlen`), so nothing waits for it. On
the CPU, and with a window in fp32, they are taken in groups whose lengths lie between two powers of
two, each a padded batch, so there are few calls and at most four times the least work. With a
window, queries are taken in blocks of that many, each with the keys of its block and of the window
before it.
"""

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from glactl.kernels.attention import (
    attention_more_room,
    attention_room,
    attention_step,
    attention_write,
)
from glactl.kernels.rows import product_rows
from glactl.models import spec
from glactl.models.joined import whole
from glactl.models.layers import (
    FP32,
    Cost,
    Layout,
    RMSNorm,
    State,
    layout,
    linear_cost,
    product_onto,
    rotate,
)
from glactl.models.mixers import base
from glactl.models.mixers.base import ALONE, INT64, Depth
from glactl.models.varlen import fits, varlen

GROWTH = 64  # tokens that a full state grows by, so that few steps copy it
STATE = ("k", "v", "length")


class Attention(nn.Module):
    """Softmax attention; see the equations above.

    State: "k" and "v" (N, L, kv_heads, D) in the weights' dtype, keys already rotated, and "length"
    (N,) int64, the tokens of each sequence so far. Without a window L is the capacity asked for and
    grows with the longest sequence, and token p is in row p. With one L = window at all times, and
    token p is in row p % window until it is written over. Rows without a token are never read.
    """

    class Spec(base.Spec):
        """window counts the tokens seen, the present one among them; None: all."""

        kind: Literal["attention"] = "attention"
        heads: int = Field(4, ge=1)
        kv_heads: int | None = Field(None, ge=1)  # None: heads
        window: int | None = Field(None, ge=1)
        rope_theta: float = Field(10_000.0, gt=0)

        def check(self, d_model: int, rope: bool) -> None:
            """Raise ValueError where the layer cannot be built."""
            spec.divides("heads", self.heads, "d_model", d_model)
            spec.divides("kv_heads", self.groups, "heads", self.heads)
            if rope:
                base.even_heads(d_model // self.heads, d_model, self.heads)

        @property
        def groups(self) -> int:
            """Heads with keys and values."""
            return self.kv_heads or self.heads

        def build(self, d_model: int, rope: bool, eps: float, at: Depth = ALONE) -> "Attention":
            """The layer; there is no norm in it that would take eps."""
            return Attention(d_model, self, rope)

        def cost(self, d_model: int, rope: bool, T: int, at: Depth = ALONE) -> Cost:
            """Of the layer, at T tokens: 4 d per token seen, the state of all tokens seen."""
            W = min(T, self.window or T)
            seen = (W * (W + 1) / 2 + (T - W) * W) / max(T, 1)  # mean over the tokens
            kv = self.groups * (d_model // self.heads)
            slots = T if self.window is None else self.window
            mixing = Cost(
                flops=4.0 * d_model * seen,
                moved=float(2 * d_model + 2 * kv),
                state=FP32 * 2 * kv * slots + INT64,
            )
            return linear_cost(d_model, d_model + 2 * kv) + mixing + linear_cost(d_model, d_model)

    def __init__(self, d_model: int, s: Spec, rope: bool) -> None:
        super().__init__()
        self.heads, self.groups, self.window = s.heads, s.groups, s.window
        self.theta = s.rope_theta if rope else None
        self.D = d_model // s.heads
        self.q = nn.Linear(d_model, d_model, bias=False)
        self.k = nn.Linear(d_model, s.groups * self.D, bias=False)
        self.v = nn.Linear(d_model, s.groups * self.D, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def initial_state(self, N: int, device: torch.device, capacity: int = 0) -> State:
        """The state of N sequences that have not begun, with room for `capacity` tokens of each."""
        size = N, self.window or capacity, self.groups, self.D
        k, v = (attention_room(*size, part.weight.dtype, device) for part in (self.k, self.v))
        return {"k": k, "v": v, "length": torch.zeros(N, device=device, dtype=torch.int64)}

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        cu_seqlens: Tensor | None = None,
        longest: int | None = None,
    ) -> tuple[Tensor, State | None]:
        """Mix along time.

        Args:
            x: (B, T, d).
            state: of the N sequences so far; None: they begin here.
            cu_seqlens: (N + 1,), the bounds of N sequences packed into one row (B = 1).
            longest: at least the tokens of the longest sequence after this call; the state gets as
                many rows. None: looked up, for which a GPU is waited for.

        Returns:
            y (B, T, d), and the state after, None where none went in.

        Cost: O(T^2 d) for a sequence of T, O(T window d) with a window.
        """
        at = layout(x.shape[0], x.shape[1], cu_seqlens, x.device)
        place = at.place if state is None else at.place + state["length"][at.sequence]
        if longest is None:
            longest = _largest(at.length if state is None else at.length + state["length"])
        o, k, v = self._mix(x, state, cu_seqlens, at, place, longest)
        y: Tensor = self.out(o)  # (3)
        if state is None:
            return y, None
        after = {"length": state["length"] + at.length}
        rows = self.window or max(state["k"].shape[1], longest)
        after |= {name: attention_more_room(state[name], rows) for name in ("k", "v")}
        self._write(after, k, v, at, place)
        return y, {name: after[name] for name in STATE}

    @torch.no_grad()
    def extend(
        self, h: Tensor, x: Tensor, state: State, cu_seqlens: Tensor | None, before: int,
        longest: int,
    ) -> Tensor:  # fmt: skip
        """`forward` without gradients that updates `state` in place; returns h + y, which may be
        where h was.

        before: as longest, but before this call; 0: no sequence of the state has begun, and nothing
        of it is read. A state without a window that is too small is copied once.
        """
        at = layout(x.shape[0], x.shape[1], cu_seqlens, x.device)
        place = at.place if before == 0 else at.place + state["length"][at.sequence]
        o, k, v = self._mix(x, state if before else None, cu_seqlens, at, place, longest)
        for name in ("k", "v") if self.window is None and longest > state["k"].shape[1] else ():
            state[name] = attention_more_room(state[name], longest)
        state["length"] += at.length
        self._write(state, k, v, at, place)
        return product_onto(h, o, self.out)  # (3)

    def _mix(
        self,
        x: Tensor,
        state: State | None,
        cu_seqlens: Tensor | None,
        at: Layout,
        place: Tensor,
        longest: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """o (B, T, d), and the keys and values of the new tokens, (B, T, kv_heads, D)."""
        q, k, v = self._project(x, place.view(x.shape[:2]))
        if cu_seqlens is None:
            o = self._attend(q, k, v, self._past(state, None, longest - x.shape[1]))
        elif x.device.type == "cpu" or not fits(q, self.window):
            o = self._grouped(q[0], k[0], v[0], state, at, longest)[None]
        else:
            past = self._past(state, None, longest)
            o = varlen(q[0], k[0], v[0], past, at, longest, self.window)[None]  # (2)
        return o.flatten(-2), k, v

    def step(self, x: Tensor, state: State, longest: int | None = None) -> Tensor:
        """One token a sequence, (N, d) -> (N, d); `state` is updated in place, without gradients.

        `longest` is as of `forward`. Cost: as of `attention_step`; a state without a window that is
        full is copied once in 64 steps, to grow.
        """
        if self.window is None:
            length = state["length"]
            need = (_largest(length) + 1 if longest is None else longest) - state["k"].shape[1]
            for name in ("k", "v") if need > 0 else ():
                rows = state[name].shape[1] + max(GROWTH, need)
                state[name] = attention_more_room(state[name], rows)
        q, k, v = (part(x) for part in self.together())
        y: Tensor = self.out(self._one(q, k, v, state))  # (3)
        return y

    def together(self) -> list[nn.Linear]:
        """Products of the same input; see `glactl.models.joined`."""
        return [self.q, self.k, self.v]

    def joined_step(self, h: Tensor, norm: RMSNorm, state: State, longest: int) -> Tensor | None:
        """h (N, d) plus the layer's step for its norm; None where nothing is joined, or where a
        state without a window has no room for `longest` tokens.

        `state` is updated in place; `longest` is as of `forward`. Two launches and those of
        `attention_step`, or three of more rows.
        """
        matrix, L = whole(self.q), state["k"].shape[1]
        if matrix is None or (self.window is None and longest > L):
            return None
        z = product_rows(h, matrix, norm=norm.weight, eps=norm.eps)
        q, k, v = z.split([layer.out_features for layer in self.together()], 1)
        return product_rows(self._one(q, k, v, state), self.out.weight, residual=h)  # (3)

    def _one(self, q: Tensor, k: Tensor, v: Tensor, state: State) -> Tensor:
        """(1) and (2) of one token a sequence: o (N, d) of q, k, v before the rotation, (N, ..)."""
        q, k, v = (x.unflatten(1, (-1, self.D)) for x in (q, k, v))
        held = state["k"], state["v"]
        return attention_step(q, k, v, held, state["length"], self.theta).flatten(1)

    def _project(self, x: Tensor, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (..., heads, D), k and v (..., kv_heads, D), at places (...)."""
        matrix, together = whole(self.q), self.together()
        if matrix is None:
            parts = [layer(x) for layer in together]
        else:
            parts = F.linear(x, matrix).split([layer.out_features for layer in together], -1)
        q, k, v = (part.unflatten(-1, (-1, self.D)) for part in parts)
        if self.theta is not None:
            q, k = rotate(q, place, self.theta), rotate(k, place, self.theta)  # (1)
        return q, k, v

    def _grouped(
        self, q: Tensor, k: Tensor, v: Tensor, state: State | None, at: Layout, longest: int
    ) -> Tensor:
        """(2) for sequences end to end: q (M, heads, D), k and v (M, kv_heads, D)."""
        made, order = [q[:0]], [at.sequence[:0]]
        for rows, most in _groups(at.length):
            token = torch.arange(most, device=q.device)
            inside = token < at.length[rows, None]
            # past a sequence's end stands some token: causality keeps it from the real ones
            index = (at.start[rows, None] + token).clamp(max=len(q) - 1)
            o = self._attend(q[index], k[index], v[index], self._past(state, rows, longest))
            made.append(o[inside])
            order.append(index[inside])
        return torch.empty_like(q).index_copy(0, torch.cat(order), torch.cat(made))

    def _past(
        self, state: State | None, rows: Tensor | None, held: int
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Keys and values before a forward pass, (n, L, kv_heads, D), in order, and which count.

        No sequence holds more than `held` tokens. None where there are none; with a window the
        last `window` tokens end at the last row.
        """
        if state is None or state["k"].shape[1] == 0 or held <= 0:
            return None
        k, v, length = (state[name] if rows is None else state[name][rows] for name in STATE)
        row = torch.arange(k.shape[1], device=k.device)
        if self.window is None:
            return k[:, :held], v[:, :held], row[:held] < length[:, None]
        place = length[:, None] - self.window + row
        n = torch.arange(len(k), device=k.device)[:, None]
        return k[n, place % self.window], v[n, place % self.window], place >= 0

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, past: tuple[Tensor, Tensor, Tensor] | None
    ) -> Tensor:
        """(2) for n sequences of t tokens: q (n, t, heads, D), k and v (n, t, kv_heads, D)."""
        n, t = q.shape[:2]
        if t == 0:
            return q
        if self.window is not None and (past is not None or t > self.window):
            return self._blocks(q, k, v, past, self.window)
        if past is None:
            return self._sdpa(q, k, v, None)
        causal = torch.ones(t, t, device=q.device, dtype=torch.bool).tril().expand(n, t, t)
        mask = torch.cat([past[2][:, None].expand(n, t, -1), causal], -1)
        k, v = (torch.cat([old.to(k.dtype), x], 1) for old, x in ((past[0], k), (past[1], v)))
        return self._sdpa(q, k, v, mask)

    def _blocks(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past: tuple[Tensor, Tensor, Tensor] | None,
        W: int,
    ) -> Tensor:
        """(2) with a window of W, in blocks of C queries that see W + C keys each."""
        n, t = q.shape[:2]
        if past is None:
            before = k.new_zeros(n, W, *k.shape[2:])
            past = before, before, torch.zeros(n, W, device=q.device, dtype=torch.bool)
        C = min(W, t)
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, -t % C)) for x in (q, k, v))
        count = F.pad(past[2], (0, q.shape[1]), value=True)  # padding is after all real tokens
        blocks = q.shape[1] // C
        q = q.unflatten(1, (blocks, C)).flatten(0, 1)
        k, v = (
            torch.cat([old.to(new.dtype), new], 1).unfold(1, W + C, C).flatten(0, 1).movedim(-1, 1)
            for old, new in ((past[0], k), (past[1], v))
        )
        count = count.unfold(1, W + C, C).flatten(0, 1)
        # query r of a block stands at W + r among its keys, and sees the last W up to there
        gap = torch.arange(W + C, device=q.device) - torch.arange(C, device=q.device)[:, None]
        mask = (gap > 0) & (gap <= W) & count[:, None]
        return self._sdpa(q, k, v, mask).unflatten(0, (n, blocks)).flatten(1, 2)[:, :t]

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """(2) with the tokens in axis 1; mask (n, queries, keys), None: causal."""
        o = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=None if mask is None else mask[:, None],
            is_causal=mask is None,
            enable_gqa=self.groups != self.heads,
        )
        return o.transpose(1, 2)

    def _write(self, state: State, k: Tensor, v: Tensor, at: Layout, place: Tensor) -> None:
        """New keys and values (B, T, kv_heads, D) at `place` (B * T,) into a state, whose length
        counts them already."""
        row = place
        if self.window is not None:  # what does not stay is left out
            kept = place >= (state["length"] - self.window)[at.sequence]
            row = torch.where(kept, place % self.window, self.window)
        held, new = (state["k"], state["v"]), (k.flatten(0, 1), v.flatten(0, 1))
        attention_write(*new, held, at.sequence, row, drops=self.window is not None)


def _largest(length: Tensor) -> int:
    """The largest length, 0 of none; waits for the device."""
    return int(length.max()) if len(length) else 0


def _groups(length: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Sequences of like lengths: indices (n,) int64, and the longest length; no empty ones."""
    groups: dict[int, list[int]] = {}
    lengths = length.tolist()
    for i, n in enumerate(lengths):
        if n:
            groups.setdefault((n - 1).bit_length(), []).append(i)
    for rows in groups.values():
        yield torch.tensor(rows, device=length.device), max(lengths[i] for i in rows)
