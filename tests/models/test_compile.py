"""Models as one graph: torch.compile without breaks, and CUDA graphs, against the plain run."""

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from glactl.models.lm import LMSpec, build_lm
from glactl.models.losses import token_losses

MODELS = {
    "gla": {"mixer": "gla"},
    "gsa": {"mixer": {"kind": "gsa", "slots": 16, "kv_heads": 2}},
    "hybrid": {"mixer": ["gla", {"kind": "attention", "window": 4}], "short_conv": 3},
    "attention": {"mixer": "attention", "positions": "learned", "max_len": 64},
    "decays": {
        "n_layers": 4,
        "mixer": ["retnet", "transnormer", "linear", {"kind": "gla", "gate": "scalar"}],
    },
    "bounds": {"n_layers": 4, "mixer": ["hgrn2", "abc"]},
    "mamba": {"mixer": "mamba"},
    "fixed decay": {"mixer": {"kind": "gsa", "slots": 16, "decay": "fixed"}},
}
# a gate on the value axis alone has no Triton engine
ON_CPU = MODELS | {"swish": {"mixer": {"kind": "gsa", "slots": 16, "read": "swish"}}}
CUDA = torch.cuda.is_available()
gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()


@pytest.fixture
def engines(monkeypatch):
    """All Triton engines, those included that run only where they are asked for."""
    for operator in ("gla", "gsa", "scan"):  # the package has functions of these names
        module = import_module(f"glactl.kernels.{operator}")
        monkeypatch.setattr(module, "PROVEN", {"gk", "g", None, "gsa", "step", "gsa step", "scan"})


def model(name, **options):
    fields = {"d_model": 64, "n_layers": 2, "vocab_size": 11, "init_std": 0.1} | ON_CPU[name]
    return build_lm(LMSpec.model_validate(fields), 0, **options)


def draw(*shape, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(11, shape, generator=generator).to(device)


def loss_of(lm, hidden, targets):
    """Of every target, so that no target is looked for, and a graph can be captured."""
    return F.cross_entropy(lm.logits(hidden).float().flatten(0, 1), targets.flatten())


def outcome(lm, read, tokens, targets):
    """Hidden states, the loss, and its gradients."""
    hidden, _ = read(tokens)
    loss = loss_of(lm, hidden, targets)
    return [hidden.detach(), loss.detach(), *torch.autograd.grad(loss, list(lm.parameters()))]


def close(ours, truth, rounding):
    for i, (a, b) in enumerate(zip(ours, truth, strict=True)):
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert error <= rounding, f"{i}: {error:.1e}"


@pytest.mark.parametrize("name", ON_CPU)
def test_one_graph_gives_the_same(name):
    """aot_eager traces forward and backward, and runs the same operators: equal to the last bit
    but for the order in which gradients are added up."""
    lm = model(name)
    whole = torch.compile(lm, backend="aot_eager", fullgraph=True)
    tokens, targets = draw(2, 37), draw(2, 37, seed=1)
    rounding = 64 * torch.finfo(torch.float32).eps
    truth = outcome(lm, lm, tokens, targets)
    close(outcome(lm, whole, tokens, targets), truth, rounding)
    with torch.no_grad():
        torch.testing.assert_close(whole(tokens)[0], truth[0])


@pytest.mark.parametrize("name", ["gla", "gsa", "mamba"])
def test_one_graph_reads_and_returns_states(name):
    lm, tokens = model(name), draw(2, 9)
    whole = torch.compile(lm, backend="aot_eager", fullgraph=True)
    _, before = lm(tokens, lm.initial_state(2))
    (a, after), (b, expected) = whole(tokens, before), lm(tokens, before)
    torch.testing.assert_close(a, b)
    assert after.longest == expected.longest == 18
    for x, y in zip(after.layers, expected.layers, strict=True):
        assert all(torch.equal(x[part], y[part]) for part in y)


@pytest.mark.parametrize("name", ["gla", "gsa", "mamba"])
def test_the_triton_engines_are_in_the_graph(name, engines, monkeypatch):
    """Traced with shapes alone, forward and backward, without a GPU."""
    pytest.importorskip("triton")
    for operator in ("gla", "gsa", "scan"):
        module = import_module(f"glactl.kernels.{operator}")
        monkeypatch.setattr(module, "pick_backend", lambda *_: "triton")
    lm, meta = model(name).to("meta"), torch.zeros(2, 130, dtype=torch.int64, device="meta")
    names = []

    def backend(graph, inputs):
        names.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    whole = torch.compile(lm, backend=aot_autograd(fw_compiler=backend), fullgraph=True)
    hidden = whole(meta)[0]
    hidden.sum().backward()
    engine = {"gla": "gla_key", "gsa": "gsa", "mamba": "scan"}[name]
    for direction in ("forward", "backward"):
        found = [n for n in names if n.startswith(f"glactl.{engine}_{direction}")]
        assert len(found) == 2, names


@gpu
@needs_cuda
@pytest.mark.parametrize("name", MODELS)
def test_gpu_one_graph_gives_the_same(name, engines):
    """bf16 rounds each of some ten products a layer: 64 roundings of the largest."""
    lm = model(name, device="cuda", dtype=torch.bfloat16)
    whole = torch.compile(lm, fullgraph=True)
    tokens, targets = draw(2, 37, device="cuda"), draw(2, 37, seed=1, device="cuda")
    truth = outcome(lm, lm, tokens, targets)
    close(outcome(lm, whole, tokens, targets), truth, 64 * torch.finfo(torch.bfloat16).eps)


def captured(call):
    """A CUDA graph of `call` and what it returns; warmed up first, as torch's notes ask for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


@gpu
@needs_cuda
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_gpu_forward_in_a_cuda_graph(name, packed, engines):
    """A question to the device is an error while a graph is captured."""
    lm = model(name, device="cuda", dtype=torch.bfloat16).eval()
    tokens = draw(1, 60, device="cuda")
    bounds = torch.tensor([0, 7, 7, 60], device="cuda", dtype=torch.int32) if packed else None
    with torch.no_grad():
        graph, hidden = captured(lambda: lm(tokens, cu_seqlens=bounds)[0])
        tokens.copy_(draw(1, 60, seed=5))
        if bounds is not None:
            bounds.copy_(torch.tensor([0, 20, 50, 60]))
        graph.replay()
        expected, _ = lm(tokens, cu_seqlens=bounds)
    torch.testing.assert_close(hidden, expected)


@gpu
@needs_cuda
@pytest.mark.parametrize("name", MODELS)
def test_gpu_training_in_a_cuda_graph(name, engines):
    lm = model(name, device="cuda", dtype=torch.bfloat16)
    tokens, targets = draw(2, 37, device="cuda"), draw(2, 37, seed=1, device="cuda")
    graph, out = captured(lambda: outcome(lm, lm, tokens, targets))
    tokens.copy_(draw(2, 37, seed=5))
    targets.copy_(draw(2, 37, seed=6))
    graph.replay()
    # sums of gradients over rows may be taken in another order
    close(out, outcome(lm, lm, tokens, targets), 2 * torch.finfo(torch.bfloat16).eps)


@gpu
@needs_cuda
@pytest.mark.parametrize("name", MODELS)
def test_gpu_steps_in_a_cuda_graph(name, engines):
    lm = model(name, device="cuda", dtype=torch.bfloat16).eval()
    prompt, new = draw(2, 9, device="cuda"), draw(20, 2, seed=1, device="cuda")
    with torch.no_grad():
        state = lm(prompt, lm.initial_state(2, capacity=40))[1]
        expected_state = lm(prompt, lm.initial_state(2, capacity=40))[1]
        kept = [{n: x.clone() for n, x in layer.items()} for layer in state.layers]
        token, position = new[0].clone(), state.position.clone()
        graph, hidden = captured(lambda: lm.step(token, state))
        state.position.copy_(position)  # as it was before the steps that warmed up
        for layer, before in zip(state.layers, kept, strict=True):
            for part in layer:
                layer[part].copy_(before[part])
        for row in new:
            token.copy_(row)
            graph.replay()
            torch.testing.assert_close(hidden, lm.step(row, expected_state))
    assert torch.equal(state.position, expected_state.position)


@gpu
@needs_cuda
@pytest.mark.parametrize("name", MODELS)
def test_gpu_nothing_waits(name, engines):
    """torch raises at every call that waits for the device."""
    lm = model(name, device="cuda", dtype=torch.bfloat16)
    tokens, targets = draw(1, 60, device="cuda"), draw(1, 60, seed=1)
    targets[0, :9] = -100
    for bounds in (None, torch.tensor([0, 7, 7, 60])):
        N = 1 if bounds is None else 3
        state = lm.initial_state(N)
        new = tokens[0, :N].clone()

        def work(bounds=bounds, state=state, new=new):
            hidden, _ = lm(tokens, cu_seqlens=bounds)
            token_losses(lm, hidden, targets).mean().backward()
            with torch.no_grad():
                _, after = lm(tokens[:, :40], state, None if bounds is None else bounds * 2 // 3)
                for _ in range(3):
                    lm.step(new, after)

        work()  # compiles the kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
