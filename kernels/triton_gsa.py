"""Gated slot attention on a CUDA device: tile shapes and launches.

The mathematics is in triton_gsa_pairs.py, triton_gsa_forward.py and triton_gsa_backward.py, the cut
into blocks and segments in triton_layout.py, the differentiable operator in triton_gsa_op.py. Four
launches forward and six backward, one more each where sequences are cut into segments.

Precision. bf16 inputs: products of bf16 numbers with fp32 sums; A1, A2, dA2, dA1, p, dz, the states
once in 128 rows, and each head's share of ds and of dg, once summed over rows, are bf16 in memory.
Running states, exponents, factors, logits and softmax are fp32. fp32 and fp16 inputs: operands in
fp32, products in three tf32 passes.

Bytes over 3.02 TB/s, and the time predicted, in ms on an H100, 32,768 tokens, 4 heads, M 64, bf16
gates and no s. `walk` and `gradients` measured 0.31 and 0.61, 0.17 and 0.38 with more to read. The
last columns are the share of blocks with n < 7 (triton_gsa_pairs.py): n = 5 and n = 0.

                        K = V = 512     K = V = 256     more if n = 5, 0
    slots               0.02  0.03      0.02  0.03      0.01  0.01
    walk                0.14  0.16      0.07  0.09
    outputs             0.26  0.38      0.15  0.23      0.12  0.40
    logit_gradients     0.22  0.34      0.16  0.24      0.15  0.50
    slot_gradients      0.05  0.09      0.05  0.09      0.10  0.35
    walk, reversed      0.14  0.16      0.07  0.09
    gradients           0.40  0.58      0.21  0.34
    sum                 1.23  1.74      0.73  1.11      0.38  1.26

Memory above the inputs, MiB, at its peak in `gradients`: kept s^ 16, G 32, S 128 (64), p 16, A1 32,
the state's part of z 16; o 128 (64); scale dz e^G 16, the shares of ds and dg 32; D 128 (64); dq,
dk and dv 384 (192), dg 16: 944 at K = V = 512 (560 at 256). A2, dA2 and dA1 are in dv, dk and dq;
they need 96 more where K or V is below 128 or query heads share states.
"""

from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from glactl.kernels import triton_gsa_backward as backward_kernels
from glactl.kernels import triton_gsa_forward as forward_kernels
from glactl.kernels.checks import operand_dtype
from glactl.kernels.triton_launch import launch, signature
from glactl.kernels.triton_layout import BLOCK, cut
from glactl.kernels.triton_segments import carried
from glactl.kernels.triton_walks import Call
from glactl.kernels.tuned import Key, tuned

MOST_SLOTS = {torch.bfloat16: 256, torch.float32: 128}  # by operands: what shared memory holds


@dataclass(frozen=True)
class Tile:
    """One kernel's shape.

    Attributes:
        columns: of K, V or [K | V] in a step.
        warps, stages: the launch options of Triton.
        slots: of the M at a time where all of them would want more registers than there are.
        registers: most of a thread, where fewer let two blocks share a multiprocessor.
    """

    columns: int
    warps: int
    stages: int
    slots: int = 16
    registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """The launch options of Triton."""
        most = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **most}


@dataclass(frozen=True)
class Tiles:
    """The shapes of the kernels for one (K, V, M, precision).

    Attributes:
        slots: its columns are slots.
        walk: of the states and of their gradients, summaries of segments included.
        slot_gradients: for blocks of one pair of factors, and for the others.
        programs: programs wanted for a walk; where sequences times heads times tiles give fewer,
            sequences are cut into segments.
    """

    slots: Tile
    walk: Tile
    outputs: Tile
    logits: Tile
    slot_gradients: tuple[Tile, Tile]
    gradients: Tile
    programs: int


@cache  # one object a shape: `tuned` looks it up in every call
def tiles(K: int, V: int, M: int, R: int, dtype: torch.dtype) -> Tiles:
    """The rule: how large a tile fits the registers and shared memory at this shape."""
    columns = min(K, V, 64)
    if dtype == torch.bfloat16 and M <= 64:
        slots = Tile(M, 8, 1, registers=128)
        main = Tile(columns, 8, 2, slots=64)
        # with R > 1 the scores of the heads are fetched in each step, and two would not fit; a walk
        # back fetches the operands of R heads
        last = main if R == 1 else Tile(columns, 8, 1)
        walk = Tile(columns, 4, max(1, 4 - R))
        pair = (Tile(0, 8, 1, slots=32, registers=128), Tile(0, 8, 1, slots=32))
        return Tiles(slots, walk, main, main, pair, last, programs=528)
    slots, stages = Tile(min(M, 64), 8, 1), 2 if dtype == torch.bfloat16 and M <= 128 else 1
    main = Tile(min(columns, 32), 8 if M <= 128 else 16, stages)
    walk = Tile(main.columns, main.warps // 2, stages if R <= 2 else 1)
    last = main if R == 1 else Tile(main.columns, main.warps, 1)
    pair = (Tile(0, 8, 1), Tile(0, 8, 1))
    return Tiles(slots, walk, main, main, pair, last, programs=528)


@dataclass(frozen=True)
class Plan(Call):
    """What the launches of one call share."""

    s: Tensor | None
    g: Tensor
    slots: int  # those of the caller, the first of the M here
    M: int
    tiles: Tiles

    @property
    def hoist(self) -> bool:
        """Whether `gradients` keeps scores over its loops: fp32's tf32x3 parts would not fit."""
        return self.R == 1 and self.bf16

    @property
    def in_place(self) -> bool:
        """Whether A2 and dA1 wait in dv and dq, which `gradients` writes after reading them."""
        return self.hoist and min(self.K, self.V) >= BLOCK


def plan(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor | None, g: Tensor, scale: float, slots: int,
    cu_seqlens: Tensor | None,
) -> Plan:  # fmt: skip
    """The plan for inputs (B, T, heads, width) whose widths are as `gsa_fused` leaves them."""
    B, T, HQ, K = q.shape
    H, V = v.shape[2:]
    M = g.shape[3]
    dtype = operand_dtype(q, k, v)
    key = Key(K, V, M, HQ // H, dtype)
    rule = tuned("slots", q.device, key, tiles(K, V, M, HQ // H, dtype))
    walkers = H * ((K + V) // rule.walk.columns)
    layout = cut(B, T, cu_seqlens, walkers, rule.programs, q.device)
    types = None if s is None else s.dtype, q.dtype, k.dtype, v.dtype, g.dtype
    number = signature(q.device, H, HQ, K, V, M, slots, *types)
    return Plan(q, k, v, scale, layout, H, HQ // H, K, V, dtype, number, s, g, slots, M, rule)


def saved_shapes(
    blocks: int, H: int, HQ: int, K: int, V: int, M: int, dtype: torch.dtype
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of what `forward` keeps for the backward."""
    return [
        ((blocks, H, BLOCK, M), dtype),  # s^
        ((blocks, H, BLOCK, M), torch.float32),  # G
        ((blocks, H, M), torch.float32),  # Ge
        ((blocks, H, M // min(M, 64)), torch.int32),  # n, the sizes of groups
        ((blocks, H, M, K + V), dtype),  # S1, S2
        ((blocks, HQ, BLOCK, M), dtype),  # p
        ((blocks, HQ, BLOCK, BLOCK), dtype),  # A1
        ((blocks, HQ, BLOCK, M), dtype),  # the state's part of z
    ]


@lru_cache(maxsize=16)
def selections(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Matrices (16, BLOCK, BLOCK) whose products with g are the sums of triton_gsa_pairs.py.

    0 to 6: E of (1) there, for groups of 2^n rows; 7 to 13: the exponents of (2), for h = 1 .. 64;
    then the sums over the rows before each row, and over those after it.
    """
    i = torch.arange(BLOCK, device=device)[:, None]
    s = i.T
    out = []
    for n in range(7):
        first = i >> n << n
        inside = (s > first) & (s < first + 2**n)
        out.append(torch.where(s <= i, 0.5, -0.5) * inside)
    for n in range(7):
        u = (i >> (n + 1) << (n + 1)) + 2**n
        out.append(torch.where(i >= u, (s >= u) & (s <= i), (s > i) & (s < u)))
    return torch.stack([x.to(dtype) for x in (*out, s < i, s > i)])


def walk(
    p: Plan, x1: Tensor, y1: Tensor, x2: Tensor, y2: Tensor, ge: Tensor, start: Tensor | None,
    states: Tensor, last: Tensor | None, reverse: bool,
) -> None:  # fmt: skip
    """Fills `states`, before each block or (reverse) after it, and `last`, both in place.

    `last` receives what a sequence's walk ends with; `start` is what it starts from, None for zero.
    """
    t, width = p.tiles.walk, p.K + p.V
    n = len(p.layout.segments)
    cut, local, decay = p.layout.split, p.new(0), p.new(0)
    if last is not None:  # what a sequence without rows leaves
        last.copy_(start) if start is not None else last.zero_()
    if cut:
        local = p.new(n, p.H, p.M, width, dtype=torch.float32)
        decay = p.new(n, p.H, p.M, dtype=torch.float32)
    for summary in (True, False) if cut else (False,):
        if cut and not summary:
            start = carried(p.number, p.layout, local, decay, start, reverse)
        first, end = (None, None) if summary else (start, last)
        launch(
            p.number, forward_kernels.walk, n * p.H * (width // t.columns),
            x1, y1, x2, y2, ge, p.layout.segments, first, local, decay, states, end, p.H,
            M=p.M, W1=p.K, W2=p.V, WB=t.columns, R=p.R if reverse else 1, REVERSE=reverse,
            SUMMARY=summary, START=first is not None, CUT=cut, LAST=end is not None, PREC=p.prec,
            **t.options,
        )  # fmt: skip


def forward(
    p: Plan, start: Tensor | None, want_final: bool, save: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """o, the final states (N, H, M, K + V) as [S1 | S2], and what the backward needs."""
    nb, HQ = len(p.layout.blocks), p.H * p.R
    shapes = saved_shapes(nb, p.H, HQ, p.K, p.V, p.M, p.dtype)
    # without a backward, only the first five exist
    kept = [p.new(*s, dtype=d) if save or j < 5 else p.new(0) for j, (s, d) in enumerate(shapes)]
    sh, G, ge, levels, states, *rest = kept
    t, table = p.tiles.slots, selections(p.dtype, p.q.device)
    launch(
        p.number, forward_kernels.slots, nb * p.H * (p.M // t.columns),
        p.s, p.g, p.layout.blocks, table, sh, G, ge, levels, p.H,
        M=p.M, MB=t.columns, GIVEN=p.s is not None, LIMIT=p.limit, **t.options,
    )  # fmt: skip
    final = p.new(0, dtype=torch.float32)
    if want_final:
        final = p.new(len(p.layout.bounds), p.H, p.M, p.K + p.V, dtype=torch.float32)
    walk(p, sh, p.k, sh, p.v, ge, start, states, final if want_final else None, False)
    o = p.new(*p.q.shape[:3], p.V, dtype=p.v.dtype)
    t = p.tiles.outputs
    scratch = p.new(*(0,) if t.slots >= p.M else (nb, HQ, BLOCK, p.M), dtype=torch.float32)
    for strong in (False, True):
        launch(
            p.number, forward_kernels.outputs, nb * HQ,
            p.q, p.k, p.v, p.s, p.g, p.layout.blocks, table, G, ge, levels, states, o, *rest,
            scratch, p.scale, p.slots, p.H,
            K=p.K, V=p.V, M=p.M, WB=t.columns, MB=min(p.M, t.slots), R=p.R, GIVEN=p.s is not None,
            SAVE=save, STRONG=strong, PREC=p.prec, **t.options,
        )  # fmt: skip
    return o, final, kept


def backward(
    p: Plan, do: Tensor, dfinal: Tensor | None, kept: list[Tensor], want_initial: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, ds (empty where s is not given), dg and the initial states' gradient."""
    sh, G, ge, levels, states, prob, a1, zs = kept
    given = p.s is not None
    nb, HQ = len(p.layout.blocks), p.H * p.R
    table = selections(p.dtype, p.q.device)
    x1, x2, ds_part, dg_part = (torch.empty_like(prob) for _ in range(4))
    dq, dk, dv = (torch.empty_like(x) for x in (p.q, p.k, p.v))
    da1, da2, a2 = (dq, dk, dv) if p.in_place else (torch.empty_like(a1) for _ in range(3))
    t = p.tiles.logits
    scratch = p.new(*(0,) if t.slots >= p.M else prob.shape, dtype=torch.float32)
    for strong in (False, True):
        launch(
            p.number, backward_kernels.logit_gradients, nb * HQ,
            do, p.v, p.s, p.g, p.layout.blocks, table, G, ge, levels, states, prob, zs, a2, da2,
            da1, x1, x2, ds_part, dg_part, scratch, p.scale, p.H,
            K=p.K, V=p.V, M=p.M, WB=t.columns, MB=min(p.M, t.slots), R=p.R, GIVEN=given,
            STRONG=strong, IN_PLACE=p.in_place, PREC=p.prec, **t.options,
        )  # fmt: skip
        u = p.tiles.slot_gradients[strong]
        launch(
            p.number, backward_kernels.slot_gradients, nb * HQ * (p.M // min(p.M, u.slots)),
            p.s, p.g, p.layout.blocks, table, G, ge, levels, prob, a1, da2, ds_part, dg_part, p.H,
            K=p.K, M=p.M, MB=min(p.M, u.slots), R=p.R, GIVEN=given, STRONG=strong,
            IN_PLACE=p.in_place, PREC=p.prec, **u.options,
        )  # fmt: skip
    del scratch, da2
    dstates, dstart = torch.empty_like(states), p.new(0, dtype=torch.float32)
    if want_initial:
        dstart = p.new(len(p.layout.bounds), p.H, p.M, p.K + p.V, dtype=torch.float32)
    walk(p, x1, p.q, x2, do, ge, dfinal, dstates, dstart if want_initial else None, True)
    del x2
    dg = torch.empty_like(p.g)
    ds = p.new(0) if p.s is None else torch.empty_like(p.s)
    t = p.tiles.gradients
    launch(
        p.number, backward_kernels.gradients, nb * p.H,
        p.q, p.k, p.v, do, p.s, p.g, p.layout.blocks, table, sh, ge, states, dstates, a2, da1, x1,
        ds_part, dg_part, dq, dk, dv, ds, dg, p.H,
        K=p.K, V=p.V, M=p.M, KB=t.columns, VB=t.columns, R=p.R, GIVEN=given, HOIST=p.hoist,
        IN_PLACE=p.in_place, PREC=p.prec, **t.options,
    )  # fmt: skip
    return dq, dk, dv, ds, dg, dstart
