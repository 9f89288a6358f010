r"""Retention, the mixer of RetNet, as a layer.

For x_t (d), heads h of key width K = d expand_k / heads and value width V = d expand_v / heads,
position p of t in its sequence:

    q, k, v = rotate(f(W_q x), p), rotate(f(W_k x), p), W_v x                          (1)
    S_t = a S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t / sqrt(K),   a = 1 - 2^(-5-h)       (2)
    y = W_o concat_h(RMSNorm(o_h) * silu(W_r x)_h)                                     (3)

No product has a bias; the norm's weight (V,) is shared by the heads; f is feature_map. In a model
without rotary positions the rotation is left out, and without an output gate silu(W_r x). With
kv_heads, that many heads have k, v, a and S, and each is read by heads / kv_heads heads of q.

Source: Sun et al. 2023, arXiv:2307.08621, Sec. 2; xPos, of which it speaks, is the rotation of (1)
and the decay of (2) together. Its "GroupNorm" of the heads is an RMSNorm in the released code,
without a weight there and with one in flash-linear-attention, which is followed here; the code's
denominators of (2) are cancelled by it and left out. The rotation pairs the two halves of a head,
as in LLaMA. f and the gate's absence are those of models made of a Transformer (Zhang et al. 2024,
arXiv:2409.07146, Sec. 4.2); f comes before the rotation, as in flash-linear-attention. There every
head of q has a decay of its own, even where k and v are of a group.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from glactl.kernels.rows import FEATURES
from glactl.models import spec
from glactl.models.layers import Cost, RMSNorm, linear_cost, rotate
from glactl.models.mixers import base
from glactl.models.mixers.base import (
    ALONE,
    Depth,
    fixed_decay,
    mixing_cost,
    width,
)


class RetNet(base.Linear):
    """Retention; see the equations above. State: as of `base.Linear`, with "length" if turned."""

    class Spec(base.Spec):
        """Widths are shares of d_model over all heads; the paper's heads have K = 256."""

        kind: Literal["retnet"] = "retnet"
        heads: int = Field(4, ge=1)
        kv_heads: int | None = Field(None, ge=1)  # None: heads
        expand_k: float = Field(1.0, gt=0)
        expand_v: float = Field(2.0, gt=0)
        rope_theta: float = Field(10_000.0, gt=0)
        feature_map: Literal["none", "relu", "swish"] = "none"  # of q and k
        output_gate: bool = True

        def check(self, d_model: int, rope: bool) -> None:
            """Raise ValueError where the layer cannot be built."""
            K, _ = self.widths(d_model)
            spec.divides("kv_heads", self.groups, "heads", self.heads)
            if rope:
                base.even_heads(K, d_model, self.heads)

        @property
        def groups(self) -> int:
            """Heads with a state."""
            return self.kv_heads or self.heads

        def widths(self, d_model: int) -> tuple[int, int]:
            """K and V of one head."""
            K = width("expand_k", self.expand_k, d_model, self.heads)
            return K, width("expand_v", self.expand_v, d_model, self.heads)

        def build(self, d_model: int, rope: bool, eps: float, at: Depth = ALONE) -> "RetNet":
            """The layer; eps is the norm's."""
            return RetNet(d_model, self, rope, eps)

        def cost(self, d_model: int, rope: bool, T: int, at: Depth = ALONE) -> Cost:
            """Of the layer, at T tokens; the mixing as in `mixing_cost`."""
            (K, V), H, G = self.widths(d_model), self.heads, self.groups
            r = self.output_gate * H * V
            projections = linear_cost(d_model, H * K + G * (K + V) + r)
            norm = Cost(params=V, moved=float(r))  # fused into W_o's product; it reads r
            mixing = mixing_cost(H, G, K, V, T, 0, counts=rope)
            return projections + norm + mixing + linear_cost(H * V, d_model)

    def __init__(self, d_model: int, s: Spec, rope: bool, eps: float) -> None:
        super().__init__()
        self.heads, self.groups = s.heads, s.groups
        self.axis, self.counts, self.theta = "g", rope, s.rope_theta
        self.features = FEATURES[s.feature_map]
        K, V = self.widths = s.widths(d_model)
        self.q = nn.Linear(d_model, s.heads * K, bias=False)
        self.k = nn.Linear(d_model, s.groups * K, bias=False)
        self.v = nn.Linear(d_model, s.groups * V, bias=False)
        self.r = nn.Linear(d_model, s.heads * V, bias=False) if s.output_gate else None
        self.norm = RMSNorm(V, eps)
        self.out = nn.Linear(s.heads * V, d_model, bias=False)

    def _project(
        self, x: Tensor, place: Tensor | None, shared: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        q = self.q(x).unflatten(-1, (self.heads, -1))
        k, v = (part(x).unflatten(-1, (self.groups, -1)) for part in (self.k, self.v))
        q, k = self.features(q), self.features(k)
        if place is not None:
            q, k = rotate(q, place, self.theta), rotate(k, place, self.theta)  # (1)
        return q, k, v, fixed_decay(self.groups, x)  # (2)

    def _read(self, o: Tensor, x: Tensor) -> Tensor:
        gate = None if self.r is None else self.r(x).view_as(o)
        y: Tensor = self.out(self.norm(o, gate).flatten(-2))  # (3)
        return y
