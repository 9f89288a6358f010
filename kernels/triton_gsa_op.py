r"""`gsa_fused`: the Triton engine of gated slot attention, as one PyTorch operator.

The forward and backward launches are registered as operators of their own with fake
implementations, so that torch.compile traces through and a CUDA graph can capture them; nothing
here waits for the device. Outside of a compiled region the launches are called directly, without
the operators' dispatch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from glactl.kernels import triton_gsa
from glactl.kernels.checks import operand_dtype
from glactl.kernels.triton_launch import aligned, rehearsed
from glactl.kernels.triton_layout import block_count


def _both(p: triton_gsa.Plan, start: Tensor | None, want_final: bool) -> None:
    """A call and its backward, to be rehearsed."""
    o, final, kept = triton_gsa.forward(p, start, want_final, True)
    triton_gsa.backward(p, o, final if want_final else None, kept, start is not None)


def _run_forward(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor | None, g: Tensor, scale: float, slots: int,
    start: Tensor | None, cu_seqlens: Tensor | None, want_final: bool, save: bool,
) -> list[Tensor]:  # fmt: skip
    q, k, v, s, g, start = aligned(q, k, v, s, g, start)
    p = triton_gsa.plan(q, k, v, s, g, scale, slots, cu_seqlens)
    if save:
        rehearsed(p, start, _both, want_final)
    o, final, kept = triton_gsa.forward(p, start, want_final, save)
    return [o, final, *(kept if save else [])]


_forward = torch.library.custom_op("glactl::gsa_forward", _run_forward, mutates_args=())


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor | None, g: Tensor, scale: float, slots: int,
    start: Tensor | None, cu_seqlens: Tensor | None, want_final: bool, save: bool,
) -> list[Tensor]:  # fmt: skip
    B, T, HQ, K = q.shape
    H, V = v.shape[2:]
    M = g.shape[3]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    n = block_count(B, T, None if cu_seqlens is None else N)
    dtype = operand_dtype(q, k, v)
    out = [
        v.new_empty(B, T, HQ, V),
        q.new_empty((N, H, M, K + V) if want_final else (0,), dtype=torch.float32),
    ]
    if save:
        shapes = triton_gsa.saved_shapes(n, H, HQ, K, V, M, dtype)
        out += [q.new_empty(size, dtype=d) for size, d in shapes]
    return out


def _run_backward(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor | None, g: Tensor, scale: float, slots: int,
    cu_seqlens: Tensor | None, do: Tensor, dfinal: Tensor | None, kept: list[Tensor],
    want_initial: bool,
) -> list[Tensor]:  # fmt: skip
    q, k, v, s, g, do, dfinal = aligned(q, k, v, s, g, do, dfinal)
    p = triton_gsa.plan(q, k, v, s, g, scale, slots, cu_seqlens)
    return list(triton_gsa.backward(p, do, dfinal, kept, want_initial))


_backward = torch.library.custom_op("glactl::gsa_backward", _run_backward, mutates_args=())


@_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor | None, g: Tensor, scale: float, slots: int,
    cu_seqlens: Tensor | None, do: Tensor, dfinal: Tensor | None, kept: list[Tensor],
    want_initial: bool,
) -> list[Tensor]:  # fmt: skip
    dtype = operand_dtype(q, k, v)
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (N, v.shape[2], g.shape[3], q.shape[3] + v.shape[3]) if want_initial else (0,)
    dstart = q.new_empty(shape, dtype=torch.float32)
    ds = q.new_empty(0, dtype=dtype) if s is None else torch.empty_like(s)
    return [*(torch.empty_like(x) for x in (q, k, v)), ds, torch.empty_like(g), dstart]


class _GSA(torch.autograd.Function):
    """The two operators joined; the inputs are contiguous and of the widths the kernels take."""

    @staticmethod
    def forward(ctx, q, k, v, s, g, start, scale, slots, cu_seqlens, want_final, grad):  # type: ignore[no-untyped-def]
        run = _forward if torch.compiler.is_compiling() else _run_forward
        o, final, *kept = run(q, k, v, s, g, scale, slots, start, cu_seqlens, want_final, grad)
        if grad:
            ctx.save_for_backward(q, k, v, s, g, cu_seqlens, *kept)
            ctx.scale, ctx.slots = scale, slots
            ctx.initial, ctx.final = start is not None, want_final
        return o, final

    @staticmethod
    def backward(ctx, do, dfinal):  # type: ignore[no-untyped-def]
        q, k, v, s, g, cu_seqlens, *kept = ctx.saved_tensors
        dfinal = dfinal.float() if ctx.final else None
        run = _backward if torch.compiler.is_compiling() else _run_backward
        dq, dk, dv, ds, dg, dstart = run(
            q, k, v, s, g, ctx.scale, ctx.slots, cu_seqlens, do, dfinal, kept,
            ctx.initial,
        )  # fmt: skip
        ds = None if s is None else ds
        dstart = dstart if ctx.initial else None
        return dq, dk, dv, ds, dg, dstart, None, None, None, None, None


def _width(n: int, least: int) -> int:
    """The next multiple of 64, or the next power of two from `least` on."""
    return -(-n // 64) * 64 if n > 64 else max(least, 1 << (n - 1).bit_length())


def _pad(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def gsa_fused(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor | None, g: Tensor | None, *, scale: float = 1.0,
    initial_state: tuple[Tensor, Tensor] | None = None, output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:  # fmt: skip
    """Gated slot attention by the Triton kernels, differentiable in every tensor.

    Args:
        q: queries, (B, T, HQ, K). bf16, fp16 or fp32, as k and v; mixed ones are taken as fp32.
        k: keys, (B, T, H, K); H divides HQ, and query head j reads state j // (HQ / H).
        v: values, (B, T, H, V).
        s: write strengths, (B, T, H, M); None for 1 - exp(g).
        g: log gates, (B, T, H, M), natural log, in [-inf, 0], not checked; None for no decay,
            and s is then required.
        scale: factor on the logits.
        initial_state: Sk (N, H, K, M) and Sv (N, H, M, V), or None for zero; N = B, or the number
            of packed sequences.
        output_final_state: whether to return the states after the last token.
        cu_seqlens: (N + 1,) ints on the device, row bounds of packed sequences; B is then 1.

    Returns:
        o: (B, T, HQ, V) in v's dtype, and the final (Sk, Sv) in fp32 or None.

    Raises:
        ValueError: neither s nor g is given, or M exceeds 256 (128 where q, k, v are not all bf16).

    Widths are padded with zeros: K and V to a multiple of 64, or to a power of two up to 64, M to a
    power of two, all of them at least 16, in bf16 64. Memory: between forward and backward, the
    states of every 128th row, and of each row and head 256 bytes and 10 M bytes in bf16.
    """
    gate, scale = s if g is None else g, float(scale)
    if gate is None:
        raise ValueError("s and g are both None; gsa needs s, g or both")
    K, V, M = q.shape[3], v.shape[3], gate.shape[3]
    most = triton_gsa.MOST_SLOTS[operand_dtype(q, k, v)]
    if most < M:
        raise ValueError(f"g or s has {M} slots; the Triton engine takes at most {most} here")
    dtype = v.dtype
    if not q.dtype == k.dtype == v.dtype:
        q, k, v = q.float(), k.float(), v.float()
    g = torch.zeros_like(gate) if g is None else g
    # 64 columns at least in bf16: Triton 3.6 lets products of a matrix from memory with fewer than
    # 64 columns from registers read shared memory past its end (H100, compute-sanitizer)
    least = 64 if q.dtype == torch.bfloat16 else 16
    wide_k, wide_v, wide_m = (
        _width(K, least),
        _width(V, least),
        max(least, 1 << (M - 1).bit_length()),
    )
    q, k, v, g = _pad(q, wide_k), _pad(k, wide_k), _pad(v, wide_v), _pad(g, wide_m)
    start = None
    if initial_state is not None:
        Sk, Sv = (x.float() for x in initial_state)
        start = torch.cat([_pad(Sk.transpose(2, 3), wide_k), _pad(Sv, wide_v)], 3)
        start = F.pad(start, (0, 0, 0, wide_m - M)).contiguous()
    q, k, v, g = (x.contiguous() for x in (q, k, v, g))
    s = None if s is None else _pad(s, wide_m).contiguous()
    inputs = [x for x in (q, k, v, s, g, start) if x is not None]
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    o, final = _GSA.apply(q, k, v, s, g, start, scale, M, cu_seqlens, output_final_state, grad)
    o = o[..., :V].to(dtype)
    if not output_final_state:
        return o, None
    final = final[:, :, :M]
    Sk, Sv = final[..., :K].transpose(2, 3), final[..., wide_k : wide_k + V]
    return o, (Sk.contiguous(), Sv.contiguous())
