"""The papers' baselines and ablations against their equations, token by token in fp64."""

import math

import pytest
import torch
from drawn import draw, filled, same

from glactl.models.lm import LMSpec, build_lm
from glactl.models.mixers.abc import ABC
from glactl.models.mixers.base import Depth
from glactl.models.mixers.gla import GLA
from glactl.models.mixers.gsa import GSA
from glactl.models.mixers.hgrn2 import HGRN2, Bounds
from glactl.models.mixers.linear import LinearAttention
from glactl.models.mixers.retnet import RetNet
from glactl.models.mixers.transnormer import TransNormer

D, T, EPS = 12, 11, 1e-3
CPU = torch.device("cpu")


def rms(x, weight=1.0):
    return weight * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def sigmoid(x):
    return 1 / (1 + (-x).exp())


def silu(x):
    return x * sigmoid(x)


def softmax(z):
    return z.exp() / z.exp().sum()


def turned(x, place, theta):
    """The two halves as real and imaginary part, turned by e^(i place f)."""
    w = x.shape[-1]
    f = theta ** (-torch.arange(0, w, 2).double() / w)
    z = torch.complex(x[..., : w // 2], x[..., w // 2 :]) * torch.exp(1j * place * f)
    return torch.cat([z.real, z.imag], -1)


def parts(m, x_t, names, heads):
    return [(getattr(m, name).weight @ x_t).view(heads, -1) for name in names]


def check(m, x, expected, states, shared=()):
    """The layer's outputs and final states, whole and stepwise."""
    y, after = m(x, m.initial_state(1, CPU), None, None, *shared)
    same(y[0], torch.stack(expected))
    same(m(x, None, None, None, *shared)[0], y)
    stepped = m.initial_state(1, CPU)
    for t in range(T):
        same(m.step(x[:, t], stepped, None, *shared)[0], expected[t])
    for name, S in states.items():
        same(after[name][0], S)
        same(stepped[name][0], S)


@pytest.mark.parametrize("feature", ["none", "relu", "swish", "elu"])
def test_linear(feature):
    spec = LinearAttention.Spec(heads=3, expand_k=0.5, expand_v=1.0, feature_map=feature)
    m, x = filled(spec.build(D, True, EPS)), draw(1, T, D)
    f = {
        "none": lambda z: z,
        "relu": lambda z: z.clamp_min(0),
        "swish": silu,
        "elu": lambda z: torch.where(z > 0, z + 1, z.exp()),
    }[feature]
    S, expected = torch.zeros(3, 2, 4).double(), []
    for x_t in x[0]:
        q, k, v = parts(m, x_t, "qkv", 3)
        S = S + f(k)[:, :, None] * v[:, None, :]
        o = torch.einsum("hkv,hk->hv", S, f(q)) / math.sqrt(2)
        expected.append(m.out.weight @ rms(o, m.norm.weight).flatten())
    check(m, x, expected, {"s": S})


@pytest.mark.parametrize("rope", [True, False])
def test_retnet(rope):
    spec = RetNet.Spec(heads=3, rope_theta=100.0)
    m, x = filled(spec.build(D, rope, EPS)), draw(1, T, D)
    decay = torch.tensor([1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128]).double()
    S, expected = torch.zeros(3, 4, 8).double(), []
    for t, x_t in enumerate(x[0]):
        q, k, v, r = parts(m, x_t, "qkvr", 3)
        if rope:
            q, k = turned(q, t, 100.0), turned(k, t, 100.0)
        S = decay[:, None, None] * S + k[:, :, None] * v[:, None, :]
        o = torch.einsum("hkv,hk->hv", S, q) / 2
        expected.append(m.out.weight @ (rms(o, m.norm.weight) * silu(r)).flatten())
    check(m, x, expected, {"s": S})
    assert ("length" in m.initial_state(1, CPU)) == rope


@pytest.mark.parametrize("feature", ["relu", "swish"])
def test_retnet_made_of_attention(feature):
    """Two heads a state, a feature map in front of the rotation, no output gate."""
    fields = {"heads": 6, "kv_heads": 3, "expand_v": 1.0, "rope_theta": 100.0}
    spec = RetNet.Spec(**fields, feature_map=feature, output_gate=False)
    m, x = filled(spec.build(D, True, EPS)), draw(1, T, D)
    f = {"relu": lambda z: z.clamp(min=0), "swish": silu}[feature]
    decay = torch.tensor([1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128]).double()
    S, expected = torch.zeros(3, 2, 2).double(), []
    for t, x_t in enumerate(x[0]):
        q, (k, v) = (m.q.weight @ x_t).view(6, -1), parts(m, x_t, "kv", 3)
        q, k = turned(f(q), t, 100.0), turned(f(k), t, 100.0)
        S = decay[:, None, None] * S + k[:, :, None] * v[:, None, :]
        o = torch.einsum("hkv,hk->hv", S.repeat_interleave(2, 0), q) / math.sqrt(2)
        expected.append(m.out.weight @ rms(o, m.norm.weight).flatten())
    check(m, x, expected, {"s": S})


def transnormer_decay(name, layer, layers, heads):
    made = []
    for h in range(heads):
        if name == "lightning":
            made.append(math.exp(-(8 / heads) * (1 - layer / layers) * h))
        else:
            slope = 2 ** (-8 * (h + 1) / heads)
            made.append(math.exp(-slope * (1 - layer / (layers - 1) + 1e-5)))
    return torch.tensor(made, dtype=torch.float64)


@pytest.mark.parametrize("name", ["transnormerllm", "lightning"])
@pytest.mark.parametrize(("lrpe", "layer"), [("first", 0), ("first", 2), ("all", 1), ("none", 0)])
def test_transnormer(name, lrpe, layer):
    """Learnt positions as what they do to a score: sum_i q_i k_i cos(theta_i (m - n))."""
    spec = TransNormer.Spec(heads=3, decay=name, lrpe=lrpe)
    m, x = filled(spec.build(D, True, EPS, Depth(layer, 4))), draw(1, T, D)
    turns = lrpe == "all" or (lrpe == "first" and layer == 0)
    assert (m.theta is not None) == turns
    decay = transnormer_decay(name, layer, 4, 3)
    keys, values, expected = [], [], []
    for t, x_t in enumerate(x[0]):
        q, k, v, u = parts(m, x_t, "qkvu", 3)
        keys.append(silu(k))
        values.append(v)
        o = torch.zeros(3, 4).double()
        for s in range(t + 1):
            angle = m.theta * (t - s) if turns else torch.zeros(3, 4).double()
            score = (silu(q) * keys[s] * angle.cos()).sum(-1)
            o += (decay ** (t - s) * score)[:, None] * values[s]
        expected.append(m.out.weight @ (rms(o.flatten()) * u.flatten()))
    check(m, x, expected, {})


def test_transnormer_starts_with_its_angles():
    lm = build_lm(LMSpec(d_model=16, n_layers=2, mixer=TransNormer.Spec(), vocab_size=5), 0)
    first, second = (block.mixer for block in lm.blocks)
    assert second.theta is None
    expected = 10_000 ** (-2 * torch.arange(16) / 16)
    torch.testing.assert_close(first.theta.flatten(), expected)


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_hgrn2(layer):
    spec = HGRN2.Spec(expand_ratio=4)
    m, x = filled(spec.build(D, True, EPS, Depth(layer, 4))), draw(1, T, D)
    bounds = filled(Bounds(D, 4))
    p = torch.stack([w / bounds.weight.exp().sum(0) for w in bounds.weight.exp()])
    b = (p[: layer + 1].sum(0) - p[0]).view(3, 4)
    S, expected = torch.zeros(3, 4, 4).double(), []
    for x_t in x[0]:
        q, z, v = parts(m, x_t, "qfv", 3)
        f = b + (1 - b) * sigmoid(z)
        S = f[:, :, None] * S + (1 - f)[:, :, None] * v[:, None, :]
        o = torch.einsum("hkv,hk->hv", S, silu(q)) / 2
        expected.append(m.out.weight @ rms(o.flatten(), m.norm.weight))
    check(m, x, expected, {"s": S}, (bounds()[layer],))


def test_lower_bounds_are_one_parameter_of_the_model():
    spec = LMSpec(d_model=16, n_layers=4, mixer=HGRN2.Spec(), vocab_size=5)
    lm = build_lm(spec, 0)
    assert lm.shared["hgrn2"].weight.shape == (4, 16)
    assert [name for name, _ in lm.named_parameters() if "shared" in name] == [
        "shared.hgrn2.weight"
    ]
    b = lm.shared["hgrn2"]()
    torch.testing.assert_close(b, torch.tensor([0, 0.25, 0.5, 0.75])[:, None].expand(4, 16))
    alone = build_lm(LMSpec(d_model=16, n_layers=1, mixer=HGRN2.Spec(), vocab_size=5), 0)
    assert not alone.shared


def test_lower_bounds_at_their_ends():
    """A bound that rounds to 1 and one that is tiny give finite outputs and gradients."""
    bounds = Bounds(16, 3)
    with torch.no_grad():
        bounds.weight.copy_(torch.tensor([0.0, 60.0, -60.0])[:, None].expand(3, 16))
    b = bounds()
    assert (b < 1).all()
    for layer in (1, 2):
        m = filled(HGRN2.Spec(expand_ratio=4).build(16, True, EPS, Depth(layer, 3)), 30.0).float()
        y, _ = m(draw(1, T, 16).float(), None, None, None, b[layer])
        (g,) = torch.autograd.grad(y.sum(), bounds.weight, retain_graph=True)
        assert torch.isfinite(y).all()
        assert torch.isfinite(g).all()


@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("variant", ["rescaled", "cumulative"])
def test_abc(variant, rope):
    """ "rescaled" as the weighted mean that a slot is, "cumulative" as its published sum."""
    spec = ABC.Spec(heads=3, slots=5, expand_k=0.5, variant=variant, rope_theta=100.0)
    m, x = filled(spec.build(D, rope, EPS)), draw(1, T, D)
    with torch.no_grad():
        m.s.weight *= 3
    keys, values, e, expected = [], [], [], []
    for t, x_t in enumerate(x[0]):
        q, k, v, s, r = parts(m, x_t, "qkvsr", 3)
        if rope:
            q, k = turned(q, t, 100.0), turned(k, t, 100.0)
        keys.append(k)
        values.append(v)
        e.append(s.exp())
        if variant == "rescaled":
            weights = [e_i / sum(e) for e_i in e]
        else:
            weights = [e_i / sum(e[: i + 1]) for i, e_i in enumerate(e)]
        Sk = sum(k_i[:, :, None] * w[:, None, :] for k_i, w in zip(keys, weights, strict=True))
        Sv = sum(w[:, :, None] * v_i[:, None, :] for v_i, w in zip(values, weights, strict=True))
        o = torch.stack([Sv[h].T @ softmax(Sk[h].T @ q[h] / math.sqrt(2)) for h in range(3)])
        expected.append(m.out.weight @ (rms(o, m.norm.weight) * silu(r)).flatten())
    check(m, x, expected, {"k": Sk, "v": Sv, "z": sum(e)[:, None]})


def test_abc_clips_its_logits():
    """Logits of thousands are taken as 32, forward and backward finite, also in fp32."""
    m = filled(ABC.Spec(slots=5).build(16, True, EPS)).float()
    with torch.no_grad():
        m.s.weight *= 1e4
    x = draw(2, 40, 16).float().requires_grad_()
    y, _ = m(x)
    y.square().sum().backward()
    assert torch.isfinite(y).all()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("gate", ["scalar", "fixed", "none"])
@pytest.mark.parametrize("groups", [4, 2])
def test_gla_with_the_gates_of_the_ablation(groups, gate):
    spec = GLA.Spec(heads=4, kv_heads=groups, expand_k=1.0, gate=gate)
    m, x = filled(spec.build(D, True, EPS)), draw(1, T, D)
    S, expected = torch.zeros(groups, 3, 3).double(), []
    for x_t in x[0]:
        (q, r), (k, v) = parts(m, x_t, "qr", 4), parts(m, x_t, "kv", groups)
        a = torch.ones(groups).double()
        if gate == "scalar":
            a = sigmoid(m.gate.weight @ x_t + m.gate.bias) ** (1 / 16)
        elif gate == "fixed":
            a = 1 - 2.0 ** (-5 - torch.arange(groups).double())
        S = a[:, None, None] * S + k[:, :, None] * v[:, None, :]
        o = torch.stack([S[h // (4 // groups)].T @ q[h] / math.sqrt(3) for h in range(4)])
        expected.append(m.out.weight @ (rms(o, m.norm.weight) * silu(r)).flatten())
    check(m, x, expected, {"s": S})


@pytest.mark.parametrize("decay", ["data", "fixed", "none"])
@pytest.mark.parametrize("read", ["softmax", "linear", "swish", "relu", "relu2"])
def test_gsa_with_the_changes_of_the_ablation(read, decay):
    spec = GSA.Spec(heads=4, kv_heads=2, slots=5, decay=decay, read=read)
    m, x = filled(spec.build(D, True, EPS)), draw(1, T, D)
    f = {
        "softmax": softmax,
        "linear": lambda z: z,
        "swish": silu,
        "relu": lambda z: z.clamp_min(0),
        "relu2": lambda z: z.clamp_min(0) ** 2,
    }[read]
    Sk, Sv, expected = torch.zeros(2, 3, 5).double(), torch.zeros(2, 5, 3).double(), []
    for x_t in x[0]:
        (q,), (k, v, z) = parts(m, x_t, "q", 4), parts(m, x_t, ["k", "v", "gate"], 2)
        a = sigmoid(z) ** (1 / 8)
        w = 1 - a
        if decay == "fixed":
            a = torch.tensor([1 - 1 / 32, 1 - 1 / 64]).double()[:, None].expand(2, 5)
        elif decay == "none":
            a = torch.ones(2, 5).double()
        Sk = Sk * a[:, None, :] + silu(k)[:, :, None] * w[:, None, :]
        Sv = Sv * a[:, :, None] + w[:, :, None] * silu(v)[:, None, :]
        o = torch.stack([Sv[h // 2].T @ f(Sk[h // 2].T @ silu(q[h])) for h in range(4)])
        expected.append(m.out.weight @ rms(silu(o.flatten()), m.norm.weight))
    check(m, x, expected, {"k": Sk, "v": Sv})


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        ({"kind": "retnet", "heads": 16}, "heads of an even width, not 1"),
        ({"kind": "abc", "heads": 8}, "heads of an even width, not 1"),
        ({"kind": "transnormer", "heads": 3}, "heads 3 does not divide d_model 16"),
        ({"kind": "hgrn2", "expand_ratio": 3}, "expand_ratio 3 does not divide d_model 16"),
        ({"kind": "linear", "heads": 3}, r"heads 3 does not divide expand_k \* d_model 16"),
    ],
)
def test_specs_that_cannot_be_built(mixer, message):
    with pytest.raises(ValueError, match=f"mixer {mixer['kind']}: .*{message}"):
        LMSpec.model_validate({"d_model": 16, "mixer": mixer})
