"""What the tests of the Triton engines share: gates, gradients, and the bound of the error."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
Op = Callable[..., Sequence[Tensor]]


def gates(kind: float | str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Log-sigmoid over `kind`; "mixed" adds gates of -30 and -inf; "closed" is -inf throughout."""
    x = torch.randn(shape, generator=generator)
    if kind == "closed":
        return torch.full(shape, -torch.inf)
    if kind == "mixed":
        g, u = F.logsigmoid(x) / 16, torch.rand(shape, generator=generator)
        return g.masked_fill(u < 0.1, -30.0).masked_fill(u < 0.05, -torch.inf)
    return F.logsigmoid(x) / kind


def with_gradients(op: Op, xs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """The results of op, o and final states, and the gradients of all inputs."""
    xs = [x.detach().clone().requires_grad_() for x in xs]
    out = op(*xs)
    loss = sum((a.double() * b.double()).sum() for a, b in zip(out, grads, strict=True))
    return [*out, *torch.autograd.grad(loss, xs)]


def rms(x: Tensor) -> float:
    return x.detach().double().square().mean().sqrt().item()


def assert_as_good_as(
    definition: Op, engine: Op, names: Sequence[str], xs: list[Tensor], grads: list[Tensor],
    dtype: torch.dtype, terms: dict[str, float] | None = None,
) -> None:  # fmt: skip
    """Truth is the definition in fp64. The engine may err twice as much as the definition errs in
    the inputs' dtype, plus, of each result, two roundings to that dtype and the random walk of T
    fp32 sums; -inf has no gradient in the definition, and none is compared there.

    terms: of a result that is a sum of large numbers which cancel, what their sizes add up to."""
    truth = with_gradients(definition, [x.double() for x in xs], [x.double() for x in grads])
    plain = with_gradients(definition, [x.to(dtype) for x in xs], [x.to(dtype) for x in grads])
    ours = with_gradients(engine, xs, grads)
    steps = xs[0].shape[1]
    eps = torch.finfo(dtype).eps + steps**0.5 * torch.finfo(torch.float32).eps
    for name, t, p, x in zip(names, truth, plain, ours, strict=True):
        assert torch.isfinite(x).all(), f"{name} is not finite"
        t, p = torch.nan_to_num(t), torch.nan_to_num(p)
        size = max(rms(t), (terms or {}).get(name, 0.0), 1e-30)
        error, allowed = rms(x - t), 2 * rms(p - t) + 2 * eps * size
        assert error <= allowed, f"{name}: rms error {error:.2e} > {allowed:.2e} allowed"


def assert_equal_sums(a: Tensor, b: Tensor, name: str) -> None:
    """Equal up to the order of fp32 sums of 300 terms."""
    eps = torch.finfo(torch.float32).eps
    assert rms(a - b) <= 2 * 300**0.5 * eps * rms(b), name
