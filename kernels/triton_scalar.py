"""Gated linear attention with a scalar decay, or none, on a CUDA device: tile shapes and launches.

The mathematics is in triton_scalar_forward.py and triton_scalar_backward.py, the cut into blocks
and segments in triton_layout.py, the states carried between segments in triton_segments.py, the
differentiable operator in triton_scalar_op.py. Two launches forward and three backward, two more
each with segments and one more where the decay wants a gradient.

Precision, as for the key gate. bf16 inputs: products in bf16 with fp32 sums, A and dA rounded to
bf16, states stored in bf16 once in 128 rows; the running state and its gradient stay fp32.
fp32 and fp16 inputs: operands in fp32, products in three tf32 passes.

K 256, V 512, 4 heads, 32,768 tokens, T 2048, bf16: megabytes to and from memory, their time at
3.02 TB/s, and the milliseconds measured on an H100 with A and dA as two numbers, a decay a token
and its gradient; with one number each, as here, they are not measured yet.

    scores           q k 134, A 34                            168   0.06   0.06
    sweep            q k 134, A 34, v o 268, S 268            704   0.23   0.57
    sweep_back       q k 134, A 34, do dv 268, D 268          704   0.23   0.57
    score_gradient   do v 268, dA 34                          302   0.10   0.13
    gradients        do v 268, S D 537, dA 34, q k dq dk 268 1107   0.37   0.58
    gate_gradient    shares 6                                   7   0.00

`gradients` and `score_gradient` are held to 128 registers a thread, so that two blocks share a
multiprocessor; with a gradient for g they spill 112 and 12 bytes after their loops, without none.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from glactl.kernels import triton_scalar_backward as backward_kernels
from glactl.kernels import triton_scalar_forward as forward_kernels
from glactl.kernels.triton_gla import Tile, operand_dtype
from glactl.kernels.triton_layout import BLOCK, CHUNK, Layout, cut
from glactl.kernels.triton_segments import carried
from glactl.kernels.tuned import Key, tuned

TWO_BLOCKS = {"maxnreg": 128}  # registers a thread, so that two blocks share a multiprocessor


@dataclass(frozen=True)
class Tiles:
    """The shapes of the kernels for one (K, V, precision), and of the walk over segments.

    Attributes:
        programs: programs wanted for a sweep; where sequences times heads give fewer, sequences
            are cut into segments.
    """

    scores: Tile
    local: Tile
    sweep: Tile
    back: Tile
    score_gradient: Tile
    gradients: Tile
    programs: int


def tiles(K: int, V: int, dtype: torch.dtype) -> Tiles:
    """The rule: how large a tile fits the registers and shared memory at this shape."""
    v = min(V, 64)
    if dtype == torch.float32:
        v = min(v, 32 if K <= 128 else 16)
        return Tiles(
            scores=Tile(min(K, 32), V, 4, 1),
            local=Tile(min(K, 64), v, 4, 1),
            sweep=Tile(K, v, 4 if K <= 64 else 8, 1),
            back=Tile(K, v, 4 if K <= 64 else 8, 1),
            score_gradient=Tile(K, min(V, 32), 8, 1),
            gradients=Tile(min(K, 32), min(V, 32), 8, 1),
            programs=528,
        )
    wide = K > 128
    # V is 64 or more where K is wide: at K 512, tiles of 32 columns end in an illegal memory access
    # (H100, Triton 3.6: a product reads shared memory past its end; 64 columns are right)
    warps = 8 if wide else 4
    return Tiles(
        scores=Tile(min(K, 64), V, 4, 3),
        local=Tile(min(K, 128), min(V, 128), 8, 3) if wide else Tile(min(K, 64), v, 4, 3),
        sweep=Tile(K, v, warps, 1 if K > 256 else 2),
        back=Tile(K, v, warps, 2 if K == 256 else 1),
        score_gradient=Tile(K, min(V, 64), 8, 3),
        gradients=Tile(min(K, 64), min(V, 64), 8, 2),
        programs=264,
    )


def gate_kind(g: Tensor | None) -> int:
    """GATE of the kernels: 0 no decay, 1 one number a head, 2 one a token and head."""
    return 0 if g is None else 1 if g.dim() == 1 else 2


def saved_shapes(
    blocks: int, H: int, HQ: int, dtype: torch.dtype
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of A and of the running sums of the decays."""
    n = 2 * blocks
    return [
        ((n, HQ, CHUNK, CHUNK), dtype),
        ((n, H, 2, CHUNK), torch.float32),
    ]


@dataclass(frozen=True)
class Plan:
    """Everything the launches of one call share."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    scale: float
    layout: Layout
    H: int
    R: int
    K: int
    V: int
    dtype: torch.dtype  # of the operands
    tiles: Tiles

    @property
    def bf16(self) -> bool:
        """Whether the operands are bf16; else they are fp32."""
        return self.dtype == torch.bfloat16

    @property
    def common(self) -> dict[str, int | str]:
        """What every kernel is compiled for."""
        prec = "tf32" if self.bf16 else "tf32x3"
        return {"R": self.R, "GATE": gate_kind(self.g), "PREC": prec}

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised tensor on the inputs' device."""
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.q.device)


def plan(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float, cu_seqlens: Tensor | None
) -> Plan:
    """The plan for inputs (B, T, heads, width) whose widths are powers of two."""
    B, T, HQ, K = q.shape
    H, V = v.shape[2:]
    dtype = operand_dtype(q, k, v)
    rule = tuned("scalar", q.device, Key(K, V, 0, HQ // H, dtype), tiles(K, V, dtype))
    layout = cut(B, T, cu_seqlens, H * (V // rule.sweep.V), rule.programs, q.device)
    return Plan(q, k, v, g, scale, layout, H, HQ // H, K, V, dtype, rule)


def segment_starts(
    p: Plan, x: Tensor, y: Tensor, sums: Tensor, initial: Tensor | None, reverse: bool
) -> Tensor | None:
    """The states, or their gradients if reverse, that the walks start from: of the sequences, as
    given, or of the segments where sequences are cut."""
    if not p.layout.split:
        return initial
    n, t = len(p.layout.segments), p.tiles.local
    local = p.new(n, p.H, p.K, p.V, dtype=torch.float32)
    decay = p.new(n, p.H, p.K, dtype=torch.float32)
    options = {**p.common, **t.options, "R": p.R if reverse else 1}
    forward_kernels.local_states[(n * p.H * (p.K // t.K) * (p.V // t.V),)](
        x, y, sums, p.layout.segments, local, decay, p.scale, p.H,
        K=p.K, V=p.V, KB=t.K, VB=t.V, REVERSE=reverse, BF16=p.bf16, **options,
    )  # fmt: skip
    return carried(p.layout, local, decay, initial, reverse)


def forward(
    p: Plan, s0: Tensor | None, want_final: bool, want_states: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """o, final state, states of the blocks, and what the backward wants of the scores."""
    nb, n, N = len(p.layout.blocks), len(p.layout.segments), len(p.layout.bounds)
    shapes = saved_shapes(nb, p.H, p.H * p.R, p.dtype)
    parts = a, sums = tuple(p.new(*s, dtype=d) for s, d in shapes)
    t = p.tiles.scores
    forward_kernels.scores[(2 * nb * p.H * p.R,)](
        p.q, p.k, p.g, p.layout.blocks, a, sums, p.scale, p.H,
        K=p.K, KB=t.K, BF16=p.bf16, **p.common, **t.options,
    )  # fmt: skip
    start = segment_starts(p, p.k, p.v, sums, s0, False)
    o = p.new(*p.q.shape[:3], p.V, dtype=p.v.dtype)
    states = p.new(nb, p.H, p.K, p.V) if want_states else p.new(0)
    final = p.new(N, p.H, p.K, p.V, dtype=torch.float32) if want_final else p.new(0)
    if want_final:  # what a sequence without rows leaves
        final.copy_(s0) if s0 is not None else final.zero_()
    t = p.tiles.sweep
    forward_kernels.sweep[(n * p.H * (p.V // t.V),)](
        p.q, p.k, a, sums, p.v, p.layout.segments, start, o, states, final, p.scale, p.H,
        K=p.K, V=p.V, VB=t.V, START=start is not None, CUT=p.layout.split, STORE=want_states,
        FINAL=want_final, **p.common, **t.options,
    )  # fmt: skip
    return o, final, states, parts


def backward(
    p: Plan, do: Tensor, dfinal: Tensor | None, states: Tensor, parts: tuple[Tensor, ...],
    want_gate: bool, want_initial: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, the decay's gradient and that of the initial state; each of the last two empty
    unless wanted."""
    a, sums = parts
    nb, n, N, HQ = len(p.layout.blocks), len(p.layout.segments), len(p.layout.bounds), p.H * p.R
    start = segment_starts(p, p.q, do, sums, dfinal, True)
    t = p.tiles.back
    dv, dstates = torch.empty_like(p.v), torch.empty_like(states)
    ds0 = p.new(N, p.H, p.K, p.V, dtype=torch.float32) if want_initial else p.new(0)
    if want_initial:
        ds0.copy_(dfinal) if dfinal is not None else ds0.zero_()
    backward_kernels.sweep_back[(n * p.H * (p.V // t.V),)](
        p.q, p.k, a, sums, do, p.layout.segments, start, dv, dstates, ds0, p.scale, p.H,
        K=p.K, V=p.V, VB=t.V, START=start is not None, CUT=p.layout.split,
        INITIAL=want_initial, **p.common, **t.options,
    )  # fmt: skip
    del start

    t = p.tiles.score_gradient
    da = p.new(nb, HQ, BLOCK, BLOCK)
    own = p.new(*((nb, HQ, BLOCK) if want_gate else (0,)), dtype=torch.float32)
    backward_kernels.score_gradient[(nb * HQ,)](
        do, p.v, p.g, p.layout.blocks, da, own, p.scale, p.H,
        V=p.V, VB=t.V, GRAD=want_gate, **p.common, **t.options,
        **(TWO_BLOCKS if p.bf16 else {}),
    )  # fmt: skip

    t = p.tiles.gradients
    NK = p.K // t.K
    dq, dk = torch.empty_like(p.q), torch.empty_like(p.k)
    shares = p.new(*((nb, p.H, NK, 3, BLOCK) if want_gate else (0,)), dtype=torch.float32)
    through = p.new(*((nb, p.H, NK) if want_gate else (0,)), dtype=torch.float32)
    # where one step covers V, its buffers leave no room for a second block
    pair = TWO_BLOCKS if p.bf16 and p.V > t.V else {}
    backward_kernels.gradients[(nb * p.H * NK,)](
        p.q, p.k, p.g, do, p.v, states, dstates, da, own, p.layout.blocks, dq, dk, shares, through,
        p.scale, p.H,
        K=p.K, V=p.V, KB=t.K, VB=t.V, GRAD=want_gate, **p.common, **t.options,
        **pair,
    )  # fmt: skip
    if not want_gate or p.g is None:
        return dq, dk, dv, p.new(0), ds0
    kind = gate_kind(p.g)
    dg = p.new(*p.q.shape[:2], p.H, dtype=p.g.dtype if kind == 2 else torch.float32)
    backward_kernels.gate_gradient[(nb * p.H,)](
        p.g, p.layout.blocks, shares, through, dg, p.H, NK=NK, GATE=kind, num_warps=4
    )
    return dq, dk, dv, dg if kind == 2 else dg.sum((0, 1)).to(p.g.dtype), ds0
