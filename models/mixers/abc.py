r"""Attention with bounded memory control (ABC) as a layer.

For x_t (d), heads of key width K = d expand_k / heads and value width V = d expand_v / heads, M
slots a head, position p of t in its sequence:

    q, k, v = rotate(W_q x, p), rotate(W_k x, p), W_v x                                (1)
    e_t = exp(clip(W_s x, -32, 32)),   Z_t = Z_{t-1} + e_t,   w_t = e_t / Z_t          (2)
    Sk_t = Sk_{t-1} diag(a_t) + k_t w_t^T
    Sv_t = diag(a_t) Sv_{t-1} + w_t v_t^T,   o_t = Sv_t^T softmax(Sk_t^T q_t / sqrt(K)) (3)
    a_t = Z_{t-1} / Z_t = 1 - w_t                             variant "rescaled"       (4)
    a_t = 1                                                   variant "cumulative"     (5)
    y = W_o concat_h(RMSNorm(o_h) * silu(W_r x)_h)                                     (6)

No product has a bias; the norm's weight (V,) is shared by the heads. In a model without rotary
positions the rotation is left out. Z_0 is 0; a_1 is taken as 1, where there is nothing to forget.

The two variants are both published and differ: with (4) a slot is the mean of the past weighted by
e, and (3) is gated slot attention with a gate of its own; with (5) what was written stays as it was
and w_1 = 1 for ever.

Source: Peng et al. 2022, arXiv:2110.02488. (5) is ABC as Zhang et al. 2024, arXiv:2409.07146,
write it (Eq. 3 and 4); (4) and the layer (1), (2), (6) are those of flash-linear-attention. Their
ablation "without decay" does not say which.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from glactl.kernels import gsa_step
from glactl.kernels.compiled import gla, gsa
from glactl.models.layers import (
    FP32,
    Cost,
    Layout,
    RMSNorm,
    State,
    layout,
    linear_cost,
    rotate,
    wide,
)
from glactl.models.mixers import base
from glactl.models.mixers.base import ALONE, INT64, Depth, mixing_cost, width

CLIP = 32.0


class ABC(nn.Module):
    """Attention with bounded memory control; see the equations above.

    State: "k" (N, heads, K, M), "v" (N, heads, M, V) and "z" (N, heads, 1, M), the Z of (2), in
    fp32, or fp64 where the weights are, and with rotary positions "length" (N,) int64, the tokens
    so far; 0 at the start, of one size whatever the number of tokens.
    """

    class Spec(base.Spec):
        """slots are of each head; widths are shares of d_model over all heads."""

        kind: Literal["abc"] = "abc"
        variant: Literal["rescaled", "cumulative"] = "rescaled"
        heads: int = Field(4, ge=1)
        slots: int = Field(64, ge=1)
        expand_k: float = Field(0.5, gt=0)
        expand_v: float = Field(1.0, gt=0)
        rope_theta: float = Field(10_000.0, gt=0)

        def check(self, d_model: int, rope: bool) -> None:
            """Raise ValueError where the layer cannot be built."""
            K, _ = self.widths(d_model)
            if rope:
                base.even_heads(K, d_model, self.heads)

        def widths(self, d_model: int) -> tuple[int, int]:
            """K and V of one head."""
            K = width("expand_k", self.expand_k, d_model, self.heads)
            return K, width("expand_v", self.expand_v, d_model, self.heads)

        def build(self, d_model: int, rope: bool, eps: float, at: Depth = ALONE) -> "ABC":
            """The layer; eps is the norm's."""
            return ABC(d_model, self, rope, eps)

        def cost(self, d_model: int, rope: bool, T: int, at: Depth = ALONE) -> Cost:
            """Of the layer, at T tokens: (3) is two passes of linear attention round a softmax."""
            (K, V), H, M = self.widths(d_model), self.heads, self.slots
            projections = linear_cost(d_model, H * (2 * K + 2 * V + M))
            passes = mixing_cost(H, H, K, M, T, M) + mixing_cost(H, H, M, V, T, M)
            sums = Cost(moved=3.0 * H * M, state=FP32 * H * M + rope * INT64)  # e; w and log a
            norm = Cost(params=V, moved=float(H * V))  # fused into W_o's product; it reads r
            return projections + passes + sums + norm + linear_cost(H * V, d_model)

    def __init__(self, d_model: int, s: Spec, rope: bool, eps: float) -> None:
        super().__init__()
        self.heads, self.slots, self.rescaled = s.heads, s.slots, s.variant == "rescaled"
        self.theta = s.rope_theta if rope else None
        K, V = self.widths = s.widths(d_model)
        self.scale = K**-0.5
        self.q = nn.Linear(d_model, s.heads * K, bias=False)
        self.k = nn.Linear(d_model, s.heads * K, bias=False)
        self.v = nn.Linear(d_model, s.heads * V, bias=False)
        self.s = nn.Linear(d_model, s.heads * s.slots, bias=False)
        self.r = nn.Linear(d_model, s.heads * V, bias=False)
        self.norm = RMSNorm(V, eps)
        self.out = nn.Linear(s.heads * V, d_model, bias=False)

    def initial_state(self, N: int, device: torch.device, capacity: int = 0) -> State:
        """The state of N sequences that have not begun."""
        (K, V), H, M = self.widths, self.heads, self.slots
        sizes = {"k": (N, H, K, M), "v": (N, H, M, V), "z": (N, H, 1, M)}
        dtype = wide(self.out.weight.dtype)
        state = {n: torch.zeros(size, device=device, dtype=dtype) for n, size in sizes.items()}
        if self.theta is not None:
            state["length"] = torch.zeros(N, device=device, dtype=torch.int64)
        return state

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
            longest: of no use to this layer.

        Returns:
            y (B, T, d), and the state after, None where none went in.
        """
        at = layout(x.shape[0], x.shape[1], cu_seqlens, x.device)
        turned = state is not None and self.theta is not None
        place = at.place + state["length"][at.sequence] if turned and state else at.place
        q, k, v, e = self._project(x, place.view(x.shape[:2]))
        before = None if state is None else state["z"]
        keep = state is not None
        # a sum over time is linear attention of ones, which knows sequences and states
        one = e.new_ones(*e.shape[:3], 1)
        Z, z = gla(one, one, e, None, before, keep, cu_seqlens, axis="g", scale=1.0)  # (2)
        g = _log_kept(Z, before, at) if self.rescaled else None  # (4), (5)
        initial = None if state is None else (state["k"], state["v"])
        o, last = gsa(q, k, v, g, initial, keep, cu_seqlens, s=e / Z, scale=self.scale)  # (3)
        if state is None or last is None or z is None:
            return self._read(o, x), None
        # a step writes in place, and an engine that pads its widths returns views
        after = {n: part.contiguous() for n, part in zip("kvz", (*last, z), strict=True)}
        if turned:
            after["length"] = state["length"] + at.length
        return self._read(o, x), after

    def step(self, x: Tensor, state: State, longest: int | None = None) -> Tensor:
        """One token a sequence, (N, d) -> (N, d); `state` is updated in place."""
        q, k, v, e = self._project(x, state.get("length"))
        before = state["z"][:, :, 0].clone()
        state["z"] += e[:, :, None]  # (2)
        Z = state["z"][:, :, 0]
        g = _log_ratio(before, Z) if self.rescaled else None  # (4), (5)
        o = gsa_step(q, k, v, e / Z, g, (state["k"], state["v"]), scale=self.scale)  # (3)
        if self.theta is not None:
            state["length"] += 1
        return self._read(o, x)

    def _project(self, x: Tensor, place: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k (..., heads, K), v (..., heads, V) and e (..., heads, M), at places (...)."""
        parts = (self.q, self.k, self.v, self.s)
        q, k, v, s = (part(x).unflatten(-1, (self.heads, -1)) for part in parts)
        if self.theta is not None and place is not None:
            q, k = rotate(q, place, self.theta), rotate(k, place, self.theta)  # (1)
        return q, k, v, s.to(wide(s.dtype)).clamp(-CLIP, CLIP).exp()  # (2)

    def _read(self, o: Tensor, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.norm(o, self.r(x).view_as(o)).flatten(-2))  # (6)
        return y


def _log_kept(Z: Tensor, before: Tensor | None, at: Layout) -> Tensor:
    """log a of (4), like Z (B, T, heads, M); before (N, heads, 1, M): Z ahead of each sequence."""
    flat = Z.flatten(0, 1)
    ahead = torch.zeros_like(flat) if before is None else before[:, :, 0][at.sequence]
    last = torch.cat([flat[:1], flat[:-1]])
    last = torch.where((at.place == 0)[:, None, None], ahead, last)
    return _log_ratio(last, flat).view_as(Z)


def _log_ratio(before: Tensor, Z: Tensor) -> Tensor:
    """log(before / Z), at most 0 although sums round; 0 where before is 0."""
    return torch.where(before > 0, before / Z, 1.0).clamp(max=1).log()
