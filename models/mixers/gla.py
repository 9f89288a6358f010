r"""Gated linear attention as a layer.

For x_t (d), heads h of key width K = d expand_k / heads and value width V = d expand_v / heads:

    q, k, v = f(W_q x), f(W_k x), W_v x                                                (1)
    log a = log sigmoid(W_2 W_1 x + b) / gate_normalizer                               (2)
    S_t = diag(a_t) S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t / sqrt(K)                   (3)
    y = W_o concat_h(RMSNorm(o_h) * silu(W_r x)_h)                                     (4)

W_1 is (gate_rank, d), W_2 has a bias, all others have none; the norm's weight (V,) is shared by the
heads; f is feature_map. At b = 0 the gate is about 0.5^(1/16) = 0.958. With kv_heads, that many
heads have k, v, a and S, and each is read by heads / kv_heads heads of q.

Source: Yang et al. 2024, arXiv:2312.06635v6, Sec. 4.4; the norm of (4) is an RMSNorm as in the
released code, where the paper writes LayerNorm.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from glactl.kernels import gla_step
from glactl.kernels.compiled import gla
from glactl.models import spec
from glactl.models.layers import FP32, Cost, RMSNorm, State, linear_cost, log_gate, wide

CHUNK = 64  # tokens that the chunked form takes at once

FEATURES: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "swish": F.silu}


class GLA(nn.Module):
    """Gated linear attention; see the equations above.

    State: "s" (N, kv_heads, K, V) in fp32, or fp64 where the weights are; 0 at the start, of one
    size whatever the number of tokens.
    """

    class Spec(spec.Spec):
        """Widths are shares of d_model over all heads; gate_normalizer above 1 forgets slower."""

        kind: Literal["gla"] = "gla"
        heads: int = Field(4, ge=1)
        kv_heads: int | None = Field(None, ge=1)  # None: heads
        expand_k: float = Field(0.5, gt=0)
        expand_v: float = Field(1.0, gt=0)
        gate_rank: int = Field(16, ge=1)
        gate_normalizer: float = Field(16.0, gt=0)
        feature_map: Literal["none", "relu", "swish"] = "none"  # of q and k
        output_gate: bool = True

        def check(self, d_model: int, rope: bool) -> None:
            """Raise ValueError where the layer cannot be built; rope has no effect here."""
            for name, share in (("expand_k", self.expand_k), ("expand_v", self.expand_v)):
                width = round(d_model * share)
                if width < 1 or abs(width - d_model * share) > 1e-6:
                    raise ValueError(
                        f"{name} {share:g} times d_model {d_model} is {d_model * share:g}; "
                        "allowed: a whole number, 1 or more"
                    )
                spec.divides("heads", self.heads, f"{name} * d_model", width)
            spec.divides("kv_heads", self.groups, "heads", self.heads)

        @property
        def groups(self) -> int:
            """Heads with a state."""
            return self.kv_heads or self.heads

        def widths(self, d_model: int) -> tuple[int, int]:
            """K and V of one head."""
            K, V = (
                round(d_model * share) // self.heads for share in (self.expand_k, self.expand_v)
            )
            return K, V

        def build(self, d_model: int, rope: bool, eps: float) -> "GLA":
            """The layer; eps is the norm's."""
            return GLA(d_model, self, eps)

        def cost(self, d_model: int, rope: bool, T: int) -> Cost:
            """Of the layer, at T tokens; the mixing as in `mixing_cost`."""
            (K, V), H, G = self.widths(d_model), self.heads, self.groups
            out = H * V
            made = H * K + G * (2 * K + V) + self.output_gate * out
            projections = Cost(
                params=d_model * (H * K + G * (K + V) + self.output_gate * out),
                flops=2.0 * d_model * (H * K + G * (K + V) + self.output_gate * out),
                moved=float(d_model + made),
            )
            rank = self.gate_rank
            gate = linear_cost(d_model, rank) + linear_cost(rank, G * K, bias=True)
            gate = Cost(gate.params, gate.flops, 2.0 * rank)  # x and log a are counted above
            norm = Cost(params=V, moved=float(self.output_gate * out))  # fused into W_o's product
            mixing = mixing_cost(H, G, K, V, T)
            return projections + gate + norm + mixing + linear_cost(out, d_model)

    def __init__(self, d_model: int, s: Spec, eps: float) -> None:
        super().__init__()
        self.heads, self.groups, self.normalizer = s.heads, s.groups, s.gate_normalizer
        K, V = self.widths = s.widths(d_model)
        self.features = FEATURES.get(s.feature_map)
        self.q = nn.Linear(d_model, s.heads * K, bias=False)
        self.k = nn.Linear(d_model, s.groups * K, bias=False)
        self.v = nn.Linear(d_model, s.groups * V, bias=False)
        self.gate_down = nn.Linear(d_model, s.gate_rank, bias=False)
        self.gate_up = nn.Linear(s.gate_rank, s.groups * K)
        self.r = nn.Linear(d_model, s.heads * V, bias=False) if s.output_gate else None
        self.norm = RMSNorm(V, eps)
        self.out = nn.Linear(s.heads * V, d_model, bias=False)

    def initial_state(self, N: int, device: torch.device, capacity: int = 0) -> State:
        """The state of N sequences that have not begun."""
        dtype = wide(self.q.weight.dtype)
        return {"s": torch.zeros(N, self.groups, *self.widths, device=device, dtype=dtype)}

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
        initial = None if state is None else state["s"]
        o, last = gla(q, k, v, a, initial, state is not None, cu_seqlens)  # (3)
        # a step writes in place, and an engine that pads its widths returns a view
        return self._read(o, x), None if last is None else {"s": last.contiguous()}

    def step(self, x: Tensor, state: State, longest: int | None = None) -> Tensor:
        """One token a sequence, (N, d) -> (N, d); `state` is updated in place."""
        q, k, v, a = self._project(x)
        return self._read(gla_step(q, k, v, state["s"], gk=a), x)  # (3)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q (..., heads, K), k (..., kv_heads, K), v (..., kv_heads, V), log a like k."""
        q = self.q(x).unflatten(-1, (self.heads, -1))
        k, v, a = (
            part.unflatten(-1, (self.groups, -1))
            for part in (self.k(x), self.v(x), self.gate_up(self.gate_down(x)))
        )
        if self.features is not None:
            q, k = self.features(q), self.features(k)  # (1)
        return q, k, v, log_gate(a, self.normalizer)  # (2)

    def _read(self, o: Tensor, x: Tensor) -> Tensor:
        gate = None if self.r is None else self.r(x).view_as(o)
        y: Tensor = self.out(self.norm(o, gate).flatten(-2))  # (4)
        return y


def mixing_cost(heads: int, groups: int, K: int, V: int, T: int) -> Cost:
    """Of linear attention with a gate on one axis, in the chunked form at T tokens.

    Per query head 2 C (K + V) inside a chunk of C = 64 tokens and 2 K V to read the state; per
    state 2 K V to update it. Sequences shorter than a chunk are one chunk.
    """
    C = max(1, min(CHUNK, T))
    flops = heads * (2 * C * (K + V) + 2 * K * V) + groups * 2 * K * V
    moved = heads * (K + V) + groups * (2 * K + V)  # q and o; k, log a and v
    return Cost(flops=float(flops), moved=float(moved), state=FP32 * groups * K * V)
