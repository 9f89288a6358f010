r"""Mamba's block as a layer: a selective scan behind a convolution, gated.

For x_t (d), E = expand d channels c, each with a state of M = state entries n, a step of rank R:

    x', z = W_in x                                              E and E                (1)
    u_t = silu(b_conv + sum_{j < conv} w_j * x'_{t-j})          x' = 0 before          (2)
    r, B, C = W_x u                                             R, M and M             (3)
    step_t = softplus(W_dt r + b_dt),   A = -exp(A_log)                                (4)
    h_t[c,n] = exp(step_t[c] A[c,n]) h_{t-1}[c,n] + step_t[c] u_t[c] B_t[n]            (5)
    y = W_out ((sum_n C[n] h[.,n] + D * u) * silu(z))                                  (6)

Only the convolution and the step have biases, unless `bias` is set. There is no positional
encoding and no channel mixer beside it: two of these blocks have about the parameters of an
attention layer with its channel mixer.

At the start A[c,n] = -n, n from 1; D = 1; b_dt is such that the steps at W_dt r = 0 are
log-uniform over the channels from dt_min to dt_max, evenly spaced and not drawn, and at least
dt_floor; the standard deviations of W_dt and of w are those of the released code's uniform draws,
1 / sqrt(3 R) and 1 / sqrt(3 conv). All else is as in every model here, as is W_out, which the
released code divides by the root of the number of layers. A_log has no weight decay, nor has D.

Source: Gu and Dao 2023, arXiv:2312.00752, Sec. 3.4 and its released code.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from glactl.kernels import scan_step
from glactl.kernels.compiled import scan
from glactl.models.layers import FP32, Cost, State, layout, linear_cost, wide
from glactl.models.mixers import base
from glactl.models.mixers.base import ALONE, Depth


class Mamba(nn.Module):
    """Mamba's block; see the equations above.

    State: "s" (N, E, M), the h of (5), in fp32, or fp64 where the weights are, and "past" (N,
    conv - 1, E), the last x' of (2), in the weights' type; 0 at the start, of one size whatever the
    number of tokens.
    """

    undecayed = ("A_log",)  # weights of two axes that have no weight decay all the same

    class Spec(base.Spec):
        """expand and state give the widths; dt_* the steps at the start."""

        kind: Literal["mamba"] = "mamba"
        expand: int = Field(2, ge=1)
        state: int = Field(16, ge=1)
        conv: int = Field(4, ge=2)
        conv_bias: bool = True
        bias: bool = False  # of W_in and W_out
        dt_rank: int | None = Field(None, ge=1)  # None: d_model / 16, rounded up
        dt_min: float = Field(1e-3, gt=0)
        dt_max: float = Field(0.1, gt=0)
        dt_floor: float = Field(1e-4, gt=0)

        def check(self, d_model: int, rope: bool) -> None:
            """Raise ValueError where the layer cannot be built; rope has no effect here."""
            if self.dt_min > self.dt_max:
                raise ValueError(f"dt_min {self.dt_min:g} is above dt_max {self.dt_max:g}")

        def rank(self, d_model: int) -> int:
            """R."""
            return self.dt_rank or -(-d_model // 16)

        def build(self, d_model: int, rope: bool, eps: float, at: Depth = ALONE) -> "Mamba":
            """The layer."""
            return Mamba(d_model, self)

        def cost(self, d_model: int, rope: bool, T: int, at: Depth = ALONE) -> Cost:
            """Of the layer. A channel's state takes 2 M operations to update and 2 M to read."""
            E, M, R, W = self.expand * d_model, self.state, self.rank(d_model), self.conv
            conv = Cost((W + self.conv_bias) * E, 2.0 * W * E, 2.0 * E, FP32 * (W - 1) * E)
            # u, the steps, z, B and C; y
            mixing = Cost(E * M + E, 4.0 * E * M, 4.0 * E + 2 * M, FP32 * E * M)
            projections = linear_cost(d_model, 2 * E, self.bias) + linear_cost(E, R + 2 * M)
            steps = linear_cost(R, E, bias=True)
            return projections + conv + steps + mixing + linear_cost(E, d_model, self.bias)

    def __init__(self, d_model: int, s: Spec) -> None:
        super().__init__()
        E, self.rank = s.expand * d_model, s.rank(d_model)
        self.steps = (s.dt_min, s.dt_max, s.dt_floor)
        self.inner = nn.Linear(d_model, 2 * E, bias=s.bias)
        self.weight = nn.Parameter(torch.empty(E, 1, s.conv))  # w, the earliest token first
        self.bias = nn.Parameter(torch.empty(E)) if s.conv_bias else None
        self.select = nn.Linear(E, self.rank + 2 * s.state, bias=False)
        self.dt = nn.Linear(self.rank, E)
        self.A_log = nn.Parameter(torch.empty(E, s.state))
        self.D = nn.Parameter(torch.empty(E))
        self.out = nn.Linear(E, d_model, bias=s.bias)

    @torch.no_grad()
    def start(self) -> None:
        """Set A_log, D and b_dt, and the standard deviations of W_dt and of w."""
        E, M = self.A_log.shape
        n = torch.arange(1, M + 1, dtype=torch.float64)
        self.A_log.copy_(n.log().expand(E, M))
        self.D.fill_(1.0)
        low, high, floor = self.steps
        place = (torch.arange(E, dtype=torch.float64) + 0.5) / E
        step = torch.exp(math.log(low) + place * (math.log(high) - math.log(low))).clamp(min=floor)
        self.dt.bias.copy_(step + (-torch.expm1(-step)).log())  # the inverse of softplus
        for w, terms in ((self.dt.weight, self.rank), (self.weight, self.weight.shape[2])):
            w.mul_((3 * terms) ** -0.5 / w.square().mean().sqrt())

    def initial_state(self, N: int, device: torch.device, capacity: int = 0) -> State:
        """The state of N sequences that have not begun."""
        E, M = self.A_log.shape
        dtype, before = self.A_log.dtype, self.weight.shape[2] - 1
        return {
            "s": torch.zeros(N, E, M, device=device, dtype=wide(dtype)),
            "past": torch.zeros(N, before, E, device=device, dtype=dtype),
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
        u, z = self.inner(x).chunk(2, -1)  # (1)
        u, past = self._convolve(u, None if state is None else state["past"], cu_seqlens)
        u = F.silu(u)  # (2)
        dt, B, C = self._select(u)
        y, last = scan(
            u, dt, self._rates(), B, C, self.D, z, self.dt.bias,
            None if state is None else state["s"], state is not None, cu_seqlens,
        )  # fmt: skip
        y = self.out(y)  # (6)
        if last is None or past is None:
            return y, None
        return y, {"s": last.contiguous(), "past": past}

    def step(self, x: Tensor, state: State, longest: int | None = None) -> Tensor:
        """One token a sequence, (N, d) -> (N, d); `state` is updated in place."""
        u, z = self.inner(x).chunk(2, -1)  # (1)
        last = torch.cat([state["past"], u[:, None].to(state["past"].dtype)], 1)
        state["past"].copy_(last[:, 1:])
        mixed = torch.einsum("nwe,ew->ne", last, self.weight[:, 0])
        u = F.silu(mixed if self.bias is None else mixed + self.bias).to(u.dtype)  # (2)
        dt, B, C = self._select(u)
        y = scan_step(
            u, dt, self._rates(), B, C, state["s"], self.D, z=z, dt_bias=self.dt.bias
        )  # (5)
        out: Tensor = self.out(y)  # (6)
        return out

    def _select(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """W_dt r, B and C; the bias of the step is added where its softplus is taken."""
        M = self.A_log.shape[1]
        r, B, C = self.select(u).split([self.rank, M, M], -1)  # (3)
        return F.linear(r, self.dt.weight), B, C

    def _rates(self) -> Tensor:
        """A, in fp32 or wider."""
        return -self.A_log.to(wide(self.A_log.dtype)).exp()  # (4)

    def _convolve(
        self, x: Tensor, past: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The sum of (2) for x (B, T, E), and the last inputs after where some went in."""
        T, E = x.shape[1:]
        before = self.weight.shape[2] - 1
        N = len(x) if cu_seqlens is None else len(cu_seqlens) - 1
        ahead = x.new_zeros(N, before, E) if past is None else past.to(x.dtype)
        if cu_seqlens is None:
            rows = torch.cat([ahead, x], 1)
            y = self._slide(rows)
            return y, None if past is None else rows[:, T:].to(past.dtype)
        # every sequence with the inputs before it in front, end to end
        at = layout(1, T, cu_seqlens, x.device)
        first = at.start + torch.arange(N, device=x.device) * before
        index = first[at.sequence] + before + at.place
        history = first[:, None] + torch.arange(before, device=x.device)
        rows = x.new_zeros(T + N * before, E).index_copy(0, history.flatten(), ahead.flatten(0, 1))
        rows = rows.index_copy(0, index, x[0])
        y = self._slide(rows[None])[:, index - before]
        after = None if past is None else rows[history + at.length[:, None]].to(past.dtype)
        return y, after

    def _slide(self, x: Tensor) -> Tensor:
        """(B, before + T, E) -> (B, T, E)."""
        if x.shape[1] < self.weight.shape[2]:  # no tokens
            return x[:, :0]
        y = F.conv1d(x.transpose(1, 2), self.weight, self.bias, groups=x.shape[2])
        return y.transpose(1, 2)
