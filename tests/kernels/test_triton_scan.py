"""The Triton engine of the selective scan against the recurrence in fp64."""

import dataclasses
import os
from functools import partial

import pytest
import torch
from oracle import CUDA, DEVICE, assert_as_good_as, assert_equal_sums, with_gradients
from torch import Tensor

pytest.importorskip("triton")
from glactl.kernels import scan_reference, triton_scan
from glactl.kernels.triton_scan_op import _backward, _forward, scan_triton

pytestmark = pytest.mark.skipif(
    not CUDA and os.environ.get("TRITON_INTERPRET") != "1", reason="needs CUDA or TRITON_INTERPRET"
)
NAMES = ("y", "final_state", "du", "ddt", "dA", "dB", "dC", "dinitial", "dD", "dz", "dbias")
DESIGNS = triton_scan.DESIGNS


def call(op, *xs: Tensor, **options) -> tuple[Tensor, Tensor]:
    u, dt, A, B, C, h, *more = xs
    D, z, bias = more or (None, None, None)
    return op(
        u, dt, A, B, C, D, z=z, dt_bias=bias, initial_state=h, output_final_state=True, **options
    )


def engine(*xs: Tensor, **options) -> tuple[Tensor, Tensor]:
    return call(scan_triton, *xs, **options)


def definition(*xs: Tensor, **options) -> tuple[Tensor, Tensor]:
    return call(scan_reference, *xs, **options)


def inputs(
    B: int, T: int, D: int, M: int, rate: float, dtype: torch.dtype, plain: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """u, dt, A, B, C, h and, unless plain, D, z, dt_bias; gradients of y and the final state.

    Rates of 0.01 carry the state over hundreds of rows, those of 100 close it in one.
    """
    g = torch.Generator().manual_seed(T + 1000 * D)
    randn = lambda *s: torch.randn(*s, generator=g)  # noqa: E731
    rows = [randn(B, T, D), randn(B, T, D) - 2, randn(B, T, M), randn(B, T, M), randn(B, T, D)]
    u, dt, b, c, z = (x.to(DEVICE, dtype) for x in rows)
    A, h, D_, bias = -rate * randn(D, M).exp(), randn(B, D, M), randn(D), randn(D)
    weights = [x.to(DEVICE) for x in (A, h, D_, bias)]
    xs = [u, dt, weights[0], b, c, weights[1]]
    grads = [randn(B, T, D).to(DEVICE, dtype), randn(B, D, M).to(DEVICE)]
    return xs if plain else [*xs, weights[2], z, weights[3]], grads


@pytest.fixture(autouse=True)
def poisoned():
    """Uninitialised memory holds NaN, so that an element nobody writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def use(monkeypatch, name: str, programs: int = 1, narrow: int | None = 8) -> None:
    """A design with so many programs, and tiles of few channels where the interpreter runs."""
    chosen = dataclasses.replace(DESIGNS[name], programs=programs)
    if narrow and not CUDA:
        back = 16 if chosen.sum == "dot" else narrow
        chosen = dataclasses.replace(chosen, forward=(narrow, 1), back=(back, 1))
    monkeypatch.setattr(triton_scan, "design", lambda *_: chosen)


# B, T, D, M, rate; a block is 16 rows, or 8
CASES = [(1, 1, 3, 2, 1.0), (2, 17, 5, 2, 0.01), (1, 33, 9, 1, 1.0), (1, 19, 8, 3, 100.0)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fp32_matches_the_fp64_recurrence(monkeypatch, case) -> None:
    use(monkeypatch, "lanes")
    xs, grads = inputs(*case, torch.float32)
    assert_as_good_as(definition, engine, NAMES, xs, grads, torch.float32)


@pytest.mark.parametrize(("name", "M"), [("16 rows", 2), ("8 rows", 3), ("8 rows", 17)])
def test_designs_match_the_fp64_recurrence(monkeypatch, name: str, M: int) -> None:
    use(monkeypatch, name)
    xs, grads = inputs(1, 20, 17, M, 0.1, torch.float32)  # two tiles backwards
    assert_as_good_as(definition, engine, NAMES, xs, grads, torch.float32)


def test_what_may_be_left_out(monkeypatch) -> None:
    use(monkeypatch, "lanes")
    xs, grads = inputs(1, 18, 4, 2, 0.1, torch.float32, plain=True)
    assert_as_good_as(definition, engine, NAMES[:8], xs, grads, torch.float32)
    y, none = scan_triton(*xs[:5])
    assert none is None
    assert_equal_sums(y, engine(*xs[:5], torch.zeros_like(xs[5]))[0], "y")


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rate", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("shape", [(2, 300, 256, 16), (1, 200, 100, 5), (1, 77, 64, 32)], ids=str)
@pytest.mark.parametrize("name", [None, *DESIGNS])
def test_gpu_matches_the_fp64_recurrence(monkeypatch, name, shape, rate, dtype) -> None:
    for programs in (1, 10**9):
        if name is not None:
            use(monkeypatch, name, programs)
        xs, grads = inputs(*shape, rate, dtype)
        # a weight's gradient is a sum over all rows, in fp32 though the rows are of dtype
        assert_as_good_as(definition, engine, NAMES, xs, grads, dtype)


def test_segments_match_the_fp64_recurrence(monkeypatch) -> None:
    use(monkeypatch, "lanes", 10**9)
    xs, grads = inputs(1, 257, 5, 1, 0.003, torch.float32)  # the middle one has both neighbours
    plan = triton_scan.plan(*xs[:3], None, None, None, None, None)
    assert plan.layout.split
    assert len(plan.layout.segments) == 3
    assert_as_good_as(definition, engine, NAMES, xs, grads, torch.float32)


@pytest.mark.parametrize(("name", "programs"), [("lanes", 1), ("8 rows", 10**9)])
def test_packed_sequences_match_the_fp64_recurrence(monkeypatch, name, programs) -> None:
    """The second is empty: its state, and the gradient of it, pass through unchanged."""
    use(monkeypatch, name, programs)
    xs, (dy, _) = inputs(1, 150, 3, 1, 0.01, torch.float32)
    _, (_, states) = inputs(4, 1, 3, 1, 1.0, torch.float32)
    xs[5], dfinal = states, states.flip(0)
    cu = torch.tensor([0, 130, 130, 131, 150], dtype=torch.int32, device=DEVICE)
    assert triton_scan.plan(*xs[:3], None, None, None, cu, None).layout.split == (programs > 1)
    finals, initials = [], []

    def ours(*xs: Tensor) -> tuple[Tensor, Tensor]:
        xs[5].register_hook(initials.append)
        y, final = engine(*xs, cu_seqlens=cu)
        finals.append(final)
        return y, final

    truth = partial(definition, cu_seqlens=cu)
    assert_as_good_as(truth, ours, NAMES, xs, [dy, dfinal], torch.float32)
    assert torch.equal(finals[0][1], states[1])
    assert torch.equal(initials[0][1], dfinal[1])


def test_operators_have_fakes_of_the_same_shapes(monkeypatch) -> None:
    use(monkeypatch, "lanes")
    xs, (dy, dfinal) = inputs(1, 5, 4, 2, 1.0, torch.float32)
    u, dt, A, B, C, h, D, z, bias = xs
    tests = ("test_schema", "test_faketensor")
    h, dfinal = (x.transpose(1, 2).contiguous() for x in (h, dfinal))
    for cu in (None, torch.tensor([0, 5], device=DEVICE)):
        args = (u, dt, A, B, C, D, z, bias, h, cu, True, True)
        torch.library.opcheck(_forward, args, test_utils=tests)
        states = _forward(*args)[2]
        args = (u, dt, A, B, C, D, z, bias, cu, dy, dfinal, states, True)
        torch.library.opcheck(_backward, args, test_utils=tests)


def test_compiles_without_a_graph_break(monkeypatch) -> None:
    use(monkeypatch, "lanes")
    xs, grads = inputs(1, 5, 4, 2, 1.0, torch.float32)
    compiled = torch.compile(engine, backend="aot_eager", fullgraph=True)
    eager = with_gradients(engine, xs, grads)
    for a, b in zip(with_gradients(compiled, xs, grads), eager, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("name", DESIGNS)
def test_runs_are_bit_equal_and_can_be_captured(monkeypatch, name: str) -> None:
    use(monkeypatch, name)
    xs, grads = inputs(1, 2048, 1024, 16, 1.0, torch.bfloat16)
    first = with_gradients(engine, xs, grads)
    for a, b in zip(first, with_gradients(engine, xs, grads), strict=True):
        assert torch.equal(a, b)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y, _ = engine(*xs)
    graph.replay()
    assert torch.equal(y, first[0])
