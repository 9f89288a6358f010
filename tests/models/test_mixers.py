"""Each mixer against its equations, written out token by token in fp64."""

import itertools
import math
import time

import pytest
import torch
from drawn import draw, filled, same

from glactl.models.layers import GLU, LayerNorm, RMSNorm, ShortConv, rotate
from glactl.models.mixers.attention import Attention
from glactl.models.mixers.gla import GLA
from glactl.models.mixers.gsa import GSA

D, T = 12, 11
CPU = torch.device("cpu")


def rms(x, weight, eps):
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def silu(x):
    return x / (1 + (-x).exp())


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("feature", ["none", "relu", "swish"])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_gla(groups, feature, gate):
    spec = GLA.Spec(
        heads=4,
        kv_heads=groups,
        expand_k=1.0,
        expand_v=2.0,
        gate_rank=3,
        feature_map=feature,
        output_gate=gate,
    )
    m, x = filled(spec.build(D, True, 1e-3)), draw(1, T, D)
    K, V = 3, 6
    f = {"none": lambda z: z, "relu": lambda z: z.clamp_min(0), "swish": silu}[feature]
    S = torch.zeros(groups, K, V).double()
    expected = []
    for x_t in x[0]:
        q = f(m.q.weight @ x_t).view(4, K)
        k = f(m.k.weight @ x_t).view(groups, K)
        v = (m.v.weight @ x_t).view(groups, V)
        z = m.gate_up.weight @ (m.gate_down.weight @ x_t) + m.gate_up.bias
        a = ((1 / (1 + (-z).exp())) ** (1 / 16)).view(groups, K)
        S = a[:, :, None] * S + k[:, :, None] * v[:, None, :]
        o = torch.stack([S[h // (4 // groups)].T @ q[h] / math.sqrt(K) for h in range(4)])
        y = rms(o, m.norm.weight, 1e-3).flatten()
        if gate:
            y = y * silu(m.r.weight @ x_t)
        expected.append(m.out.weight @ y)
    y, state = m(x, m.initial_state(1, CPU))
    same(y[0], torch.stack(expected))
    same(state["s"][0], S)


@pytest.mark.parametrize("groups", [4, 2])
def test_gsa(groups):
    spec = GSA.Spec(heads=4, kv_heads=groups, slots=5)
    m, x = filled(spec.build(D, True, 1e-3)), draw(1, T, D)
    w, M = 3, 5
    Sk, Sv = torch.zeros(groups, w, M).double(), torch.zeros(groups, M, w).double()
    expected = []
    for x_t in x[0]:
        q = silu(m.q.weight @ x_t).view(4, w)
        k, v = (silu(p.weight @ x_t).view(groups, w) for p in (m.k, m.v))
        a = ((1 / (1 + (-(m.gate.weight @ x_t)).exp())) ** (1 / 8)).view(groups, M)
        Sk = Sk * a[:, None, :] + k[:, :, None] * (1 - a)[:, None, :]
        Sv = Sv * a[:, :, None] + (1 - a)[:, :, None] * v[:, None, :]
        o = []
        for h in range(4):
            g = h // (4 // groups)
            p = (Sk[g].T @ q[h]).exp()
            o.append(Sv[g].T @ (p / p.sum()))
        expected.append(m.out.weight @ rms(silu(torch.cat(o)), m.norm.weight, 1e-3))
    y, state = m(x, m.initial_state(1, CPU))
    same(y[0], torch.stack(expected))
    same(state["k"][0], Sk)
    same(state["v"][0], Sv)


def turned(x, place, theta):
    """The two halves as real and imaginary part, turned by e^(i place f)."""
    w = x.shape[-1]
    f = theta ** (-torch.arange(0, w, 2).double() / w)
    z = torch.complex(x[..., : w // 2], x[..., w // 2 :]) * torch.exp(1j * place * f)
    return torch.cat([z.real, z.imag], -1)


@pytest.mark.parametrize("window", [None, 1, 4, 50])
@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("groups", [3, 1])
def test_attention(groups, rope, window):
    spec = Attention.Spec(heads=3, kv_heads=groups, window=window, rope_theta=100.0)
    m, x = filled(spec.build(D, rope, 1e-3)), draw(1, T, D)
    w = 4
    q = (x[0] @ m.q.weight.T).view(T, 3, w)
    k, v = ((x[0] @ p.weight.T).view(T, groups, w) for p in (m.k, m.v))
    if rope:
        q, k = (torch.stack([turned(z[t], t, 100.0) for t in range(T)]) for z in (q, k))
    expected = []
    for t in range(T):
        o = []
        first = 0 if window is None else max(0, t + 1 - window)
        for h in range(3):
            g = h // (3 // groups)
            p = (k[first : t + 1, g] @ q[t, h] / math.sqrt(w)).exp()
            o.append(p @ v[first : t + 1, g] / p.sum())
        expected.append(m.out.weight @ torch.cat(o))
    y, state = m(x, m.initial_state(1, CPU))
    same(y[0], torch.stack(expected))
    same(m(x)[0], y)
    assert state["length"].tolist() == [T]
    if window is None:
        same(state["k"][0], k)
    else:
        assert state["k"].shape[1] == window
        for p in range(max(0, T - window), T):
            same(state["v"][0, p % window], v[p])


@pytest.mark.parametrize("window", [None, 7])
def test_attention_steps_past_its_growth_and_its_window(window):
    m = filled(Attention.Spec(heads=3, window=window).build(D, True, 1e-3))
    x = draw(2, 140, D)
    state = m.initial_state(2, CPU)
    y = torch.stack([m.step(x[:, t], state) for t in range(140)], 1)
    same(y, m(x)[0])
    assert state["length"].tolist() == [140, 140]
    assert state["k"].shape[1] == (192 if window is None else 7)


def test_rows_of_other_lengths_step_together():
    """A short row reads none of the rows that a longer one makes its state have."""
    m = filled(Attention.Spec(heads=3).build(D, True, 1e-3))
    x = draw(1, 9, D)
    _, state = m(x, m.initial_state(2, CPU), torch.tensor([0, 7, 9]))
    state["k"][1, 2:], state["v"][1, 2:] = math.nan, math.nan
    state = {name: part.nan_to_num(1e3) for name, part in state.items()}
    new = draw(2, D, seed=1)
    y = m.step(new, state)
    alone = m(torch.cat([x[:, 7:], new[None, 1:]], 1))[0][:, -1]
    same(y[1:], alone)


def test_many_short_documents_are_not_quadratic():
    """8,000 documents of 8 tokens: a mask of all pairs would have 4e9 entries."""
    m = Attention.Spec(heads=2).build(16, True, 1e-3)
    x = torch.zeros(1, 64_000, 16)
    start = time.perf_counter()
    with torch.no_grad():
        m(x, None, torch.arange(0, 64_001, 8))
    assert time.perf_counter() - start < 5


def test_a_long_window_is_not_quadratic():
    """Of 40,000 tokens with a window of 64: all pairs would be 1.6e9 scores a head."""
    m = Attention.Spec(heads=2, window=64).build(16, True, 1e-3)
    start = time.perf_counter()
    with torch.no_grad():
        m(torch.zeros(1, 40_000, 16), m.initial_state(1, CPU))
    assert time.perf_counter() - start < 5


def test_rotation_depends_on_distance_alone():
    q, k = draw(1, 1, 8), draw(1, 1, 8, seed=1)

    def score(i, j):
        at = [torch.tensor([p]) for p in (i, j)]
        return (rotate(q, at[0], 100.0) * rotate(k, at[1], 100.0)).sum()

    same(score(7, 3), score(104, 100))
    assert (score(7, 3) - score(8, 3)).abs() > 1e-3


def test_norms():
    x = 3 * draw(5, D) + 1
    same(filled(RMSNorm(D, 1e-2))(x), rms(x, filled(RMSNorm(D, 1e-2)).weight, 1e-2))
    m = filled(LayerNorm(D, 1e-2))
    centred = x - x.mean(-1, keepdim=True)
    same(m(x), rms(centred, m.weight, 1e-2) + m.bias)
    # sums of bf16 are taken in fp32: 4,096 ones in bf16 alone would add up to 256
    big = torch.full((1, 4096), 3.0, dtype=torch.bfloat16)
    assert RMSNorm(4096, 1e-6).bfloat16()(big).unique().tolist() == [1.0]


def test_channel_mixers():
    x = draw(3, D)
    for kind, act in (("swiglu", silu), ("glu", lambda z: 1 / (1 + (-z).exp()))):
        m = filled(GLU(D, 20, kind))
        inner = act(x @ m.gate.weight.T) * (x @ m.up.weight.T)
        same(m(x), inner @ m.down.weight.T)


@pytest.mark.parametrize("width", [2, 4])
def test_short_convolution(width):
    m, x = filled(ShortConv(D, width)), draw(1, T, D)
    bounds = [0, 4, 4, 5, T]
    expected = x.clone()
    for a, b in itertools.pairwise(bounds):
        for t in range(a, b):
            for j in range(width):
                if t - j >= a:
                    expected[0, t] += m.weight[j] * x[0, t - j]
    state = m.initial_state(4, CPU)
    y, after = m(x, state, torch.tensor(bounds))
    same(y, expected.detach())
    assert torch.equal(m(x, None, torch.tensor(bounds))[0], y)
    assert (after["conv"][1] == 0).all()  # of the empty one
    assert torch.equal(after["conv"][3], x[0, -(width - 1) :])
    assert torch.equal(after["conv"][2, -1], x[0, 4])


def test_a_new_short_convolution_passes_its_input_on():
    x = draw(1, T, D)
    assert torch.equal(ShortConv(D, 4).double()(x)[0], x)
