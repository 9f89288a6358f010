r"""`scan_triton`: the Triton engine of the selective scan as one PyTorch operator.

Built as `gla_scalar` is (triton_scalar_op.py): forward and backward launches are operators with
fake implementations, for torch.compile and CUDA graphs; nothing here waits for the device; outside
of a compiled region the launches are called directly.
"""

import torch
from torch import Tensor

from glactl.kernels import triton_scan


def _run_forward(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    bias: Tensor | None, h0: Tensor | None, cu_seqlens: Tensor | None, want_final: bool,
    want_states: bool,
) -> list[Tensor]:  # fmt: skip
    p = triton_scan.plan(u, dt, A, D, z, bias, cu_seqlens)
    y, final, states = triton_scan.forward(p, B, C, h0, want_final, want_states)
    empty = u.new_empty(0, dtype=torch.float32)
    return [y, empty if final is None else final, empty.clone() if states is None else states]


_forward = torch.library.custom_op("glactl::scan_forward", _run_forward, mutates_args=())


@_forward.register_fake
def _(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    bias: Tensor | None, h0: Tensor | None, cu_seqlens: Tensor | None, want_final: bool,
    want_states: bool,
) -> list[Tensor]:  # fmt: skip
    batch, T, width = u.shape
    packed = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    M = A.shape[1]
    N = batch if packed is None else packed
    shape, dtype = triton_scan.states_shape(batch, T, packed, width, M, u.dtype)
    return [
        torch.empty_like(u),
        u.new_empty((N, M, width) if want_final else (0,), dtype=torch.float32),
        u.new_empty(shape, dtype=dtype) if want_states else u.new_empty(0, dtype=torch.float32),
    ]


def _run_backward(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    bias: Tensor | None, cu_seqlens: Tensor | None, dy: Tensor, dfinal: Tensor | None,
    states: Tensor, want_initial: bool,
) -> list[Tensor]:  # fmt: skip
    p = triton_scan.plan(u, dt, A, D, z, bias, cu_seqlens)
    du, ddt, dz, dA, dB, dC, dD, dbias, dh = triton_scan.backward(
        p, B, C, dy, dfinal, states, want_initial
    )
    dz = u.new_empty(0) if z is None else dz
    dh = u.new_empty(0, dtype=torch.float32) if dh is None else dh
    found = (du, ddt, dz, dA, dB, dC, dD, dbias, dh)
    return [x for x in found if x is not None]  # none of them is now


_backward = torch.library.custom_op("glactl::scan_backward", _run_backward, mutates_args=())


@_backward.register_fake
def _(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    bias: Tensor | None, cu_seqlens: Tensor | None, dy: Tensor, dfinal: Tensor | None,
    states: Tensor, want_initial: bool,
) -> list[Tensor]:  # fmt: skip
    width, M = A.shape
    N = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    new = lambda *size: u.new_empty(size, dtype=torch.float32)  # noqa: E731
    dz = u.new_empty(0) if z is None else torch.empty_like(z)
    return [
        *(torch.empty_like(x) for x in (u, dt)), dz, new(M, width),
        *(torch.empty_like(x) for x in (B, C)), new(width), new(width),
        new(N, M, width) if want_initial else new(0),
    ]  # fmt: skip


class _ScanTriton(torch.autograd.Function):
    """The two operators joined; the inputs are contiguous, the states (N, M, D)."""

    @staticmethod
    def forward(ctx, u, dt, A, B, C, D, z, bias, h0, cu_seqlens, want_final, grad):  # type: ignore[no-untyped-def]
        run = _forward if torch.compiler.is_compiling() else _run_forward
        y, final, states = run(u, dt, A, B, C, D, z, bias, h0, cu_seqlens, want_final, grad)
        if grad:
            ctx.save_for_backward(u, dt, A, B, C, D, z, bias, cu_seqlens, states)
            ctx.initial, ctx.final = h0 is not None, want_final
        return y, final

    @staticmethod
    def backward(ctx, dy, dfinal):  # type: ignore[no-untyped-def]
        u, dt, A, B, C, D, z, bias, cu_seqlens, states = ctx.saved_tensors
        dfinal = dfinal.float().contiguous() if ctx.final else None
        run = _backward if torch.compiler.is_compiling() else _run_backward
        du, ddt, dz, dA, dB, dC, dD, dbias, dh = run(
            u, dt, A, B, C, D, z, bias, cu_seqlens, dy.contiguous(), dfinal, states, ctx.initial
        )
        return (
            du, ddt, dA.T.to(A.dtype), dB, dC, None if D is None else dD.to(D.dtype),
            None if z is None else dz, None if bias is None else dbias.to(bias.dtype),
            dh if ctx.initial else None, None, None, None,
        )  # fmt: skip


def scan_triton(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, dt_bias: Tensor | None = None, *,
    initial_state: Tensor | None = None, output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The selective scan by the Triton kernels; differentiable.

    Arguments and results as of `scan`, bf16, fp16 or fp32, M at most 32, with tokens and channels;
    values are not checked.

    Memory: between forward and backward, the state of every 16th row (fp32: every 8th).
    """
    h0 = None
    if initial_state is not None:
        h0 = initial_state.float().transpose(1, 2).contiguous()
    given = (u, dt, A, B, C, D, z, dt_bias, h0)
    inputs = [None if x is None else x.contiguous() for x in given]
    grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    y, final = _ScanTriton.apply(*inputs, cu_seqlens, output_final_state, grad)
    return y, final.transpose(1, 2).contiguous() if output_final_state else None
