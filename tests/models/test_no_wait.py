"""On a GPU nothing waits for the device: the code runs on tensors that have no values.

Tensors on the device "meta" have shapes and types alone, and every question for a value (item,
tolist, nonzero, a boolean index, a copy to the CPU) is an error there. Everything that is not the
CPU's takes the paths of a GPU; the Triton engines stand in with the shapes of their results.
"""

from importlib import import_module
from itertools import pairwise

import pytest
import torch

from glactl.models import varlen as packed_attention
from glactl.models.decode import prefill
from glactl.models.layers import layout
from glactl.models.lm import LMSpec, build_lm
from glactl.models.losses import token_losses
from glactl.models.mixers.attention import Attention
from glactl.models.sampling import Sampler, Sampling
from glactl.models.steps import Stepper

META = torch.device("meta")
MODELS = {
    "gla": {"mixer": "gla"},
    "gsa": {"mixer": {"kind": "gsa", "slots": 16, "kv_heads": 2}},
    "attention": {"mixer": {"kind": "attention", "kv_heads": 2}},
    "window": {"mixer": {"kind": "attention", "window": 4}},
    "short_conv": {"mixer": ["gla", "attention"], "short_conv": 3},
    "decays": {
        "n_layers": 4,
        "mixer": ["retnet", "transnormer", "linear", {"kind": "gla", "gate": "scalar"}],
    },
    "bounds": {"n_layers": 4, "mixer": ["hgrn2", "abc"]},
    "mamba": {"mixer": "mamba"},
    "fixed decay": {"mixer": {"kind": "gsa", "slots": 16, "decay": "fixed"}},
    "learned": {"mixer": "attention", "positions": "learned", "max_len": 64, "norm": "layernorm"},
}
EPS = torch.finfo(torch.float64).eps


@pytest.fixture
def engines(monkeypatch):
    """The Triton engines' operators, whose fake implementations give shapes without a launch."""
    pytest.importorskip("triton")
    from glactl.kernels import triton_gla_op, triton_gsa_op, triton_scalar_op, triton_scan_op

    for module in (triton_gla_op, triton_gsa_op, triton_scalar_op, triton_scan_op):
        monkeypatch.setattr(module, "_run_forward", module._forward)
        monkeypatch.setattr(module, "_run_backward", module._backward)
    for name in ("gla", "gsa", "scan"):  # the package has functions of these names
        module = import_module(f"glactl.kernels.{name}")
        monkeypatch.setattr(module, "pick_backend", lambda *_: "triton")
        monkeypatch.setattr(module, "PROVEN", {"gk", "g", None, "gsa", "scan"})
    enabled = torch.is_autocast_enabled  # of a device that autocast knows
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind != "meta" and enabled(kind))


@pytest.fixture(params=MODELS)
def lm(request, engines):
    return model(MODELS[request.param], torch.bfloat16)


def model(fields, dtype):
    spec = LMSpec.model_validate({"d_model": 64, "n_layers": 2, "vocab_size": 11} | fields)
    return build_lm(spec, 0, dtype=dtype).to(META)


def tokens(*shape, device=META):
    return torch.zeros(shape, dtype=torch.int64, device=device)


def test_values_are_an_error_on_meta():
    x = torch.zeros(3, device=META)
    for ask in (x.sum().item, x.tolist, x.nonzero, x.cpu, lambda: x[x > 0], lambda: bool(x[0])):
        with pytest.raises((RuntimeError, NotImplementedError)):
            ask()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("packed", [None, "cpu", "meta"])
@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_training(fields, packed, dtype, engines):
    lm = model(fields, dtype)
    if fields is MODELS["window"] and packed and dtype == torch.float32:
        pytest.skip("no kernel takes a window in fp32: sequences go by groups of like lengths")
    shape = (2, 9) if packed is None else (1, 18)
    bounds = packed and torch.tensor([0, 7, 7, 18], dtype=torch.int32).to(packed)
    hidden, _ = lm(tokens(*shape), cu_seqlens=bounds)
    targets = tokens(*shape, device="cpu")
    token_losses(lm, hidden, targets).mean().backward()
    assert all(p.grad.shape == p.shape for p in lm.parameters())
    targets[0, :5] = -100
    losses, correct = token_losses(lm, hidden.detach(), targets, correct=True)
    assert losses.shape == correct.shape == (13,)
    assert losses.device == META


@pytest.mark.parametrize("capacity", [0, 40])
def test_states(lm, capacity):
    state = lm.initial_state(2, capacity=capacity)
    with torch.no_grad():
        hidden, state = lm(tokens(2, 9), state)
        assert state.longest == 9
        bounds = torch.tensor([0, 3, 8])
        _, state = lm(tokens(1, 8), state, bounds)
        assert state.longest == 14
        for _ in range(3):
            hidden = lm.step(tokens(2), state)
    assert hidden.shape == (2, 64)
    assert state.longest == 17
    for mixer, layer in zip(lm.spec.mixers, state.layers, strict=True):
        if mixer.kind == "attention":
            assert layer["k"].shape[1] == (mixer.window or max(capacity, 14 + 64 * (not capacity)))


def test_decoding(lm):
    with torch.inference_mode():
        hidden, state = prefill(lm, [[1, 2, 3], [4], [5, 6]], piece=4)
        assert state.longest == 3
        sampling = Sampling(0.8, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.2)
        sampler = Sampler(sampling, [0, 1, 2]).start(META, 11)
        new = sampler.draw(lm.logits(hidden), sampler.uniform(state.position))
        stepper = Stepper(lm, new, state, sampler, room=9).keep([0, 2])
        stepper.rest([1])
        stepper._once()
    assert stepper.state.position.shape == (2,)


def test_bounds_on_the_device_stand_for_the_longest_sequence(engines):
    lm = model(MODELS["attention"], torch.bfloat16)
    bounds = torch.tensor([0, 3, 8], device=META)
    assert lm(tokens(1, 8), lm.initial_state(2), bounds)[1].longest == 8


def test_targets_on_the_device_are_waited_for(lm):
    with pytest.raises((RuntimeError, NotImplementedError)):
        token_losses(lm, torch.zeros(1, 3, 64, device=META), tokens(1, 3))


def test_learned_positions_that_must_be_too_many(engines):
    lm = model(MODELS["learned"], torch.bfloat16)
    with pytest.raises(ValueError, match="position 65 is beyond the model's max_len 64"):
        lm(tokens(1, 65))
    lm(tokens(1, 65), cu_seqlens=torch.tensor([0, 30, 65], device=META))


def by_definition(q, k, v, bounds, rows, most, longest, window):
    """The fused kernels of packed attention: equation (2) of models/varlen.py."""
    assert bounds.dtype == rows.dtype == torch.int32
    o, shared = [], q.shape[1] // k.shape[1]
    for (a, b), (c, d) in zip(pairwise(bounds.tolist()), pairwise(rows.tolist()), strict=True):
        assert b - a <= most
        assert d - c <= longest
        i = torch.arange(b - a)[:, None] + (d - c) - (b - a)
        j = torch.arange(d - c)
        seen = (j <= i) & (j > i - (window or len(j) + 1))
        keys, values = (x[c:d].repeat_interleave(shared, 1) for x in (k, v))
        z = torch.einsum("ihd,jhd->hij", q[a:b], keys) * q.shape[2] ** -0.5
        p = z.masked_fill(~seen, -torch.inf).softmax(-1)
        o.append(torch.einsum("hij,jhd->ihd", p, values))
    return torch.cat(o)


@pytest.mark.parametrize("longest", [None, 40])
@pytest.mark.parametrize("window", [None, 3, 50])
@pytest.mark.parametrize("past", [None, [6, 0, 3, 1]], ids=str)
def test_packed_attention_of_a_gpu_is_that_of_the_cpu(monkeypatch, past, window, longest):
    layer = Attention.Spec(heads=4, kv_heads=2, window=window).build(16, True, 1e-6).double()
    torch.manual_seed(0)
    state = None
    if past is not None:
        before = torch.tensor([0, *past]).cumsum(0)
        x = torch.randn(1, sum(past), 16, dtype=torch.float64)
        _, state = layer(x, layer.initial_state(4, torch.device("cpu"), 2), before)
    x = torch.randn(1, 13, 16, dtype=torch.float64)
    bounds = torch.tensor([0, 5, 6, 6, 13])
    expected, after = layer(x, state, bounds)
    monkeypatch.setattr(packed_attention, "_kernel", by_definition)
    seen = []

    def on_gpu(self, q, k, v, state, at, most):
        seen.append(most)
        past = self._past(state, None, most)
        return packed_attention.varlen(q, k, v, past, at, most, self.window)

    monkeypatch.setattr(Attention, "_grouped", on_gpu)
    y, state = layer(x, state, bounds, longest)
    torch.testing.assert_close(y, expected, rtol=1e3 * EPS, atol=1e3 * EPS)
    assert seen == [longest or (7 if past is None else 11)]
    if past is not None:
        rows = after["k"].shape[1]
        assert torch.equal(state["k"][:, :rows], after["k"])
        assert torch.equal(state["length"], after["length"])


def test_no_tokens():
    at = layout(1, 0, torch.tensor([0, 0]), torch.device("cpu"))
    q = torch.zeros(0, 2, 8)
    assert packed_attention.varlen(q, q, q, None, at, 0, None).shape == (0, 2, 8)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("past", [None, [60, 0, 300, 1]], ids=str)
def test_gpu_packed_attention(past, window, dtype):
    """Against the same weights in fp64, with gradients; 64 roundings: sums of 64 and a softmax."""
    layers, results = [], []
    for kind in (dtype, torch.float64):
        torch.manual_seed(0)
        layer = Attention.Spec(heads=4, kv_heads=2, window=window).build(64, True, 1e-6)
        layers.append(layer.to("cuda", dtype).to(kind))
    for layer in layers:
        kind = layer.q.weight.dtype
        torch.manual_seed(1)
        state = None
        if past is not None:
            x = torch.randn(1, sum(past), 64).to(dtype).to("cuda", kind)
            before = torch.tensor([0, *past], device="cuda").cumsum(0)
            with torch.no_grad():
                _, state = layer(x, layer.initial_state(4, x.device), before, 361)
        x = torch.randn(1, 400, 64).to(dtype).to("cuda", kind).requires_grad_()
        bounds = torch.tensor([0, 5, 6, 6, 400], dtype=torch.int32, device="cuda")
        if packed_attention.fits(x, window):
            torch.cuda.set_sync_debug_mode("error")
        try:
            y, _ = layer(x, state, bounds, 800)
            y.square().sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append([y, x.grad, layer.q.weight.grad, layer.v.weight.grad])
    for ours, truth in zip(*results, strict=True):
        error = (ours.double() - truth).norm() / truth.norm()
        assert error < 64 * torch.finfo(dtype).eps
