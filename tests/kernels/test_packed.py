"""Softmax attention of packed sequences: the definition against sums in fp64, the kernel against
it."""

import os
from itertools import pairwise

import pytest
import torch
from oracle import CUDA, DEVICE

from glactl.kernels.attention import attention_packed, attention_packed_reference, packs

pytest.importorskip("triton")
from glactl.kernels import triton_packed
from glactl.kernels.triton_packed import attention_packed_triton

runs = pytest.mark.skipif(
    not CUDA and os.environ.get("TRITON_INTERPRET") != "1", reason="needs CUDA or TRITON_INTERPRET"
)
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
EPS32 = torch.finfo(torch.float32).eps
CASES = {  # query heads, heads of keys, D, queries and keys before of each sequence
    "one": (1, 1, 16, [(1, 0)]),
    "ragged": (2, 2, 16, [(5, 0), (0, 0), (40, 0), (16, 0), (33, 0)]),
    "after others": (2, 2, 16, [(3, 20), (17, 16), (0, 9), (32, 1)]),
    "shared keys": (6, 2, 32, [(20, 0), (1, 7)]),
    "wide": (1, 1, 128, [(18, 3)]),
    "whole tiles": (1, 1, 16, [(48, 0), (16, 32)]),
}


def inputs(name: str, dtype: torch.dtype) -> tuple:
    """q, k, v as parts of wider rows, NaN behind the last keys, and the bounds of both."""
    HQ, H, D, sequences = CASES[name]
    new = [n for n, _ in sequences]
    bounds = torch.tensor([0, *new]).cumsum(0)
    rows = torch.tensor([0, *(n + c for n, c in sequences)]).cumsum(0)
    M, MK = int(bounds[-1]), int(rows[-1])
    g = torch.Generator().manual_seed(D + M)
    draw = lambda n, heads: (2 * torch.randn(n, heads * D + 8, generator=g)).to(DEVICE, dtype)  # noqa: E731
    q = draw(M, HQ)[:, :-8].unflatten(1, (HQ, D))
    k, v = (draw(MK + 5, H).index_fill_(0, MK + torch.arange(5, device=DEVICE), torch.nan)
            [:, :-8].unflatten(1, (H, D)) for _ in "kv")  # fmt: skip
    return q, k, v, bounds.int().to(DEVICE), rows.int().to(DEVICE), max(new)


def definition(q, k, v, bounds, rows):
    """(8) in fp64, query by query, and per query the scores' and values' largest size."""
    o, size = torch.zeros_like(q), q.new_zeros(len(q), q.shape[1], 2)
    for (a, b), (c, d) in zip(pairwise(bounds.tolist()), pairwise(rows.tolist()), strict=True):
        for i in range(a, b):
            end = d - (b - 1 - i)
            for h in range(q.shape[1]):
                K, V = (x[c:end, h // (q.shape[1] // k.shape[1])] for x in (k, v))
                o[i, h] = (K @ q[i, h] / q.shape[2] ** 0.5).softmax(0) @ V
                size[i, h] = torch.stack([(K.abs() @ q[i, h].abs()).max(), V.abs().max()])
    return o, size


def check(attend, name: str, dtype: torch.dtype) -> None:
    """A score is a sum of D terms and off by so many roundings to fp32 of its terms' sizes, which
    makes p off by as much, relatively; sums over the keys round as walks do, p and o once each."""
    q, k, v, bounds, rows, most = inputs(name, dtype)
    truth, size = definition(*(x.double() for x in (q, k, v)), bounds, rows)
    made = attend(q, k, v, bounds, rows, most)
    assert (made.dtype, made.shape) == (q.dtype, q.shape)
    D, eps = q.shape[2], torch.finfo(dtype).eps
    share = 2 * D**0.5 * EPS32 * size[..., 0] / D**0.5 + 8 * EPS32 + 2 * eps
    error = (made.double() - truth).abs().amax(-1)
    assert torch.isfinite(made).all()
    assert (error <= share * size[..., 1]).all(), (error / size[..., 1]).max()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_definition_is_its_equation(name: str, dtype) -> None:
    check(lambda *args: attention_packed_reference(*args[:-1]), name, dtype)


@runs
@pytest.mark.parametrize("tiles", [(16, 16), (32, 16), (16, 32)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_matches_the_definition(name, tiles, monkeypatch) -> None:
    monkeypatch.setattr(triton_packed, "_tile", lambda D: (*tiles, 4, 2))
    check(attention_packed_triton, name, torch.float32)


@runs
def test_a_limit_beyond_the_longest_changes_nothing() -> None:
    q, k, v, bounds, rows, most = inputs("ragged", torch.float32)
    expected = attention_packed_triton(q, k, v, bounds, rows, most)
    assert torch.equal(attention_packed_triton(q, k, v, bounds, rows, 3 * most), expected)


@runs
def test_large_scores() -> None:
    """Scores of some 2,000: the largest one is chosen, and none is too large."""
    q, k, v, bounds, rows, most = inputs("after others", torch.float32)
    truth, _ = definition(*(x.double() for x in (400 * q, k, v)), bounds, rows)
    made = attention_packed_triton(400 * q, k, v, bounds, rows, most)
    torch.testing.assert_close(made.double(), truth, rtol=1e-2, atol=1e-2)


def test_a_cpu_takes_the_definition_and_training_other_kernels() -> None:
    q, k, v, bounds, rows, most = (
        x.cpu() if torch.is_tensor(x) else x for x in inputs("shared keys", torch.float64)
    )
    made = attention_packed(q, k, v, bounds, rows, most)
    assert torch.equal(made, attention_packed_reference(q, k, v, bounds, rows))
    assert not packs(q, k, v)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("past", [False, True])
def test_a_gpu_is_as_close_as_torchs_flash_attention(dtype, past) -> None:
    """Tiles as they ship; both against fp64."""
    g = torch.Generator(DEVICE).manual_seed(0)
    new = torch.tensor([300, 1, 700, 0, 65, 64], device=DEVICE)
    held = new + (torch.tensor([9, 500, 0, 3, 70, 64], device=DEVICE) if past else 0)
    bounds, rows = (torch.cat([x.new_zeros(1), x.cumsum(0)]).int() for x in (new, held))
    draw = lambda n, H: torch.randn(n, H, 64, device=DEVICE, dtype=dtype, generator=g)  # noqa: E731
    q, k, v = draw(int(bounds[-1]), 4), draw(int(rows[-1]), 2), draw(int(rows[-1]), 2)
    assert packs(q, k, v)
    assert not packs(q.clone().requires_grad_(), k, v)
    made = attention_packed(q, k, v, bounds, rows, 700)
    truth = attention_packed_reference(*(x.double() for x in (q, k, v)), bounds, rows)
    flash = torch.ops.aten._flash_attention_forward
    theirs = flash(q, k, v, bounds, rows, 700, int(held.max()), 0.0, True, False)[0]
    ours, other = ((x.double() - truth).abs().max() for x in (made, theirs))
    assert ours <= 1.5 * other
