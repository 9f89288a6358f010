"""Walks over segments of chunks, as launched for a key gate and for a scalar decay alike.

The kernels are `sweep` and `local_states` of triton_gla_forward.py and `sweep_back` of
triton_gla_backward.py. They read q^, k^, A and Ge of every chunk, in which the gate is already.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from glactl.kernels import triton_gla_backward as backward_kernels
from glactl.kernels import triton_gla_forward as forward_kernels
from glactl.kernels.triton_launch import launch
from glactl.kernels.triton_layout import Layout
from glactl.kernels.triton_segments import carried


@dataclass(frozen=True)
class Tile:
    """One kernel's shape: columns of K and of V a program holds, warps, pipeline stages."""

    K: int
    V: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        """The launch options of Triton."""
        return {"num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class Tiles:
    """The shapes of the walks' kernels for one (K, V, precision); a subclass has the others.

    Attributes:
        programs: programs wanted for a sweep; where sequences times heads give fewer, sequences
            are cut into segments.
    """

    sweep: Tile
    local: Tile
    back: Tile
    programs: int


@dataclass(frozen=True)
class Call:
    """What the launches of one call share; a subclass adds the gate and the tiles."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    layout: Layout
    H: int
    R: int
    K: int
    V: int
    dtype: torch.dtype  # of the operands in memory
    number: int  # see triton_launch.py

    @property
    def bf16(self) -> bool:
        """Whether the operands are bf16; else they are fp32."""
        return self.dtype == torch.bfloat16

    @property
    def prec(self) -> str:
        """How fp32 operands are multiplied."""
        return "tf32" if self.bf16 else "tf32x3"

    @property
    def limit(self) -> float:
        """Decay in nats up to which one pair of factors is used: e^64 is safe in bf16 and fp32, and
        fp32 results need the running sums exact to 1e-6."""
        return 128.0 if self.bf16 else 16.0

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised tensor on the inputs' device."""
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.q.device)


@dataclass(frozen=True)
class Plan(Call):
    """A call whose states the walks of this file carry."""

    tiles: Tiles


def segment_starts(
    p: Plan, x: Tensor, y: Tensor, ge: Tensor, initial: Tensor | None, reverse: bool
) -> Tensor | None:
    """The states, or their gradients if reverse, that the walks start from: of the sequences, as
    given, or of the segments where sequences are cut."""
    if not p.layout.split:
        return initial
    n, t = len(p.layout.segments), p.tiles.local
    local = p.new(n, p.H, p.K, p.V, dtype=torch.float32)
    decay = p.new(n, p.H, p.K, dtype=torch.float32)
    launch(
        p.number, forward_kernels.local_states, n * p.H * (p.K // t.K) * (p.V // t.V),
        x, y, ge, p.layout.segments, local, decay, p.H,
        K=p.K, V=p.V, KB=t.K, VB=t.V, R=p.R if reverse else 1, REVERSE=reverse, PREC=p.prec,
        **t.options,
    )  # fmt: skip
    return carried(p.number, p.layout, local, decay, initial, reverse)


def walk(
    p: Plan, qh: Tensor, kh: Tensor, a: Tensor, ge: Tensor, s0: Tensor | None, want_final: bool,
    want_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """o, the final state and the states of the blocks; the last two empty unless wanted."""
    start = segment_starts(p, kh, p.v, ge, s0, False)
    n, N = len(p.layout.segments), len(p.layout.bounds)
    o = p.new(*p.q.shape[:3], p.V, dtype=p.v.dtype)
    states = p.new(len(p.layout.blocks), p.H, p.K, p.V) if want_states else p.new(0)
    final = p.new(N, p.H, p.K, p.V, dtype=torch.float32) if want_final else p.new(0)
    if want_final:  # what a sequence without rows leaves
        final.copy_(s0) if s0 is not None else final.zero_()
    t = p.tiles.sweep
    launch(
        p.number, forward_kernels.sweep, n * p.H * (p.V // t.V),
        qh, kh, a, ge, p.v, p.layout.segments, start, o, states, final, p.H,
        K=p.K, V=p.V, VB=t.V, R=p.R, START=start is not None, CUT=p.layout.split,
        STORE=want_states, FINAL=want_final, PREC=p.prec, **t.options,
    )  # fmt: skip
    return o, final, states


def walk_back(
    p: Plan, qh: Tensor, kh: Tensor, a: Tensor, ge: Tensor, do: Tensor, dfinal: Tensor | None,
    states: Tensor, want_initial: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dv, the gradients of the states of the blocks and, if wanted, of the initial state."""
    n, N = len(p.layout.segments), len(p.layout.bounds)
    start = segment_starts(p, qh, do, ge, dfinal, True)
    t = p.tiles.back
    dv, dstates = torch.empty_like(p.v), torch.empty_like(states)
    ds0 = p.new(N, p.H, p.K, p.V, dtype=torch.float32) if want_initial else p.new(0)
    if want_initial:
        ds0.copy_(dfinal) if dfinal is not None else ds0.zero_()
    launch(
        p.number, backward_kernels.sweep_back, n * p.H * (p.V // t.V),
        qh, kh, a, ge, do, p.layout.segments, start, dv, dstates, ds0, p.H,
        K=p.K, V=p.V, VB=t.V, R=p.R, START=start is not None, CUT=p.layout.split,
        INITIAL=want_initial, PREC=p.prec, **t.options,
    )  # fmt: skip
    return dv, dstates, ds0
