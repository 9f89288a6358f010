r"""The operators as the layers call them, so that torch.compile takes a model as one graph.

The Triton engines are operators that a compiler traces. The chunked engine is not: which of its
chunks need the exact form is a question to the values, and it checks gates and bounds. So on the
CPU and within a compiled region it is put in the graph as one opaque operator each way,

    forward    (o, S) = f(inputs)                                                            (1)
    backward   d inputs = (df / d inputs)^T (do, dS), with f computed again                  (2)

so that nothing whose size depends on values lies between the two. Outside of a compiled region, and
on every other device, these functions are `gla` and `gsa`.

Cost: inside a compiled region on the CPU one forward pass more than without; nothing elsewhere.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from glactl.kernels.checks import state_dtype
from glactl.kernels.gla import gla as gla_whole
from glactl.kernels.gsa import States
from glactl.kernels.gsa import gsa as gsa_whole

Function = Callable[..., tuple[Tensor, ...]]


def _gla(q: Tensor, k: Tensor, v: Tensor, gk: Tensor, s: Tensor, cu: Tensor | None):  # type: ignore[no-untyped-def]
    o, final = gla_whole(q, k, v, gk=gk, initial_state=s, output_final_state=True, cu_seqlens=cu)
    assert final is not None
    return o, final


def _gsa(q: Tensor, k: Tensor, v: Tensor, g: Tensor, Sk: Tensor, Sv: Tensor, cu: Tensor | None):  # type: ignore[no-untyped-def]
    o, final = gsa_whole(
        q, k, v, None, g, initial_state=(Sk, Sv), output_final_state=True, cu_seqlens=cu
    )
    assert final is not None
    return o, *final


FUNCTIONS: dict[str, Function] = {"gla": _gla, "gsa": _gsa}


@contextmanager
def _recording() -> Iterator[None]:
    """Autograd within the body of an operator, which runs below it."""
    key = torch._C.DispatchKey.AutogradFunctionality
    exclude = torch._C._dispatch_tls_set_dispatch_key_excluded
    before = torch._C._dispatch_tls_is_dispatch_key_excluded(key)
    exclude(key, False)
    try:
        with torch.enable_grad():
            yield
    finally:
        exclude(key, before)


@torch.library.custom_op("glactl::whole", mutates_args=())
def _whole(name: str, inputs: Sequence[Tensor], cu: Tensor | None) -> list[Tensor]:
    return [x.contiguous() for x in FUNCTIONS[name](*inputs, cu)]  # (1)


@_whole.register_fake
def _(name: str, inputs: Sequence[Tensor], cu: Tensor | None) -> list[Tensor]:
    q, _, v = inputs[:3]
    o = v.new_empty(*q.shape[:3], v.shape[3])
    return [o, *(x.new_empty(x.shape, dtype=state_dtype(*inputs[:3])) for x in inputs[4:])]


@torch.library.custom_op("glactl::whole_backward", mutates_args=())
def _whole_backward(
    name: str, inputs: Sequence[Tensor], cu: Tensor | None, grads: Sequence[Tensor]
) -> list[Tensor]:
    with _recording():
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = FUNCTIONS[name](*leaves, cu)
        found = torch.autograd.grad(out, leaves, list(grads))  # (2)
    return [x.contiguous() for x in found]


@_whole_backward.register_fake
def _(
    name: str, inputs: Sequence[Tensor], cu: Tensor | None, grads: Sequence[Tensor]
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in inputs]


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.name, tensors, cu = inputs
    ctx.count = len(tensors)
    ctx.save_for_backward(*tensors, cu)


def _back(ctx, grads):  # type: ignore[no-untyped-def]
    *tensors, cu = ctx.saved_tensors
    return None, _whole_backward(ctx.name, tensors, cu, grads), None


_whole.register_autograd(_back, setup_context=_keep)


def _opaque(device: torch.device) -> bool:
    return device.type == "cpu" and torch.compiler.is_compiling()


def gla(
    q: Tensor, k: Tensor, v: Tensor, gk: Tensor, initial_state: Tensor | None,
    output_final_state: bool, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`glactl.kernels.gla` with a key gate; arguments and results as there."""
    if not _opaque(q.device):
        return gla_whole(
            q, k, v, gk=gk, initial_state=initial_state,
            output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    s = initial_state
    if s is None:
        s = _zeros(q, k, v, cu_seqlens, k.shape[3], v.shape[3])
    o, final = _whole("gla", [q, k, v, gk, s], cu_seqlens)
    return o, final if output_final_state else None


def gsa(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: States | None,
    output_final_state: bool, cu_seqlens: Tensor | None,
) -> tuple[Tensor, States | None]:  # fmt: skip
    """`glactl.kernels.gsa` with write strengths 1 - exp g; arguments and results as there."""
    if not _opaque(q.device):
        return gsa_whole(
            q, k, v, None, g, initial_state=initial_state,
            output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    Sk, Sv = initial_state or (
        _zeros(q, k, v, cu_seqlens, k.shape[3], g.shape[3]),
        _zeros(q, k, v, cu_seqlens, g.shape[3], v.shape[3]),
    )
    o, Sk, Sv = _whole("gsa", [q, k, v, g, Sk, Sv], cu_seqlens)
    return o, (Sk, Sv) if output_final_state else None


def _zeros(q: Tensor, k: Tensor, v: Tensor, cu: Tensor | None, rows: int, columns: int) -> Tensor:
    """States (N, H, rows, columns) before the first token."""
    N = k.shape[0] if cu is None else len(cu) - 1
    return k.new_zeros(N, k.shape[2], rows, columns, dtype=state_dtype(q, k, v))
