"""Products of a few rows in one launch against their definition in fp64."""

import os

import pytest
import torch
from oracle import CUDA, DEVICE

pytest.importorskip("triton")
from glactl.kernels.rows import product_rows, product_rows_reference
from glactl.kernels.triton_rows import product_rows_triton

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


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", [*CASES, *WIDE])
def test_gpu_matches_the_definition(name: str, dtype: torch.dtype) -> None:
    check((CASES | WIDE)[name], dtype)
