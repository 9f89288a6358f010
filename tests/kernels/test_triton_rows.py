"""Products of a few rows in one launch against their definition in fp64."""

import os

import pytest
import torch
from oracle import CUDA, DEVICE

pytest.importorskip("triton")
import triton
import triton.language as tl

from glactl.kernels import triton_rows
from glactl.kernels.rows import Next, greedy_rows, product_rows, product_rows_reference
from glactl.kernels.triton_rows import (
    _addresses,
    _pieces,
    _rank,
    greedy_rows_triton,
    product_rows_triton,
)

pytestmark = pytest.mark.skipif(
    not CUDA and os.environ.get("TRITON_INTERPRET") != "1", reason="needs CUDA or TRITON_INTERPRET"
)
CASES = {  # rows, results, width, and what stands round the product
    "plain": (1, 9, 24, {}),
    "norm": (1, 33, 20, {"norm": True, "eps": 1e-5}),
    "gated": (1, 16, 48, {"norm": True, "eps": 1e-5, "groups": 3, "gate": True, "residual": True}),
    "swish": (1, 8, 32, {"norm": True, "swish": True, "residual": True}),
    "pair": (1, 20, 16, {"norm": True, "pair": True}),
    "few": (3, 17, 40, {"norm": True, "eps": 1e-5, "residual": True}),
    "few, gated": (5, 16, 64, {"norm": True, "groups": 2, "gate": True, "residual": True}),
    "few, swish": (17, 8, 36, {"norm": True, "swish": True}),
    "few, pair": (2, 22, 16, {"norm": True, "pair": True}),
}
WIDE = {  # as models have them
    "q, k, v": (1, 3088, 1024, {"norm": True, "eps": 1e-5}),
    "out": (1, 2048, 2048, {"norm": True, "groups": 4, "gate": True, "residual": True}),
    "down": (1, 1024, 2816, {"residual": True}),
    "gate, up": (64, 11264, 2048, {"norm": True, "pair": True}),
    "out, 64": (64, 1024, 1024, {"norm": True, "groups": 4, "gate": True, "residual": True}),
    "head": (40, 32000, 1024, {"norm": True}),
}


def inputs(case: tuple, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """x and gate as slices of wider rows, and the other arguments."""
    N, R, K, more = case
    g = torch.Generator().manual_seed(R + K)
    randn = lambda *s: torch.randn(*s, generator=g).to(DEVICE, dtype)  # noqa: E731
    x, z = randn(N, 2 * K + 8).split([K + 8, K], 1)
    options = dict(more)
    if options.get("norm"):
        options["norm"] = randn(K // options.get("groups", 1))
    if options.get("gate"):
        options["gate"] = z
    if options.get("residual"):
        options["residual"] = randn(N, R)
    return x[:, :K], randn(R, K) * K**-0.5, options


def check(case: tuple, dtype: torch.dtype) -> None:
    """To four roundings to the type, and the random walk of fp32 sums of K terms."""
    x, weight, options = inputs(case, dtype)
    wide = {k: v.double() if torch.is_tensor(v) else v for k, v in options.items()}
    truth = product_rows_reference(x.double(), weight.double(), **wide)
    arguments = {"norm": None, "eps": 0.0, "groups": 1, "gate": None, "swish": False}
    arguments |= {"pair": False, "residual": None} | options
    found = product_rows_triton(x, weight, *arguments.values())
    assert found.shape == truth.shape
    assert found.dtype == dtype
    error = (found.double() - truth).norm() / truth.norm()
    bound = 4 * torch.finfo(dtype).eps + case[2] ** 0.5 * torch.finfo(torch.float32).eps
    assert error < bound, error.item()


@pytest.mark.parametrize("name", CASES)
def test_fp32_matches_the_definition(name: str) -> None:
    check(CASES[name], torch.float32)


def test_rows_of_a_cpu_are_the_definition() -> None:
    x, weight, options = inputs(CASES["gated"], torch.float64)
    x, weight = x.cpu(), weight.cpu()
    options = {k: v.cpu() if torch.is_tensor(v) else v for k, v in options.items()}
    assert torch.equal(
        product_rows(x, weight, **options), product_rows_reference(x, weight, **options)
    )


def test_entries_that_lie_apart_are_refused() -> None:
    x = torch.zeros(8, 2, device=DEVICE).T
    with pytest.raises(ValueError, match=r"x has the strides \(1, 2\)"):
        product_rows_triton(
            x, torch.zeros(4, 8, device=DEVICE), None, 0, 1, None, False, False, None
        )


def greedy(
    x: torch.Tensor, W: torch.Tensor, E: torch.Tensor, norm: torch.Tensor, eps: float,
    slot: list[int] | None = None,
) -> Next:  # fmt: skip
    """What the end of a greedy step leaves behind: by the kernels, in fp64 by the definition. The
    embeddings come in the place of x, as they may."""
    whole = lambda *values: torch.tensor(values, device=x.device)  # noqa: E731
    N = len(x)
    made, place = whole(*[[-1] * 4] * N), whole(*slot or [0] * N)
    into = Next(whole(*[-1] * N), made, place, whole(*range(7, 7 + N)), x)
    if x.dtype == torch.float64:
        greedy_rows(x, W, norm=norm, eps=eps, embedding=E, scale=0.5, into=into)
    else:
        greedy_rows_triton(x, W, norm, eps, E, 0.5, into)
    return into


def taken(z: torch.Tensor, signs: tuple[float, ...] = (1.0,)) -> list[int]:
    """The tokens of these logits times the signs: of width 1, the norm of a row is its sign."""
    x = torch.tensor(signs, device=DEVICE, dtype=z.dtype)[:, None]
    return greedy(x, z[:, None], z[:, None], torch.ones_like(x[0]), 0.0).token.tolist()


INF, NAN = float("inf"), float("nan")
LOGITS = {
    "largest": [3.0, -1.0, 4.0, 1.0, -5.0, 9.0, 2.0],
    "last": [0.0] * 20 + [1e-30],
    "below 0": [-3.0, -1.0, -4.0, -1.5],
    "first of equals": [1.0, 2.0, 0.0, 2.0, 2.0, -2.0] + [2.0] * 20,
    "signs of 0": [-1.0, -0.0, 0.0, -0.0],
    "all -inf": [-INF] * 9,
    "inf": [5.0, -INF, INF, 1.0, INF],
    "nan": [5.0, -INF, INF, NAN, 7.0, NAN],
    "nan alone": [NAN] * 3,
}


@pytest.mark.parametrize("ranks", [4, 4096])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", LOGITS)
def test_the_first_of_the_largest_is_taken(
    name: str, rows: int, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As argmax takes it, however rows are cut into programs; -NaN is a NaN."""
    monkeypatch.setattr(triton_rows, "_rows_of_one", lambda *_: (rows, 4))
    monkeypatch.setattr(triton_rows, "RANKS", ranks)
    z = torch.tensor(LOGITS[name], device=DEVICE)
    assert taken(z) == [int(z.cpu().argmax())]
    assert taken(torch.where(z.isnan(), -z.abs(), z)) == [int(z.cpu().argmax())]


@pytest.mark.parametrize("ranks", [4, 4096])
@pytest.mark.parametrize("name", LOGITS)
def test_every_row_takes_its_first_of_the_largest(
    name: str, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_rows, "RANKS", ranks)
    z = torch.tensor(LOGITS[name], device=DEVICE)
    expected = [int((sign * z).cpu().argmax()) for sign in (1, -1, 1)]
    assert taken(z, (1.0, -1.0, 1.0)) == expected


@triton.jit
def _ranks(to, z, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(to + i, _rank(tl.load(z + i), i))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_ranks_order_numbers_and_equals_by_their_place(dtype: torch.dtype) -> None:
    z = [0.0, -0.0, 1.0, -1.0, -0.0, INF, NAN, -INF, 6e-8, -6e-8, 1.0, -NAN, 0.0, INF, -2.0, 3.0]
    found = torch.zeros(16, dtype=torch.int64, device=DEVICE)
    _ranks[(1,)](found, torch.tensor(z, device=DEVICE, dtype=dtype), N=16)
    largest = sorted(range(16), key=lambda i: (z[i] == z[i], -z[i] if z[i] == z[i] else 0, i))
    assert found.argsort(descending=True).tolist() == largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("N", [1, 3])
def test_logits_are_compared_in_their_type(dtype: torch.dtype, N: int) -> None:
    """1 and 1.001, which are one number in bf16."""
    x, norm = torch.ones(N, 2, device=DEVICE, dtype=dtype), torch.ones(2, device=DEVICE).to(dtype)
    W = torch.tensor([[0.0, 0.5], [1.0, 0.0], [1.0, 1e-3]], device=DEVICE).to(dtype)
    assert greedy(x, W, W, norm, 0.0).token.tolist() == [1 if dtype == torch.bfloat16 else 2] * N


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("slots", [[2], [1, 0, 3, 2, 2]], ids=str)
def test_the_end_of_a_greedy_step(slots: list[int], dtype: torch.dtype) -> None:
    """By the kernels, and by the definition."""
    g, N = torch.Generator().manual_seed(0), len(slots)
    x, norm, W, E = (
        torch.randn(*s, generator=g).to(dtype) for s in ((N, 20), (20,), (33, 20), (40, 20))
    )
    z = product_rows_reference(x.double(), W.double(), norm=norm.double(), eps=1e-5)
    j = z.argmax(1).tolist()
    assert N == 1 or len(set(j)) > 2
    device = DEVICE if dtype == torch.float32 else "cpu"
    into = greedy(*(t.to(device) for t in (x, W, E, norm)), 1e-5, slots)
    assert into.token.tolist() == j
    made = torch.full((N, 4), -1)
    made[range(N), slots] = torch.tensor(j)
    assert into.made.tolist() == made.tolist()
    assert into.slot.tolist() == [slot + 1 for slot in slots]
    assert into.position.tolist() == list(range(8, 8 + N))
    assert torch.equal(into.h.cpu(), 0.5 * E[j])


@triton.jit
def _all_addresses(to, weight, pieces, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(to + i, _addresses(weight, pieces, i.to(tl.int64)))


@pytest.mark.parametrize("size", [1024, 3072, 5120 + 512], ids=str)
def test_a_weight_is_asked_for_piece_by_piece(size: int) -> None:
    """And what is no whole piece is not."""
    w = torch.zeros(size // 2, dtype=torch.bfloat16, device=DEVICE)
    found = torch.zeros(8, dtype=torch.int64, device=DEVICE)
    _all_addresses[(1,)](found, w, _pieces(w), N=8)
    expected = [w.data_ptr() + 1024 * i for i in range(size // 1024)]
    assert found.tolist() == expected + [expected[-1]] * (8 - len(expected))


def test_what_is_asked_for_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.zeros(160, 512, dtype=torch.bfloat16, device=DEVICE)
    assert _pieces(w) == 160
    assert _pieces(w[:1].flatten()[:511]) == 0  # less than a piece
    assert _pieces(w.T) == _pieces(w.flatten()[1:]) == 0  # in parts; at an odd address
    monkeypatch.setattr(triton_rows, "AHEAD", 100 * 1024)
    assert _pieces(w) == 100


def test_a_norm_of_rows_asks_for_the_weight_of_its_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """In programs of its own, which change nothing."""
    kernel, seen = triton_rows._prepare, []

    class Prepare:
        def __getitem__(self, grid: tuple[int]):
            def launch(*arguments: object, **options: object) -> None:
                seen.append((grid, arguments[4], arguments[-1]))
                kernel[grid](*arguments, **options)

            return launch

    monkeypatch.setattr(triton_rows, "_prepare", Prepare())
    x, weight, options = inputs((3, 4000, 40, {"norm": True}), torch.float32)
    more = options["norm"], 0.0, 1, None, False, False, None
    found = product_rows_triton(x, weight, *more)
    monkeypatch.setattr(triton_rows, "AHEAD", 0)
    assert torch.equal(product_rows_triton(x, weight, *more), found)
    assert [(grid, pieces) for grid, _, pieces in seen] == [((3 + 5,), 625), ((3,), 0)]
    assert all(w is weight for _, w, _ in seen)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("R", "K"), [(32000, 1024), (50257, 2048), (11, 40)])
@pytest.mark.parametrize("N", [1, 64])
def test_gpu_takes_the_largest(N: int, R: int, K: int, dtype: torch.dtype) -> None:
    """To the error of both logits, of `check`."""
    x, W, options = inputs((N, R, K, {"norm": True}), dtype)
    wide = (t.double() for t in (x, W, options["norm"]))
    z = product_rows_reference(next(wide), next(wide), norm=next(wide), eps=1e-5)
    into = greedy(x.clone(memory_format=torch.contiguous_format), W, W, options["norm"], 1e-5)
    error = 4 * torch.finfo(dtype).eps + K**0.5 * torch.finfo(torch.float32).eps
    found = z.gather(1, into.token[:, None])[:, 0]
    assert (z.amax(1) - found <= 2 * error * z.abs().amax(1)).all()
    assert torch.equal(into.h, 0.5 * W[into.token])


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", [*CASES, *WIDE])
def test_gpu_matches_the_definition(name: str, dtype: torch.dtype) -> None:
    check((CASES | WIDE)[name], dtype)
