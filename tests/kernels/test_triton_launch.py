"""The launcher: what Triton is asked once, and what decides whether it is asked again."""

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
