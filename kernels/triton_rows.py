r"""Triton kernels of `product_rows` (rows.py): equations (1) to (5) there as one launch; and of
`greedy_rows`, (7) and (8).

`_one` is a single row: a program owns RB rows of W, has all of them on their way before it looks at
x, and takes the sums along K in its threads. Of more rows the product is the library's, with (1) to
(3) as a launch before it, `_prepare`, and (4) as one behind it, `_pair`. (A kernel with all of it
on the tensor cores took 21 us where the library's product takes 5 to 12: 64 rows, d 1024.)

For (7) of a single row a program of `_one` leaves the best of its rows in the place of y, as one
whole number that orders them (`_rank`), and `_take` finds the largest of those and does (8). Of
more rows `_take` looks at the library's product, a program a row.

A launch may begin before the one before it has ended (programmatic dependent launch, compute
capability 9 and later): it asks for its weights, which no kernel writes, and only then waits. Every
kernel waits before it writes, so that one that has ended vouches for all before it, and lets the
next one begin only then: earlier, they take its place on the chip (0.544 ms a step in place of
0.527). So when a launch begins, all have ended but the one just before it, and what that one does
not write may be read at once; triton_step.py and triton_step_gsa.py do so and say why.

While `_prepare` runs, memory has little to do. Programs added to it ask for the weight of the
product behind it, which comes into the L2 cache (`_ask`). They read and write nothing, so they wait
for nothing and hold nobody up: the next launch still begins only when those of the rows have
waited, and a launch that has ended still vouches for all before it. 340m, 64 rows, us a step on an
H100: those products 329 in place of 439, `_prepare` 166 in place of 126. In the mixers' steps of
one row the same cost time: steps of 432 in place of 416 (GLA), 480 in place of 467 (GSA).

Floor of one row, an H100: the bytes of W over 3.02 TB/s. 340m, d 1024: 12.6 M weights a layer, 8.3
us in five launches; each takes some 1 to 2 us besides to begin and end.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the parameters of a kernel have no Python types)

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from glactl.kernels.rows import Next
from glactl.kernels.triton_edges import sigma

TILE = 8192  # weights of a program of `_one`
RANKS = 8192  # that `_take` reads at once: 16 a thread
LAST = tl.constexpr(2**31 - 1)  # the largest row there may be
LOWEST = tl.constexpr(-(2**63))  # below the rank of any row
PIECE = tl.constexpr(1024)  # bytes that a thread asks for
ASKING = tl.constexpr(128)  # threads of a program that asks
AHEAD = 20 * 2**20  # bytes of a weight asked for at most, of 50 MB that L2 holds


@triton.jit
def _addresses(weight, pieces, i):
    """int64, of the pieces i of a weight; of the last one beyond them."""
    return weight.to(tl.int64) + tl.minimum(i, pieces - 1) * PIECE


@triton.jit
def _ask(weight, pieces, program, EARLY: tl.constexpr):
    """Bring ASKING of the pieces of a weight into the L2 cache. The prefetch of one address is of a
    line at most, and need not be of all of it; this one is of a whole piece."""
    if EARLY:
        gdc_launch_dependents()
    at = _addresses(weight, pieces, program * ASKING + tl.arange(0, ASKING).to(tl.int64))
    if EARLY:
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], 1024; mov.u32 $0, 0;", "=r,l", [at],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _before(x, z, SWISH: tl.constexpr):
    """(1) of x and the factor of (3), fp32."""
    s = x.to(tl.float32)
    if SWISH:
        s *= sigma(s)
    f = 1.0
    if z is not None:
        g = z.to(tl.float32)
        f = g * sigma(g)
    return s, f


@triton.jit
def _rank(z, j):
    """int64, the larger the larger z is, a NaN above all, and of equals the larger the smaller j.

    Bits of fp32 order numbers as whole numbers do, but below 0 the other way round.
    """
    z = tl.where(z == 0, 0.0, z.to(tl.float32))  # -0 equals 0
    bits = z.to(tl.int32, bitcast=True)
    order = tl.where(z == z, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    return (order.to(tl.int64) << 32) | (LAST - j)


@triton.jit
def _one(
    x, w, norm, gate, res, y, best, eps, R,
    GROUPS: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, RB: tl.constexpr,
    SWISH: tl.constexpr, PAIR: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """(1) to (5) of one row and RB of the R results; GROUPS groups of D, padded to GP and DP. The
    results to y, or the rank of the best of them to `best`."""
    r = tl.program_id(0).to(tl.int64) * RB + tl.arange(0, RB)
    g, d = tl.arange(0, GP)[:, None], tl.arange(0, DP)[None, :]
    inside = (g < GROUPS) & (d < D)
    k = g * D + d
    at = r[:, None, None] * (GROUPS * D) + k[None, :, :]
    live = (r < R)[:, None, None] & inside[None, :, :]
    W = tl.load(w + at, mask=live, other=0.0)
    if PAIR:
        W2 = tl.load(w + R.to(tl.int64) * (GROUPS * D) + at, mask=live, other=0.0)
    if norm is not None:
        weight = tl.load(norm + tl.arange(0, DP), mask=tl.arange(0, DP) < D, other=0.0)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    z = tl.load(gate + k, mask=inside, other=0.0) if gate is not None else None
    if res is not None:
        rest = tl.load(res + r, mask=r < R, other=0.0)
    s, f = _before(tl.load(x + k, mask=inside, other=0.0), z, SWISH)
    if norm is not None:
        s *= (1.0 / tl.sqrt(tl.sum(s * s, 1) / D + eps))[:, None]  # (2)
        s *= weight.to(tl.float32)[None, :]
    p = (s * f)[None, :, :]  # (3)
    out = tl.sum(tl.sum(W.to(tl.float32) * p, 2), 1)
    if PAIR:
        out = out * sigma(out) * tl.sum(tl.sum(W2.to(tl.float32) * p, 2), 1)  # (4)
    if res is not None:
        out += rest.to(tl.float32)  # (5)
    z = out.to(w.dtype.element_ty)
    if best is None:
        tl.store(y + r, z, mask=r < R)
    else:
        tl.store(best + tl.program_id(0), tl.max(tl.where(r < R, _rank(z, r), LOWEST), 0))  # (7)


@triton.jit
def _take(
    best, embedding, token, made, slot, position, h, scale, places,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """(7) of one row, of the ranks that PARTS programs left or of PARTS logits, BLOCK at once, and
    (8)."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    n = tl.program_id(0).to(tl.int64)
    place, count = tl.load(slot + n), tl.load(position + n)
    found = tl.full((BLOCK,), LOWEST, tl.int64)
    for first in tl.range(0, PARTS, BLOCK, loop_unroll_factor=4):  # reads of four are on their way
        i = first + tl.arange(0, BLOCK)
        part = tl.load(best + n * PARTS + i, mask=i < PARTS)
        rank = part if part.dtype == tl.int64 else _rank(part, i)
        found = tl.maximum(found, tl.where(i < PARTS, rank, LOWEST))
    j = LAST - (tl.max(found, 0) & LAST)  # (7)
    d = tl.arange(0, DP)
    e = tl.load(embedding + j * D + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(h + n * D + d, (scale * e).to(h.dtype.element_ty), mask=d < D)
    tl.store(token + n, j)
    tl.store(made + n * places + place, j)
    tl.store(slot + n, place + 1)
    tl.store(position + n, count + 1)  # (8)


@triton.jit
def _prepare(
    x, norm, gate, p, weight, eps, x_row, gate_row, rows, pieces,
    GROUPS: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    SWISH: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """(1) to (3) of one of many rows. The programs beyond `rows` ask for the pieces of `weight`."""
    n = tl.program_id(0).to(tl.int64)
    if n >= rows:
        _ask(weight, pieces, n - rows, EARLY)
        return
    g, d = tl.arange(0, GP)[:, None], tl.arange(0, DP)[None, :]
    inside = (g < GROUPS) & (d < D)
    k = g * D + d
    if norm is not None:  # from memory, so before the wait
        w = tl.load(norm + d, mask=d < D, other=0.0)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    z = tl.load(gate + n * gate_row + k, mask=inside, other=0.0) if gate is not None else None
    s, f = _before(tl.load(x + n * x_row + k, mask=inside, other=0.0), z, SWISH)
    if norm is not None:
        s *= (1.0 / tl.sqrt(tl.sum(s * s, 1) / D + eps))[:, None]  # (2)
        s *= w.to(tl.float32)
    tl.store(p + n * (GROUPS * D) + k, (s * f).to(p.dtype.element_ty), mask=inside)  # (3)


@triton.jit
def _pair(y, out, R, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """(4) of a pair's products y (N, 2 R), for BLOCK results of one row."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    n = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y += n * 2 * R
    first = tl.load(y + i, mask=i < R, other=0.0).to(tl.float32)
    second = tl.load(y + R + i, mask=i < R, other=0.0).to(tl.float32)
    made = first * sigma(first) * second
    tl.store(out + n * R + i, made.to(out.dtype.element_ty), mask=i < R)


@functools.cache
def early(device: torch.device) -> bool:
    """Whether a launch on this device may begin before the one before it has ended."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(device: torch.device) -> dict[str, bool]:
    """The constant and the option of a launch that waits by itself."""
    return {"EARLY": True, "launch_pdl": True} if early(device) else {"EARLY": False}


def _pieces(weight: Tensor) -> int:
    """Pieces of the first AHEAD bytes; 0 unless contiguous, at an address that 16 divides."""
    whole = weight.is_contiguous() and weight.data_ptr() % 16 == 0
    return min(AHEAD, weight.nbytes) // PIECE.value if whole else 0


def _rows_of_one(R: int, K: int, pair: bool) -> tuple[int, int]:
    """RB and warps of `one`: a tile of TILE weights, less where that leaves half the chip idle."""
    rows = max(1, TILE // K)
    while rows > 1 and triton.cdiv(R, rows) < 128:
        rows //= 2
    return rows, 4 if rows * K * (1 + pair) <= 8192 else 8


def product_rows_triton(
    x: Tensor, weight: Tensor, norm: Tensor | None, eps: float, groups: int, gate: Tensor | None,
    swish: bool, pair: bool, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    """`product_rows` on a CUDA device; the arguments are taken to be right.

    Raises:
        ValueError: entries of a row lie apart.
    """
    for name, part in (("x", x), ("weight", weight), ("gate", gate), ("residual", residual)):
        if part is not None and part.stride(-1) != 1:
            raise ValueError(f"{name} has the strides {part.stride()}; allowed: 1 along a row")
    N, K = x.shape
    R = weight.shape[0] // (1 + pair)
    D = K // groups
    sizes = {"GROUPS": groups, "GP": triton.next_power_of_2(groups), "D": D}
    sizes |= {"DP": triton.next_power_of_2(D), "SWISH": swish}
    begin = launch_options(x.device)
    if N == 1:
        y = torch.empty(N, R, dtype=x.dtype, device=x.device)
        rows, warps = _rows_of_one(R, sizes["GP"] * sizes["DP"], pair)
        _one[(triton.cdiv(R, rows),)](
            x, weight, norm, gate, residual, y, None, eps, R,
            RB=rows, PAIR=pair, num_warps=warps, **sizes, **begin,
        )  # fmt: skip
        return y
    p = x
    if norm is not None or gate is not None or swish:
        p = torch.empty(N, K, dtype=x.dtype, device=x.device)
        pieces = _pieces(weight)
        _prepare[(N + triton.cdiv(pieces, ASKING.value),)](
            x, norm, gate, p, weight, eps, x.stride(0), 0 if gate is None else gate.stride(0), N,
            pieces, num_warps=4, **sizes, **begin,
        )  # fmt: skip
    if residual is not None and not pair:
        return residual.addmm_(p, weight.T)  # the library would copy it first
    y = p @ weight.T
    if not pair:
        return y
    made = torch.empty(N, R, dtype=x.dtype, device=x.device)
    _pair[(N, triton.cdiv(R, 1024))](y, made, R, BLOCK=1024, num_warps=4, **begin)
    return made if residual is None else made + residual


def greedy_rows_triton(
    x: Tensor, weight: Tensor, norm: Tensor, eps: float, embedding: Tensor, scale: float,
    into: Next,
) -> None:  # fmt: skip
    """`greedy_rows` on a CUDA device; the arguments are taken to be right."""
    N, (R, K) = len(x), weight.shape
    D, begin = triton.next_power_of_2(K), launch_options(x.device)
    if N == 1:
        rows, warps = _rows_of_one(R, D, False)
        best = torch.empty(1, triton.cdiv(R, rows), dtype=torch.int64, device=x.device)
        _one[(best.shape[1],)](
            x, weight, norm, None, None, None, best, eps, R, GROUPS=1, GP=1, D=K, DP=D, RB=rows,
            SWISH=False, PAIR=False, num_warps=warps, **begin,
        )  # fmt: skip
    else:
        best = product_rows_triton(x, weight, norm, eps, 1, None, False, False, None)
    parts = best.shape[1]
    block = min(RANKS, triton.next_power_of_2(parts))
    _take[(N,)](
        best, embedding, *into, scale, into.made.shape[1], PARTS=parts, BLOCK=block, D=K, DP=D,
        num_warps=max(4, block // 512), **begin,
    )  # fmt: skip
