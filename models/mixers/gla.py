r"""Gated linear attention as a layer.

For x_t (d), heads h of key width K = d expand_k / heads and value width V = d expand_v / heads:

    q, k, v = f(W_q x), f(W_k x), W_v x                                                (1)
    log a = log sigmoid(W_2 W_1 x + b) / gate_normalizer            gate "key"         (2)
    S_t = diag(a_t) S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t / sqrt(K)                   (3)
    y = W_o concat_h(RMSNorm(o_h) * silu(W_r x)_h)                                     (4)

W_1 is (gate_rank, d), W_2 has a bias, all others have none; the norm's weight (V,) is shared by the
heads; f is feature_map. At b = 0 the gate is about 0.5^(1/16) = 0.958. With kv_heads, that many
heads have k, v, a and S, and each is read by heads / kv_heads heads of q.

The other gates are those of the paper's ablation (Table 4), with one number a_t a head:

    log a = log sigmoid(w x + b) / gate_normalizer                  gate "scalar"      (5)
    a = 1 - 2^(-5-h), as in RetNet                                  gate "fixed"       (6)
    a = 1                                                           gate "none"        (7)

Source: Yang et al. 2024, arXiv:2312.06635v6, Sec. 4.4; the norm of (4) is an RMSNorm as in the
released code, where the paper writes LayerNorm. The paper does not say how its scalar gate is
made; (5) is (2) with a product of full rank.
"""

from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from glactl.kernels.rows import FEATURES, gla_step_rows, product_rows
from glactl.models import spec
from glactl.models.joined import whole
from glactl.models.layers import Cost, RMSNorm, State, linear_cost, log_gate
from glactl.models.mixers import base
from glactl.models.mixers.base import (
    ALONE,
    Depth,
    fixed_decay,
    mixing_cost,
    width,
)


class GLA(base.Linear):
    """Gated linear attention; see the equations above. State: as of `base.Linear`."""

    class Spec(base.Spec):
        """Widths are shares of d_model over all heads; gate_normalizer above 1 forgets slower.

        gate: (2), (5), (6) or (7).
        """

        kind: Literal["gla"] = "gla"
        heads: int = Field(4, ge=1)
        kv_heads: int | None = Field(None, ge=1)  # None: heads
        expand_k: float = Field(0.5, gt=0)
        expand_v: float = Field(1.0, gt=0)
        gate: Literal["key", "scalar", "fixed", "none"] = "key"
        gate_rank: int = Field(16, ge=1)  # of gate "key"
        gate_normalizer: float = Field(16.0, gt=0)
        feature_map: Literal["none", "relu", "swish"] = "none"  # of q and k
        output_gate: bool = True

        def check(self, d_model: int, rope: bool) -> None:
            """Raise ValueError where the layer cannot be built; rope has no effect here."""
            self.widths(d_model)
            spec.divides("kv_heads", self.groups, "heads", self.heads)

        @property
        def groups(self) -> int:
            """Heads with a state."""
            return self.kv_heads or self.heads

        def widths(self, d_model: int) -> tuple[int, int]:
            """K and V of one head."""
            K = width("expand_k", self.expand_k, d_model, self.heads)
            return K, width("expand_v", self.expand_v, d_model, self.heads)

        def build(self, d_model: int, rope: bool, eps: float, at: Depth = ALONE) -> "GLA":
            """The layer; eps is the norm's."""
            return GLA(d_model, self, eps)

        def cost(self, d_model: int, rope: bool, T: int, at: Depth = ALONE) -> Cost:
            """Of the layer, at T tokens; the mixing as in `mixing_cost`."""
            (K, V), H, G = self.widths(d_model), self.heads, self.groups
            out, a = H * V, {"key": K, "scalar": 1}.get(self.gate, 0)
            made = H * K + G * (K + a + V) + self.output_gate * out
            projections = Cost(
                params=d_model * (H * K + G * (K + V) + self.output_gate * out),
                flops=2.0 * d_model * (H * K + G * (K + V) + self.output_gate * out),
                moved=float(d_model + made),
            )
            gate, rank = Cost(), self.gate_rank  # x and log a are counted above
            if self.gate == "key":
                gate = linear_cost(d_model, rank) + linear_cost(rank, G * K, bias=True)
                gate = Cost(gate.params, gate.flops, 2.0 * rank)
            elif self.gate == "scalar":
                gate = linear_cost(d_model, G, bias=True)
                gate = Cost(gate.params, gate.flops)
            norm = Cost(params=V, moved=float(self.output_gate * out))  # fused into W_o's product
            mixing = mixing_cost(H, G, K, V, T, a)
            return projections + gate + norm + mixing + linear_cost(out, d_model)

    def __init__(self, d_model: int, s: Spec, eps: float) -> None:
        super().__init__()
        self.heads, self.groups, self.normalizer = s.heads, s.groups, s.gate_normalizer
        K, V = self.widths = s.widths(d_model)
        self.features, self.feature_map = FEATURES[s.feature_map], s.feature_map
        self.q = nn.Linear(d_model, s.heads * K, bias=False)
        self.k = nn.Linear(d_model, s.groups * K, bias=False)
        self.v = nn.Linear(d_model, s.groups * V, bias=False)
        self.kind, self.axis = s.gate, "gk" if s.gate == "key" else "g"
        if s.gate == "key":
            self.gate_down = nn.Linear(d_model, s.gate_rank, bias=False)
            self.gate_up = nn.Linear(s.gate_rank, s.groups * K)
        elif s.gate == "scalar":
            self.gate = nn.Linear(d_model, s.groups)
        self.r = nn.Linear(d_model, s.heads * V, bias=False) if s.output_gate else None
        self.norm = RMSNorm(V, eps)
        self.out = nn.Linear(s.heads * V, d_model, bias=False)

    def _project(
        self, x: Tensor, place: Tensor | None, shared: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        q = self.q(x).unflatten(-1, (self.heads, -1))
        k, v = (part(x).unflatten(-1, (self.groups, -1)) for part in (self.k, self.v))
        q, k = self.features(q), self.features(k)  # (1)
        return q, k, v, self._gate(x)

    def together(self) -> list[nn.Linear]:
        """Products of the same input; see `glactl.models.joined`."""
        if self.kind != "key" or self.r is None:
            return []
        return [self.q, self.k, self.v, self.gate_down, self.r]

    def joined_step(self, h: Tensor, norm: RMSNorm, state: State, longest: int) -> Tensor | None:
        """h (N, d) plus the layer's step for its norm, in three launches; None where nothing is
        joined. `state` is updated in place."""
        matrix = whole(self.q)
        if matrix is None:
            return None
        z = product_rows(h, matrix, norm=norm.weight, eps=norm.eps)
        q, k, v, low, r = z.split([layer.out_features for layer in self.together()], 1)
        q = q.unflatten(1, (self.heads, -1))
        k, v = (part.unflatten(1, (self.groups, -1)) for part in (k, v))
        gate: dict[str, Any] = {
            "up": self.gate_up.weight,
            "bias": self.gate_up.bias,
            "state": state["s"],
        }
        o = gla_step_rows(
            q, k, v, low, **gate, normalizer=self.normalizer, feature_map=self.feature_map
        )  # (1) to (3)
        n: dict[str, Any] = {"norm": self.norm.weight, "eps": self.norm.eps, "groups": self.heads}
        return product_rows(o.flatten(1), self.out.weight, **n, gate=r, residual=h)  # (4)

    def _gate(self, x: Tensor) -> Tensor | None:
        """log a: (..., kv_heads, K), (..., kv_heads), (kv_heads,) or None."""
        if self.kind == "key":
            a = self.gate_up(self.gate_down(x)).unflatten(-1, (self.groups, -1))
            return log_gate(a, self.normalizer)  # (2)
        if self.kind == "scalar":
            return log_gate(self.gate(x), self.normalizer)  # (5)
        return fixed_decay(self.groups, x) if self.kind == "fixed" else None  # (6), (7)

    def _read(self, o: Tensor, x: Tensor) -> Tensor:
        gate = None if self.r is None else self.r(x).view_as(o)
        y: Tensor = self.out(self.norm(o, gate).flatten(-2))  # (4)
        return y
