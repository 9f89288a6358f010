"""The Triton engine of gated slot attention against the recurrence in fp64."""

import dataclasses
import os
from itertools import pairwise

import pytest
import torch
from oracle import CUDA, DEVICE, assert_as_good_as, assert_equal_sums, gates
from oracle import with_gradients as results_of
from torch import Tensor

pytest.importorskip("triton")
from glactl.kernels import triton_gsa
from glactl.kernels.triton_gsa_op import _backward, _forward, gsa_fused

pytestmark = pytest.mark.skipif(
    not CUDA and os.environ.get("TRITON_INTERPRET") != "1", reason="needs CUDA or TRITON_INTERPRET"
)
Tensors = dict[str, Tensor]


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, Sk: Tensor, Sv: Tensor,
    s: Tensor | None = None, g: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Sk diag(e^g) + k s^T, diag(e^g) Sv + s v^T, o = Sv^T softmax(Sk^T q), token after token."""
    if g is None:
        g = torch.zeros_like(s)
    if s is None:
        s = 1 - g.exp()
    B, T, HQ, K = q.shape
    H = v.shape[2]
    o = []
    for t in range(T):
        decay = g[:, t].exp()
        Sk = Sk * decay[:, :, None, :] + k[:, t, :, :, None] * s[:, t, :, None, :]
        Sv = Sv * decay[..., None] + s[:, t, :, :, None] * v[:, t, :, None, :]
        q_t = q[:, t].reshape(B, H, HQ // H, K)
        p = torch.einsum("bhrk,bhkm->bhrm", q_t, Sk).softmax(-1)
        o.append(torch.einsum("bhrm,bhmv->bhrv", p, Sv).flatten(1, 2))
    return torch.stack(o, 1), Sk, Sv


def engine(
    q: Tensor, k: Tensor, v: Tensor, Sk: Tensor, Sv: Tensor,
    s: Tensor | None = None, g: Tensor | None = None, **options: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The operator with states in and out, called as `recurrence` is."""
    o, final = gsa_fused(
        q, k, v, s, g, initial_state=(Sk, Sv), output_final_state=True, **options
    )  # fmt: skip
    return o, *final


def inputs(
    B: int, T: int, H: int, R: int, K: int, V: int, M: int, gate: float | str | None,
    write: bool, dtype: torch.dtype = torch.float32,
) -> tuple[Tensors, list[Tensor]]:  # fmt: skip
    """q, k, v, the states, and s (`write`), g (`gate`); gradients of o and of the final states."""
    generator = torch.Generator().manual_seed(T + 1000 * K)
    randn = lambda *s: torch.randn(*s, generator=generator)  # noqa: E731
    # q of length 1, so that the logits are of the size of the keys' elements
    xs = {"q": K**-0.5 * randn(B, T, H * R, K), "k": randn(B, T, H, K), "v": randn(B, T, H, V)}
    if gate is not None:
        xs["g"] = gates(gate, (B, T, H, M), generator)
    if write:
        # without a decay the state adds up T of them
        size = T**-0.5 if gate is None else 1.0
        xs["s"] = size * torch.rand(B, T, H, M, generator=generator)
    xs = {name: x.to(DEVICE, dtype) for name, x in xs.items()}
    xs |= {"Sk": randn(B, H, K, M).to(DEVICE), "Sv": randn(B, H, M, V).to(DEVICE)}
    grads = [randn(B, T, H * R, V).to(DEVICE, dtype)]
    return xs, [*grads, randn(B, H, K, M).to(DEVICE), randn(B, H, M, V).to(DEVICE)]


def by_position(op, names: list[str]):
    """op with its tensors in the order of names, as oracle.py calls it."""
    return lambda *xs: op(**dict(zip(names, xs, strict=True)))


def result_names(xs: Tensors) -> list[str]:
    return ["o", "Sk", "Sv", *(f"d{name}" for name in xs)]


def with_gradients(op, xs: Tensors, grads: list[Tensor]) -> Tensors:
    """o, the final states and the gradients of all inputs."""
    found = results_of(by_position(op, list(xs)), list(xs.values()), grads)
    return dict(zip(result_names(xs), found, strict=True))


def assert_as_good_as_recurrence(xs: Tensors, grads: list[Tensor], dtype: torch.dtype) -> None:
    ops = (by_position(op, list(xs)) for op in (recurrence, engine))
    assert_as_good_as(*ops, result_names(xs), list(xs.values()), grads, dtype)


@pytest.fixture(autouse=True)
def poisoned():
    """Uninitialised memory holds NaN, so that an element nobody writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


# Mild gates (48) carry the states across blocks; 4 to 1 pass the fp32 range of one pair of factors
# and take groups of rows; 0.1, mixed and closed have gates whose exponential is 0. M = 32 is more
# slots than fp32 takes at a time.
CASES = [
    (1, 1, 1, 1, 16, 16, 16, 48.0, False),
    (2, 65, 1, 1, 16, 16, 16, 48.0, True),
    (1, 130, 1, 1, 16, 32, 32, 48.0, False),
    (1, 130, 2, 1, 32, 16, 16, 48.0, True),
    (1, 130, 1, 2, 16, 16, 16, 16.0, False),
    (1, 130, 1, 1, 16, 16, 16, None, True),
    (1, 130, 1, 1, 16, 16, 32, 4.0, False),
    (1, 130, 1, 2, 16, 16, 16, 2.0, True),
    (1, 129, 1, 1, 16, 16, 32, 1.0, False),
    (1, 129, 1, 2, 16, 16, 16, 1.0, True),
    (1, 130, 1, 1, 16, 16, 16, 0.1, False),
    (1, 130, 1, 1, 16, 16, 16, "mixed", False),
    (1, 130, 1, 1, 16, 16, 16, "mixed", True),
    (1, 70, 1, 1, 16, 16, 16, "closed", True),
    (1, 67, 1, 1, 5, 70, 9, 48.0, False),
    (1, 67, 1, 1, 7, 5, 18, 48.0, True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fp32_matches_the_fp64_recurrence(case) -> None:
    assert_as_good_as_recurrence(*inputs(*case), torch.float32)


@pytest.mark.parametrize(
    ("gate", "rows"),
    [(48.0, 7), (4.0, 6), (2.0, 5), (1.0, 3), (0.1, 0), ("mixed", 0), ("closed", 0)],
)
def test_the_largest_safe_groups_are_found(gate, rows) -> None:
    """n of groups of 2^n rows, of which none decays by more than the limit after its first row."""
    xs, _ = inputs(1, 128, 1, 1, 16, 16, 16, gate, False)
    p = triton_gsa.plan(xs["q"], xs["k"], xs["v"], None, xs["g"], 1.0, 16, None)
    found = triton_gsa.forward(p, None, False, True)[2][3].item()
    within = [
        n for n in range(8) if -xs["g"].unflatten(1, (-1, 2**n))[:, :, 1:].sum(2).min() <= p.limit
    ]
    assert found == max(within) == rows


def test_scores_may_wait_in_the_gradients(monkeypatch) -> None:
    xs, grads = inputs(2, 130, 2, 1, 128, 128, 16, 48.0, True)
    apart = with_gradients(engine, xs, grads)
    for name in ("hoist", "in_place"):
        monkeypatch.setattr(triton_gsa.Plan, name, True)
    for name, x in with_gradients(engine, xs, grads).items():
        assert torch.equal(x, apart[name]), name


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("gate", [48.0, 8.0, 1.0, 0.5, 0.25, 0.1, "mixed"])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 300, 2, 1, 512, 512, 64),
        (2, 300, 2, 1, 256, 256, 64),
        (1, 200, 2, 2, 64, 64, 32),
        (1, 200, 1, 1, 64, 128, 128),
        (1, 200, 1, 1, 100, 70, 128),
        (1, 200, 1, 1, 64, 64, 16),
    ],
    ids=str,
)
def test_gpu_matches_the_fp64_recurrence(shape, gate, dtype) -> None:
    if dtype != torch.bfloat16 and shape[4] > 128:
        pytest.skip("fp32 operands are for small heads")
    for write in (False, True):
        assert_as_good_as_recurrence(*inputs(*shape, gate, write, dtype), dtype)


def _want_programs(monkeypatch, programs: int) -> None:
    """Many programs cut sequences into segments of one block; one keeps them whole."""
    rule = triton_gsa.tiles
    monkeypatch.setattr(
        triton_gsa, "tiles", lambda *a: dataclasses.replace(rule(*a), programs=programs)
    )


def test_segments_equal_one_walk(monkeypatch) -> None:
    xs, grads = inputs(1, 300, 1, 2, 16, 16, 16, 48.0, False)
    args = (xs["q"], xs["k"], xs["v"], None, xs["g"], 1.0, 16, None)
    _want_programs(monkeypatch, 1)
    assert not triton_gsa.plan(*args).layout.split
    whole = with_gradients(engine, xs, grads)
    _want_programs(monkeypatch, 10**9)
    assert triton_gsa.plan(*args).layout.split
    for name, x in with_gradients(engine, xs, grads).items():
        assert_equal_sums(x, whole[name], name)


@pytest.mark.parametrize("programs", [1, 10**9])
def test_packed_sequences_equal_separate_ones(monkeypatch, programs) -> None:
    bounds = [0, 140, 140, 141, 300]  # the second is empty
    _want_programs(monkeypatch, programs)
    xs, (do, *_) = inputs(1, 300, 1, 1, 16, 16, 16, 48.0, True)
    states, (_, *dstates) = inputs(4, 1, 1, 1, 16, 16, 16, 48.0, True)
    states = {name: states[name] for name in ("Sk", "Sv")}
    cu = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)

    def packed(**xs: Tensor) -> tuple[Tensor, ...]:
        return engine(**xs, cu_seqlens=cu)

    ours = with_gradients(packed, xs | states, [do, *dstates])
    for n, (a, b) in enumerate(pairwise(bounds)):
        if a == b:
            for name, x, dx in zip(("Sk", "Sv"), states.values(), dstates, strict=True):
                assert torch.equal(ours[name][n], x[n])
                assert torch.equal(ours[f"d{name}"][n], dx[n])
            continue
        one = {name: x[:, a:b] for name, x in xs.items()}
        one |= {name: x[n : n + 1] for name, x in states.items()}
        alone = with_gradients(engine, one, [do[:, a:b], *(x[n : n + 1] for x in dstates)])
        for name, x in alone.items():
            whole = ours[name]
            assert_equal_sums(whole[n : n + 1] if "S" in name else whole[:, a:b], x, f"{n} {name}")


def test_a_state_handed_over_continues_the_sequence() -> None:
    xs, _ = inputs(1, 200, 1, 1, 16, 16, 16, 48.0, True)
    parts = ("q", "k", "v", "s", "g")
    o, *final = engine(**xs)
    first, Sk, Sv = engine(**{n: xs[n][:, :77] for n in parts}, Sk=xs["Sk"], Sv=xs["Sv"])
    second, *last = engine(**{n: xs[n][:, 77:] for n in parts}, Sk=Sk, Sv=Sv)
    assert_equal_sums(torch.cat([first, second], 1), o, "o")
    for a, b, name in zip(last, final, ("Sk", "Sv"), strict=True):
        assert_equal_sums(a, b, name)


def test_without_states_or_gradients() -> None:
    xs, _ = inputs(1, 70, 1, 1, 16, 16, 16, 48.0, False)
    Sk, Sv = xs.pop("Sk"), xs.pop("Sv")
    o, none = gsa_fused(xs["q"], xs["k"], xs["v"], None, xs["g"])
    zero, *_ = engine(**xs, Sk=torch.zeros_like(Sk), Sv=torch.zeros_like(Sv))
    assert none is None
    assert_equal_sums(o, zero, "o")


def test_scale_is_a_factor_on_the_queries() -> None:
    xs, grads = inputs(1, 40, 1, 1, 16, 16, 16, 48.0, False)

    def scaled(**xs: Tensor) -> tuple[Tensor, ...]:
        return engine(**xs, scale=0.5)

    def halved(q: Tensor, **xs: Tensor) -> tuple[Tensor, ...]:
        return engine(q=0.5 * q, **xs)

    expected = with_gradients(halved, xs, grads)
    for name, x in with_gradients(scaled, xs, grads).items():
        assert_equal_sums(x, expected[name], name)


def test_mixed_dtypes_are_taken_as_fp32() -> None:
    xs, _ = inputs(1, 20, 1, 1, 16, 16, 16, 48.0, False)
    v = xs["v"].half()
    o, *_ = engine(**xs | {"v": v})
    expected, *_ = engine(**xs | {"v": v.float()})
    assert o.dtype == torch.float16
    assert torch.equal(o, expected.half())


def test_neither_strength_nor_gate_is_an_error() -> None:
    xs, _ = inputs(1, 3, 1, 1, 16, 16, 16, 48.0, False)
    with pytest.raises(ValueError, match="s and g are both None"):
        gsa_fused(xs["q"], xs["k"], xs["v"], None, None)
    many = torch.zeros(1, 3, 1, 129, device=DEVICE)
    with pytest.raises(ValueError, match="129 slots"):
        gsa_fused(xs["q"], xs["k"], xs["v"], many, None)


def test_operators_have_fakes_of_the_same_shapes() -> None:
    xs, (do, *_) = inputs(2, 20, 1, 2, 16, 32, 16, 48.0, True)
    start = torch.zeros(2, 1, 16, 48, device=DEVICE)
    for cu in (None, torch.tensor([0, 3, 20], device=DEVICE)):
        n = 2 if cu is None else 1
        q, k, v, s, g = (xs[name][:n] for name in ("q", "k", "v", "s", "g"))
        args = (q, k, v, s, g, 0.25, 16)
        run = (*args, start, cu, True, True)
        torch.library.opcheck(_forward, run, test_utils=("test_schema", "test_faketensor"))
        back = (*args, cu, do[:n], start, _forward(*run)[2:], True)
        torch.library.opcheck(_backward, back, test_utils=("test_schema", "test_faketensor"))


def test_compiles_without_a_graph_break() -> None:
    xs, grads = inputs(1, 20, 1, 1, 16, 16, 16, 48.0, False)
    compiled = torch.compile(engine, backend="aot_eager", fullgraph=True)
    eager = with_gradients(engine, xs, grads)
    for name, x in with_gradients(compiled, xs, grads).items():
        assert torch.equal(x, eager[name]), name


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_runs_are_bit_equal_and_can_be_captured() -> None:
    xs, grads = inputs(1, 2048, 2, 1, 256, 256, 64, 8.0, False, torch.bfloat16)
    first = with_gradients(engine, xs, grads)
    for name, x in with_gradients(engine, xs, grads).items():
        assert torch.equal(x, first[name]), name
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        o, *_ = engine(**xs)
    graph.replay()
    assert torch.equal(o, first["o"])
