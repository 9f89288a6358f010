"""Products of one input as one product: steps and prompts, and how long what is joined is kept."""

import pytest
import torch

from glactl.models import decode as decoding
from glactl.models.decode import prefill
from glactl.models.joined import Joined, joined, whole
from glactl.models.lm import LMSpec, build_lm

VOCAB = 23
SPEC = {"d_model": 16, "n_layers": 2, "mixer": "gsa", "vocab_size": VOCAB, "init_std": 0.6}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "mixer",
    [
        "gla",
        "gsa",
        {"kind": "gla", "gate": "scalar"},
        {"kind": "gla", "heads": 4, "kv_heads": 2, "feature_map": "swish"},
        {"kind": "gsa", "heads": 4, "kv_heads": 2, "slots": 3},
    ],
    ids=str,
)
def test_joined_products_are_the_products(mixer, rows, monkeypatch):
    """fp64; sums of 16 or 32 terms in another order."""
    spec = LMSpec.model_validate(
        {"d_model": 16, "n_layers": 2, "mixer": mixer, "vocab_size": VOCAB, "init_std": 0.3}
    )
    lm, token = build_lm(spec, 0, dtype=torch.float64).eval(), torch.arange(rows) + 3
    plain, ours = lm.initial_state(rows), lm.initial_state(rows)
    names = {name for name, _ in lm.named_parameters()}
    joined = Joined(lm)
    for _ in range(5):
        expected = lm.step(token, plain)
        with joined, monkeypatch.context() as patch:
            for block in lm.blocks:
                for part in (block.mixer, block.ffn):
                    for layer in part.together():
                        patch.setattr(layer, "forward", None, raising=False)  # is not called
            hidden = lm.step(token, ours)
        torch.testing.assert_close(hidden, expected, rtol=1e-12, atol=1e-12)
    assert {name for name, _ in lm.named_parameters()} == names
    gate, up = lm.blocks[0].ffn.gate.weight, lm.blocks[0].ffn.up.weight
    Joined(lm)  # takes the slices as they are
    assert (gate.data_ptr(), up.data_ptr() - gate.data_ptr()) == (
        lm.blocks[0].ffn.gate.weight.data_ptr(),
        gate.nbytes,
    )
    assert not any(hasattr(module, "joined") for module in lm.modules())


def test_what_is_joined_is_kept_until_the_weights_move():
    lm = build_lm(LMSpec.model_validate(SPEC), 0).eval()
    kept = joined(lm)
    assert joined(lm) is kept
    lm.double()
    again = joined(lm)
    assert again is not kept
    with again:
        assert whole(lm.blocks[1].ffn.gate).dtype == torch.float64
    up = lm.blocks[0].ffn.up
    up.weight = torch.nn.Parameter(2 * up.weight.detach())  # one of several
    with joined(lm):
        assert torch.equal(whole(lm.blocks[0].ffn.gate)[-len(up.weight) :], up.weight)


@pytest.mark.parametrize("mixer", ["attention", "gla"])
def test_prompts_are_read_with_joined_products(mixer, monkeypatch):
    lm = build_lm(LMSpec.model_validate(SPEC | {"mixer": mixer}), 0, dtype=torch.float64).eval()
    prompts = [[3, 4, 5], [6], [7] * 9]
    expected, _ = prefill(lm, prompts)
    monkeypatch.setattr(decoding, "captures", lambda device: True)
    found, _ = prefill(lm, prompts)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert not any(hasattr(module, "joined") for module in lm.modules())
