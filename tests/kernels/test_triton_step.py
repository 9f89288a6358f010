"""The Triton kernels of one token against the definitions in fp64."""

import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from glactl.kernels.triton_step import LowRank, column_tile, gla_step_triton
from glactl.kernels.triton_step_gsa import gsa_step_triton

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = pytest.mark.skipif(
    not CUDA and os.environ.get("TRITON_INTERPRET") != "1", reason="needs CUDA or TRITON_INTERPRET"
)
gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")


def gla_definition(q, k, v, S, gk=None, gv=None, g=None) -> tuple[Tensor, Tensor]:
    if gk is not None:
        S = gk.exp()[..., :, None] * S
    if gv is not None:
        S = S * gv.exp()[..., None, :]
    if g is not None:
        S = g.exp()[..., None, None] * S
    S = S + k[..., :, None] * v[..., None, :]
    N, H, K = k.shape
    o = torch.einsum("nhrk,nhkv->nhrv", q.reshape(N, H, -1, K), S).flatten(1, 2)
    return o * K**-0.5, S


def gsa_definition(q, k, v, s, g, Sk, Sv, scale) -> tuple[Tensor, Tensor, Tensor]:
    s = -torch.expm1(g) if s is None else s
    a = torch.ones_like(s) if g is None else g.exp()
    Sk = Sk * a[..., None, :] + k[..., :, None] * s[..., None, :]
    Sv = a[..., :, None] * Sv + s[..., :, None] * v[..., None, :]
    N, H, K = k.shape
    z = torch.einsum("nhrk,nhkm->nhrm", q.reshape(N, H, -1, K), Sk)
    o = torch.einsum("nhrm,nhmv->nhrv", (scale * z).softmax(-1), Sv)
    return o.flatten(1, 2), Sk, Sv


def assert_close(ours: Tensor, truth: Tensor, terms: int, name: str) -> None:
    """To two roundings to the result's dtype and the random walk of fp32 sums of `terms` terms."""
    eps = torch.finfo(ours.dtype).eps + terms**0.5 * torch.finfo(torch.float32).eps
    error = (ours.double() - truth).square().mean().sqrt()
    assert error <= 2 * eps * truth.square().mean().sqrt(), f"{name}: {error:.2e}"


def make(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def check_gla(N: int, H: int, R: int, K: int, V: int, gate: str, dtype: torch.dtype) -> None:
    shapes = {"gk": (N, H, K), "gv": (N, H, V), "g": (N, H), "head": (H,)}
    q = make(N, H * R, K, seed=0, dtype=dtype)
    k, v = make(N, H, K, seed=1, dtype=dtype), make(N, H, V, seed=2, dtype=dtype)
    S = make(N, H, K, V, seed=3)
    gates = {}
    if gate != "none":
        x = -make(*shapes[gate], seed=4).abs()
        x.view(-1)[0] = -torch.inf
        gates = {"g" if gate == "head" else gate: x.to(dtype)}
    truth = gla_definition(
        *(x.double() for x in (q, k, v, S)), **{n: x.double() for n, x in gates.items()}
    )
    o = gla_step_triton(q, k, v, S, **gates)
    assert o.dtype == v.dtype
    assert_close(o, truth[0], K, "o")
    assert_close(S, truth[1], 2, "state")


def check_gsa(
    N: int, H: int, R: int, K: int, V: int, M: int, kind: str, dtype: torch.dtype
) -> None:
    q = make(N, H * R, K, seed=0, dtype=dtype)
    k, v = make(N, H, K, seed=1, dtype=dtype), make(N, H, V, seed=2, dtype=dtype)
    Sk, Sv = make(N, H, K, M, seed=3), make(N, H, M, V, seed=4)
    g = None if kind == "no decay" else -make(N, H, M, seed=5, dtype=dtype).abs() / 16
    s = None if kind == "tied" else make(N, H, M, seed=6, dtype=dtype)
    if g is not None:
        g.view(-1)[0] = -torch.inf
    xs = [None if x is None else x.double() for x in (q, k, v, s, g, Sk, Sv)]
    truth = gsa_definition(*xs, K**-0.5)
    o = gsa_step_triton(q, k, v, s, g, (Sk, Sv), scale=K**-0.5)
    assert o.dtype == v.dtype
    # the logits' error is that of a sum over K, and the softmax hands it on
    assert_close(o, truth[0], K + M, "o")
    assert_close(Sk, truth[1], 2, "Sk")
    assert_close(Sv, truth[2], 2, "Sv")


@pytest.mark.parametrize("gate", ["none", "gk", "gv", "g", "head"])
@pytest.mark.parametrize("shape", [(2, 2, 1, 16, 16), (1, 2, 3, 5, 20)], ids=str)
def test_gla_step_is_the_definition(shape, gate: str) -> None:
    check_gla(*shape, gate, torch.float32)


@pytest.mark.parametrize("kind", ["tied", "given", "no decay"])
@pytest.mark.parametrize("shape", [(2, 2, 1, 16, 16, 16), (1, 2, 3, 5, 20, 7)], ids=str)
def test_gsa_step_is_the_definition(shape, kind: str) -> None:
    check_gsa(*shape, kind, torch.float32)


@pytest.mark.parametrize("tile", [128, 16384])
def test_gsa_step_in_one_launch(monkeypatch, tile: int) -> None:
    """As where heads fill the chip, whose tiles of K and V may be smaller than either."""
    monkeypatch.setattr("glactl.kernels.triton_step_gsa.FEW", 1)
    monkeypatch.setattr("glactl.kernels.triton_step_gsa.TILE", tile)
    check_gsa(1, 1, 2, 20, 28, 16, "tied", torch.float32)


@pytest.mark.parametrize("shares", [1, 64, 4096])
def test_shares_of_logits_are_read_in_parts(monkeypatch, shares: int) -> None:
    """Five of them, one or four at once or all."""
    monkeypatch.setattr("glactl.kernels.triton_step_gsa.SHARES", shares)
    check_gsa(1, 2, 2, 36, 12, 7, "tied", torch.float32)


FEATURES = {"none": lambda x: x, "relu": torch.relu, "swish": torch.nn.functional.silu}


@pytest.mark.parametrize("feature_map", FEATURES)
def test_gla_step_makes_its_gate_and_features(feature_map: str) -> None:
    N, H, R, K, V, rank = 2, 2, 2, 12, 20, 5
    z = make(N, H * R * K + H * (K + V) + rank, seed=0)
    q, k, v, low = z.split([H * R * K, H * K, H * V, rank], 1)
    q, k, v = q.unflatten(1, (H * R, K)), k.unflatten(1, (H, K)), v.unflatten(1, (H, V))
    up, bias, S = make(H * K, rank, seed=1), make(H * K, seed=2), make(N, H, K, V, seed=3)
    gates = torch.nn.functional.logsigmoid(low.double() @ up.double().T + bias) / 16
    f = FEATURES[feature_map]
    truth = gla_definition(
        f(q.double()), f(k.double()), v.double(), S.double(), gk=gates.unflatten(1, (H, K))
    )
    o = gla_step_triton(q, k, v, S, low_rank=LowRank(low, up, bias, 16.0), feature_map=feature_map)
    assert_close(o, truth[0], K + rank, "o")
    assert_close(S, truth[1], 2 + rank, "state")


@pytest.mark.parametrize("few", [1, 128])
@pytest.mark.parametrize("feature_map", FEATURES)
def test_gsa_step_makes_its_gate_and_features(monkeypatch, feature_map: str, few: int) -> None:
    monkeypatch.setattr("glactl.kernels.triton_step_gsa.FEW", few)
    N, H, R, D, M = 2, 2, 2, 12, 6
    z = make(N, H * R * D + H * (2 * D + M), seed=0)
    q, k, v, a = z.split([H * R * D, H * D, H * D, H * M], 1)
    q, k, v = (x.unflatten(1, (-1, D)) for x in (q, k, v))
    a = a.unflatten(1, (H, M))
    state = make(N, H, D, M, seed=1), make(N, H, M, D, seed=2)
    f, g = FEATURES[feature_map], torch.nn.functional.logsigmoid(a.double()) / 8
    xs = [f(x.double()) for x in (q, k, v)]
    truth = gsa_definition(*xs, None, g, *(x.double() for x in state), 1.0)
    o = gsa_step_triton(q, k, v, None, a, state, normalizer=8.0, feature_map=feature_map)
    assert_close(o, truth[0], D + M, "o")
    assert_close(state[0], truth[1], 3, "Sk")
    assert_close(state[1], truth[2], 3, "Sv")


def test_small_gates_keep_the_digits_of_the_write_strength() -> None:
    g = torch.full((1, 1, 16), -1e-6, device=DEVICE)
    Sk, Sv = torch.zeros(1, 1, 16, 16, device=DEVICE), torch.zeros(1, 1, 16, 16, device=DEVICE)
    one = torch.ones(1, 1, 16, device=DEVICE)
    gsa_step_triton(one, one, one, None, g, (Sk, Sv))
    assert_close(Sk, (-torch.expm1(g.double())).expand(1, 1, 16, 16), 2, "Sk")


def test_a_state_that_would_be_copied_is_refused() -> None:
    q = torch.zeros(1, 1, 16, device=DEVICE)
    S = torch.zeros(1, 1, 16, 16, device=DEVICE).transpose(2, 3)
    with pytest.raises(ValueError, match="state has the strides"):
        gla_step_triton(q, q, q, S)
    with pytest.raises(ValueError, match=r"state\[1\] has the strides"):
        gsa_step_triton(q, q, q, q, q, (S.transpose(2, 3), S))


def test_one_sequence_fills_the_chip_and_many_get_wide_tiles() -> None:
    assert 4 * 512 // column_tile(4, 256, 512) >= 256
    assert [column_tile(4, K, 256) for K in (64, 128, 256)] == [8, 8, 8]
    # of 2,048 elements, and no less than a sector of memory wide
    assert [column_tile(256, K, 256) for K in (16, 64, 128, 256, 512)] == [128, 32, 16, 8, 8]
    assert column_tile(4096, 64, 20) == 32


@gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 4, 1, 256, 512), (64, 4, 1, 128, 256), (3, 2, 4, 100, 72)])
@pytest.mark.parametrize("gate", ["none", "gk", "gv", "g", "head"])
def test_gpu_gla_step(shape, gate: str, dtype: torch.dtype) -> None:
    check_gla(*shape, gate, dtype)


@gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 4, 1, 512, 512, 64), (64, 4, 1, 256, 256, 256), (3, 2, 4, 100, 72, 20)]
)
@pytest.mark.parametrize("kind", ["tied", "given", "no decay"])
def test_gpu_gsa_step(shape, kind: str, dtype: torch.dtype) -> None:
    check_gsa(*shape, kind, dtype)


@gpu
@needs_cuda
def test_steps_that_follow_each_other_on_one_state() -> None:
    """Each begins while the one before is at work on the state that both update."""
    q, k, v, g = (make(1, 4, 256, seed=i) for i in range(4))
    g, g_slots = -g.abs() / 16, -make(1, 4, 64, seed=4).abs() / 16
    S, Sk, Sv = (make(1, 4, *s, seed=5) for s in ((256, 256), (256, 64), (64, 256)))
    truth, slots = S.double(), [Sk.double(), Sv.double()]
    for _ in range(50):
        truth = gla_definition(*(x.double() for x in (q, k, v)), truth, g.double())[1]
        xs = [x.double() for x in (q, k, v)]
        slots = gsa_definition(*xs, None, g_slots.double(), *slots, 1.0)[1:]
    for _ in range(50):
        gla_step_triton(q, k, v, S, gk=g)
    for _ in range(50):
        gsa_step_triton(q, k, v, None, g_slots, (Sk, Sv))
    for name, ours, expected in (("S", S, truth), ("Sk", Sk, slots[0]), ("Sv", Sv, slots[1])):
        assert_close(ours, expected, 100, name)


@gpu
@needs_cuda
def test_a_graph_of_both_steps_replays() -> None:
    q, k, v = (make(2, 4, 64, seed=i) for i in range(3))
    g = -make(2, 4, 64, seed=3).abs()
    states = [make(2, 4, 64, 64, seed=4 + i) for i in range(3)]
    kept = [S.clone() for S in states]

    def steps() -> tuple[Tensor, Tensor]:
        a = gla_step_triton(q, k, v, states[0], gk=g)
        return a, gsa_step_triton(q, k, v, None, g, (states[1], states[2]))

    expected = [x.clone() for x in steps()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours = steps()
    for S, x in zip(states, kept, strict=True):
        S.copy_(x)
    graph.replay()
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)
