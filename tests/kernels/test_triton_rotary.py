"""The rotation as one launch against its definition in fp64, and its gradient."""

import os

import pytest
import torch
from oracle import CUDA, DEVICE
from torch import Tensor

pytest.importorskip("triton")
import triton
import triton.language as tl

from glactl.kernels.attention import rotate_reference
from glactl.kernels.triton_rotary import circle, rotate_triton
from glactl.models.layers import rotate

runs = pytest.mark.skipif(
    not CUDA and os.environ.get("TRITON_INTERPRET") != "1", reason="needs CUDA or TRITON_INTERPRET"
)
EPS32 = torch.finfo(torch.float32).eps
pytestmark = runs


def inputs(shape: tuple[int, ...], furthest: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, its places from 0 to `furthest`, and dy."""
    g = torch.Generator().manual_seed(shape[-1])
    place = torch.randint(furthest + 1, shape[:-2], generator=g)
    place.view(-1)[-1], place.view(-1)[0] = furthest, 0
    x, dy = (torch.randn(shape, generator=g).to(DEVICE, dtype) for _ in range(2))
    return x, place.to(DEVICE), dy


def check(shape: tuple[int, ...], furthest: int, theta: float, dtype: torch.dtype) -> None:
    """A pair keeps its length: it is off by that of the angle, 4 p eps, by sin and cos, 4 eps, and
    by a rounding to the type."""
    x, place, dy = inputs(shape, furthest, dtype)
    ours, truth = [], []
    for made, a, b in ((ours, x, dy), (truth, x.double(), dy.double())):
        a = a.detach().requires_grad_()
        y = (rotate_triton if made is ours else rotate_reference)(a, place, theta)
        made += [y.detach(), *torch.autograd.grad(y, a, b)]
    for a, b, source in zip(ours, truth, (x, dy), strict=True):
        assert a.dtype == dtype
        assert torch.isfinite(a).all()
        length = torch.hypot(*source.double().chunk(2, -1)).repeat(*[1] * (len(shape) - 1), 2)
        angle = 4 * EPS32 * place.double()[..., None, None]
        assert ((a - b).abs() <= (angle + 4 * EPS32 + torch.finfo(dtype).eps) * length).all()


SHAPES = [(1, 1, 2), (2, 7, 3, 8), (3, 5, 20), (70, 2, 6), (2, 300), (1, 4, 1, 64)]


@pytest.mark.parametrize("furthest", [0, 50, 30_000])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_rotation_is_its_definition(shape, furthest) -> None:
    check(shape, furthest, 10_000.0, torch.float32)


@pytest.mark.parametrize("theta", [0.5, 1.0, 500_000.0])
def test_bases(theta) -> None:
    check((9, 2, 16), 40, theta, torch.float32)


def test_places_that_lie_apart_are_read_where_they_are() -> None:
    """As parts of the rows of a joined product, and both ways."""
    z, place, dz = inputs((2, 7, 5, 8), 50, torch.float32)
    places = place.expand(2, 7)
    parts = [x.flatten(2)[..., 8:32].unflatten(2, (3, 8)) for x in (z, dz)]
    made = []
    for x, dy in (parts, [x.contiguous() for x in parts]):
        x = x.detach().requires_grad_()
        y = rotate_triton(x, places, 100.0)
        assert y.is_contiguous()
        made.append((y.detach(), *torch.autograd.grad(y, x, dy)))
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


def test_a_rotation_back_is_none() -> None:
    x, place, _ = inputs((40, 2, 16), 1000, torch.float32)
    x.requires_grad_()
    y = rotate_triton(x, place, 100.0)
    (back,) = torch.autograd.grad(y, x, y.detach())
    torch.testing.assert_close(back, x.detach(), rtol=0, atol=16 * EPS32)


@triton.jit
def _circle(turns, cos, sin, N: tl.constexpr):
    i = tl.arange(0, N)
    c, s = circle(tl.load(turns + i))
    tl.store(cos + i, c)
    tl.store(sin + i, s)


def test_all_of_a_circle_to_two_eps() -> None:
    """And many turns, whose whole part does not count; forth and back."""
    part = torch.arange(4096, dtype=torch.float64) / 2048 - 1
    turns = torch.cat([part, part * 1000]).to(DEVICE).float()
    cos, sin = torch.empty_like(turns), torch.empty_like(turns)
    _circle[(1,)](turns, cos, sin, N=len(turns))
    angle = 2 * torch.pi * (turns.double() % 1)
    assert (cos - angle.cos()).abs().max() <= 2 * EPS32
    assert (sin - angle.sin()).abs().max() <= 2 * EPS32


def test_parts_of_wider_rows_and_places_for_all() -> None:
    """As a layer hands them over: a slice of a product, one row of places for a batch."""
    z = torch.randn(2, 5, 3, 24, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    x, place = z[..., 4:20], torch.arange(5, device=DEVICE)[None]
    expected = rotate_reference(x, place, 100.0)
    torch.testing.assert_close(rotate_triton(x, place, 100.0), expected, rtol=1e-5, atol=1e-5)


def test_layers_take_it(monkeypatch) -> None:
    x, place, _ = inputs((4, 2, 8), 30, torch.float32)
    plain = rotate(x, place, 100.0)
    monkeypatch.setattr("glactl.models.layers.launches", lambda x: True)
    monkeypatch.setattr("glactl.models.layers.rotate_reference", None)  # is not called
    torch.testing.assert_close(rotate(x, place, 100.0), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(8, 2048, 16, 64), (999, 3, 128), (5, 7, 2, 512)], ids=str)
def test_gpu_rotation(shape, dtype) -> None:
    check(shape, 32_768, 10_000.0, dtype)
