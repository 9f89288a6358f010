"""Softmax attention token by token: joined, without room, and in a model whose steps are joined."""

import pytest
import torch

from glactl.models.joined import Joined
from glactl.models.lm import LMSpec, build_lm
from glactl.models.steps import reserve

VOCAB = 23
KINDS = {
    "attention": {},
    "shared keys": {"heads": 4, "kv_heads": 2},
    "window": {"window": 3},
    "one wide head": {"heads": 1},
}


def model(kind: str, **more):
    spec = {"d_model": 16, "n_layers": 2, "vocab_size": VOCAB, "init_std": 0.3}
    spec |= {"mixer": {"kind": "attention", "heads": 2} | KINDS[kind]} | more
    return build_lm(LMSpec.model_validate(spec), 0, dtype=torch.float64).eval()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("positions", ["rope", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_joined_steps_are_the_steps_and_the_forward_pass(kind, positions, rows, monkeypatch):
    """fp64; sums of 16 terms in another order, in a state with room to spare."""
    lm = model(kind, positions=positions)
    text = torch.randint(VOCAB, (rows, 9), generator=torch.Generator().manual_seed(rows))
    with torch.no_grad():
        whole = lm(text)[0]
    plain, ours, joined = lm.initial_state(rows), lm.initial_state(rows, capacity=13), Joined(lm)
    for t, token in enumerate(text.T):
        expected = lm.step(token, plain)
        with joined, monkeypatch.context() as patch:
            for block in lm.blocks:
                for layer in block.mixer.together():
                    patch.setattr(layer, "forward", None, raising=False)  # is not called
            hidden = lm.step(token, ours)
        for other in (expected, whole[:, t]):
            torch.testing.assert_close(hidden, other, rtol=1e-12, atol=1e-12)
    for a, b in zip(ours.layers, plain.layers, strict=True):
        L = min(a["k"].shape[1], b["k"].shape[1], 9)
        for name in ("k", "v"):
            torch.testing.assert_close(a[name][:, :L], b[name][:, :L], rtol=1e-12, atol=1e-12)
        assert torch.equal(a["length"], b["length"])


def test_a_joined_step_without_room_grows_its_state():
    lm, token = model("attention"), torch.tensor([3, 5])
    plain, ours, joined = lm.initial_state(2), lm.initial_state(2), Joined(lm)
    reserve(lm, ours, 2)
    for step in range(5):
        assert ours.layers[0]["k"].shape[1] == (2 if step < 3 else 66)
        expected = lm.step(token, plain)
        with joined:
            hidden = lm.step(token, ours)
        torch.testing.assert_close(hidden, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["attention", "window"])
def test_a_step_has_no_gradients(kind):
    lm = model(kind)
    layer, state = lm.blocks[0].mixer, lm.initial_state(2).layers[0]
    y = layer.step(torch.zeros(2, 16, dtype=torch.float64, requires_grad=True), state)
    assert not state["k"].requires_grad
    assert not state["v"].requires_grad
    assert y.shape == (2, 16)
