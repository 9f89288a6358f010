"""The loss in chunks, and layers that are compiled or computed again."""

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._inductor import compile_fx

from glactl.measure import saved_bytes
from glactl.models.lm import LMSpec, build_lm
from glactl.spec import RunSpec
from glactl.train.layers import quicken
from glactl.train.loop import train
from glactl.train.loss import LARGEST, Objective, _compiled_slope, chunked_loss

N, D, V = 23, 8, 50
MODEL = {"d_model": 16, "n_layers": 4, "mixer": {"kind": "gla", "heads": 2}, "vocab_size": V}


def inputs(dtype):
    torch.manual_seed(0)
    hidden = torch.randn(N, D).to(dtype).requires_grad_()
    weight = torch.randn(V, D).to(dtype).requires_grad_()
    targets = torch.randint(V, (N,))
    targets[::3] = -100
    targets[1] = -7  # any number below 0 asks for nothing
    return hidden, weight, targets


def plainly(hidden, weight, targets):
    wanted = targets.masked_fill(targets < 0, -100)
    return F.cross_entropy(hidden @ weight.t(), wanted, reduction="sum")


@pytest.mark.parametrize("largest", [1, 7 * V, 10**6])
def test_chunks_change_no_number(largest):
    """In fp64 against the loss in one piece; n D V sums, in another order."""
    found, wanted = inputs(torch.float64), inputs(torch.float64)
    a = chunked_loss(*found, largest=largest)
    b = plainly(*wanted)
    (3 * a).backward()
    (3 * b).backward()
    eps = N * torch.finfo(torch.float64).eps
    torch.testing.assert_close(a, b, rtol=eps, atol=0)
    for x, y in zip(found[:2], wanted[:2], strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=10 * eps * y.grad.abs().max())


def test_chunks_agree_with_finite_differences():
    hidden, weight, targets = inputs(torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: chunked_loss(h, w, targets), (hidden, weight))


def test_under_autocast_products_are_bf16_and_sums_are_fp32():
    hidden, weight, targets = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_loss(hidden, weight, targets, largest=7 * V)
    loss.backward()
    assert loss.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
    truth = plainly(*inputs(torch.float64))
    assert loss.item() == pytest.approx(truth.item(), rel=4 * 2**-8)
    assert loss.item() != pytest.approx(truth.item(), rel=1e-6)


def test_nothing_asked_is_no_loss():
    hidden, weight, targets = inputs(torch.float32)
    loss = chunked_loss(hidden, weight, torch.full_like(targets, -100))
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad.abs().max() == weight.grad.abs().max() == 0


def test_the_whole_logits_are_never_kept():
    """What is kept for the backward pass is as large as hidden states and weight, not as logits."""
    hidden, weight = torch.randn(512, D, requires_grad=True), torch.randn(1000, D)
    weight.requires_grad_()
    targets = torch.randint(1000, (512,))
    kept = saved_bytes(lambda: chunked_loss(hidden, weight, targets, largest=2**16))
    assert kept == 4 * (512 * D + 1000 * D)


@pytest.mark.parametrize("kind", ["whole", "chunked", "auto"])
def test_targets_on_the_cpu_or_where_the_model_is(kind):
    """Both ways of asking, that of plain steps and that of captured ones, are one loss."""
    lm = build_lm(LMSpec.model_validate(MODEL), 0)
    objective = Objective(lm, kind)
    tokens, targets = torch.randint(V, (2, 12)), torch.randint(V, (2, 12))
    targets[:, ::2] = -100
    selected = objective(tokens, targets)
    hidden = lm(tokens)[0].flatten(0, 1)
    masked = objective.total(hidden, targets.flatten())
    assert selected.item() == pytest.approx(masked.item(), rel=24 * torch.finfo(torch.float32).eps)
    losses, right = objective(tokens, targets, None, True)
    assert len(losses) == len(right) == 12
    assert losses.sum().item() == pytest.approx(selected.item(), rel=1e-6)


def test_auto_takes_chunks_where_there_are_many_logits(monkeypatch):
    asked = []

    def noted(*args):
        asked.append(args)
        return chunked_loss(*args)

    monkeypatch.setattr("glactl.train.loss.chunked_loss", noted)
    lm = build_lm(LMSpec.model_validate(MODEL), 0)
    tokens = torch.randint(V, (2, 12))
    Objective(lm)(tokens, tokens)
    assert not asked
    monkeypatch.setattr("glactl.train.loss.LARGEST", 24 * V - 1)
    Objective(lm)(tokens, tokens)
    assert len(asked) == 1
    assert LARGEST * 4 == 2**28  # 256 MiB in fp32


def gradients(lm, tokens):
    lm.zero_grad()
    loss = Objective(lm)(tokens, tokens)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in lm.named_parameters()}


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_recomputed_layers_keep_less_and_change_no_bit(dropout):
    lm = build_lm(LMSpec.model_validate(MODEL | {"dropout": dropout}), 0)
    tokens, weights = torch.randint(V, (2, 32)), list(lm.parameters())
    torch.manual_seed(1)
    loss, wanted = gradients(lm, tokens)
    before = saved_bytes(lambda: Objective(lm)(tokens, tokens), weights)
    quicken(lm, compiled=False, recompute=True)
    torch.manual_seed(1)
    again, found = gradients(lm, tokens)
    after = saved_bytes(lambda: Objective(lm)(tokens, tokens), weights)
    assert again == loss
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert set(lm.state_dict()) == set(build_lm(lm.spec, 0).state_dict())
    assert after < before / 4  # of four layers, whose insides are gone


def test_compiled_layers_share_their_code_and_are_those_of_training(monkeypatch):
    """With a compiler that gives the traced graph back as it is."""
    graphs, compiler = [], torch.compile

    def backend(graph, examples, options):
        graphs.append(graph)
        return graph.forward

    def compiled(function, **options):
        return compiler(function, backend=backend, **options)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", compiled)
    lm = build_lm(LMSpec.model_validate(MODEL), 0)
    tokens = torch.randint(V, (2, 32))
    _, wanted = gradients(lm, tokens)
    quicken(lm, compiled=True, recompute=False)
    _, found = gradients(lm, tokens)
    assert len(graphs) == 1  # for four layers
    eps = 64 * torch.finfo(torch.float32).eps
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=0, atol=eps * grad.abs().max())
    lm.eval()
    lm(tokens[:1])
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_compiled_sums_do_not_depend_on_a_timing(monkeypatch):
    """The compiler has been told so whenever it makes code: forward, backward, and of the loss."""
    made = []

    def inner(graph, *_, **options):
        made.append((options.get("is_backward", False), torch._inductor.config.deterministic))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    monkeypatch.setattr(compile_fx, "_compile_fx_inner", inner)
    monkeypatch.setattr(torch._functorch.config, "enable_autograd_cache", False)
    lm = build_lm(LMSpec.model_validate(MODEL), 0)
    quicken(lm, compiled=True, recompute=False)
    tokens = torch.randint(V, (2, 32))
    Objective(lm, "chunked", True)(tokens, tokens).backward()
    assert made == [(False, True), (False, True), (True, True)]
    assert not torch._inductor.config.deterministic  # of others' code
    _compiled_slope.cache_clear()
    torch._dynamo.reset()


def test_a_run_takes_these_options(tiny_data, make_toy):
    """The same run with chunks and recomputed layers, to rounding."""
    first = []
    for options in ({}, {"loss": "chunked"}, {"recompute": True}, {"loss": "whole"}):
        tiny_data["train"] |= {"loss": "auto", "recompute": False} | options
        spec = RunSpec.model_validate(tiny_data)
        steps = list(train(spec, device="cpu", task=make_toy()))
        first.append([steps[0].loss, steps[0].grad_norm, steps[-1].loss])
    assert first[2] == first[3] == first[0]
    assert first[1] == pytest.approx(first[0], rel=1e-4)
