r"""The linear attention of TransNormerLLM as a layer.

For x_t (d), heads h of H, of width D = d / H, position p of t in its sequence, layer l of L:

    q, k, v, u = silu(W_q x), silu(W_k x), W_v x, W_u x                                (1)
    q, k <- (q cos p theta, q sin p theta), (k cos p theta, k sin p theta)             (2)
    S_t = a S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t                                     (3)
    log a = -2^(-8(h+1)/H) (1 - l / (L-1) + 1e-5)             decay "transnormerllm"   (4)
    log a = -(8/H) h (1 - l/L)                                decay "lightning"        (5)
    y = W_o (n(concat_h o_h) * u),   n(o) = o / sqrt(mean(o^2) + eps)                  (6)

No product has a bias, and n, over the full width, has no weight. theta (H, D) is learnt, from
10000^(-2i/d), i = 0 .. d - 1 counted over all heads; (2) doubles the width of the keys, and takes
place in the layers of `lrpe`. l and L count the model's layers of this kind; where L is 1, l/(L-1)
is 0.

Source: Qin et al. 2023, arXiv:2307.14995. The two decays differ greatly: (4) is that of the
released code, (5) that of flash-linear-attention's operator, in which head 0 never decays. u has no
activation, as in the released code; there W_q, W_k, W_v and W_u are one matrix, and its slopes of
(4) are interpolated where H is no power of two.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from glactl.models import spec
from glactl.models.layers import Cost, linear_cost, rms_norm, wide
from glactl.models.mixers import base
from glactl.models.mixers.base import ALONE, Depth, mixing_cost

BASE = 10_000.0  # of theta at the start


class TransNormer(base.Linear):
    """TransNormerLLM's mixer; see the equations above. State: as of `base.Linear`.

    K is 2 D, and "length" is in the state, where (2) takes place.
    """

    class Spec(base.Spec):
        """decay names the published decay; lrpe the layers with learnt positions."""

        kind: Literal["transnormer"] = "transnormer"
        heads: int = Field(4, ge=1)
        decay: Literal["transnormerllm", "lightning"] = "transnormerllm"
        lrpe: Literal["first", "all", "none"] = "first"

        def check(self, d_model: int, rope: bool) -> None:
            """Raise ValueError where the layer cannot be built; rope has no effect here."""
            spec.divides("heads", self.heads, "d_model", d_model)

        def turns(self, at: Depth) -> bool:
            """Whether (2) takes place in this layer."""
            return self.lrpe == "all" or (self.lrpe == "first" and at.layer == 0)

        def build(self, d_model: int, rope: bool, eps: float, at: Depth = ALONE) -> "TransNormer":
            """The layer; eps is that of n."""
            return TransNormer(d_model, self, eps, at)

        def cost(self, d_model: int, rope: bool, T: int, at: Depth = ALONE) -> Cost:
            """Of the layer, at T tokens; the mixing as in `mixing_cost`."""
            H, D, turns = self.heads, d_model // self.heads, self.turns(at)
            mixing = mixing_cost(H, H, D * (1 + turns), D, T, 0, counts=turns)
            rest = Cost(params=turns * d_model, moved=float(d_model))  # theta; u
            return linear_cost(d_model, 4 * d_model) + rest + mixing + linear_cost(d_model, d_model)

    def __init__(self, d_model: int, s: Spec, eps: float, at: Depth) -> None:
        super().__init__()
        D = d_model // s.heads
        self.groups, self.axis, self.scale, self.counts = s.heads, "g", 1.0, s.turns(at)
        self.widths = D * (1 + self.counts), D
        self.decay, self.at, self.eps = s.decay, at, eps
        self.q = nn.Linear(d_model, d_model, bias=False)
        self.k = nn.Linear(d_model, d_model, bias=False)
        self.v = nn.Linear(d_model, d_model, bias=False)
        self.u = nn.Linear(d_model, d_model, bias=False)
        self.theta = nn.Parameter(torch.empty(s.heads, D)) if self.counts else None
        self.out = nn.Linear(d_model, d_model, bias=False)

    @torch.no_grad()
    def start(self) -> None:
        """Set theta as it is at the start."""
        if self.theta is not None:
            i = torch.arange(self.theta.numel(), device=self.theta.device, dtype=torch.float64)
            self.theta.copy_((BASE ** (-2 * i / len(i))).view_as(self.theta))

    def _project(
        self, x: Tensor, place: Tensor | None, shared: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        q, k, v = (part(x).unflatten(-1, (self.groups, -1)) for part in (self.q, self.k, self.v))
        q, k = F.silu(q), F.silu(k)  # (1)
        if place is not None and self.theta is not None:
            angle = place[..., None, None] * self.theta.to(wide(x.dtype))
            cos, sin = angle.cos(), angle.sin()
            q, k = (torch.cat([z * cos, z * sin], -1).to(v.dtype) for z in (q, k))  # (2)
        return q, k, v, self._decay(x)

    def _decay(self, x: Tensor) -> Tensor:
        """log a, (H,)."""
        l, L, H = self.at.layer, self.at.layers, self.groups  # noqa: E741
        h = torch.arange(H, device=x.device, dtype=wide(x.dtype))
        if self.decay == "transnormerllm":
            return -torch.exp2(-8 * (h + 1) / H) * (1 - l / max(L - 1, 1) + 1e-5)  # (4)
        return -h * (8 / H * (1 - l / L))  # (5)

    def _read(self, o: Tensor, x: Tensor) -> Tensor:
        o = o.flatten(-2)
        y: Tensor = self.out(rms_norm(o, o.new_ones(o.shape[-1]), self.eps) * self.u(x))  # (6)
        return y
