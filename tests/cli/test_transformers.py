"""What transformers itself saves is read, and gives its logits; needs transformers."""

import json

import pytest
import torch
from typer.testing import CliRunner

from glactl.cli.main import app
from glactl.convert.command import read_model

transformers = pytest.importorskip("transformers")

SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "vocab_size": 90,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-3,
    "initializer_range": 0.3,
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv", [4, 2])
@pytest.mark.parametrize("window", [None, 9])
def test_logits_are_those_of_transformers_and_an_export_is_read_by_it(
    tmp_path, monkeypatch, window, kv, tied
):
    """To 1e-4 of the largest logit: fp32, two orders of the same sums."""
    fields = SHAPE | {"num_key_value_heads": kv, "tie_word_embeddings": tied}
    if window is None:
        config, kind = transformers.LlamaConfig(**fields), transformers.LlamaForCausalLM
    else:
        config = transformers.MistralConfig(**fields, sliding_window=window)
        kind = transformers.MistralForCausalLM
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for p in model.parameters():  # norms are 1 as they are made
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(tmp_path / "hf")
    tokens = torch.randint(90, (2, 70))
    lm, _ = read_model(tmp_path / "hf", torch.device("cpu"))
    with torch.no_grad():
        wanted = model(tokens).logits
        found = lm.logits(lm(tokens)[0])
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert (lm.head.weight is lm.embed.weight) == tied

    monkeypatch.chdir(tmp_path)
    for command in (["import", "hf", "--out", "a"], ["export", "a", "--out", "back", "--json"]):
        made = CliRunner().invoke(app, command)
        assert made.exit_code == 0, made.stderr
    assert json.loads(made.stdout)["transformers"] < 1e-4 * wanted.abs().max()
