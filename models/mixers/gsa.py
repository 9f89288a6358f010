r"""Gated slot attention as a layer.

For x_t (d), heads h of width D = d / heads, M slots a head:

    q, k, v = silu(W_q x), silu(W_k x), silu(W_v x)                                    (1)
    log a = log sigmoid(W_a x) / gate_normalizer                                       (2)
    Sk_t = Sk_{t-1} diag(a_t) + k_t (1 - a_t)^T
    Sv_t = diag(a_t) Sv_{t-1} + (1 - a_t) v_t^T,   o_t = Sv_t^T softmax(Sk_t^T q_t)     (3)
    y = W_o RMSNorm(silu(concat_h o_h))                                                (4)

No product has a bias; the norm spans the full width d, after the silu. With kv_heads, that many
heads have k, v, a and the slots, and each is read by heads / kv_heads heads of q.

The paper's ablations (Table 2) change the decay of (3), with the writes 1 - a_t as they are, or
what stands in the place of the softmax:

    decay "fixed": 1 - 2^(-5-h) in the place of a_t      decay "none": 1                (5)
    read "linear", "swish", "relu", "relu2": z, silu(z), max(z, 0), max(z, 0)^2
    of z = Sk_t^T q_t, in the place of softmax(z)                                      (6)

Source: Zhang et al. 2024, arXiv:2409.07146, Sec. 3 and App. C. Where the paper contradicts itself
or its code: the decay is on the slots in both halves of (3), as in Eq. 6 (Eq. 7 prints the gated
axes swapped); the logits are not scaled, as in Eq. 6 (the code's operator, left alone, divides by
sqrt(D)); W_a has full rank, unlike GLA's. Which decay does not depend on the data the paper does
not say, (5) is RetNet's; its row "without decay" is named ABC, which is a mixer of its own here.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from glactl.kernels import gla_step, gsa_step
from glactl.kernels.compiled import gla, gsa
from glactl.kernels.rows import gsa_step_rows, product_rows
from glactl.models import spec
from glactl.models.joined import whole
from glactl.models.layers import Cost, RMSNorm, State, linear_cost, log_gate, wide
from glactl.models.mixers import base
from glactl.models.mixers.base import ALONE, Depth, fixed_decay, mixing_cost

READS: dict[str, Callable[[Tensor], Tensor]] = {  # (6)
    "linear": lambda z: z,
    "swish": F.silu,
    "relu": F.relu,
    "relu2": lambda z: F.relu(z).square(),
}


class GSA(nn.Module):
    """Gated slot attention; see the equations above.

    State: "k" (N, kv_heads, D, M) and "v" (N, kv_heads, M, D) in fp32, or fp64 where the weights
    are; 0 at the start, of one size whatever the number of tokens.
    """

    class Spec(base.Spec):
        """slots are of each head; gate_normalizer above 1 forgets slower; decay: (5), read: (6).

        norm_eps: of the norm of (4); None: the model's. fla's is 1e-5 whatever the model's.
        """

        kind: Literal["gsa"] = "gsa"
        heads: int = Field(4, ge=1)
        kv_heads: int | None = Field(None, ge=1)  # None: heads
        slots: int = Field(64, ge=1)
        gate_normalizer: float = Field(8.0, gt=0)
        decay: Literal["data", "fixed", "none"] = "data"
        read: Literal["softmax", "linear", "swish", "relu", "relu2"] = "softmax"
        norm_eps: float | None = Field(None, gt=0)

        def check(self, d_model: int, rope: bool) -> None:
            """Raise ValueError where the layer cannot be built; rope has no effect here."""
            spec.divides("heads", self.heads, "d_model", d_model)
            spec.divides("kv_heads", self.groups, "heads", self.heads)

        @property
        def groups(self) -> int:
            """Heads with slots."""
            return self.kv_heads or self.heads

        def build(self, d_model: int, rope: bool, eps: float, at: Depth = ALONE) -> "GSA":
            """The layer; eps is the norm's where it has none of its own."""
            return GSA(d_model, self, self.norm_eps or eps)

        def cost(self, d_model: int, rope: bool, T: int, at: Depth = ALONE) -> Cost:
            """Of the layer, at T tokens: (3) is two passes of linear attention round a softmax."""
            D, H, G, M = d_model // self.heads, self.heads, self.groups, self.slots
            projections = linear_cost(d_model, H * D + G * (2 * D + M))
            passes = mixing_cost(H, G, D, M, T) + mixing_cost(H, G, M, D, T)
            norm = Cost(params=d_model)  # fused into W_o's product
            return projections + passes + norm + linear_cost(d_model, d_model)

    def __init__(self, d_model: int, s: Spec, eps: float) -> None:
        super().__init__()
        self.heads, self.groups, self.slots = s.heads, s.groups, s.slots
        self.normalizer, self.D = s.gate_normalizer, d_model // s.heads
        self.decay, self.weigh = s.decay, READS.get(s.read)
        self.q = nn.Linear(d_model, d_model, bias=False)
        self.k = nn.Linear(d_model, s.groups * self.D, bias=False)
        self.v = nn.Linear(d_model, s.groups * self.D, bias=False)
        self.gate = nn.Linear(d_model, s.groups * s.slots, bias=False)
        self.norm = RMSNorm(d_model, eps)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def initial_state(self, N: int, device: torch.device, capacity: int = 0) -> State:
        """The state of N sequences that have not begun."""
        sizes = {"k": (self.D, self.slots), "v": (self.slots, self.D)}
        dtype = wide(self.q.weight.dtype)
        return {
            name: torch.zeros(N, self.groups, *size, device=device, dtype=dtype)
            for name, size in sizes.items()
        }

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
        q, k, v, a = self._project(x)
        w, g = self._gates(a)
        initial = None if state is None else (state["k"], state["v"])
        keep = state is not None
        if self.weigh is None:
            o, last = gsa(q, k, v, g, initial, keep, cu_seqlens, s=w)  # (3)
        else:
            Sk, Sv = initial or (None, None)
            w = -a.expm1() if w is None else w
            z, Sk = gla(q, k, w, g, Sk, keep, cu_seqlens, axis="gv", scale=1.0)
            o, Sv = gla(self.weigh(z), w, v, g, Sv, keep, cu_seqlens, axis="gk", scale=1.0)  # (6)
            last = None if Sk is None or Sv is None else (Sk, Sv)
        if last is None:
            return self._read(o), None
        # a step writes in place, and an engine that pads its widths returns views
        return self._read(o), {"k": last[0].contiguous(), "v": last[1].contiguous()}

    def step(self, x: Tensor, state: State, longest: int | None = None) -> Tensor:
        """One token a sequence, (N, d) -> (N, d); `state` is updated in place."""
        q, k, v, a = self._project(x)
        w, g = self._gates(a)
        if self.weigh is None:
            return self._read(gsa_step(q, k, v, w, g, (state["k"], state["v"])))  # (3)
        w = -a.expm1() if w is None else w
        z = gla_step(q, k, w, state["k"], gv=g, scale=1.0)
        return self._read(gla_step(self.weigh(z), w, v, state["v"], gk=g, scale=1.0))  # (6)

    def _gates(self, a: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The writes, None where they are 1 - a of the decay, and the log decay; like log a."""
        if self.decay == "data":
            return None, a
        fixed = fixed_decay(self.groups, a)[:, None].expand_as(a)
        return -a.expm1(), fixed if self.decay == "fixed" else None  # (5)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q (..., heads, D), k and v (..., kv_heads, D), log a (..., kv_heads, M)."""
        q, k, v, a = (part(x) for part in (self.q, self.k, self.v, self.gate))
        q = F.silu(q).unflatten(-1, (self.heads, -1))
        k, v, a = (
            part.unflatten(-1, (self.groups, -1))
            for part in (F.silu(k), F.silu(v), a)  # (1)
        )
        return q, k, v, log_gate(a, self.normalizer)  # (2)

    def together(self) -> list[nn.Linear]:
        """Products of the same input; see `glactl.models.joined`."""
        published = self.decay == "data" and self.weigh is None
        return [self.q, self.k, self.v, self.gate] if published else []

    def joined_step(self, h: Tensor, norm: RMSNorm, state: State, longest: int) -> Tensor | None:
        """h (N, d) plus the layer's step for its norm, in three or four launches; None where
        nothing is joined. `state` is updated in place."""
        matrix = whole(self.q)
        if matrix is None:
            return None
        z = product_rows(h, matrix, norm=norm.weight, eps=norm.eps)
        q, *rest = z.split([layer.out_features for layer in self.together()], 1)
        q = q.unflatten(1, (self.heads, -1))
        k, v, a = (part.unflatten(1, (self.groups, -1)) for part in rest)
        both = state["k"], state["v"]
        o = gsa_step_rows(
            q, k, v, a, both, normalizer=self.normalizer, feature_map="swish"
        ).flatten(1)  # (1) to (3)
        n: dict[str, Any] = {"norm": self.norm.weight, "eps": self.norm.eps, "swish": True}
        return product_rows(o, self.out.weight, **n, residual=h)  # (4)

    def _read(self, o: Tensor) -> Tensor:
        y: Tensor = self.out(self.norm(o.flatten(-2), swish=True))  # (4)
        return y
