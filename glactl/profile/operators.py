"""The operators that `glactl profile` measures: their inputs, their reference, their least work.

With N = batch * T tokens, H heads, key width K, value width V, slots M, chunk C = 64, the least
work of one call, in floating-point operations (a product of (m, n) and (n, p) counts 2 m n p); of
the bytes moved, that each input is read once and each output written once:

    linear attention, forward     N H (2 C (K + V) + 4 K V)                                (1)
                      backward    N H (2 C (3 K + 2 V) + 10 K V)                           (2)
    GSA: (1) and (2) with V = M for the first pass, with K = M for the second
    softmax attention, forward    2 N (T + 1) H K, backward 2.5 times as much              (3)

(1) counts q k^T and its product with v inside a chunk, and the read and the update of the state;
(2) the five products inside a chunk and the five with a state, which is computed again.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from glactl.kernels import gla, gla_reference, gsa, gsa_reference

CHUNK = 64
ERROR_T = 256  # length at which an operator is held against fp64: the reference loops over time


@dataclass(frozen=True)
class Shape:
    """Sizes of one call: batch, T, heads, key and value width, slots of GSA, element type."""

    batch: int
    T: int
    heads: int
    width: int
    slots: int
    dtype: torch.dtype

    @property
    def tokens(self) -> int:
        """Tokens of a call."""
        return self.batch * self.T


@dataclass(frozen=True)
class Operator:
    """A function of tensors that mixes along time.

    inputs(shape, device, seed) makes its arguments; call is the engine for the device, reference
    the definition, for any dtype. work: gla, decay, gsa or attention, whose work it does; "": that
    of its name.
    """

    name: str
    inputs: Callable[[Shape, torch.device, int], list[Tensor]]
    call: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    work: str = ""

    @property
    def kind(self) -> str:
        """The operator whose work it does."""
        return self.work or self.name

    def flops(self, shape: Shape, backward: bool) -> float:
        """Least floating-point operations of a forward pass, or of forward and backward."""
        N, H, K, M = shape.tokens, shape.heads, shape.width, shape.slots
        if self.kind == "attention":
            return 2.0 * N * (shape.T + 1) * H * K * (3.5 if backward else 1)  # (3)
        passes = [(K, M), (M, K)] if self.kind == "gsa" else [(K, K)]
        total = 0
        for k, v in passes:
            total += 2 * CHUNK * (k + v) + 4 * k * v  # (1)
            if backward:
                total += 2 * CHUNK * (3 * k + 2 * v) + 10 * k * v  # (2)
        return float(N * H * total)

    def moved(self, shape: Shape, backward: bool) -> float:
        """Least bytes moved in a forward pass, or in forward and backward; gates are fp32."""
        size = torch.empty((), dtype=shape.dtype).element_size()
        gate = {"gla": shape.width, "gsa": shape.slots}.get(self.kind, 0) * max(size, 4)
        read, written = 3 * shape.width * size + gate, shape.width * size
        total = read + written
        if backward:  # the inputs and the output's gradient in, the inputs' gradients out
            total += read + written + read
        return float(shape.tokens * shape.heads * total)


def _qkv(shape: Shape, device: torch.device, seed: int) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    size = (3, shape.batch, shape.T, shape.heads, shape.width)
    return list(torch.randn(size, generator=generator, device=device).to(shape.dtype))


def _gate(shape: Shape, width: int, normalizer: float, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed + 1)
    size = (shape.batch, shape.T, shape.heads, width)
    x = torch.randn(size, generator=generator, device=device).to(_fp32(shape.dtype))
    return F.logsigmoid(x) / normalizer


def _fp32(dtype: torch.dtype) -> torch.dtype:
    """The type of a gate beside tensors of `dtype`: fp32 at least."""
    return torch.promote_types(dtype, torch.float32)


def _gla_inputs(shape: Shape, device: torch.device, seed: int) -> list[Tensor]:
    return [*_qkv(shape, device, seed), _gate(shape, shape.width, 16.0, device, seed)]


def _decay_inputs(shape: Shape, device: torch.device, seed: int) -> list[Tensor]:
    heads = torch.arange(shape.heads, device=device, dtype=_fp32(shape.dtype))
    return [*_qkv(shape, device, seed), torch.log1p(-torch.exp2(-5 - heads))]  # RetNet's


def _gsa_inputs(shape: Shape, device: torch.device, seed: int) -> list[Tensor]:
    return [*_qkv(shape, device, seed), _gate(shape, shape.slots, 8.0, device, seed)]


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _attention_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bihk,bjhk->bhij", q, k) * q.shape[-1] ** -0.5
    later = torch.ones(scores.shape[-2:], device=q.device, dtype=torch.bool).triu(1)
    return torch.einsum("bhij,bjhv->bihv", scores.masked_fill(later, -torch.inf).softmax(-1), v)


OPERATORS = (
    Operator("attention", _qkv, _attention, _attention_reference),
    Operator(
        "gla",
        _gla_inputs,
        lambda q, k, v, gk: gla(q, k, v, gk=gk)[0],
        lambda q, k, v, gk: gla_reference(q, k, v, gk=gk)[0],
    ),
    Operator(
        "decay",
        _decay_inputs,
        lambda q, k, v, g: gla(q, k, v, g=g)[0],
        lambda q, k, v, g: gla_reference(q, k, v, g=g)[0],
    ),
    Operator(
        "gsa",
        _gsa_inputs,
        lambda q, k, v, g: gsa(q, k, v, None, g)[0],
        lambda q, k, v, g: gsa_reference(q, k, v, None, g)[0],
    ),
)


def error(
    operator: Operator, shape: Shape, device: torch.device, seed: int, backward: bool = True
) -> tuple[float, int]:
    """The largest relative error of the output and of every gradient against the fp64 reference.

    Without `backward` that of the output alone. Measured on one sequence of min(T, ERROR_T)
    tokens, which is returned too.
    """
    T = min(shape.T, ERROR_T)
    short = Shape(1, T, shape.heads, shape.width, shape.slots, shape.dtype)
    inputs = operator.inputs(short, device, seed)
    exact = [x.double() for x in inputs]
    if backward:
        ours = _with_gradients(operator.call, inputs, seed)
        truth = _with_gradients(operator.reference, exact, seed)
    else:
        with torch.no_grad():
            ours, truth = [operator.call(*inputs)], [operator.reference(*exact)]
    return max(relative(a, b) for a, b in zip(ours, truth, strict=True)), T


def relative(found: Tensor, truth: Tensor) -> float:
    """The root mean square of the difference over that of the truth, in fp64."""
    difference = found.double() - truth.double()
    return (difference.norm() / truth.double().norm().clamp_min(1e-300)).item()


def _with_gradients(call: Callable[..., Tensor], inputs: list[Tensor], seed: int) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    o = call(*leaves)
    generator = torch.Generator(o.device).manual_seed(seed + 2)
    do = torch.randn(o.shape, generator=generator, device=o.device).to(o.dtype)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]
