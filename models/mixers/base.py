r"""What the mixers have in common: where a layer stands, shares of the width, the linear layer.

A linear layer has, for each of its heads with keys, a state S_t (K, V), and reads with q:

    S_t = gated(S_{t-1}) + k_t v_t^T,   o_t = scale * S_t^T q_t                        (1)

gated is a gate on the axis of K (gk), a decay of the whole state (g) or nothing. A subclass says
how q, k, v and the gate are made of x and how y is made of o.

The fixed decay of head h is log(1 - 2^(-5-h)), h from 0                               (2)

Source: (2) Sun et al. 2023, arXiv:2307.08621, Sec. 2.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from glactl.kernels import gla_step
from glactl.kernels.compiled import gla
from glactl.models import spec
from glactl.models.layers import FP32, Cost, State, layout, wide

CHUNK = 64  # tokens that the chunked form takes at once
INT64 = 8  # bytes


@dataclass(frozen=True)
class Depth:
    """Where a layer stands: its number, from 0, among the `layers` of the model of its kind."""

    layer: int = 0
    layers: int = 1


ALONE = Depth()


class Spec(spec.Spec):
    """A mixer's spec; see the package for what else it has."""

    def shared(self, d_model: int, layers: int) -> nn.Module | None:
        """What the `layers` layers of this kind have together; its forward gives a row for each."""
        return None


def width(name: str, share: float, d_model: int, heads: int) -> int:
    """The width of a head where all have `share` of d_model. Raises ValueError if not whole."""
    total = round(d_model * share)
    if total < 1 or abs(total - d_model * share) > 1e-6:
        raise ValueError(
            f"{name} {share:g} times d_model {d_model} is {d_model * share:g}; "
            "allowed: a whole number, 1 or more"
        )
    spec.divides("heads", heads, f"{name} * d_model", total)
    return total // heads


def even_heads(wide: int, d_model: int, heads: int) -> None:
    """Raise ValueError where heads of this width cannot be turned."""
    if wide % 2:
        raise ValueError(
            f"positions rope needs heads of an even width, not {wide} "
            f"(d_model {d_model} / heads {heads})"
        )


def fixed_decay(heads: int, like: Tensor) -> Tensor:
    """(2), (heads,), on the device of `like` and in fp32, or fp64 where it is."""
    h = torch.arange(heads, device=like.device, dtype=wide(like.dtype))
    return torch.log1p(-torch.exp2(-5 - h))


class Linear(nn.Module):
    """A layer of linear attention: (1).

    A subclass sets `groups` (heads with a state), `widths` (K, V), `axis` (of the gate), `scale`
    (None: 1 / sqrt(K)) and `counts` (whether it wants the place of a token), and has `_project`
    and `_read`.

    State: "s" (N, groups, K, V) in fp32, or fp64 where the weights are; 0 at the start, of one
    size whatever the number of tokens. With `counts` also "length" (N,) int64, the tokens so far.
    """

    groups: int
    widths: tuple[int, int]
    axis: Literal["gk", "g"] = "gk"
    scale: float | None = None
    counts: bool = False
    out: nn.Linear

    def _project(
        self, x: Tensor, place: Tensor | None, shared: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q (..., heads, K), k (..., groups, K), v (..., groups, V) and the log gate.

        x (..., d); place (...) with `counts`, else None; shared: of this layer, where its kind has
        something shared.
        """
        raise NotImplementedError

    def _read(self, o: Tensor, x: Tensor) -> Tensor:
        """y (..., d) of o (..., heads, V) and x (..., d)."""
        raise NotImplementedError

    def initial_state(self, N: int, device: torch.device, capacity: int = 0) -> State:
        """The state of N sequences that have not begun."""
        dtype = wide(self.out.weight.dtype)
        state = {"s": torch.zeros(N, self.groups, *self.widths, device=device, dtype=dtype)}
        if self.counts:
            state["length"] = torch.zeros(N, device=device, dtype=torch.int64)
        return state

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        cu_seqlens: Tensor | None = None,
        longest: int | None = None,
        shared: Tensor | None = None,
    ) -> tuple[Tensor, State | None]:
        """Mix along time.

        Args:
            x: (B, T, d).
            state: of the N sequences so far; None: they begin here.
            cu_seqlens: (N + 1,), the bounds of N sequences packed into one row (B = 1).
            longest: of no use to this layer.
            shared: this layer's row of what its kind shares.

        Returns:
            y (B, T, d), and the state after, None where none went in.
        """
        place = length = None
        if self.counts:
            at = layout(x.shape[0], x.shape[1], cu_seqlens, x.device)
            place, length = at.place, at.length
            if state is not None:
                place, length = place + state["length"][at.sequence], length + state["length"]
            place = place.view(x.shape[:2])
        q, k, v, gate = self._project(x, place, shared)
        initial = None if state is None else state["s"]
        o, last = gla(
            q, k, v, gate, initial, state is not None, cu_seqlens, axis=self.axis, scale=self.scale
        )  # (1)
        y = self._read(o, x)
        if last is None:
            return y, None
        # a step writes in place, and an engine that pads its widths returns a view
        after = {"s": last.contiguous()}
        return y, after if length is None else after | {"length": length}

    def step(
        self, x: Tensor, state: State, longest: int | None = None, shared: Tensor | None = None
    ) -> Tensor:
        """One token a sequence, (N, d) -> (N, d); `state` is updated in place."""
        q, k, v, gate = self._project(x, state.get("length"), shared)
        by_axis: dict[str, Any] = {self.axis: gate}
        o = gla_step(q, k, v, state["s"], scale=self.scale, **by_axis)  # (1)
        if self.counts:
            state["length"] += 1
        return self._read(o, x)


def mixing_cost(
    heads: int, groups: int, K: int, V: int, T: int, gate: int | None = None, counts: bool = False
) -> Cost:
    """Of linear attention in the chunked form at T tokens.

    Per query head 2 C (K + V) inside a chunk of C = 64 tokens and 2 K V to read the state; per
    state 2 K V to update it. Sequences shorter than a chunk are one chunk. gate is the numbers
    that the gate of a state has at a token (None: K), counts as of `Linear`.
    """
    C = max(1, min(CHUNK, T))
    flops = heads * (2 * C * (K + V) + 2 * K * V) + groups * 2 * K * V
    # q and o; k, the gate and v
    moved = heads * (K + V) + groups * (K + (K if gate is None else gate) + V)
    state = FP32 * groups * K * V + counts * INT64
    return Cost(flops=float(flops), moved=float(moved), state=state)
