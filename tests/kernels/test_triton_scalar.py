"""The Triton engine of a scalar decay, or of none, against the recurrence in fp64."""

import dataclasses
import os
from itertools import pairwise

import pytest
import torch
from oracle import CUDA, DEVICE, assert_as_good_as, assert_equal_sums, gates, rms, with_gradients
from torch import Tensor

pytest.importorskip("triton")
from glactl.kernels import triton_scalar
from glactl.kernels.triton_scalar_op import _backward, _forward, gla_scalar

pytestmark = pytest.mark.skipif(
    not CUDA and os.environ.get("TRITON_INTERPRET") != "1", reason="needs CUDA or TRITON_INTERPRET"
)


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, S: Tensor, g: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """S_t = e^g_t S_{t-1} + k_t v_t^T and o_t = K^-1/2 S_t^T q_t, token after token."""
    B, T, HQ, K = q.shape
    H = v.shape[2]
    o = []
    for t in range(T):
        if g is not None:
            S = (g if g.dim() == 1 else g[:, t]).exp()[..., None, None] * S
        S = S + k[:, t, :, :, None] * v[:, t, :, None, :]
        q_t = q[:, t].reshape(B, H, HQ // H, K)
        o.append(K**-0.5 * torch.einsum("bhrk,bhkv->bhrv", q_t, S).flatten(1, 2))
    return torch.stack(o, 1), S


def engine(*xs: Tensor, **options) -> tuple[Tensor, Tensor | None]:
    q, k, v, s0, *g = xs
    g = g[0] if g else None
    return gla_scalar(q, k, v, g, initial_state=s0, output_final_state=True, **options)


def inputs(
    B: int, T: int, H: int, R: int, K: int, V: int, form: str, gate: float | str, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """q, k, v, initial state, and g unless form is "none"; gradients of o and the final state.

    A head's g gets the sum of a gradient over all rows, which must fit fp16: g is fp32 there, and
    the gradients are a 64th.
    """
    generator = torch.Generator().manual_seed(T + 1000 * K)
    randn = lambda *s: torch.randn(*s, generator=generator)  # noqa: E731
    q, k, v = randn(B, T, H * R, K), randn(B, T, H, K), randn(B, T, H, V)
    s0, do, ds = randn(B, H, K, V), randn(B, T, H * R, V), randn(B, H, K, V)
    xs = [*(x.to(DEVICE, dtype) for x in (q, k, v)), s0.to(DEVICE)]
    if form != "none":
        g = gates(gate, (H,) if form == "head" else (B, T, H), generator)
        xs.append(g.to(DEVICE, torch.float32 if form == "head" else dtype))
    if form == "head":
        do, ds = do / 64, ds / 64
    return xs, [do.to(DEVICE, dtype), ds.to(DEVICE)]


def check(case: tuple, dtype: torch.dtype) -> None:
    xs, grads = inputs(*case, dtype)
    names = ("o", "final_state", "dq", "dk", "dv", "dinitial_state", "dg")
    terms = {}
    if xs[-1].shape == (case[2],):  # a head's gradient is the sum of those of its tokens
        tokens = [*(x.double() for x in xs[:4]), xs[4].double().expand(*case[:3])]
        shares = with_gradients(recurrence, tokens, [x.double() for x in grads])[-1]
        terms["dg"] = rms(torch.nan_to_num(shares).abs().sum((0, 1)))
    assert_as_good_as(recurrence, engine, names[: 2 + len(xs)], xs, grads, dtype, terms)


@pytest.fixture(autouse=True)
def poisoned():
    """Uninitialised memory holds NaN, so that an element nobody writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


# Mild decays (48) carry the state across blocks; mixed and closed have some whose exponential is 0.
CASES = [
    (1, 1, 1, 1, 16, 16, "token", 48.0),
    (2, 65, 1, 1, 16, 16, "token", 48.0),
    (1, 130, 2, 1, 32, 64, "token", 48.0),
    (1, 130, 1, 2, 16, 16, "token", 16.0),
    (1, 129, 1, 1, 32, 16, "token", 1.0),
    (1, 130, 1, 1, 16, 16, "token", 0.1),
    (1, 130, 1, 1, 16, 16, "token", "mixed"),
    (1, 70, 1, 1, 16, 16, "token", "closed"),
    (1, 67, 1, 1, 5, 7, "token", 48.0),
    (1, 130, 2, 1, 16, 16, "head", 48.0),
    (1, 70, 1, 2, 16, 16, "head", 1.0),
    (2, 67, 2, 1, 16, 16, "head", "closed"),
    (1, 130, 2, 2, 16, 16, "none", 1.0),
    (1, 130, 1, 1, 64, 16, "token", 48.0),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fp32_matches_the_fp64_recurrence(case) -> None:
    check(case, torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "decay",
    [("token", 48.0), ("token", 1.0), ("token", 0.1), ("token", "mixed"), ("head", 48.0),
     ("none", 1.0)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize(
    "shape",
    [(2, 300, 2, 1, 256, 512), (2, 300, 2, 1, 128, 256), (1, 200, 2, 2, 64, 64),
     (1, 200, 1, 1, 512, 64)],
    ids=str,
)  # fmt: skip
def test_gpu_matches_the_fp64_recurrence(shape, decay, dtype) -> None:
    if dtype != torch.bfloat16 and shape[4] > 64:
        pytest.skip("fp32 operands are for small heads")
    check((*shape, *decay), dtype)


def _want_programs(monkeypatch, programs: int) -> None:
    """Many programs cut sequences into segments of one block; one keeps them whole."""
    rule = triton_scalar.tiles
    monkeypatch.setattr(
        triton_scalar, "tiles", lambda *a: dataclasses.replace(rule(*a), programs=programs)
    )


@pytest.mark.parametrize(
    ("B", "T", "form", "gate"),
    [(2, 300, "token", 48.0), (2, 300, "head", 48.0), (2, 300, "none", 1.0),
     (1, 1300, "token", 400.0)],
)  # fmt: skip
def test_segments_equal_one_walk(monkeypatch, B: int, T: int, form: str, gate: float) -> None:
    xs, grads = inputs(B, T, 1, 2, 16, 16, form, gate, torch.float32)
    _want_programs(monkeypatch, 1)
    assert not triton_scalar.plan(*xs[:3], None, 1.0, None).layout.split
    whole = with_gradients(engine, xs, grads)
    _want_programs(monkeypatch, 10**9)
    layout = triton_scalar.plan(*xs[:3], None, 1.0, None).layout
    assert len(layout.segments) == B * -(-T // 128)
    for i, (a, b) in enumerate(zip(with_gradients(engine, xs, grads), whole, strict=True)):
        assert_equal_sums(a, b, str(i))


@pytest.mark.parametrize("programs", [1, 10**9])
def test_packed_sequences_equal_separate_ones(monkeypatch, programs) -> None:
    bounds = [0, 140, 140, 141, 300]  # the second is empty
    _want_programs(monkeypatch, programs)
    (q, k, v, _, g), (do, _) = inputs(1, 300, 2, 1, 16, 16, "token", 48.0, torch.float32)
    _, (_, many) = inputs(4, 1, 2, 1, 16, 16, "none", 48.0, torch.float32)
    s0, ds = many.flip(0), many
    cu = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    ours = with_gradients(lambda *xs: engine(*xs, cu_seqlens=cu), [q, k, v, s0, g], [do, ds])
    for n, (a, b) in enumerate(pairwise(bounds)):
        if a == b:
            assert torch.equal(ours[1][n], s0[n])
            assert torch.equal(ours[5][n], ds[n])
            continue
        rows = [x[:, a:b] for x in (q, k, v, g)]
        xs = [*rows[:3], s0[n : n + 1], rows[3]]
        alone = with_gradients(engine, xs, [do[:, a:b], ds[n : n + 1]])
        for i in (0, 2, 3, 4, 6):
            assert_equal_sums(ours[i][:, a:b], alone[i], f"{n} {i}")
        assert_equal_sums(ours[1][n], alone[1][0], f"{n} final")
        assert_equal_sums(ours[5][n], alone[5][0], f"{n} initial")


def test_a_state_handed_over_continues_the_sequence() -> None:
    (q, k, v, s0, g), _ = inputs(1, 200, 1, 1, 16, 16, "token", 48.0, torch.float32)
    o, final = engine(q, k, v, s0, g)
    first, middle = engine(*(x[:, :77] for x in (q, k, v)), s0, g[:, :77])
    second, last = engine(*(x[:, 77:] for x in (q, k, v)), middle, g[:, 77:])
    assert_equal_sums(torch.cat([first, second], 1), o, "o")
    assert_equal_sums(last, final, "final")


def test_without_states() -> None:
    (q, k, v, s0, g), _ = inputs(1, 70, 1, 1, 16, 16, "token", 48.0, torch.float32)
    o, none = gla_scalar(q, k, v, g)
    zero, _ = engine(q, k, v, torch.zeros_like(s0), g)
    assert none is None
    assert_equal_sums(o, zero, "o")


def test_a_constant_decay_is_that_decay_at_every_token_and_costs_no_gradient(monkeypatch) -> None:
    (q, k, v, s0, g), (do, _) = inputs(1, 130, 2, 1, 16, 16, "head", 48.0, torch.float32)
    per_token = g.expand(1, 130, 2)
    assert_equal_sums(engine(q, k, v, s0, g)[0], engine(q, k, v, s0, per_token)[0], "o")
    monkeypatch.delattr(triton_scalar.backward_kernels, "gate_gradient")  # not to be launched
    q.requires_grad_()
    engine(q, k, v, s0, g)[0].backward(do)
    assert torch.isfinite(q.grad).all()


@pytest.mark.parametrize("form", ["token", "head", "none"])
def test_operators_have_fakes_of_the_same_shapes(form: str) -> None:
    (q, k, v, s0, *g), (do, ds) = inputs(2, 130, 1, 2, 16, 16, form, 48.0, torch.float32)
    g = g[0] if g else None
    tests = ("test_schema", "test_faketensor")
    for cu in (None, torch.tensor([0, 3, 130], device=DEVICE)):
        b = 2 if cu is None else 1
        rows = [x[:b] for x in (q, k, v)]
        decay = g[:b] if form == "token" else g
        args = (*rows, decay, 0.25, s0, cu, True, True)
        torch.library.opcheck(_forward, args, test_utils=tests)
        _, _, states, *parts = _forward(*args)
        args = (*rows, decay, 0.25, cu, do[:b], ds, states, parts, g is not None, True)
        torch.library.opcheck(_backward, args, test_utils=tests)


def test_compiles_without_a_graph_break() -> None:
    xs, grads = inputs(1, 70, 1, 1, 16, 16, "token", 48.0, torch.float32)
    compiled = torch.compile(engine, backend="aot_eager", fullgraph=True)
    eager = with_gradients(engine, xs, grads)
    for a, b in zip(with_gradients(compiled, xs, grads), eager, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("form", ["token", "head", "none"])
def test_runs_are_bit_equal_and_can_be_captured(form: str) -> None:
    xs, grads = inputs(1, 2048, 2, 1, 128, 256, form, 16.0, torch.bfloat16)
    first = with_gradients(engine, xs, grads)
    for a, b in zip(first, with_gradients(engine, xs, grads), strict=True):
        assert torch.equal(a, b)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        o, _ = engine(*xs)
    graph.replay()
    assert torch.equal(o, first[0])
