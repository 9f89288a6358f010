r"""The element-wise edges of a layer as one launch each way: the log gate, the read-out's norm,
and the product inside of a channel mixer.

For a row x (D), its gate z (D) where there is one, weight w (D), sigma the logistic function:

    y = log sigma(x) / c,   dx = dy sigma(-x) / c                                            (1)
    log sigma(x) = min(x, 0) - 2 (t + t^3 / 3 + .. + t^13 / 13),   t = e / (2 + e), e = e^-|x|
    s = x, or silu(x) = x sigma(x)      r = (mean(s^2) + eps)^(-1/2)      n = r s             (2)
    y = w n, or w n silu(z)                                                                  (3)
    u = dy silu(z)        dw = sum over rows of u n        ds = r (w u - n mean(w u n))      (4)
    dx = ds, or ds silu'(x)        dz = dy w n silu'(z)                                      (5)
    silu'(x) = sigma(x) (1 + x (1 - sigma(x)))                                               (6)

For a pair of numbers x and u:

    y = silu(x) u        dx = dy u silu'(x)        du = dy silu(x)                           (7)

The series in (1) is log(1 + e) by the area tangent, with a remainder below 2e-8 of it: the
hardware's logarithm next to 1 would leave nothing of the small gates of large x. Everything is fp32
inside and rounded once. Nothing but the inputs is kept for the backward, in which r is computed
again; each program walks over rows with dw in registers, and torch adds up the programs' sums.

The definitions in plain torch are `log_gate`, `rms_norm` and `GLU` of glactl.models.layers, which
call this file outside of compiled regions on a CUDA device; a compiler fuses those definitions
itself, so nothing here is registered as an operator.

Floor, 32,768 tokens of gla-1.3b (4 heads, K 256, V 512), bf16, over 3.02 TB/s, and the prediction
at 85 % of it; (7) is of d_model 1,024. Plain torch moves the same in steps, with an fp32 copy
before each:

    | launch                  | MB  | floor ms | predicted | plain torch: launches, MB, floor ms |
    |-------------------------|-----|----------|-----------|-------------------------------------|
    | (1)                     | 201 | 0.067    | 0.08      | 3, 740, 0.24                        |
    | (1), backward           | 268 | 0.089    | 0.10      | 3, 870, 0.29                        |
    | (2), (3) with a gate    | 403 | 0.133    | 0.16      | 6, 3090, 1.02                       |
    | (4), (5) with a gate    | 671 | 0.222    | 0.26      | 9 or more                           |
    | (7), hidden 2816        | 554 | 0.183    | 0.21      | 2, 923, 0.31                        |
    | (7), backward           | 923 | 0.306    | 0.36      | 3, 1660, 0.55                       |

(7) measured there: 0.185, plain torch 0.308.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

WIDEST = 8192  # D of a row, which a program has in registers at once
TILE = 2048  # numbers of a program's tile, 16 a thread
FLAT = 1024  # numbers of a program of (1)
WALKS = 1056  # programs of the backward of (2): 8 a multiprocessor of an H100


@triton.jit
def sigma(x):
    """sigma(x) without overflow."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def log_sigma(x):
    """log sigma(x) of (1), fp32."""
    e = tl.exp(-tl.abs(x))
    t = e / (2.0 + e)
    q = t * t
    series = 1 / 9 + q * (1 / 11 + q * (1 / 13))
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * series)))
    return tl.where(x < 0, x, 0.0) - 2 * t * series


@triton.jit
def _glu(x, u, y, size, N: tl.constexpr):
    """y of (7), N numbers."""
    i = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    gate = tl.load(x + i, mask=i < size, other=0.0).to(tl.float32)
    up = tl.load(u + i, mask=i < size, other=0.0).to(tl.float32)
    tl.store(y + i, (gate * sigma(gate) * up).to(y.dtype.element_ty), mask=i < size)


@triton.jit
def _glu_back(x, u, dy, dx, du, size, N: tl.constexpr):
    """dx and du of (7), N numbers."""
    i = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    gate = tl.load(x + i, mask=i < size, other=0.0).to(tl.float32)
    up = tl.load(u + i, mask=i < size, other=0.0).to(tl.float32)
    d = tl.load(dy + i, mask=i < size, other=0.0).to(tl.float32)
    open_x = sigma(gate)
    slope = open_x * (1.0 + gate * (1.0 - open_x))  # (6)
    tl.store(dx + i, (d * up * slope).to(dx.dtype.element_ty), mask=i < size)
    tl.store(du + i, (d * gate * open_x).to(du.dtype.element_ty), mask=i < size)  # (7)


@triton.jit
def _log_gate(x, y, c, size, N: tl.constexpr):
    """(1) of N numbers."""
    i = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    v = tl.load(x + i, mask=i < size, other=0.0).to(tl.float32)
    tl.store(y + i, log_sigma(v) / c, mask=i < size)  # (1)


@triton.jit
def _log_gate_back(x, dy, dx, c, size, N: tl.constexpr):
    """The gradient of (1) for N numbers."""
    i = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    v = tl.load(x + i, mask=i < size, other=0.0).to(tl.float32)
    d = tl.load(dy + i, mask=i < size, other=0.0).to(tl.float32)
    tl.store(dx + i, (d * sigma(-v) / c).to(dx.dtype.element_ty), mask=i < size)  # (1)


@triton.jit
def _norm(
    x, z, w, y, eps, rows,
    D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, SWISH: tl.constexpr,
):  # fmt: skip
    """(2) and (3) of R rows; DP is D up to a power of two."""
    i = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    j = tl.arange(0, DP)
    inside = (i < rows)[:, None] & (j < D)[None, :]
    at = i[:, None] * D + j[None, :]
    weight = tl.load(w + j, mask=j < D, other=0.0).to(tl.float32)
    s = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if SWISH:
        s *= sigma(s)
    n = s * (1.0 / tl.sqrt(tl.sum(s * s, 1) / D + eps))[:, None]  # (2)
    out = n * weight[None, :]
    if z is not None:
        gate = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
        out *= gate * sigma(gate)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)  # (3)


@triton.jit
def _norm_back(
    x, z, w, dy, dx, dz, dw, eps, rows,
    D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, SWISH: tl.constexpr,
):  # fmt: skip
    """(4) and (5) of every num_programs-th tile of R rows; dw (programs, D) of those alone."""
    j = tl.arange(0, DP)
    weight = tl.load(w + j, mask=j < D, other=0.0).to(tl.float32)
    total = tl.zeros((DP,), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, R), tl.num_programs(0)):
        i = tl.cast(tile, tl.int64) * R + tl.arange(0, R)
        inside = (i < rows)[:, None] & (j < D)[None, :]
        at = i[:, None] * D + j[None, :]
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        s = v
        if SWISH:
            open_x = sigma(v)
            s = v * open_x
        r = 1.0 / tl.sqrt(tl.sum(s * s, 1) / D + eps)
        n = s * r[:, None]  # (2)
        if z is not None:
            gate = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
            open_z = sigma(gate)
            slope = open_z * (1.0 + gate * (1.0 - open_z))  # (6)
            dgate = u * weight[None, :] * n * slope  # (5)
            tl.store(dz + at, dgate.to(dz.dtype.element_ty), mask=inside)
            u *= gate * open_z
        total += tl.sum(u * n, 0)  # (4)
        u *= weight[None, :]
        d = (u - n * (tl.sum(u * n, 1) / D)[:, None]) * r[:, None]
        if SWISH:
            d *= open_x * (1.0 + v * (1.0 - open_x))
        tl.store(dx + at, d.to(dx.dtype.element_ty), mask=inside)  # (5)
    tl.store(dw + tl.program_id(0).to(tl.int64) * D + j, total, mask=j < D)


class _LogGate(torch.autograd.Function):
    """(1) of a contiguous x."""

    @staticmethod
    def forward(ctx, x, c):
        y = torch.empty_like(x, dtype=torch.float32)
        _log_gate[(triton.cdiv(x.numel(), FLAT),)](x, y, c, x.numel(), N=FLAT, num_warps=4)
        ctx.save_for_backward(x)
        ctx.c = c
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        dx, size = torch.empty_like(x), x.numel()
        _log_gate_back[(triton.cdiv(size, FLAT),)](
            x, dy.contiguous(), dx, ctx.c, size, N=FLAT, num_warps=4
        )
        return dx, None


def _tile(D: int) -> tuple[int, int, int]:
    """D up to a power of two, rows of a tile, warps."""
    wide = triton.next_power_of_2(D)
    rows = max(1, TILE // wide)
    return wide, rows, max(4, rows * wide // 512)


class _RMSNorm(torch.autograd.Function):
    """(2) and (3) of contiguous tensors."""

    @staticmethod
    def forward(ctx, x, weight, eps, gate, swish):
        D = x.shape[-1]
        wide, R, warps = _tile(D)
        rows, y = x.numel() // D, torch.empty_like(x)
        _norm[(triton.cdiv(rows, R),)](
            x, gate, weight, y, eps, rows, D=D, DP=wide, R=R, SWISH=swish, num_warps=warps
        )
        ctx.save_for_backward(x, weight, gate)
        ctx.eps, ctx.swish = eps, swish
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, gate = ctx.saved_tensors
        D = x.shape[-1]
        wide, R, warps = _tile(D)
        rows = x.numel() // D
        programs = min(WALKS, triton.cdiv(rows, R))
        dx, dz = torch.empty_like(x), None if gate is None else torch.empty_like(gate)
        dw = torch.empty(programs, D, dtype=torch.float32, device=x.device)
        _norm_back[(programs,)](
            x, gate, weight, dy.contiguous(), dx, dz, dw, ctx.eps, rows,
            D=D, DP=wide, R=R, SWISH=ctx.swish, num_warps=warps,
        )  # fmt: skip
        return dx, dw.sum(0).to(weight.dtype), None, dz, None


class _GLU(torch.autograd.Function):
    """(7) of contiguous tensors."""

    @staticmethod
    def forward(ctx, x, u):
        y, size = torch.empty_like(x), x.numel()
        _glu[(triton.cdiv(size, FLAT),)](x, u, y, size, N=FLAT, num_warps=4)
        ctx.save_for_backward(x, u)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, u = ctx.saved_tensors
        dx, du, size = torch.empty_like(x), torch.empty_like(u), x.numel()
        _glu_back[(triton.cdiv(size, FLAT),)](
            x, u, dy.contiguous(), dx, du, size, N=FLAT, num_warps=4
        )
        return dx, du


def log_gate_triton(x: Tensor, normalizer: float) -> Tensor:
    """(1) of x, in fp32, bf16 or fp16 and not empty; returns fp32, and nothing waits for it."""
    y: Tensor = _LogGate.apply(x.contiguous(), float(normalizer))
    return y


def rms_norm_triton(
    x: Tensor, weight: Tensor, eps: float, gate: Tensor | None = None, swish: bool = False
) -> Tensor:
    """(2) and (3), differentiable in x, weight and gate.

    Args:
        x: (..., D), D at most WIDEST, not empty; fp32, bf16 or fp16.
        weight: (D,).
        eps: added to the mean square, more than 0.
        gate: z, of x's shape; None: y = w n.
        swish: whether s is silu(x).

    Returns:
        y like x. Nothing waits for it.
    """
    gate = None if gate is None else gate.contiguous()
    y: Tensor = _RMSNorm.apply(x.contiguous(), weight.contiguous(), eps, gate, swish)
    return y


def glu_triton(x: Tensor, u: Tensor) -> Tensor:
    """y of (7), x and u of one shape and dtype, not empty; nothing waits for it."""
    y: Tensor = _GLU.apply(x.contiguous(), u.contiguous())
    return y
