"""The kernels at a layer's edges against their definitions in plain torch, in fp64."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from glactl.kernels import triton_edges
from glactl.kernels.triton_edges import glu_triton, log_gate_triton, rms_norm_triton
from glactl.models.layers import GLU, log_gate, rms_norm

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
runs = pytest.mark.skipif(
    not CUDA and os.environ.get("TRITON_INTERPRET") != "1", reason="needs CUDA or TRITON_INTERPRET"
)
gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
EPS32 = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """What is not written stays NaN."""
    empty, like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: like(*a, **k).fill_(torch.nan))


def make(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def with_gradients(function, inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def assert_close(ours: Tensor, truth: Tensor, terms: int, name: str, size: float = 0.0) -> None:
    """To two roundings to the result's dtype and eight of fp32 sums of `terms` terms.

    Eight: the exponentials and roots on the way have a few roundings each. The terms of such a sum
    are as large as `size` where less than that is left of them.
    """
    assert torch.isfinite(ours).all(), name
    eps, size = torch.finfo(ours.dtype).eps, max(size, rms(truth))
    allowed = 2 * eps * rms(truth) + 8 * terms**0.5 * EPS32 * size
    assert rms(ours - truth) <= allowed, f"{name}: {rms(ours - truth):.2e} > {allowed:.2e}"


def check_log_gate(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = 6 * make(*shape, seed=0, dtype=dtype)
    dy = make(*shape, seed=1)
    ours = with_gradients(lambda x: log_gate_triton(x, 16.0), [x], dy)
    truth = with_gradients(lambda x: log_gate(x, 16.0), [x.double()], dy)
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == dtype
    for a, b, name in zip(ours, truth, ("y", "dx"), strict=True):
        assert_close(a, b, 1, name)


def check_norm(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    x, dy, z = (make(*shape, seed=i, dtype=dtype) for i in range(3))
    weight = 1 + make(shape[-1], seed=3) / 2
    gate, swish = kind == "gate", kind == "swish"

    def of(function):
        if gate:
            return lambda x, w, z: function(x, w, 1e-5, z)
        return lambda x, w: function(x, w, 1e-5, None, swish)

    inputs = [2 * x, weight, z] if gate else [2 * x, weight]
    ours = with_gradients(of(rms_norm_triton), inputs, dy)
    truth = with_gradients(of(rms_norm), [x.double() for x in inputs], dy.double())
    assert ours[0].dtype == dtype
    assert [x.dtype for x in ours[1:]] == [x.dtype for x in inputs]
    rows = x.numel() // shape[-1]
    for a, b, name in zip(ours, truth, ("y", "dx", "dw", "dz"), strict=False):
        assert_close(a, b, rows if name == "dw" else shape[-1], name, rms(truth[0]))


def check_glu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, u, dy = (make(*shape, seed=i, dtype=dtype) for i in range(3))
    ours = with_gradients(glu_triton, [4 * x, u], dy)
    truth = with_gradients(
        lambda x, u: torch.nn.functional.silu(x) * u, [4 * x.double(), u.double()], dy.double()
    )
    assert [y.dtype for y in ours] == [dtype] * 3
    for a, b, name in zip(ours, truth, ("y", "dx", "du"), strict=True):
        assert_close(a, b, 1, name)


@runs
@pytest.mark.parametrize("shape", [(1,), (3, 7, 5), (2, 1030)], ids=str)
def test_the_product_of_a_glu_is_its_definition(shape) -> None:
    check_glu(shape, torch.float32)


@runs
def test_closed_and_open_gates_of_a_glu_have_gradients() -> None:
    x = torch.tensor([0.0, 1e4, -1e4, 80.0, -80.0], device=DEVICE)
    u = torch.full_like(x, 3.0)
    y, dx, du = with_gradients(glu_triton, [x, u], torch.ones_like(x))
    assert y.tolist() == pytest.approx([0, 3e4, 0, 240, 0])
    assert dx.tolist() == pytest.approx([1.5, 3, 0, 3, 0])
    assert du.tolist() == pytest.approx([0, 1e4, 0, 80, 0])


@runs
@pytest.mark.parametrize("kind", ["swiglu", "glu"])
def test_a_channel_mixer_takes_the_launch_that_is_its_own(kind, monkeypatch) -> None:
    """silu alone has one; the others and compiled regions are plain torch."""
    m, x = GLU(16, 24, kind).to(DEVICE), make(5, 16, seed=0)
    plain, calls = with_gradients(m, [x], x), []
    monkeypatch.setattr("glactl.models.layers.launches", lambda x: True)
    product = glu_triton
    monkeypatch.setattr(
        triton_edges, "glu_triton", lambda x, u: (calls.append(1), product(x, u))[1]
    )
    for ours, truth, name in zip(with_gradients(m, [x], x), plain, ("y", "dx"), strict=True):
        assert_close(ours, truth.double(), 24, name)
    assert len(calls) == (kind == "swiglu")


@runs
@pytest.mark.parametrize("shape", [(1,), (3, 7, 5), (2, 1030)], ids=str)
def test_the_log_gate_is_its_definition(shape) -> None:
    check_log_gate(shape, torch.float32)


@runs
def test_gates_that_are_almost_open_keep_their_digits() -> None:
    x = torch.tensor([0.0, 1.0, 8.0, 15.0, 20.0, 80.0, -80.0, -torch.inf, torch.inf], device=DEVICE)
    ours, truth = log_gate_triton(x, 1.0).double(), log_gate(x.double(), 1.0)
    assert torch.equal(ours[-2:], truth[-2:])
    assert ((ours / truth)[:-2] - 1).abs().max() < 16 * EPS32
    assert log_gate_triton(x[:1] * torch.nan, 1.0).isnan().all()


@runs
@pytest.mark.parametrize("kind", ["plain", "gate", "swish"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3, 20), (37, 64), (2, 2100)], ids=str)
def test_the_norm_is_its_definition(shape, kind) -> None:
    check_norm(shape, kind, torch.float32)


@runs
@pytest.mark.parametrize("kind", ["gate", "swish"])
def test_programs_walk_over_rows(monkeypatch, kind) -> None:
    monkeypatch.setattr(triton_edges, "WALKS", 3)
    monkeypatch.setattr(triton_edges, "TILE", 32)
    check_norm((29, 12), kind, torch.float32)


@runs
def test_rows_of_zeros_have_gradients() -> None:
    x = torch.zeros(3, 8, device=DEVICE)
    out = with_gradients(lambda x, z: rms_norm_triton(x, x.new_ones(8), 1e-6, z), [x, x], x + 1)
    assert all(torch.isfinite(y).all() for y in out)


@gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["plain", "gate", "swish"])
@pytest.mark.parametrize("shape", [(4096, 4, 512), (1000, 2048), (333, 100), (9, 8192)], ids=str)
def test_gpu_norm(shape, kind, dtype) -> None:
    check_norm(shape, kind, dtype)


@gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gpu_log_gate(dtype) -> None:
    check_log_gate((3, 1000, 4, 256), dtype)


@gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gpu_glu(dtype) -> None:
    check_glu((3000, 2816), dtype)


# Compiled in a process of its own, as in test_triton_compile: the interpreter cannot.
SCRIPT = r"""
import json, os, re, subprocess, tempfile
os.environ.pop("TRITON_INTERPRET", None)
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from glactl.kernels import triton_edges as edges

def build(name, types, consts, warps):
    fn = getattr(edges, name)
    n = fn.arg_names
    types = {a: types[a] for a in n if a not in consts}
    signature = {a: types.get(a, "constexpr") for a in n}
    source = ASTSource(
        fn=fn, signature=signature, constexprs={(n.index(a),): v for a, v in consts.items()},
        attrs={(n.index(a),): [["tt.divisibility", 16]] for a in types if types[a][0] == "*"})
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    with tempfile.TemporaryDirectory() as folder:
        open(folder + "/k.ptx", "w").write(built.asm["ptx"])
        log = subprocess.run(
            [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", folder + "/k.ptx", "-o", "/dev/null"],
            capture_output=True, text=True, check=True).stderr
    registers = int(re.search(r"Used (\d+) registers", log).group(1))
    return registers, int(re.search(r"(\d+) bytes spill stores", log).group(1))

row, found = "*bf16", {}
flat = {"x": row, "y": "*fp32", "dy": "*fp32", "dx": row, "c": "fp32", "size": "i32"}
found["gate"] = build("_log_gate", flat, {"N": edges.FLAT}, 4)
found["gate back"] = build("_log_gate_back", flat, {"N": edges.FLAT}, 4)
pair = {n: row for n in ("x", "u", "y", "dy", "dx", "du")} | {"size": "i32"}
found["glu"] = build("_glu", pair, {"N": edges.FLAT}, 4)
found["glu back"] = build("_glu_back", pair, {"N": edges.FLAT}, 4)
for D in (64, 512, 2048, 4096, 8192):
    wide, rows, warps = edges._tile(D)
    for kind in ("gate", "swish"):
        types = {n: row for n in ("x", "z", "y", "dy", "dx", "dz")}
        types |= {"w": "*fp32", "dw": "*fp32", "eps": "fp32", "rows": "i32"}
        consts = {"D": D, "DP": wide, "R": rows, "SWISH": kind == "swish"}
        if kind == "swish":
            consts |= {"z": None}
        found[f"{kind} {D}"] = build("_norm", types, consts, warps)
        if kind == "swish":
            consts |= {"dz": None}
        found[f"{kind} {D} back"] = build("_norm_back", types, consts, warps)
consts = {"D": 512, "DP": 512, "R": 4, "SWISH": False, "rows": 1}  # Triton makes a 1 a constant
found["one row"] = build("_norm", types, consts, 4)
found["one row back"] = build("_norm_back", types, consts, 4)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_launches_compile_without_spills() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    for name, (registers, spilled) in json.loads(run.stdout.splitlines()[-1]).items():
        assert spilled == 0, f"{name} spills {spilled} bytes"
        assert registers <= 128, f"{name} has {registers} registers"
