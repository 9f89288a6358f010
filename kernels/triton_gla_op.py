r"""`gla_key`: the Triton engine of gated linear attention with a key gate, as one PyTorch operator.

The forward and backward launches are registered as operators of their own with fake
implementations, so that torch.compile traces through and a CUDA graph can capture them; nothing
here waits for the device. Outside of a compiled region the launches are called directly: the
operators' dispatch is a third of the host's time for a step (83 of 277 us, launches left out).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from glactl.kernels import triton_gla
from glactl.kernels.checks import operand_dtype
from glactl.kernels.triton_launch import aligned, rehearsed
from glactl.kernels.triton_layout import block_count


def _both(p: triton_gla.Plan, s0: Tensor | None, want_final: bool) -> None:
    """A call and its backward, to be rehearsed."""
    o, final, states, parts = triton_gla.forward(p, s0, want_final, True)
    triton_gla.backward(p, o, final if want_final else None, states, parts, s0 is not None)


def _run_forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, s0: Tensor | None,
    cu_seqlens: Tensor | None, want_final: bool, want_states: bool,
) -> list[Tensor]:  # fmt: skip
    q, k, v, g, s0 = aligned(q, k, v, g, s0)
    p = triton_gla.plan(q, k, v, g, scale, cu_seqlens)
    if want_states:
        rehearsed(p, s0, _both, want_final)
    o, final, states, parts = triton_gla.forward(p, s0, want_final, want_states)
    return [o, final, states, *(parts if want_states else [])]


_forward = torch.library.custom_op("glactl::gla_key_forward", _run_forward, mutates_args=())


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, s0: Tensor | None,
    cu_seqlens: Tensor | None, want_final: bool, want_states: bool,
) -> list[Tensor]:  # fmt: skip
    B, T, HQ, K = q.shape
    H, V = v.shape[2:]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    n = block_count(B, T, None if cu_seqlens is None else N)
    dtype = operand_dtype(q, k, v)
    out = [
        v.new_empty(B, T, HQ, V),
        q.new_empty((N, H, K, V) if want_final else (0,), dtype=torch.float32),
        q.new_empty((n, H, K, V) if want_states else (0,), dtype=dtype),
    ]
    if want_states:
        shapes = triton_gla.operand_shapes(n, H, HQ, K, dtype)
        out += [q.new_empty(s, dtype=d) for s, d in shapes]
    return out


def _run_backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, cu_seqlens: Tensor | None,
    do: Tensor, dfinal: Tensor | None, states: Tensor, parts: list[Tensor], want_initial: bool,
) -> list[Tensor]:  # fmt: skip
    q, k, v, g, do, dfinal = aligned(q, k, v, g, do, dfinal)
    p = triton_gla.plan(q, k, v, g, scale, cu_seqlens)
    return list(triton_gla.backward(p, do, dfinal, states, tuple(parts), want_initial))


_backward = torch.library.custom_op("glactl::gla_key_backward", _run_backward, mutates_args=())


@_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, cu_seqlens: Tensor | None,
    do: Tensor, dfinal: Tensor | None, states: Tensor, parts: list[Tensor], want_initial: bool,
) -> list[Tensor]:  # fmt: skip
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (N, v.shape[2], q.shape[3], v.shape[3]) if want_initial else (0,)
    ds0 = q.new_empty(shape, dtype=torch.float32)
    return [*(torch.empty_like(x) for x in (q, k, v, g)), ds0]


class _GLAKey(torch.autograd.Function):
    """The two operators joined; the inputs are contiguous and of the widths the kernels take."""

    @staticmethod
    def forward(ctx, q, k, v, g, s0, scale, cu_seqlens, want_final, grad):  # type: ignore[no-untyped-def]
        run = _forward if torch.compiler.is_compiling() else _run_forward
        o, final, states, *parts = run(q, k, v, g, scale, s0, cu_seqlens, want_final, grad)
        if grad:
            ctx.save_for_backward(q, k, v, g, cu_seqlens, states, *parts)
            ctx.scale, ctx.initial, ctx.final = scale, s0 is not None, want_final
        return o, final

    @staticmethod
    def backward(ctx, do, dfinal):  # type: ignore[no-untyped-def]
        q, k, v, g, cu_seqlens, states, *parts = ctx.saved_tensors
        dfinal = dfinal.float() if ctx.final else None
        run = _backward if torch.compiler.is_compiling() else _run_backward
        dq, dk, dv, dg, ds0 = run(
            q, k, v, g, ctx.scale, cu_seqlens, do, dfinal, states, parts, ctx.initial
        )
        return dq, dk, dv, dg, ds0 if ctx.initial else None, None, None, None, None


def _width(n: int, least: int) -> int:
    return max(least, 1 << (n - 1).bit_length())


def gla_key(
    q: Tensor, k: Tensor, v: Tensor, gk: Tensor, *, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Gated linear attention with a key gate by the Triton kernels, differentiable.

    Args:
        q: queries, (B, T, HQ, K); K at most 512. bf16, fp16 or fp32, as k and v.
        k: keys, (B, T, H, K); H divides HQ, and query head j reads state j // (HQ / H).
        v: values, (B, T, H, V), any V.
        gk: log gates, (B, T, H, K), natural log, in [-inf, 0]; the values are not checked.
        scale: factor on the read-out; K**-0.5 if None.
        initial_state: (N, H, K, V) or None for zero; N = B, or the number of packed sequences.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: (N + 1,) ints on the device, row bounds of packed sequences; B is then 1.

    Returns:
        o: (B, T, HQ, V) in v's dtype, and the final state (N, H, K, V) in fp32 or None.

    Widths that are no power of two, or below 64 (K) and 16 (V), are padded with zeros first.
    Memory: between forward and backward, the state of every 128th row and the scaled operands.
    """
    K, V = q.shape[3], v.shape[3]
    scale = K**-0.5 if scale is None else float(scale)
    wide_k = _width(K, 64 if q.dtype == torch.bfloat16 else 16)
    wide_v = _width(V, 16)
    if wide_k != K:
        q, k, gk = (F.pad(x, (0, wide_k - K)) for x in (q, k, gk))
    if wide_v != V:
        v = F.pad(v, (0, wide_v - V))
    if initial_state is not None:
        pad = (0, wide_v - V, 0, wide_k - K)
        initial_state = F.pad(initial_state.float(), pad).contiguous()
    q, k, v, gk = (x.contiguous() for x in (q, k, v, gk))
    inputs = (q, k, v, gk) if initial_state is None else (q, k, v, gk, initial_state)
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    o, final = _GLAKey.apply(
        q, k, v, gk, initial_state, scale, cu_seqlens, output_final_state, grad
    )
    return o[..., :V], final[..., :K, :V] if output_final_state else None
