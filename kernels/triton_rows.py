r"""Triton kernels of `product_rows` (rows.py): equations (1) to (5) there as one launch.

`_one` is a single row: a program owns RB rows of W, has all of them on their way before it looks at
x, and takes the sums along K in its threads. Of more rows the product is the library's, with (1) to
(3) as a launch before it, `_prepare`, and (4) as one behind it, `_pair`. (A kernel with all of it
on the tensor cores took 21 us where the library's product takes 5 to 12: 64 rows, d 1024.)

A launch may begin before the one before it has ended (programmatic dependent launch, compute
capability 9 and later): it asks for its weights, which no kernel writes, and only then waits. Every
kernel waits before it reads or writes anything else, so that one that has ended vouches for all
before it, and lets the next one begin only then: earlier, they take its place on the chip (0.544 ms
a step in place of 0.527).

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

from glactl.kernels.triton_edges import sigma

TILE = 8192  # weights of a program of `one`


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
def _one(
    x, w, norm, gate, res, y, eps, R,
    GROUPS: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, RB: tl.constexpr,
    SWISH: tl.constexpr, PAIR: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """(1) to (5) of one row and RB of the R results; GROUPS groups of D, padded to GP and DP."""
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
    s, f = _before(tl.load(x + k, mask=inside, other=0.0), z, SWISH)
    if norm is not None:
        s *= (1.0 / tl.sqrt(tl.sum(s * s, 1) / D + eps))[:, None]  # (2)
        s *= weight.to(tl.float32)[None, :]
    p = (s * f)[None, :, :]  # (3)
    out = tl.sum(tl.sum(W.to(tl.float32) * p, 2), 1)
    if PAIR:
        out = out * sigma(out) * tl.sum(tl.sum(W2.to(tl.float32) * p, 2), 1)  # (4)
    if res is not None:
        out += tl.load(res + r, mask=r < R, other=0.0).to(tl.float32)  # (5)
    tl.store(y + r, out.to(y.dtype.element_ty), mask=r < R)


@triton.jit
def _prepare(
    x, norm, gate, p, eps, x_row, gate_row,
    GROUPS: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    SWISH: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """(1) to (3) of one of many rows."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    n = tl.program_id(0).to(tl.int64)
    g, d = tl.arange(0, GP)[:, None], tl.arange(0, DP)[None, :]
    inside = (g < GROUPS) & (d < D)
    k = g * D + d
    z = tl.load(gate + n * gate_row + k, mask=inside, other=0.0) if gate is not None else None
    s, f = _before(tl.load(x + n * x_row + k, mask=inside, other=0.0), z, SWISH)
    if norm is not None:
        s *= (1.0 / tl.sqrt(tl.sum(s * s, 1) / D + eps))[:, None]  # (2)
        s *= tl.load(norm + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(p + n * (GROUPS * D) + k, (s * f).to(p.dtype.element_ty), mask=inside)  # (3)


@triton.jit
def _pair(y, out, R, size, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """(4) of a pair's products y (N, 2 R), for BLOCK of the size = N R results."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = i // R * (2 * R) + i % R
    first = tl.load(y + at, mask=i < size, other=0.0).to(tl.float32)
    second = tl.load(y + at + R, mask=i < size, other=0.0).to(tl.float32)
    tl.store(out + i, (first * sigma(first) * second).to(out.dtype.element_ty), mask=i < size)


@functools.cache
def early(device: torch.device) -> bool:
    """Whether a launch on this device may begin before the one before it has ended."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(device: torch.device) -> dict[str, bool]:
    """The constant and the option of a launch that waits by itself."""
    return {"EARLY": True, "launch_pdl": True} if early(device) else {"EARLY": False}


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
            x, weight, norm, gate, residual, y, eps, R,
            RB=rows, PAIR=pair, num_warps=warps, **sizes, **begin,
        )  # fmt: skip
        return y
    p = x
    if norm is not None or gate is not None or swish:
        p = torch.empty(N, K, dtype=x.dtype, device=x.device)
        _prepare[(N,)](
            x, norm, gate, p, eps, x.stride(0), 0 if gate is None else gate.stride(0),
            num_warps=4, **sizes, **begin,
        )  # fmt: skip
    if residual is not None and not pair:
        return residual.addmm_(p, weight.T)  # the library would copy it first
    y = p @ weight.T
    if not pair:
        return y
    made = torch.empty(N, R, dtype=x.dtype, device=x.device)
    _pair[(triton.cdiv(N * R, 1024),)](y, made, R, N * R, BLOCK=1024, num_warps=4, **begin)
    return made if residual is None else made + residual
