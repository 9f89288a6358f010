"""Autocast rounds products and nothing else: gates, states, norms and the residual stay wide."""

import sys

import pytest
import torch

from glactl.kernels import gla, gla_step, gsa, gsa_step
from glactl.models.layers import log_gate, rms_norm
from glactl.models.lm import LMSpec, build_lm
from glactl.models.losses import token_losses

MODELS = {
    "gla": {"mixer": "gla"},
    "gsa": {"mixer": {"kind": "gsa", "slots": 16}},
    "attention": {"mixer": "attention"},
    "window": {"mixer": {"kind": "attention", "window": 4}},
    "short_conv": {"mixer": ["gla", "attention"], "short_conv": 3},
    "decays": {
        "n_layers": 4,
        "mixer": ["retnet", "transnormer", "linear", {"kind": "gla", "gate": "scalar"}],
    },
    "bounds": {"n_layers": 4, "mixer": ["hgrn2", "abc"]},
    "mamba": {"mixer": "mamba"},
    "changes": {
        "mixer": [
            {"kind": "gsa", "slots": 16, "decay": "fixed"},
            {"kind": "gsa", "slots": 16, "read": "swish"},
        ]
    },
}
BF16 = torch.finfo(torch.bfloat16).eps


def bf16():
    return torch.autocast("cpu", torch.bfloat16)


def draw(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def model(name):
    fields = {"d_model": 32, "n_layers": 2, "vocab_size": 11, "init_std": 0.2} | MODELS[name]
    return build_lm(LMSpec.model_validate(fields), 0).eval()


def tokens(*shape, seed=0):
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(seed))


def both(call):
    """What a call returns without autocast and within."""
    plain = call()
    with bf16():
        return plain, call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gates_and_norms_do_not_change(dtype):
    x, z, w = draw(5, 16, dtype=dtype), draw(5, 16, seed=1, dtype=dtype), draw(16, seed=2)
    plain, within = both(lambda: log_gate(x, 16.0))
    assert plain.dtype == within.dtype == torch.float32
    assert torch.equal(plain, within)
    for gate, swish in ((None, False), (z, False), (None, True)):
        plain, within = both(lambda gate=gate, swish=swish: rms_norm(x, w, 1e-6, gate, swish))
        assert plain.dtype == within.dtype == dtype
        assert torch.equal(plain, within)


def test_norms_are_rounded_once():
    x, z, w = (
        draw(*s, seed=i, dtype=torch.bfloat16) for i, s in enumerate([(9, 64)] * 2 + [(64,)])
    )
    for gate, swish in ((None, False), (z, False), (None, True)):
        wide = None if gate is None else gate.double()
        truth = rms_norm(x.double(), w.double(), 1e-6, wide, swish)
        error = rms_norm(x, w, 1e-6, gate, swish).double() - truth
        assert (error.abs() <= 0.501 * BF16 * truth.abs()).all()  # half a place, and fp32's errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operators_do_not_change(dtype):
    """o in v's type, states and their sums in fp32, forward, backward and stepwise."""
    q, k, v = (draw(1, 40, 2, 8, seed=i, dtype=dtype).requires_grad_() for i in range(3))
    g = -draw(1, 40, 2, 8, seed=3).abs() / 8
    one = [x[:, 0].detach() for x in (q, k, v, g)]

    def linear():
        o, S = gla(q, k, v, gk=g, output_final_state=True)
        state = S.detach().clone()
        y = gla_step(*one[:3], state, gk=one[3])
        return [o, S, y, state, *torch.autograd.grad(o.float().square().sum(), (q, k, v))]

    def slots():
        o, (Sk, Sv) = gsa(q, k, v, None, g, output_final_state=True)
        states = Sk.detach().clone(), Sv.detach().clone()
        y = gsa_step(*one[:3], None, one[3], states)
        grads = torch.autograd.grad(o.float().square().sum(), (q, k, v))
        return [o, Sk, y, states[0], Sv, states[1], *grads]

    for call in (linear, slots):
        plain, within = both(call)
        assert plain[0].dtype == plain[2].dtype == dtype
        assert plain[1].dtype == plain[3].dtype == torch.float32
        for a, b in zip(plain, within, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["gla", "gsa"])
def test_layers_hand_wide_gates_and_narrow_products_to_the_operator(name, monkeypatch):
    module = sys.modules[f"glactl.models.mixers.{'base' if name == 'gla' else name}"]
    seen, operator = [], getattr(module, name)

    def spy(q, k, v, g, *rest, **more):
        o, last = operator(q, k, v, g, *rest, **more)
        seen.append([x.dtype for x in (q, k, v, g, o)])
        return o, last

    monkeypatch.setattr(module, name, spy)
    lm = model(name)
    with bf16():
        hidden, state = lm(tokens(2, 9), lm.initial_state(2))
    narrow = torch.bfloat16
    assert seen == [[narrow, narrow, narrow, torch.float32, narrow]] * 2
    assert hidden.dtype == torch.float32  # the residual
    assert {x.dtype for layer in state.layers for x in layer.values()} == {torch.float32}


@pytest.mark.parametrize("name", MODELS)
def test_models_under_autocast(name):
    """Forward, in pieces, packed and stepwise, near fp32 by bf16's rounding of some 20 products."""
    lm, text = model(name), tokens(2, 13)
    with torch.no_grad():
        plain, _ = lm(text)
        with bf16():
            hidden, _ = lm(text)
            first, state = lm(text[:, :6], lm.initial_state(2))
            second, state = lm(text[:, 6:10], state)
            steps = [lm.step(text[:, t], state) for t in range(10, 13)]
            row, bounds = text.view(1, -1), torch.tensor([0, 13, 26])
            packed, _ = lm(row, lm.initial_state(2), bounds)
    pieces = torch.cat([first, second, torch.stack(steps, 1)], 1)
    for other in (hidden, pieces, packed.view_as(plain)):
        assert other.dtype == torch.float32
        assert (other - plain).norm() < 20 * BF16 * plain.norm()


@pytest.mark.parametrize("name", MODELS)
def test_training_under_autocast(name):
    lm = model(name).train()
    with bf16():
        hidden, _ = lm(tokens(2, 13))
        losses = token_losses(lm, hidden, tokens(2, 13, seed=1))
    assert losses.dtype == torch.float32
    losses.mean().backward()
    for parameter in lm.parameters():
        assert parameter.grad.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all()
