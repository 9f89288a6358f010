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
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor

from glactl.kernels.checks import state_dtype
from glactl.kernels.gla import gla as gla_whole
from glactl.kernels.gsa import States
from glactl.kernels.gsa import gsa as gsa_whole
from glactl.kernels.scan import scan as scan_whole

Function = Callable[[Sequence[Tensor], Tensor | None, float | None], list[Tensor]]


def _gla(axis: str) -> Function:
    """`gla` of (q, k, v, [gate], S), with the gate on this axis, or none."""

    def run(inputs: Sequence[Tensor], cu: Tensor | None, scale: float | None) -> list[Tensor]:
        (q, k, v), S = inputs[:3], inputs[-1]
        gates: dict[str, Any] = dict.fromkeys(axis.split(), inputs[3])
        o, final = gla_whole(
            q, k, v, **gates, scale=scale, initial_state=S, output_final_state=True, cu_seqlens=cu
        )
        assert final is not None
        return [o, final]

    return run


def _gsa(given: str) -> Function:
    """`gsa` of (q, k, v, [s], [g], Sk, Sv), with those of s and g that are given."""

    def run(inputs: Sequence[Tensor], cu: Tensor | None, scale: float | None) -> list[Tensor]:
        (q, k, v), (Sk, Sv) = inputs[:3], inputs[-2:]
        named = dict(zip(given.split(), inputs[3:-2], strict=True))
        o, final = gsa_whole(
            q, k, v, named.get("s"), named.get("g"), scale=1.0 if scale is None else scale,
            initial_state=(Sk, Sv), output_final_state=True, cu_seqlens=cu,
        )  # fmt: skip
        assert final is not None
        return [o, *final]

    return run


def _scan(given: str) -> Function:
    """`scan` of (u, dt, A, B, C, [D], [z], [dt_bias], h_0), with those of three that are given."""

    def run(inputs: Sequence[Tensor], cu: Tensor | None, scale: float | None) -> list[Tensor]:
        named: dict[str, Any] = dict(zip(given.split(), inputs[5:-1], strict=True))
        y, final = scan_whole(
            *inputs[:5], **named, initial_state=inputs[-1], output_final_state=True, cu_seqlens=cu
        )
        assert final is not None
        return [y, final]

    return run


# name -> what runs, and how many of the last inputs are states
FUNCTIONS: dict[str, tuple[Function, int]] = {
    f"gla {axis}": (_gla(axis), 1) for axis in ("gk", "gv", "g", "")
} | {f"gsa {given}": (_gsa(given), 2) for given in ("g", "s", "s g")}
for _given in product(("D", ""), ("z", ""), ("dt_bias", "")):
    _names = " ".join(filter(None, _given))
    FUNCTIONS[f"scan {_names}"] = (_scan(_names), 1)


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
def _whole(
    name: str, inputs: Sequence[Tensor], cu: Tensor | None, scale: float | None
) -> list[Tensor]:
    return [x.contiguous() for x in FUNCTIONS[name][0](inputs, cu, scale)]  # (1)


@_whole.register_fake
def _(name: str, inputs: Sequence[Tensor], cu: Tensor | None, scale: float | None) -> list[Tensor]:
    states = inputs[-FUNCTIONS[name][1] :]
    if name.startswith("scan"):
        u, dt, _, B, C = inputs[:5]
        return [
            u.new_empty(u.shape),
            states[0].new_empty(states[0].shape, dtype=state_dtype(u, dt, B, C)),
        ]
    q, _, v = inputs[:3]
    o = v.new_empty(*q.shape[:3], v.shape[3])
    return [o, *(x.new_empty(x.shape, dtype=state_dtype(*inputs[:3])) for x in states)]


@torch.library.custom_op("glactl::whole_backward", mutates_args=())
def _whole_backward(
    name: str, inputs: Sequence[Tensor], cu: Tensor | None, scale: float | None,
    grads: Sequence[Tensor],
) -> list[Tensor]:  # fmt: skip
    with _recording():
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = FUNCTIONS[name][0](leaves, cu, scale)
        found = torch.autograd.grad(out, leaves, list(grads))  # (2)
    return [x.contiguous() for x in found]


@_whole_backward.register_fake
def _(
    name: str, inputs: Sequence[Tensor], cu: Tensor | None, scale: float | None,
    grads: Sequence[Tensor],
) -> list[Tensor]:  # fmt: skip
    return [x.new_empty(x.shape) for x in inputs]


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.name, tensors, cu, ctx.scale = inputs
    ctx.count = len(tensors)
    ctx.save_for_backward(*tensors, cu)


def _back(ctx, grads):  # type: ignore[no-untyped-def]
    *tensors, cu = ctx.saved_tensors
    return None, _whole_backward(ctx.name, tensors, cu, ctx.scale, grads), None, None


_whole.register_autograd(_back, setup_context=_keep)


def _opaque(device: torch.device) -> bool:
    return device.type == "cpu" and torch.compiler.is_compiling()


def gla(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, initial_state: Tensor | None,
    output_final_state: bool, cu_seqlens: Tensor | None, *,
    axis: Literal["gk", "gv", "g"] = "gk", scale: float | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`glactl.kernels.gla` with its argument `axis` as the gate; results as there."""
    if not _opaque(q.device):
        named: dict[str, Any] = {axis: gate}
        return gla_whole(
            q, k, v, **named, scale=scale, initial_state=initial_state,
            output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    s = initial_state
    if s is None:
        s = _zeros(q, k, v, cu_seqlens, k.shape[3], v.shape[3])
    gates = [] if gate is None else [gate]
    name = f"gla {axis if gates else ''}"
    o, final = _whole(name, [q, k, v, *gates, s], cu_seqlens, scale)
    return o, final if output_final_state else None


def gsa(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial_state: States | None,
    output_final_state: bool, cu_seqlens: Tensor | None, *, s: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, States | None]:  # fmt: skip
    """`glactl.kernels.gsa`; arguments and results as there."""
    if not _opaque(q.device):
        return gsa_whole(
            q, k, v, s, g, scale=scale, initial_state=initial_state,
            output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    given = {name: x for name, x in (("s", s), ("g", g)) if x is not None}
    M = next(iter(given.values())).shape[3]
    Sk, Sv = initial_state or (
        _zeros(q, k, v, cu_seqlens, k.shape[3], M),
        _zeros(q, k, v, cu_seqlens, M, v.shape[3]),
    )
    inputs = [q, k, v, *given.values(), Sk, Sv]
    o, Sk, Sv = _whole(f"gsa {' '.join(given)}", inputs, cu_seqlens, scale)
    return o, (Sk, Sv) if output_final_state else None


def scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, initial_state: Tensor | None, output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`glactl.kernels.scan`; arguments and results as there."""
    if not _opaque(u.device):
        return scan_whole(
            u, dt, A, B, C, D, z=z, dt_bias=dt_bias, initial_state=initial_state,
            output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    given = {n: x for n, x in (("D", D), ("z", z), ("dt_bias", dt_bias)) if x is not None}
    h = initial_state
    if h is None:
        N = len(u) if cu_seqlens is None else len(cu_seqlens) - 1
        h = u.new_zeros(N, *A.shape, dtype=state_dtype(u, dt, B, C))
    inputs = [u, dt, A, B, C, *given.values(), h]
    y, final = _whole(f"scan {' '.join(given)}", inputs, cu_seqlens, None)
    return y, final if output_final_state else None


def _zeros(q: Tensor, k: Tensor, v: Tensor, cu: Tensor | None, rows: int, columns: int) -> Tensor:
    """States (N, H, rows, columns) before the first token."""
    N = k.shape[0] if cu is None else len(cu) - 1
    return k.new_zeros(N, k.shape[2], rows, columns, dtype=state_dtype(q, k, v))
