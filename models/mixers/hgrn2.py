r"""HGRN2 as a layer: linear attention whose gate also makes the keys.

For x_t (d), heads of width E = expand_ratio, layer l of L with the lower bound b_l (d,):

    f = b_l + (1 - b_l) sigmoid(W_f x),   k = 1 - f                                    (1)
    q, v = silu(W_q x), W_v x                                                          (2)
    S_t = diag(f_t) S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t / sqrt(E)                   (3)
    y = W_o RMSNorm(concat_h o_h)                                                      (4)
    b_l = sum_{1 <= j <= l} p_j,   p = softmax over the layers of B (L, d),   b_0 = 0  (5)

No product has a bias; the norm spans the full width d. B is one parameter of the model, shared by
its layers of this kind, which l and L count; its rows are equal at the start. So no layer forgets
faster than the one before may. In a model narrower than E one head has all of it.

With z = W_f x, (1) is computed as log f = logaddexp(log b, log(1 - b) + log sigmoid(z)) and
k = (1 - b) sigmoid(-z), which lose no digits where f is close to 0 or 1.

Source: Qin et al. 2024, arXiv:2404.07904. The activations of (2), the RMSNorm and the factor in (3)
are those of flash-linear-attention, with which the GSA paper trained its HGRN2; the authors' own
code has q = sigmoid, v = silu and a LayerNorm.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from glactl.models import spec
from glactl.models.layers import Cost, RMSNorm, linear_cost, wide
from glactl.models.mixers import base
from glactl.models.mixers.base import ALONE, Depth, mixing_cost


class Bounds(nn.Module):
    """The lower bounds of all layers: (5)."""

    def __init__(self, d_model: int, layers: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(layers, d_model))

    @torch.no_grad()
    def start(self) -> None:
        """Make the rows equal."""
        self.weight.zero_()

    def forward(self) -> Tensor:
        """b (L, d), from 0 in the first layer to below 1, in fp32 or wider."""
        p = self.weight.to(wide(self.weight.dtype)).softmax(0)
        b = F.pad(p[1:].cumsum(0), (0, 0, 1, 0))  # (5)
        return b.clamp(max=1 - torch.finfo(b.dtype).eps)  # where p_0 is lost, log(1 - b) is finite


class HGRN2(base.Linear):
    """HGRN2; see the equations above. State: as of `base.Linear`."""

    class Spec(base.Spec):
        """expand_ratio is the width of a head; norm_eps is of the norm of (4), None: the LM's."""

        kind: Literal["hgrn2"] = "hgrn2"
        expand_ratio: int = Field(128, ge=1)
        norm_eps: float | None = Field(None, gt=0)

        def check(self, d_model: int, rope: bool) -> None:
            """Raise ValueError where the layer cannot be built; rope has no effect here."""
            spec.divides("expand_ratio", self.width(d_model), "d_model", d_model)

        def width(self, d_model: int) -> int:
            """Of one head."""
            return min(self.expand_ratio, d_model)

        def shared(self, d_model: int, layers: int) -> nn.Module | None:
            """The lower bounds; a single layer has none."""
            return Bounds(d_model, layers) if layers > 1 else None

        def build(self, d_model: int, rope: bool, eps: float, at: Depth = ALONE) -> "HGRN2":
            """The layer; eps is the norm's where it has none of its own."""
            return HGRN2(d_model, self, self.norm_eps or eps, at)

        def cost(self, d_model: int, rope: bool, T: int, at: Depth = ALONE) -> Cost:
            """Of the layer, at T tokens, with its row of the lower bounds."""
            E = self.width(d_model)
            H = d_model // E
            bound = Cost(params=d_model * (at.layers > 1))
            norm = Cost(params=d_model)  # fused into W_o's product
            mixing = mixing_cost(H, H, E, E, T)
            projections = linear_cost(d_model, 3 * d_model) + linear_cost(d_model, d_model)
            return projections + Cost(moved=float(d_model)) + bound + norm + mixing  # f makes two

    def __init__(self, d_model: int, s: Spec, eps: float, at: Depth) -> None:
        super().__init__()
        E = s.width(d_model)
        self.groups, self.widths, self.at = d_model // E, (E, E), at
        self.q = nn.Linear(d_model, d_model, bias=False)
        self.f = nn.Linear(d_model, d_model, bias=False)
        self.v = nn.Linear(d_model, d_model, bias=False)
        self.norm = RMSNorm(d_model, eps)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def _project(
        self, x: Tensor, place: Tensor | None, shared: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        q, z, v = F.silu(self.q(x)), self.f(x), self.v(x)  # (2)
        z = z.to(wide(z.dtype))
        log_f, k = F.logsigmoid(z), torch.sigmoid(-z)
        if shared is not None and self.at.layer > 0:  # b is 0 in the first layer
            log_f = torch.logaddexp(shared.log(), torch.log1p(-shared) + log_f)
            log_f = log_f.clamp(max=0)  # to which the sum may round from above
            k = (1 - shared) * k  # (1)
        parts = (q, k.to(v.dtype), v, log_f)
        q, k, v, log_f = (part.unflatten(-1, (self.groups, -1)) for part in parts)
        return q, k, v, log_f

    def _read(self, o: Tensor, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.norm(o.flatten(-2)))  # (4)
        return y
