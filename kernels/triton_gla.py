"""Gated linear attention with a key gate on a CUDA device: tile shapes and launches.

The mathematics is in triton_gla_forward.py and triton_gla_backward.py, for strong gates in
triton_gla_strong.py; the cut into blocks and segments in triton_layout.py, the states carried
between segments in triton_segments.py, the differentiable operator in triton_gla_op.py. Three
launches forward and four backward, two more each where sequences are cut into segments.

Precision. bf16 inputs: products in bf16 with fp32 sums, scores in tf32, A kept as one bf16 number
and dA as two, states stored in bf16 once in 128 rows; the running state and its gradient stay fp32.
fp32 and fp16 inputs: operands in fp32, products in three tf32 passes.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from glactl.kernels import triton_gla_backward as backward_kernels
from glactl.kernels import triton_gla_forward as forward_kernels
from glactl.kernels import triton_gla_strong as strong_kernels
from glactl.kernels import triton_walks as walks
from glactl.kernels.checks import operand_dtype
from glactl.kernels.triton_launch import launch, signature
from glactl.kernels.triton_layout import BLOCK, CHUNK, cut
from glactl.kernels.triton_walks import Tile, walk, walk_back
from glactl.kernels.tuned import Key, tuned

EACH = 8  # chunks that a program of `prepare_exact` looks at


@dataclass(frozen=True)
class Tiles(walks.Tiles):
    """The shapes of all kernels for one (K, V, precision)."""

    prepare: Tile
    prepare_exact: Tile
    states: Tile
    gradients: Tile
    gradients_exact: Tile


@cache  # one object a shape: `tuned` looks it up in every call
def tiles(K: int, V: int, dtype: torch.dtype) -> Tiles:
    """The rule: how large a tile fits the registers and shared memory at this shape."""
    v = min(V, 64)
    if dtype == torch.float32:
        v = min(v, 32)
        return Tiles(
            prepare=Tile(min(K, 32), V, 4, 1),
            prepare_exact=Tile(min(K, 16), V, 4, 1),
            sweep=Tile(K, v, 4 if K <= 64 else 8, 1),
            local=Tile(min(K, 64), v, 4, 1),
            back=Tile(K, v, 4 if K <= 64 else 8, 1),
            states=Tile(min(K, 32), min(V, 32), 8, 1),
            gradients=Tile(min(K, 16), V, 8, 1),
            gradients_exact=Tile(min(K, 16), V, 8, 1),
            programs=528,
        )
    if K > 256:
        v = min(v, 32)
    wide = K > 128
    return Tiles(
        prepare=Tile(min(K, 64), V, 4, 3),
        prepare_exact=Tile(16, V, 4, 1),
        sweep=Tile(K, v, 4, 1 if wide else 2),
        local=Tile(min(K, 128), min(V, 128), 8, 3) if wide else Tile(min(K, 64), v, 4, 3),
        back=Tile(K, v, 4, 2 if K == 256 else 1),
        states=Tile(min(K, 64), min(V, 64), 8, 3),
        gradients=Tile(min(K, 32), V, 8, 3),
        gradients_exact=Tile(min(K, 32), V, 8, 1),
        programs=264,
    )


def operand_shapes(
    blocks: int, H: int, HQ: int, K: int, dtype: torch.dtype
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of what `operands` returns when the backward will want it."""
    n = 2 * blocks
    return [
        ((n, HQ, CHUNK, K), dtype),
        ((n, H, CHUNK, K), dtype),
        ((n, HQ, CHUNK, CHUNK), dtype),
        ((n, H, K), torch.float32),
        ((n, H, CHUNK, K), torch.float32),
    ]


@dataclass(frozen=True)
class Plan(walks.Plan):
    """What the launches of one call share; see `walks.Plan`."""

    tiles: Tiles
    g: Tensor


def plan(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, cu_seqlens: Tensor | None,
    rule: Tiles | None = None,
) -> Plan:  # fmt: skip
    """The plan for inputs (B, T, heads, width) whose widths are as `pad` leaves them."""
    B, T, HQ, K = q.shape
    H, V = v.shape[2:]
    dtype = operand_dtype(q, k, v)
    key = Key(K, V, 0, HQ // H, dtype)
    rule = rule or tuned("key", q.device, key, tiles(K, V, dtype))
    walkers = H * (V // rule.sweep.V)
    layout = cut(B, T, cu_seqlens, walkers, rule.programs, q.device)
    number = signature(q.device, H, HQ, K, V, q.dtype, k.dtype, v.dtype, g.dtype)
    return Plan(q, k, v, scale, layout, H, HQ // H, K, V, dtype, number, rule, g)


def operands(p: Plan, want_sums: bool) -> tuple[Tensor, ...]:
    """q^, k^, A, Ge and, if wanted, the running sums G of every chunk."""
    n, HQ = 2 * len(p.layout.blocks), p.H * p.R
    shapes = operand_shapes(n // 2, p.H, HQ, p.K, p.dtype)
    qh, kh, a, ge = (p.new(*s, dtype=d) for s, d in shapes[:4])
    G = p.new(*shapes[4][0], dtype=torch.float32) if want_sums else p.new(0)
    t = p.tiles.prepare
    args = (p.q, p.k, p.g, p.layout.blocks, qh, kh, G, a, ge, p.scale, p.H)
    launch(
        p.number,
        forward_kernels.prepare,
        n * HQ,
        *args,
        K=p.K,
        KB=t.K,
        R=p.R,
        STORE=want_sums,
        PREC=p.prec,
        **t.options,
    )
    t = p.tiles.prepare_exact
    launch(
        p.number, strong_kernels.prepare_exact, -(-n // EACH) * HQ,
        p.q, p.k, p.g, p.layout.blocks, qh, kh, a, ge, p.scale, n, p.H,
        K=p.K, KB=t.K, R=p.R, EACH=EACH, LIMIT=p.limit, PREC=p.prec, **t.options,
    )  # fmt: skip
    return qh, kh, a, ge, G


def forward(
    p: Plan, s0: Tensor | None, want_final: bool, want_states: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """o, final state, states of the blocks, and the operands."""
    parts = qh, kh, a, ge, _ = operands(p, want_states)
    o, final, states = walk(p, qh, kh, a, ge, s0, want_final, want_states)
    return o, final, states, parts


def backward(
    p: Plan, do: Tensor, dfinal: Tensor | None, states: Tensor, parts: tuple[Tensor, ...],
    want_initial: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, dg and the gradient of the initial state."""
    qh, kh, a, ge, G = parts
    nb, HQ = len(p.layout.blocks), p.H * p.R
    dv, dstates, ds0 = walk_back(p, qh, kh, a, ge, do, dfinal, states, want_initial)

    t = p.tiles.states
    da = p.new(nb, HQ, 1 + p.bf16, BLOCK, BLOCK)
    kept = torch.float16 if p.bf16 else torch.float32
    dqs = p.new(nb, HQ, BLOCK, p.K, dtype=kept)
    dks = p.new(nb, p.H, BLOCK, p.K, dtype=kept)
    sizes = p.new(nb, HQ, p.K // t.K, 2, dtype=torch.float32)
    through = p.new(nb, p.H, p.K, dtype=torch.float32)
    launch(
        p.number, backward_kernels.state_gradients, nb * HQ * (p.K // t.K + 1),
        do, p.v, states, dstates, p.layout.blocks, da, dqs, dks, sizes, through, p.H,
        K=p.K, V=p.V, KB=t.K, VB=t.V, R=p.R, SPLIT=p.bf16, PREC=p.prec, **t.options,
    )  # fmt: skip
    del dstates

    dq, dk, dg = torch.empty_like(p.q), torch.empty_like(p.k), torch.empty_like(p.g)
    wide, t = t.K, p.tiles.gradients
    # all K tiles in one program, unless that leaves too few programs for the chip
    n = p.K // t.K if p.bf16 and nb * p.H >= 264 else 1
    launch(
        p.number, backward_kernels.gradients, nb * p.H * (p.K // (t.K * n)),
        p.q, p.k, G, da, ge, p.layout.blocks, dqs, dks, sizes, through, dq, dk, dg, p.scale, p.H,
        K=p.K, KB=t.K, R=p.R, TILES=n, KS=wide, SPLIT=p.bf16, LIMIT=p.limit, PREC=p.prec,
        **t.options,
    )  # fmt: skip
    columns, t = t.K, p.tiles.gradients_exact  # those of `gradients`, whose tiles it completes
    launch(
        p.number, strong_kernels.gradients_exact, nb * p.H * (p.K // (columns * n)),
        p.q, p.k, p.g, G, da, ge, p.layout.blocks, dqs, dks, sizes, through, dq, dk, dg, p.scale,
        p.H, K=p.K, KB=columns, R=p.R, TILES=n, KS=wide, SPLIT=p.bf16, LIMIT=p.limit, PREC=p.prec,
        **t.options,
    )  # fmt: skip
    return dq, dk, dv, dg, ds0
