"""Gated linear attention with a scalar decay, or none, on a CUDA device: tile shapes and launches.

The mathematics is in triton_scalar_forward.py and triton_scalar_backward.py, the cut into blocks
and segments in triton_layout.py, the states carried between segments in triton_segments.py, the
differentiable operator in triton_scalar_op.py. Two launches forward and three backward, two more
each with segments and one more where the decay wants a gradient. The walks over segments are those
of the key gate (triton_walks.py).

Precision, as for the key gate. bf16 inputs: products in bf16 with fp32 sums, q^, k^, A, dA rounded
to bf16, states stored in bf16 once in 128 rows; the running state and its gradient stay fp32.
fp32 and fp16 inputs: operands in fp32, products in three tf32 passes.

K 256, V 512, 4 heads, 32,768 tokens, T 2048, bf16: megabytes to and from memory, their time at
3.02 TB/s, and the milliseconds measured on an H100 with a decay a head and no gradient for it.

    scores           q k 134, q^ k^ 134, A 34                 302   0.10   0.12
    sweep            q^ k^ 134, A 34, v o 268, S 268          704   0.23   0.44
    sweep_back       q^ k^ 134, A 34, do dv 268, D 268        704   0.23   0.44
    score_gradient   do v 268, dA 34                          302   0.10   0.12
    gradients        do v 268, S D 537, dA 34, q k dq dk 268 1107   0.37   0.42
    gate_gradient    shares 6                                   7   0.00

`gradients` and `score_gradient` are held to 128 registers a thread, so that two blocks share a
multiprocessor; with a gradient for g they spill after their loops.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from glactl.kernels import triton_gla
from glactl.kernels import triton_scalar_backward as backward_kernels
from glactl.kernels import triton_scalar_forward as forward_kernels
from glactl.kernels import triton_walks as walks
from glactl.kernels.checks import operand_dtype
from glactl.kernels.triton_launch import launch, signature
from glactl.kernels.triton_layout import BLOCK, cut
from glactl.kernels.triton_walks import Tile, walk, walk_back
from glactl.kernels.tuned import Key, tuned

TWO_BLOCKS = {"maxnreg": 128}  # registers a thread, so that two blocks share a multiprocessor


@dataclass(frozen=True)
class Tiles(walks.Tiles):
    """The shapes of all kernels for one (K, V, precision)."""

    scores: Tile
    score_gradient: Tile
    gradients: Tile


@cache  # one object a shape: `tuned` looks it up in every call
def tiles(K: int, V: int, dtype: torch.dtype) -> Tiles:
    """The rule: that of the key gate for the walks, and how large a tile fits the others."""
    key = triton_gla.tiles(K, V, dtype)
    walks_of_key = key.sweep, key.local, key.back, key.programs
    if dtype == torch.float32:
        return Tiles(
            *walks_of_key,
            scores=Tile(min(K, 32), V, 4, 1),
            score_gradient=Tile(K, min(V, 32), 8, 1),
            gradients=Tile(min(K, 32), min(V, 32), 8, 1),
        )
    return Tiles(
        *walks_of_key,
        scores=Tile(min(K, 64), V, 4, 1),
        score_gradient=Tile(K, min(V, 64), 8, 3),
        gradients=Tile(min(K, 64), min(V, 64), 8, 2),
    )


def gate_kind(g: Tensor | None) -> int:
    """GATE of the kernels: 0 no decay, 1 one number a head, 2 one a token and head."""
    return 0 if g is None else 1 if g.dim() == 1 else 2


def saved_shapes(
    blocks: int, H: int, HQ: int, K: int, dtype: torch.dtype
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of q^, k^, A and Ge."""
    return triton_gla.operand_shapes(blocks, H, HQ, K, dtype)[:4]


@dataclass(frozen=True)
class Plan(walks.Plan):
    """What the launches of one call share; see `walks.Plan`."""

    tiles: Tiles
    g: Tensor | None

    @property
    def common(self) -> dict[str, int | str]:
        """What every kernel of the scalar decay is compiled for."""
        return {"R": self.R, "GATE": gate_kind(self.g), "PREC": self.prec}


def plan(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float, cu_seqlens: Tensor | None
) -> Plan:
    """The plan for inputs (B, T, heads, width) whose widths are powers of two."""
    B, T, HQ, K = q.shape
    H, V = v.shape[2:]
    dtype = operand_dtype(q, k, v)
    rule = tuned("scalar", q.device, Key(K, V, 0, HQ // H, dtype), tiles(K, V, dtype))
    layout = cut(B, T, cu_seqlens, H * (V // rule.sweep.V), rule.programs, q.device)
    kind = None if g is None else g.dtype
    number = signature(q.device, H, HQ, K, V, q.dtype, k.dtype, v.dtype, kind)
    return Plan(q, k, v, scale, layout, H, HQ // H, K, V, dtype, number, rule, g)


def forward(
    p: Plan, s0: Tensor | None, want_final: bool, want_states: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """o, final state, states of the blocks, and what the walks read of the chunks."""
    nb = len(p.layout.blocks)
    shapes = saved_shapes(nb, p.H, p.H * p.R, p.K, p.dtype)
    parts = qh, kh, a, ge = tuple(p.new(*s, dtype=d) for s, d in shapes)
    t = p.tiles.scores
    launch(
        p.number, forward_kernels.scores, 2 * nb * p.H * p.R,
        p.q, p.k, p.g, p.layout.blocks, qh, kh, a, ge, p.scale, p.H,
        K=p.K, KB=t.K, BF16=p.bf16, **p.common, **t.options,
    )  # fmt: skip
    return *walk(p, qh, kh, a, ge, s0, want_final, want_states), parts


def backward(
    p: Plan, do: Tensor, dfinal: Tensor | None, states: Tensor, parts: tuple[Tensor, ...],
    want_gate: bool, want_initial: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, the decay's gradient and that of the initial state; each of the last two empty
    unless wanted."""
    nb, HQ = len(p.layout.blocks), p.H * p.R
    qh, kh, a, ge = parts
    dv, dstates, ds0 = walk_back(p, qh, kh, a, ge, do, dfinal, states, want_initial)

    t = p.tiles.score_gradient
    da = p.new(nb, HQ, BLOCK, BLOCK)
    own = p.new(*((nb, HQ, BLOCK) if want_gate else (0,)), dtype=torch.float32)
    launch(
        p.number, backward_kernels.score_gradient, nb * HQ,
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
    launch(
        p.number, backward_kernels.gradients, nb * p.H * NK,
        p.q, p.k, p.g, do, p.v, states, dstates, da, own, p.layout.blocks, dq, dk, shares, through,
        p.scale, p.H,
        K=p.K, V=p.V, KB=t.K, VB=t.V, GRAD=want_gate, **p.common, **t.options,
        **pair,
    )  # fmt: skip
    if not want_gate or p.g is None:
        return dq, dk, dv, p.new(0), ds0
    kind = gate_kind(p.g)
    dg = p.new(*p.q.shape[:2], p.H, dtype=p.g.dtype if kind == 2 else torch.float32)
    launch(
        p.number,
        backward_kernels.gate_gradient,
        nb * p.H,
        p.g,
        p.layout.blocks,
        shares,
        through,
        dg,
        p.H,
        NK=NK,
        GATE=kind,
        num_warps=4,
    )
    return dq, dk, dv, dg if kind == 2 else dg.sum((0, 1)).to(p.g.dtype), ds0
