"""The selective scan on the CPU: definition, oracle, chunked engine, one token, errors."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glactl.kernels import gla_reference, scan, scan_reference, scan_step

NAMES = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
# Sums of at most 40 rows, 7 channels and 4 entries, a few of them nested, in fp64.
TOL = 1e4 * torch.finfo(torch.float64).eps


def inputs(B: int, T: int, D: int, M: int, N: int | None = None, rate: float = 1.0) -> list[Tensor]:
    g = torch.Generator().manual_seed(T)
    randn = lambda *s: torch.randn(s, generator=g, dtype=torch.float64)  # noqa: E731
    u, dt, b, c = randn(B, T, D), randn(B, T, D) - 2, randn(B, T, M), randn(B, T, M)
    A = -rate * randn(D, M).exp()
    return [u, dt, A, b, c, randn(D), randn(B, T, D), randn(D), randn(N or B, D, M)]


def call(op, xs: list[Tensor], cu: Tensor | None = None, **options) -> tuple[Tensor, Tensor]:
    u, dt, A, b, c, D, z, bias, h = xs
    return op(
        u, dt, A, b, c, D, z=z, dt_bias=bias, initial_state=h, output_final_state=True,
        cu_seqlens=cu, **options,
    )  # fmt: skip


def gradients(op, xs: list[Tensor], cu: Tensor | None = None) -> list[Tensor]:
    xs = [x.clone().requires_grad_() for x in xs]
    out = call(op, xs, cu)
    g = torch.Generator().manual_seed(9)
    loss = sum((x * torch.randn(x.shape, generator=g, dtype=x.dtype)).sum() for x in out)
    return [*out, *torch.autograd.grad(loss, xs)]


def same(ours, truth) -> None:
    for name, a, b in zip(("y", "final", *NAMES), ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=TOL, atol=TOL, msg=lambda m, n=name: f"{n}: {m}")


def test_the_recurrence_is_a_call_of_gated_linear_attention() -> None:
    """A head for every channel: q = C, k = B, v = d u, gk = d A."""
    u, dt, A, b, c, D, z, bias, h = inputs(2, 9, 5, 3)
    y, final = call(scan_reference, [u, dt, A, b, c, D, z, bias, h])
    d = (dt + bias).exp().log1p()
    q, k = (x[:, :, None].expand(-1, -1, 5, -1) for x in (c, b))
    o, S = gla_reference(
        q, k, (d * u)[..., None], gk=d[..., None] * A, scale=1.0, initial_state=h[..., None],
        output_final_state=True,
    )  # fmt: skip
    torch.testing.assert_close(y, (o[..., 0] + D * u) * F.silu(z), rtol=TOL, atol=TOL)
    torch.testing.assert_close(final, S[..., 0], rtol=TOL, atol=TOL)


@pytest.mark.parametrize("T", [1, 15, 16, 17, 40])
@pytest.mark.parametrize("rate", [0.01, 1.0, 300.0])
def test_chunked_is_the_definition(T: int, rate: float) -> None:
    xs = inputs(2, T, 7, 4, rate=rate)
    same(gradients(scan, xs), gradients(scan_reference, xs))


@pytest.mark.parametrize("bounds", [[0, 5, 5, 6, 40], [0, 40], [0, 0, 33, 40]], ids=str)
def test_packed(bounds: list[int]) -> None:
    xs = inputs(1, 40, 5, 3, N=len(bounds) - 1)
    cu = torch.tensor(bounds, dtype=torch.int32)
    same(gradients(scan, xs, cu), gradients(scan_reference, xs, cu))
    y, final = call(scan, xs, cu)
    for n, (a, b) in enumerate(pairwise(bounds)):
        rows = [x[:, a:b] if x.ndim == 3 else x for x in xs[:8]]
        alone, last = call(scan, [*rows, xs[8][n : n + 1]])
        torch.testing.assert_close(y[:, a:b], alone, rtol=TOL, atol=TOL)
        torch.testing.assert_close(final[n], last[0], rtol=TOL, atol=TOL)


def test_gradients_are_those_of_finite_differences() -> None:
    u, dt, A, b, c, D, z, bias, h = (x.requires_grad_() for x in inputs(1, 5, 2, 3))
    # rates stay below 0 under the difference's step
    op = lambda *xs: call(scan, list(xs))  # noqa: E731
    assert torch.autograd.gradcheck(op, (u, dt, A, b, c, D, z, bias, h))


def test_what_may_be_left_out() -> None:
    u, dt, A, b, c, D, z, _, h = inputs(2, 6, 4, 3)
    zero = torch.zeros_like(D)
    plain, none = scan(u, dt, A, b, c)
    assert none is None
    whole, _ = scan(u, dt, A, b, c, zero, dt_bias=zero, initial_state=torch.zeros_like(h))
    assert torch.equal(plain, whole)
    gated, _ = scan(u, dt, A, b, c, z=z)
    torch.testing.assert_close(gated, plain * F.silu(z))


def test_steps_fold_to_the_scan_in_place() -> None:
    u, dt, A, b, c, D, z, bias, h = xs = inputs(2, 6, 4, 3)
    y, final = call(scan_reference, xs)
    state = kept = h.clone()
    for t in range(6):
        one = scan_step(u[:, t], dt[:, t], A, b[:, t], c[:, t], state, D, z=z[:, t], dt_bias=bias)
        torch.testing.assert_close(one, y[:, t], rtol=TOL, atol=TOL)
    assert state is kept
    torch.testing.assert_close(state, final, rtol=TOL, atol=TOL)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_no_tokens(shape: tuple[int, int]) -> None:
    xs = inputs(*shape, 4, 3)
    y, final = call(scan, xs)
    assert y.shape == (*shape, 4)
    assert torch.equal(final, xs[8])


def test_half_precision_keeps_full_states() -> None:
    xs = [x.float() for x in inputs(1, 40, 5, 3)]
    half = [x.bfloat16() if x.ndim == 3 and i != 8 else x for i, x in enumerate(xs)]
    y, final = call(scan, half)
    assert (y.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    truth, last = call(scan, [x.float() for x in half])
    assert torch.equal(y, truth.bfloat16())
    assert torch.equal(final, last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(call(scan, half)[0], y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": torch.full((4, 3), 0.5)}, "A has a value of 0.5; allowed: finite rates of at most"),
        ({"A": torch.full((4, 3), -torch.inf)}, "A has a value of -inf"),
        ({"B": torch.ones(2, 6, 4)}, r"B has the shape \(2, 6, 4\); allowed: \(2, 6, 3\)"),
        ({"dt": torch.ones(2, 5, 4)}, r"dt has the shape \(2, 5, 4\); allowed: \(2, 6, 4\)"),
        ({"D": torch.ones(4, dtype=torch.int64)}, "D is of torch.int64; allowed: floating"),
        ({"initial_state": torch.ones(2, 3, 4)}, r"initial_state has the shape \(2, 3, 4\)"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "u has a batch of 2; allowed with cu_seqlens: 1"),
        ({"backend": "triton"}, "backend is 'triton' on cpu"),
    ],
)  # fmt: skip
def test_errors(change: dict, message: str) -> None:
    names = dict(zip(("u", "dt", "A", "B", "C"), inputs(2, 6, 4, 3)[:5], strict=True))
    with pytest.raises(ValueError, match=message):
        scan(**(names | change))
    if "A" in change:
        step = {n: x if n == "A" else x[:, 0] for n, x in (names | change).items()}
        state = torch.ones(2, 4, 3, dtype=torch.float64)
        with pytest.raises(ValueError, match=message):
            scan_step(**step, state=state)
        assert (state == 1).all()
