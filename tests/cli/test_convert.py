"""Checkpoints of others: what comes in gives the logits of their equations, and comes out equal."""

import json
import os
import pickle
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fla_layers import CONFIGS, GQA, INNER, VOCAB, D, L, fla_logits, fla_tensors
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from glactl import checkpoints
from glactl.cli.main import app
from glactl.convert.files import write_safetensors
from glactl.models.lm import build_lm
from glactl.run import Position, Run
from glactl.spec import RunSpec

STORIES = Path(__file__).resolve().parents[3] / "shared" / "data" / "stories260k"
LLAMA = {
    "model_type": "llama",
    "hidden_size": D,
    "num_hidden_layers": L,
    "vocab_size": VOCAB,
    "intermediate_size": INNER,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-3,
    "rope_theta": 500.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}


def llama_tensors(seed=0):
    named = {
        "embeddings": "embed_tokens",
        "attn_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        ".attn.": ".self_attn.",
    }
    tensors = {}
    for name, x in fla_tensors("transformer", seed).items():
        for theirs, hf in named.items():
            name = name.replace(theirs, hf)
        tensors[name] = x
    return tensors


def write(folder, config, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def glactl(tmp_path, monkeypatch):
    """Run the command line in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *args: CliRunner().invoke(app, [str(a) for a in args])


def logits(run):
    lm, _, _ = Run.open(run).load_model()
    lm = lm.double()
    tokens = torch.arange(20) * 7 % VOCAB
    return tokens, lm.logits(lm(tokens[None])[0])[0]


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_of_fla_gives_the_logits_of_its_equations_and_goes_back(glactl, tmp_path, kind):
    config, tensors = CONFIGS[kind], fla_tensors(kind)
    source = write(tmp_path / "in", config, tensors)
    made = glactl("import", source, "--out", "runs/a")
    assert made.exit_code == 0, made.stderr
    tokens, found = logits(tmp_path / "runs" / "a")
    wanted = fla_logits(kind, config, tensors, tokens)
    assert (found - wanted).abs().max() < 1e-9 * wanted.abs().max()

    shown = glactl("export", "runs/a", "--format", "fla", "--out", "back", "--json")
    assert shown.exit_code == 0, shown.stderr
    assert json.loads(shown.stdout)["read back here"] == 0
    back = load_file("back/model.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[n], x) for n, x in tensors.items())
    written = json.loads(Path("back/config.json").read_text())
    assert {n: written[n] for n in config} == config


def test_a_llama_in_three_forms_and_back(glactl, tmp_path):
    tensors = llama_tensors()
    write(tmp_path / "one", LLAMA, tensors)
    (tmp_path / "two").mkdir()
    torch.save(tensors, tmp_path / "two" / "pytorch_model.bin")
    names = sorted(tensors)
    (tmp_path / "three").mkdir()
    weight_map = {}
    for i in range(2):
        part = f"model-0000{i + 1}-of-00002.safetensors"
        weight_map |= dict.fromkeys(names[i::2], part)
        save_file({n: tensors[n] for n in names[i::2]}, tmp_path / "three" / part)
    index = {"weight_map": weight_map}
    (tmp_path / "three" / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {n: v for n, v in LLAMA.items() if n != "rope_theta"}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 500.0}
    for name in ("two", "three"):
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    found = []
    for name in ("one", "two", "three"):
        made = glactl("import", name, "--out", f"runs/{name}")
        assert made.exit_code == 0, made.stderr
        found.append(logits(tmp_path / "runs" / name)[1])
    same = CONFIGS["transformer"] | {"window_size": 64}
    tokens, _ = logits(tmp_path / "runs" / "one")
    wanted = fla_logits("transformer", same, fla_tensors("transformer"), tokens)
    assert (found[0] - wanted).abs().max() < 1e-9 * wanted.abs().max()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert glactl("export", "runs/one", "--out", "back").exit_code == 0
    back = load_file("back/model.safetensors")
    assert all(torch.equal(back[n], x) for n, x in tensors.items())


def test_a_mistral_has_a_window(glactl, tmp_path):
    config = LLAMA | {"model_type": "mistral", "sliding_window": 5}
    write(tmp_path / "in", config, llama_tensors())
    assert glactl("import", "in", "--out", "runs/a").exit_code == 0
    tokens, found = logits(tmp_path / "runs" / "a")
    wanted = fla_logits("transformer", CONFIGS["transformer"], fla_tensors("transformer"), tokens)
    assert (found - wanted).abs().max() < 1e-9 * wanted.abs().max()
    assert glactl("export", "runs/a", "--format", "hf", "--out", "back").exit_code == 0
    written = json.loads(Path("back/config.json").read_text())
    assert {n: written[n] for n in config} == config


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("kind", ["gla", "gsa"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_hybrid_of_fla(glactl, tmp_path, kind, layer, as_list):
    tensors, other = fla_tensors(kind), fla_tensors("transformer")
    at = f"model.layers.{layer}.attn."
    tensors = {n: x for n, x in tensors.items() if not n.startswith(at)}
    tensors |= {n: x for n, x in other.items() if n.startswith(at)}
    attn = GQA | {"layers": [layer], "window_size": 5, "rope_theta": 500.0}
    config = CONFIGS[kind] | {"attn": [attn] if as_list else attn}
    write(tmp_path / "in", config, tensors)
    made = glactl("import", "in", "--out", "runs/a")
    assert made.exit_code == 0, made.stderr
    tokens, found = logits(tmp_path / "runs" / "a")
    wanted = fla_logits(kind, config, tensors, tokens, {layer: CONFIGS["transformer"]})
    assert (found - wanted).abs().max() < 1e-9 * wanted.abs().max()


def test_hybrids_that_are_not_to_be_had(glactl, tmp_path):
    attn = {"attn": {"layers": [1], "num_heads": 4}}
    for kind, more, message in (
        ("hgrn2", {}, "config.json: attn is {'layers': [1], 'num_heads': 4}; allowed: None"),
        ("abc", {"use_rope": False}, "use_rope is False; allowed with attn: True"),
    ):
        write(tmp_path / kind, CONFIGS[kind] | attn | more, fla_tensors(kind))
        made = glactl("import", kind, "--out", "runs/a")
        assert (made.exit_code, message in made.stderr) == (2, True), made.stderr


def test_old_layouts_of_fla(glactl, tmp_path):
    tensors, old = fla_tensors("gsa"), {}
    for name, x in tensors.items():
        name = name.replace("attn_norm", "attn.norm").replace("mlp_norm", "mlp.norm")
        if "gate_proj" in name:
            x = torch.cat([x, tensors[name.replace("gate_proj", "up_proj")]])
        if "up_proj" not in name and "g_norm" not in name:
            old[name] = x
    config = {n: v for n, v in CONFIGS["gsa"].items() if n != "norm_eps"}
    config |= {"rms_norm_eps": 1e-3, "norm_first": True, "elementwise_affine": False}
    write(tmp_path / "in", config, old)
    made = glactl("import", "in", "--out", "runs/a")
    assert made.exit_code == 0, made.stderr
    assert "all norms have eps 1e-05, with which these ran" in made.stderr
    assert "2 weights of norms are not in the checkpoint: taken as 1" in made.stderr
    assert "rows, part 2 of 2" in made.stdout
    tokens, found = logits(tmp_path / "runs" / "a")
    tensors |= {n: torch.ones_like(x) for n, x in tensors.items() if "g_norm" in n}
    wanted = fla_logits("gsa", CONFIGS["gsa"] | {"norm_eps": 1e-5}, tensors, tokens)
    assert (found - wanted).abs().max() < 1e-9 * wanted.abs().max()


@pytest.mark.parametrize(("mixer", "size"), [("gla", 521_728), ("gsa", 535_040)])
def test_sizes_that_fla_itself_shows(mixer, size):
    data = {"d_model": 128, "n_layers": 1, "vocab_size": 1000, "ffn_hidden": 512}
    spec = RunSpec.model_validate({"model": data | {"mixer": {"kind": mixer, "heads": 2}}})
    assert sum(p.numel() for p in build_lm(spec.model, 0).parameters()) == size


G_PROJ = "model.layers.1.attn.g_proj.weight"
G_NORM = "model.layers.0.attn.g_norm_swish_gate.weight"
NORM, HEAD = "model.norm.weight", "lm_head.weight"


def _without(name):
    return lambda tensors: tensors.pop(name)


def _with(name, x):
    return lambda tensors: tensors.__setitem__(name, x)


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (_without(G_PROJ), {}, f"{G_PROJ} (16, 16) is missing"),
        (_without(HEAD), {}, f"{HEAD} (40, 16) is missing"),
        (_without(G_NORM), {}, f"{G_NORM} (4,) is missing"),
        (_with("model.extra", torch.ones(3)), {}, "model.extra (3,) belongs to nothing"),
        (_with(NORM, torch.ones(8)), {}, f"{NORM} has shape (8,), not (16,)"),
        (_with(NORM, torch.ones(16).to(torch.int8)), {}, f"{NORM} is of I8"),
        (_with(HEAD, torch.ones(40, 16)), {"tie_word_embeddings": True}, f"{HEAD} differs from"),
        (None, {"use_gv": True}, "config.json: use_gv is True; allowed: False"),
        (None, {"num_heads": "4"}, "config.json: num_heads is '4'; allowed: a whole number"),
        (None, {"expand_k": "x"}, "config.json makes no model: mixer.gla.expand_k"),
        (None, {"model_type": "mamba2"}, "config.json: model_type is 'mamba2'; known: llama"),
        (None, {"model_type": "gsa"}, "the tensors are named as those of gla"),
        (
            None,
            {"attn": {"num_heads": 4}},
            "attn is {'num_heads': 4}; allowed: objects with layers",
        ),
        (
            None,
            {"attn": {"layers": [2], "num_heads": 4}},
            "attn has layer 2; allowed: once each of",
        ),
        (None, {"attn": [{"layers": [1, 1], "num_heads": 4}]}, "attn has layer 1; allowed: once"),
        (None, {"attn": {"layers": [1]}}, "config.json has no field num_heads"),
        (None, {"attn": {"layers": [1], "num_heads": 4, "qkv_bias": True}}, "qkv_bias is True"),
        (None, {"attnres_block_size": 2}, "attnres_block_size is 2; allowed: None"),
    ],
)
def test_what_does_not_fit_is_one_line_with_its_name(glactl, tmp_path, change, config, message):
    tensors = fla_tensors("gla")
    if change is not None:
        change(tensors)
    write(tmp_path / "in", CONFIGS["gla"] | config, tensors)
    made = glactl("import", "in", "--out", "runs/a")
    assert made.exit_code == 2
    assert message in made.stderr
    assert made.stderr.count("\n") == 1
    assert not list(tmp_path.glob("runs/*"))


def test_what_the_config_lacks_is_told(glactl, tmp_path):
    config = {n: v for n, v in CONFIGS["gla"].items() if n not in ("model_type", "expand_v")}
    write(tmp_path / "in", config | {"novelty": 3}, fla_tensors("gla"))
    made = glactl("import", "in", "--out", "runs/a")
    assert made.exit_code == 0
    assert "config.json has no expand_v: taken as 1.0" in made.stderr
    assert "config.json: not read: novelty" in made.stderr


class Hostile:
    def __reduce__(self):
        return (os.mkdir, ("was-executed",))


def test_code_in_a_file_is_not_executed(glactl, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    torch.save({"model.norm.weight": Hostile()}, tmp_path / "pytorch_model.bin")
    made = glactl("import", ".", "--out", "runs/a")
    assert made.exit_code == 2
    assert "pytorch_model.bin is not a file of weights alone" in made.stderr
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Hostile(), protocol=2))
    assert glactl("import", ".", "--out", "runs/a").exit_code == 2
    assert not (tmp_path / "was-executed").exists()


def test_files_that_are_not_whole(glactl, tmp_path):
    folder = write(tmp_path / "in", LLAMA, llama_tensors())
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    made = glactl("import", "in", "--out", "runs/a")
    assert (made.exit_code, "is not a whole safetensors file" in made.stderr) == (2, True)
    index = {"weight_map": {"model.norm.weight": "a.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    made = glactl("import", "in", "--out", "runs/a")
    assert (made.exit_code, "a.safetensors is missing, which the index" in made.stderr) == (2, True)
    save_file({"other": torch.ones(1)}, folder / "a.safetensors")
    made = glactl("import", "in", "--out", "runs/a")
    assert "names model.norm.weight, which no file has" in made.stderr


def test_the_hub_out_of_reach_is_one_line(glactl, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    made = glactl("import", "nobody/no-such-model", "--out", "runs/a")
    assert made.exit_code == 3
    assert "'nobody/no-such-model' is no folder here" in made.stderr
    assert made.stderr.count("\n") == 1
    assert glactl("import", "./nothing", "--out", "runs/a").exit_code == 2


def test_a_download_is_told_before(glactl, tmp_path, monkeypatch):
    import huggingface_hub

    sizes = {"config.json": 500, "model.safetensors": 3_000_000_000, "pytorch_model.bin": 7}
    files = [SimpleNamespace(rfilename=n, size=s) for n, s in sizes.items()]
    asked = {}

    class Api:
        def model_info(self, name, files_metadata=False, timeout=None):
            return SimpleNamespace(siblings=files)

    def download(name, **options):
        asked.update(options)
        return write(tmp_path / "cache", LLAMA, llama_tensors())

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    made = glactl("import", "some/llama", "--out", "runs/a")
    assert made.exit_code == 0
    assert "from the hub: some/llama, 2 files, 3.00 GB" in made.stderr
    assert asked == {"allow_patterns": ["config.json", "model.safetensors"]}


def test_an_export_that_is_not_the_model_is_not_kept(glactl, tmp_path, monkeypatch):
    write(tmp_path / "in", LLAMA, llama_tensors())
    assert glactl("import", "in", "--out", "runs/a").exit_code == 0

    def swapped(path, tensors, dtype):
        there = dict(tensors)
        names = [f"model.layers.0.mlp.{n}_proj.weight" for n in ("gate", "up")]
        there |= zip(names, (tensors[n] for n in reversed(names)), strict=True)
        write_safetensors(path, there, dtype)

    monkeypatch.setattr("glactl.convert.command.write_safetensors", swapped)
    made = glactl("export", "runs/a", "--out", "out")
    assert made.exit_code == 1
    assert "read back, the export gives other logits" in made.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "runs"]


def test_weights_are_fetched_one_at_a_time(tmp_path):
    alive, most = weakref.WeakSet(), 0

    def read(name):
        nonlocal most
        x = torch.full((1000,), float(name))
        alive.add(x.untyped_storage())
        most = max(most, len(alive))
        return x

    shapes = {str(i): (1000,) for i in range(20)}
    path = checkpoints.save_weights(tmp_path, 0, shapes, read, {})
    assert most <= 3
    model = torch.nn.Module()
    for name in shapes:
        model.register_buffer(name, torch.zeros(1000))
    checkpoints.load_model(path, model)
    assert all((x == float(n)).all() for n, x in model.named_buffers())


@pytest.mark.parametrize(
    ("model", "format", "message"),
    [
        ({"mixer": "gla"}, "hf", "format hf has no gla models"),
        ({"mixer": "linear"}, "fla", "format fla has no linear models"),
        ({"mixer": ["gla", "gsa"]}, "fla", "model.mixer is ['gsa']; allowed in this format"),
        ({"mixer": "attention", "positions": "none"}, "hf", "model.positions is none"),
        ({"mixer": {"kind": "gla", "gate_rank": 8}}, "fla", "model.mixer.gate_rank is 8"),
        ({"mixer": "gla", "short_conv": 4}, "fla", "model.short_conv is 4"),
        ({"mixer": "gla", "positions": "learned", "max_len": 256}, "fla", "positions is learned"),
        ({"mixer": "hgrn2", "n_layers": 1}, "fla", "model.n_layers is 1; allowed"),
    ],
)
def test_what_a_format_cannot_say(glactl, tmp_path, model, format, message):
    data = {"d_model": 16, "n_layers": 2, "vocab_size": 40}
    spec = RunSpec.model_validate({"model": data | model})
    run = Run.create(spec, "", tmp_path / "runs")
    lm = build_lm(spec.model, 0)
    run.save_checkpoint(lm, torch.optim.AdamW(lm.parameters()), Position(0, 1, "x", step=1))
    made = glactl("export", run.path, "--format", format, "--out", "out")
    assert made.exit_code == 2
    assert message in made.stderr
    assert not Path("out").exists()


def test_an_eps_that_fla_does_not_have_is_told(glactl, tmp_path):
    spec = RunSpec.model_validate(
        {"model": {"d_model": 16, "n_layers": 2, "vocab_size": 40, "mixer": "gsa"}}
    )
    run = Run.create(spec, "", tmp_path / "runs")
    lm = build_lm(spec.model, 0)
    run.save_checkpoint(lm, torch.optim.AdamW(lm.parameters()), Position(0, 1, "x", step=1))
    made = glactl("export", "--format", "fla", "--out", "out", "--json")
    assert made.exit_code == 0
    assert "a norm of eps 1e-06 has 1e-05 there" in made.stderr
    assert json.loads(made.stdout)["read back here"] > 0
    assert glactl("export", "--format", "fla", "--out", "out").exit_code == 2  # it exists


@pytest.mark.skipif(not STORIES.is_dir(), reason="the sample checkpoint is not here")
def test_a_real_llama_writes_its_golden_text(glactl, tmp_path):
    assert glactl("import", STORIES / "hf", "--out", "runs/stories").exit_code == 0
    made = glactl("generate", "runs/stories", "--prompt", "", "--temperature", 0, "-n", 256)
    assert made.stdout == (STORIES / "golden_greedy.txt").read_text()
    assert glactl("export", "runs/stories", "--out", "back").exit_code == 0
    theirs = load_file(STORIES / "hf" / "model.safetensors")
    back = load_file("back/model.safetensors")
    assert all(torch.equal(back[n], x) for n, x in theirs.items())
    assert glactl("import", "back", "--out", "runs/again").exit_code == 0  # with its tokenizer
    again = glactl("generate", "runs/again", "--prompt", "", "--temperature", 0, "-n", 20)
    assert made.stdout.startswith(again.stdout.strip())
