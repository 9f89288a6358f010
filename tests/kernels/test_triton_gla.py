"""The Triton engine of gated linear attention with a key gate against the recurrence in fp64."""

import dataclasses
import os
from itertools import pairwise

import pytest
import torch
from oracle import CUDA, DEVICE, assert_as_good_as, gates, with_gradients
from oracle import assert_equal_sums as _close
from torch import Tensor

pytest.importorskip("triton")
from glactl.kernels import triton_gla, triton_gla_strong
from glactl.kernels.triton_gla_op import _forward, gla_key

pytestmark = pytest.mark.skipif(
    not CUDA and os.environ.get("TRITON_INTERPRET") != "1", reason="needs CUDA or TRITON_INTERPRET"
)
NAMES = ("q", "k", "v", "gk", "initial_state")


def recurrence(q: Tensor, k: Tensor, v: Tensor, g: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """S_t = diag(exp g_t) S_{t-1} + k_t v_t^T and o_t = K^-1/2 S_t^T q_t, token after token."""
    B, T, HQ, K = q.shape
    H = v.shape[2]
    o = []
    for t in range(T):
        S = g[:, t].exp()[..., None] * S + k[:, t, :, :, None] * v[:, t, :, None, :]
        q_t = q[:, t].reshape(B, H, HQ // H, K)
        o.append(K**-0.5 * torch.einsum("bhrk,bhkv->bhrv", q_t, S).flatten(1, 2))
    return torch.stack(o, 1), S


def inputs(
    B: int, T: int, H: int, R: int, K: int, V: int, gate: float | str, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """q, k, v, gk, initial state; gradients of the output and of the final state."""
    generator = torch.Generator().manual_seed(T + 1000 * K)
    randn = lambda *s: torch.randn(*s, generator=generator)  # noqa: E731
    q, k, v = randn(B, T, H * R, K), randn(B, T, H, K), randn(B, T, H, V)
    g = gates(gate, (B, T, H, K), generator)
    s0, do, ds = randn(B, H, K, V), randn(B, T, H * R, V), randn(B, H, K, V)
    xs = [x.to(DEVICE, dtype) for x in (q, k, v, g)]
    return [*xs, s0.to(DEVICE)], [do.to(DEVICE, dtype), ds.to(DEVICE)]


def engine(*xs: Tensor, **options) -> tuple[Tensor, Tensor | None]:
    q, k, v, g, s0 = xs
    return gla_key(q, k, v, g, initial_state=s0, output_final_state=True, **options)


def assert_as_good_as_recurrence(xs: list[Tensor], grads: list[Tensor], dtype: torch.dtype) -> None:
    names = ("o", "final_state", *(f"d{n}" for n in NAMES))
    assert_as_good_as(recurrence, engine, names, xs, grads, dtype)


@pytest.fixture(autouse=True)
def poisoned():
    """Uninitialised memory holds NaN, so that an element nobody writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


# Mild gates (48) carry the state across blocks; 1 passes the fp32 range of one product in 32 rows;
# 0.1, mixed and closed have gates whose exponential is 0.
CASES = [
    (1, 1, 1, 1, 16, 16, 48.0),
    (2, 65, 1, 1, 16, 16, 48.0),
    (1, 130, 2, 1, 16, 32, 48.0),
    (1, 130, 1, 2, 16, 16, 16.0),
    (1, 129, 1, 1, 32, 16, 1.0),
    (1, 130, 1, 1, 16, 16, 0.1),
    (1, 130, 1, 1, 16, 16, "mixed"),
    (1, 70, 1, 1, 16, 16, "closed"),
    (1, 67, 1, 1, 5, 7, 48.0),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fp32_matches_the_fp64_recurrence(case) -> None:
    assert_as_good_as_recurrence(*inputs(*case, torch.float32), torch.float32)


# Normaliser of each quarter of the channels, and the ways that triton_gla_strong.py must then take.
# 32 rows decay by 26 over the normaliser, and fp32 operands allow 16.
MIDDLE, EXACT = {"prefix_sums 64", "products"}, {"sibling_sums 64", "sibling_sums 128"}
WAYS = [
    ((48.0,), 1, set()),
    ((5.0,), 1, {"products"}),  # blocks beyond the range of chunks within it
    ((2.5,), 2, MIDDLE),
    ((1.0,), 2, EXACT),
    ((48.0, 2.5, 48.0, 48.0), 1, MIDDLE),
    ((48.0, 2.5, 0.1, 48.0), 2, MIDDLE | EXACT),
]


@pytest.mark.skipif(CUDA, reason="looks into the interpreter")
@pytest.mark.parametrize(
    ("gate", "R", "ways"), WAYS, ids=lambda x: str(sorted(x) if isinstance(x, set) else x)
)
def test_each_tile_takes_the_way_its_gates_need(monkeypatch, gate, R: int, ways: set) -> None:
    taken = set()

    def note(name: str) -> None:
        function = getattr(triton_gla_strong, name)

        def noted(*args):
            rows = args[0].shape[:1]  # of the gates; products get a pointer
            taken.add(" ".join([name, *(str(getattr(n, "value", n)) for n in rows)]))
            return function(*args)

        monkeypatch.setattr(triton_gla_strong, name, noted)

    for name in ("prefix_sums", "sibling_sums", "products"):
        note(name)
    xs, grads = inputs(1, 200, 1, R, 16 * len(gate), 16, 1.0, torch.float32)
    xs[3] /= torch.tensor(gate, device=DEVICE).repeat_interleave(16)
    assert_as_good_as_recurrence(xs, grads, torch.float32)
    assert taken == ways


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("gate", [48.0, 16.0, 1.0, 0.4, 0.1, "mixed"])
@pytest.mark.parametrize(
    "shape",
    [(2, 300, 2, 1, 256, 512), (2, 300, 2, 1, 128, 256), (1, 200, 2, 2, 64, 64),
     (1, 200, 1, 1, 512, 64)],
    ids=str,
)  # fmt: skip
def test_gpu_matches_the_fp64_recurrence(shape, gate, dtype) -> None:
    if dtype != torch.bfloat16 and shape[4] > 64:
        pytest.skip("fp32 operands are for small heads")
    assert_as_good_as_recurrence(*inputs(*shape, gate, dtype), dtype)


def _want_programs(monkeypatch, programs: int) -> None:
    """Many programs cut sequences into segments of one block; one keeps them whole."""
    rule = triton_gla.tiles
    monkeypatch.setattr(
        triton_gla, "tiles", lambda *a: dataclasses.replace(rule(*a), programs=programs)
    )


@pytest.mark.parametrize(("B", "T", "gate"), [(2, 300, 48.0), (1, 1300, 400.0)])
def test_segments_equal_one_walk(monkeypatch, B: int, T: int, gate: float) -> None:
    xs, grads = inputs(B, T, 1, 2, 16, 16, gate, torch.float32)
    _want_programs(monkeypatch, 1)
    assert not triton_gla.plan(*xs[:4], 1.0, None).layout.split
    whole = with_gradients(engine, xs, grads)
    _want_programs(monkeypatch, 10**9)
    assert len(triton_gla.plan(*xs[:4], 1.0, None).layout.segments) == B * -(-T // 128)
    for name, a, b in zip(range(7), with_gradients(engine, xs, grads), whole, strict=True):
        _close(a, b, str(name))


@pytest.mark.parametrize("programs", [1, 10**9])
def test_packed_sequences_equal_separate_ones(monkeypatch, programs) -> None:
    bounds = [0, 140, 140, 141, 300]  # the second is empty
    _want_programs(monkeypatch, programs)
    (q, k, v, g, _), (do, _) = inputs(1, 300, 2, 1, 16, 16, 48.0, torch.float32)
    _, (_, many) = inputs(4, 1, 2, 1, 16, 16, 48.0, torch.float32)
    s0, ds = many.flip(0), many
    cu = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)

    def packed(*xs):
        return engine(*xs, cu_seqlens=cu)

    ours = with_gradients(packed, [q, k, v, g, s0], [do, ds])
    for n, (a, b) in enumerate(pairwise(bounds)):
        if a == b:
            assert torch.equal(ours[1][n], s0[n])
            assert torch.equal(ours[6][n], ds[n])
            continue
        xs = [x[:, a:b] for x in (q, k, v, g)] + [s0[n : n + 1]]
        alone = with_gradients(engine, xs, [do[:, a:b], ds[n : n + 1]])
        for i in (0, 2, 3, 4, 5):
            _close(ours[i][:, a:b], alone[i], f"{n} {i}")
        _close(ours[1][n], alone[1][0], f"{n} final")
        _close(ours[6][n], alone[6][0], f"{n} initial")


def test_a_state_handed_over_continues_the_sequence() -> None:
    (q, k, v, g, s0), _ = inputs(1, 200, 1, 1, 16, 16, 48.0, torch.float32)
    o, final = engine(q, k, v, g, s0)
    first, middle = engine(*(x[:, :77] for x in (q, k, v, g)), s0)
    second, last = engine(*(x[:, 77:] for x in (q, k, v, g)), middle)
    _close(torch.cat([first, second], 1), o, "o")
    _close(last, final, "final")


def test_without_states_or_gradients() -> None:
    (q, k, v, g, s0), _ = inputs(1, 70, 1, 1, 16, 16, 48.0, torch.float32)
    o, none = gla_key(q, k, v, g)
    zero, _ = engine(q, k, v, g, torch.zeros_like(s0))
    assert none is None
    _close(o, zero, "o")


def test_operator_has_a_fake_of_the_same_shapes() -> None:
    (q, k, v, g, s0), _ = inputs(2, 130, 1, 2, 16, 16, 48.0, torch.float32)
    for cu in (None, torch.tensor([0, 3, 130], device=DEVICE)):
        b = 2 if cu is None else 1
        xs = [x[:b] for x in (q, k, v, g)]
        args = (*xs, 0.25, s0[:2], cu, True, True)
        torch.library.opcheck(_forward, args, test_utils=("test_schema", "test_faketensor"))


def test_compiles_without_a_graph_break() -> None:
    xs, grads = inputs(1, 70, 1, 1, 16, 16, 48.0, torch.float32)
    compiled = torch.compile(engine, backend="aot_eager", fullgraph=True)
    eager = with_gradients(engine, xs, grads)
    for a, b in zip(with_gradients(compiled, xs, grads), eager, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_runs_are_bit_equal_and_can_be_captured() -> None:
    xs, grads = inputs(1, 2048, 2, 1, 128, 256, 16.0, torch.bfloat16)
    first = with_gradients(engine, xs, grads)
    for a, b in zip(first, with_gradients(engine, xs, grads), strict=True):
        assert torch.equal(a, b)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        o, _ = engine(*xs)
    graph.replay()
    assert torch.equal(o, first[0])
