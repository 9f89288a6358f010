"""`glactl eval hf:PATH`: a model of transformers through the same protocols; needs transformers."""

import json

import pytest
import torch
from typer.testing import CliRunner

from glactl.cli.main import app
from glactl.tasks.engine_hf import HFEngine, own_tokenizer, takes_padding

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "vocab_size": 258,
    "initializer_range": 0.3,
    "bos_token_id": 256,
    "eos_token_id": 257,
}


def tokenizer():
    """The 256 bytes, <s> and </s>."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE({c: i for i, c in enumerate([*alphabet, "<s>", "</s>"])}, [])
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>"
    )


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SHAPE, intermediate_size=48, num_attention_heads=4, max_position_embeddings=1024
    )
    return transformers.LlamaForCausalLM(config).eval()


def mamba():
    torch.manual_seed(0)
    return transformers.MambaForCausalLM(transformers.MambaConfig(**SHAPE, state_size=4)).eval()


@pytest.fixture
def folder(tmp_path):
    llama().save_pretrained(tmp_path / "models" / "llama")
    tokenizer().save_pretrained(tmp_path / "models" / "llama")
    return tmp_path / "models" / "llama"


def test_a_model_and_its_import_give_the_same_numbers(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = CliRunner().invoke(app, ["import", str(folder), "--out", "runs/llama"])
    assert made.exit_code == 0, made.output
    args = ["eval", "runs/llama", f"hf:{folder}", "--tasks", "swde,arc_easy,lambada,positions"]
    args += ["--sample", "--context-length", "700", "--max-length", "1024"]
    done = CliRunner().invoke(app, [*args, "--json", "--quiet"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    ours, theirs = result["models"]
    assert theirs["name"] == "models-llama"
    assert theirs["parameters"] == ours["parameters"]
    assert ours["truncated"] == theirs["truncated"]
    for task, one in ours["tasks"].items():
        for name, metric in one["metrics"].items():
            other = theirs["tasks"][task]["metrics"][name]
            assert other["value"] == pytest.approx(metric["value"], rel=1e-4)
    folder = tmp_path / result["path"]
    for line in (folder / "swde.samples.jsonl").read_text().splitlines():
        one, two = json.loads(line)["models"]
        assert one["output"] == two["output"]


def test_a_folder_without_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    done = CliRunner().invoke(app, ["eval", "hf:empty", "--sample"])
    assert done.exit_code == 2
    assert done.stderr.startswith("error: hf:empty is not a model of transformers: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("make", [llama, mamba])
def test_the_batch_does_not_matter(make):
    from glactl.tasks.requests import Requests

    model = make()
    asked = [("a" * n, {"until": ["b"], "max_gen_toks": 5 + n}) for n in (3, 9, 3, 20)]
    pairs = [("one" * n, " two") for n in (1, 4, 2)]

    assert HFEngine(llama(), own_tokenizer(tokenizer())).max_length == 1024

    def answers(batch_tokens):
        engine = HFEngine(model, own_tokenizer(tokenizer()), batch_tokens)
        requests = Requests(engine)
        return requests.generate(asked), [n for n, _ in requests.loglikelihood(pairs)]

    (one, nats), (many, nats2) = answers(1), answers(1000)
    assert one == many
    assert nats == pytest.approx(nats2, rel=1e-4)


def test_a_model_that_reads_its_padding_is_found_out():
    model = llama()
    assert takes_padding(model)
    whole = model.forward

    def blind(*args, attention_mask=None, **kwargs):
        return whole(*args, attention_mask=None, **kwargs)

    model.forward = blind
    assert not takes_padding(model)
