"""The launcher: what Triton is asked once, and what decides whether it is asked again."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from glactl.kernels import triton_launch
from glactl.kernels.triton_launch import aligned, launch, signature


class Kernel:
    """Stands for a kernel (x, n, WIDE, DEEP) under triton.jit; keeps its compilations and calls."""

    arg_names = ("x", "n", "WIDE", "DEEP")

    def __init__(self):
        self.asked, self.calls = [], []

    def __getitem__(self, grid):
        def first(*args, **constants):
            self.asked.append((grid, constants))
            self.calls.append((grid, args))
            return Compiled(self)

        return first


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args: self.kernel.calls.append((grid, args))


CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def empty(monkeypatch):
    monkeypatch.setattr(triton_launch, "_runners", {})


def test_triton_is_asked_once_and_told_everything():
    kernel = Kernel()
    for n in (1, 2):
        launch(5, kernel, 7, "x", n, DEEP=3, WIDE=2, num_warps=4)
    assert kernel.asked == [((7,), {"DEEP": 3, "WIDE": 2, "num_warps": 4})]
    assert kernel.calls == [((7,), ("x", 1)), ((7, 1, 1), ("x", 2, 2, 3))]


@pytest.mark.parametrize(
    "other",
    [(6, 7, {}), (5, 8, {}), (5, 7, {"WIDE": 4}), (5, 7, {"num_warps": 8})],
    ids=["number", "programs", "constant", "option"],
)
def test_triton_is_asked_again(other):
    kernel, constants = Kernel(), {"WIDE": 2, "DEEP": 3, "num_warps": 4}
    launch(5, kernel, 7, "x", 1, **constants)
    number, programs, changed = other
    launch(number, kernel, programs, "x", 1, **constants | changed)
    assert len(kernel.asked) == 2


def test_another_kernel_is_another_launch():
    one, two = Kernel(), Kernel()
    for kernel in (one, two, one, two):
        launch(5, kernel, 7, "x", 1, WIDE=2, DEEP=3)
    assert len(one.asked) == len(two.asked) == 1
    assert len(one.calls) == len(two.calls) == 2


def test_what_is_kept_has_a_bound(monkeypatch):
    monkeypatch.setattr(triton_launch, "KEPT", 3)
    kernel = Kernel()
    for programs in range(20):
        launch(5, kernel, programs, "x", 1, WIDE=2, DEEP=3)
        assert len(triton_launch._runners) <= 3
    assert len(kernel.calls) == 20


def test_signatures_tell_types_apart():
    facts = [(CPU, 4, torch.bfloat16), (CPU, 4, torch.float32), (CPU, 2, torch.bfloat16)]
    numbers = [signature(*f) for f in facts]
    assert len(set(numbers)) == 3
    assert [signature(*f) for f in facts] == numbers


def test_tensors_are_moved_only_where_they_must():
    x = torch.arange(24.0)
    odd, wide = x[1:9], x.view(4, 6)[:, :2]
    same, none, moved, packed = aligned(x, None, odd, wide)
    assert same is x
    assert none is None
    assert moved.data_ptr() % 16 == 0
    assert torch.equal(moved, odd)
    assert packed.is_contiguous()
    assert torch.equal(packed, wide)


AHEAD = """
import contextlib, importlib, sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

class Driver:  # of a device that compiles and is never launched on
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0

driver.set_active(Driver())
torch.cuda.device = lambda device: contextlib.nullcontext()
compiled = []
compile = JITFunction._do_compile
def counted(self, *args, **options):
    compiled.append(self.__name__)
    return compile(self, *args, **options)
JITFunction._do_compile = counted

from glactl.kernels import triton_gla, triton_gsa, triton_launch, triton_scalar
new = lambda *last: torch.empty(1, 2**13, 1, *last, dtype=torch.bfloat16)
q, k, v = new(64), new(64), new(64)
def gla(p, s0=None):
    o, final, states, parts = triton_gla.forward(p, s0, False, True)
    triton_gla.backward(p, o, None, states, parts, False)
def scalar(p, s0=None):
    o, final, states, parts = triton_scalar.forward(p, s0, False, True)
    triton_scalar.backward(p, o, None, states, parts, True, False)
def gsa(p, s0=None):
    o, final, kept = triton_gsa.forward(p, s0, False, True)
    triton_gsa.backward(p, o, None, kept, False)
calls = {
    "gla": lambda: (gla, triton_gla.plan(q, k, v, new(64), 1.0, None)),
    "scalar": lambda: (scalar, triton_scalar.plan(q, k, v, new(), 1.0, None)),
    "gsa": lambda: (gsa, triton_gsa.plan(q, k, v, None, new(64), 1.0, 64, None)),
}
run, p = calls[sys.argv[1]]()
assert p.layout.split  # all launches are among those tried
for _ in range(2):
    triton_launch.compile_ahead(
        torch.device("cuda", 0), "once", lambda: run(triton_launch.on_meta(p)))
before = len(compiled)
launched = []
def warm(number, kernel, programs, *args, **constants):
    launched.append(kernel.__name__)
    kernel.warmup(*args, grid=(programs,), **constants)
for name in ("gla", "walks", "scalar", "gsa", "segments"):
    vars(importlib.import_module(f"glactl.kernels.triton_{name}"))["launch"] = warm
run(p)
print(before, len(compiled), len(launched))
"""


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["gla", "scalar", "gsa"])
def test_a_rehearsal_compiles_all_that_a_call_launches(engine, tmp_path):
    env = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", AHEAD, engine],
        env=env | {"TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    ahead, in_all, launched = map(int, run.stdout.split())
    assert ahead == in_all > 0
    assert launched >= 9


def test_nothing_is_compiled_ahead_on_a_cpu():
    triton_launch.compile_ahead(CPU, "key", lambda: pytest.fail("rehearsed"))
