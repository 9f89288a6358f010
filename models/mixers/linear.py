r"""Linear attention without a gate, as a layer.

For x_t (d), heads h of key width K = d expand_k / heads and value width V = d expand_v / heads:

    q, k, v = f(W_q x), f(W_k x), W_v x                                                (1)
    S_t = S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t / sqrt(K)                             (2)
    y = W_o concat_h(RMSNorm(o_h))                                                     (3)

No product has a bias; the norm's weight (V,) is shared by the heads; f is feature_map, elu is
elu(x) + 1. There is no denominator sum_s k_s q_t: the norm of (3) stands in its place.

Source: Katharopoulos et al. 2020, arXiv:2006.16236 (its f is elu); (2) with the identity for f and
no denominator is the linear attention that Yang et al. 2024, arXiv:2312.06635v6, start from
(Sec. 2.1), and the norm in the denominator's place is that of Qin et al. 2022, arXiv:2210.10340.
Their ablation "no gate" keeps GLA's output gate, and is `gla` with gate "none".
"""

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from glactl.models.layers import Cost, RMSNorm, linear_cost
from glactl.models.mixers import base
from glactl.models.mixers.base import ALONE, Depth, mixing_cost, width

FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "swish": F.silu,
    "elu": lambda x: F.elu(x) + 1,
}


class LinearAttention(base.Linear):
    """Linear attention; see the equations above. State: as of `base.Linear`."""

    class Spec(base.Spec):
        """Widths are shares of d_model over all heads."""

        kind: Literal["linear"] = "linear"
        heads: int = Field(4, ge=1)
        expand_k: float = Field(1.0, gt=0)
        expand_v: float = Field(1.0, gt=0)
        feature_map: Literal["none", "relu", "swish", "elu"] = "none"  # of q and k

        def check(self, d_model: int, rope: bool) -> None:
            """Raise ValueError where the layer cannot be built; rope has no effect here."""
            self.widths(d_model)

        def widths(self, d_model: int) -> tuple[int, int]:
            """K and V of one head."""
            K = width("expand_k", self.expand_k, d_model, self.heads)
            return K, width("expand_v", self.expand_v, d_model, self.heads)

        def build(
            self, d_model: int, rope: bool, eps: float, at: Depth = ALONE
        ) -> "LinearAttention":
            """The layer; eps is the norm's."""
            return LinearAttention(d_model, self, eps)

        def cost(self, d_model: int, rope: bool, T: int, at: Depth = ALONE) -> Cost:
            """Of the layer, at T tokens; the mixing as in `mixing_cost`."""
            (K, V), H = self.widths(d_model), self.heads
            projections = linear_cost(d_model, H * (2 * K + V))
            norm = Cost(params=V)  # fused into W_o's product
            mixing = mixing_cost(H, H, K, V, T, 0)
            return projections + norm + mixing + linear_cost(H * V, d_model)

    def __init__(self, d_model: int, s: Spec, eps: float) -> None:
        super().__init__()
        self.groups, self.axis = s.heads, "g"
        K, V = self.widths = s.widths(d_model)
        self.feature = FEATURES[s.feature_map]
        self.q = nn.Linear(d_model, s.heads * K, bias=False)
        self.k = nn.Linear(d_model, s.heads * K, bias=False)
        self.v = nn.Linear(d_model, s.heads * V, bias=False)
        self.norm = RMSNorm(V, eps)
        self.out = nn.Linear(s.heads * V, d_model, bias=False)

    def _project(
        self, x: Tensor, place: Tensor | None, shared: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        q, k, v = (part(x).unflatten(-1, (self.groups, -1)) for part in (self.q, self.k, self.v))
        return self.feature(q), self.feature(k), v, None  # (1)

    def _read(self, o: Tensor, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.norm(o).flatten(-2))  # (3)
        return y
