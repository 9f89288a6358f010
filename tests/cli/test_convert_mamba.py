"""Checkpoints of Mamba: three sets of fields, the logits of the equations, and the way back."""

import json
import os
import re

import pytest
import torch
import torch.nn.functional as F
from fla_layers import VOCAB, D, L, draw, rms
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from glactl.cli.main import app
from glactl.convert.command import read_model
from glactl.convert.maps import describe
from glactl.models.lm_spec import LMSpec
from glactl.run import Run

E, M, W, R = 2 * D, 3, 4, 5
SHARED = {
    "model_type": "mamba",
    "hidden_size": D,
    "num_hidden_layers": L,
    "vocab_size": VOCAB,
    "state_size": M,
    "conv_kernel": W,
    "expand": 2,
    "intermediate_size": E,
    "hidden_act": "silu",
    "use_bias": False,
    "use_conv_bias": True,
    "residual_in_fp32": True,
    "rescale_prenorm_residual": False,
}
STEPS = {"min": 0.01, "max": 0.2}
CONFIGS = {
    "hf": SHARED
    | {f"time_step_{n}": x for n, x in STEPS.items()}
    | {"layer_norm_epsilon": 1e-3, "time_step_rank": R, "time_step_floor": 1e-3},
    "fla": SHARED
    | {f"dt_{n}": x for n, x in STEPS.items()}
    | {"norm_eps": 1e-3, "dt_rank": R, "dt_init_floor": 1e-3, "tie_word_embeddings": False},
    "released": {
        "d_model": D,
        "n_layer": L,
        "vocab_size": VOCAB - 3,  # the table has rows up to a multiple of 8
        "ssm_cfg": {"d_state": M, "dt_rank": R, "dt_min": 0.01, "dt_max": 0.2},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
    },
}
INNER = {
    "in_proj.weight": (2 * E, D),
    "conv1d.weight": (E, 1, W),
    "conv1d.bias": (E,),
    "x_proj.weight": (R + 2 * M, E),
    "dt_proj.weight": (E, R),
    "dt_proj.bias": (E,),
    "A_log": (E, M),
    "D": (E,),
    "out_proj.weight": (D, E),
}


def mamba_tensors(kind, **biases):
    table = "embedding" if kind == "released" else "embeddings"
    shapes = {f"backbone.{table}.weight": (VOCAB, D), "backbone.norm_f.weight": (D,)}
    for i in range(L):
        p = f"backbone.layers.{i}."
        shapes[p + "norm.weight"] = (D,)
        shapes |= {f"{p}mixer.{n}": shape for n, shape in (INNER | biases).items()}
    if kind == "fla":
        shapes["lm_head.weight"] = (VOCAB, D)
    tensors = draw(shapes, 0)
    if kind == "released":
        tensors["lm_head.weight"] = tensors["backbone.embedding.weight"].clone()
    return tensors


def mamba_logits(config, tensors, tokens):
    """By the equations in fp64, one step at a time."""
    t = {n: x.double() for n, x in tensors.items()}
    table = t.get("backbone.embeddings.weight", t.get("backbone.embedding.weight"))
    eps = config.get("layer_norm_epsilon", config.get("norm_eps", 1e-5))
    h = table[tokens]
    for i in range(L):
        w = {n: t[f"backbone.layers.{i}.mixer.{n}"] for n in INNER}
        x = rms(h, t[f"backbone.layers.{i}.norm.weight"], eps)
        x, z = (x @ w["in_proj.weight"].T).chunk(2, -1)
        before = torch.cat([x.new_zeros(W - 1, E), x])
        u = sum(before[j : j + len(x)] * w["conv1d.weight"][:, 0, j] for j in range(W))
        u = F.silu(u + w["conv1d.bias"])
        r, b, c = (u @ w["x_proj.weight"].T).split([R, M, M], -1)
        step = F.softplus(r @ w["dt_proj.weight"].T + w["dt_proj.bias"])
        S, y = 0, []
        for s, at, now, read in zip(step, u, b, c, strict=True):
            S = (-s[:, None] * w["A_log"].exp()).exp() * S + (s * at)[:, None] * now
            y.append(S @ read)
        h = h + ((torch.stack(y) + w["D"] * u) * F.silu(z)) @ w["out_proj.weight"].T
    return rms(h, t["backbone.norm_f.weight"], eps) @ t.get("lm_head.weight", table).T


def write(folder, config, tensors):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def glactl(tmp_path, monkeypatch):
    """Run the command line in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *args: CliRunner().invoke(app, [str(a) for a in args])


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_mamba_gives_the_logits_of_its_equations_and_goes_back(glactl, tmp_path, kind):
    config, tensors = CONFIGS[kind], mamba_tensors(kind)
    source = write(tmp_path / "in", config, tensors)
    made = glactl("import", source, "--out", "a")
    assert made.exit_code == 0, made.stderr
    assert "not read" not in made.stderr
    lm, _, spec = Run.open("a").load_model()
    tokens = torch.arange(20) * 7 % VOCAB
    found = lm.double().logits(lm(tokens[None])[0])[0]
    wanted = mamba_logits(config, tensors, tokens)
    assert (found - wanted).abs().max() < 1e-9 * wanted.abs().max()
    mixer = spec.model.mixers[0]
    assert (mixer.dt_min, mixer.dt_max) == (0.01, 0.2)
    assert spec.model.tie_embeddings == (kind != "fla")

    format = "fla" if kind == "fla" else "hf"
    shown = glactl("export", "a", "--format", format, "--out", "back", "--json")
    assert shown.exit_code == 0, shown.stderr
    assert json.loads(shown.stdout)["read back here"] == 0
    back = load_file("back/model.safetensors")
    theirs = {n.replace("embedding.", "embeddings."): x for n, x in tensors.items()}
    if kind == "released":  # a tied table is written once
        del theirs["lm_head.weight"]
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[n], x) for n, x in theirs.items())
    if kind != "released":
        written = json.loads((tmp_path / "back" / "config.json").read_text())
        assert {n: written[n] for n in config} == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"intermediate_size": 48}, "intermediate_size is 48; allowed: 32"),
        ({"expand": 1.5}, "expand is 1.5; allowed: a whole number"),
        ({"state_size": 0}, "state_size is 0; allowed: a whole number"),
        ({"conv_kernel": 1}, "mixer.mamba.conv Input should be greater than or equal to 2"),
        ({"time_step_rank": "all"}, "time_step_rank is 'all'; allowed: a whole number"),
        ({"dt_rank": 7}, "dt_rank is 7; allowed: 5"),
        ({"time_step_min": 0.5}, "dt_min 0.5 is above dt_max 0.2"),
        ({"time_step_floor": "low"}, "mixer.mamba.dt_floor Input should be a valid number"),
        ({"dt_max": 0.3}, "dt_max is 0.3; allowed: 0.2"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; allowed: silu or swish"),
        ({"use_bias": "no"}, "use_bias is 'no'; allowed: True or False"),
        ({"use_conv_bias": False}, "mixer.conv1d.bias (32,) belongs to nothing"),
        ({"residual_in_fp32": "yes"}, "residual_in_fp32 is 'yes'"),
        ({"norm_eps": 1e-6}, "norm_eps is 1e-06; allowed: 0.001"),
        ({"rms_norm": False}, "rms_norm is False; allowed: True"),
        ({"tie_word_embeddings": False}, "lm_head.weight (40, 16) is missing"),
        ({"attn_layer_idx": [1]}, "attn_layer_idx is [1]"),
        ({"attn": {"layers": [0]}}, "attn is {'layers': [0]}"),
        ({"d_intermediate": 64}, "d_intermediate is 64"),
        ({"ssm_cfg": {"layer": "Mamba2"}}, "layer is 'Mamba2'; allowed: Mamba1"),
        ({"ssm_cfg": {"headdim": 64}}, "ssm_cfg has headdim; allowed: bias,"),
        ({"ssm_cfg": {"expand": 4}}, "ssm_cfg has expand 4, beside 2"),
        ({"ssm_cfg": 3}, "ssm_cfg is 3; allowed: an object"),
        ({"model_type": "falcon_mamba"}, "model_type is 'falcon_mamba'; known: llama"),
        ({"model_type": "gla"}, "tensors are named as those of mamba"),
    ],
)
def test_a_setting_that_is_not_to_be_had_is_named(tmp_path, fields, message):
    source = write(tmp_path / "in", CONFIGS["hf"] | fields, mamba_tensors("hf"))
    with pytest.raises(ValueError, match=re.escape(message)):
        read_model(source, torch.device("cpu"))


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "vocab_size"])
def test_what_has_no_default_is_asked_for(tmp_path, field):
    config = {n: x for n, x in CONFIGS["hf"].items() if n != field}
    source = write(tmp_path / "in", config, mamba_tensors("hf"))
    with pytest.raises(ValueError, match=f"config.json has no field {field}"):
        read_model(source, torch.device("cpu"))


def test_what_a_config_lacks_is_told(tmp_path):
    needed = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "state_size")
    config = {n: SHARED[n] for n in needed} | {"dt_rank": R}
    source = write(tmp_path / "in", config, mamba_tensors("hf"))
    lm, found = read_model(source, torch.device("cpu"))
    assert lm.spec.norm_eps == 1e-5
    assert "config.json has no expand: taken as 2" in found.notes
    assert "config.json has no layer_norm_epsilon: taken as 1e-05" in found.notes


@pytest.mark.parametrize("rank", [1, "auto", None])
def test_a_rank_of_a_16th_of_the_width_is_ours_by_default(tmp_path, rank):
    config = CONFIGS["hf"] | {"time_step_rank": rank}
    if rank is None:
        del config["time_step_rank"]
    small = {"x_proj.weight": (1 + 2 * M, E), "dt_proj.weight": (E, 1)}
    source = write(tmp_path / "in", config, mamba_tensors("hf", **small))
    lm, _ = read_model(source, torch.device("cpu"))
    assert lm.spec.mixers[0].dt_rank is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ffn": "swiglu"}, "model.ffn is swiglu; allowed in this format: none"),
        ({"positions": "learned", "max_len": 9}, "model.positions is learned"),
        ({"norm": "layernorm"}, "model.norm is layernorm"),
        ({"short_conv": 4}, "model.short_conv is 4"),
        ({"mixer": ["mamba", "gla"]}, "model.mixer is ['gla']"),
    ],
)
def test_what_a_format_cannot_say(fields, message):
    plain = {"d_model": D, "n_layers": L, "vocab_size": VOCAB, "mixer": "mamba", "ffn": "none"}
    describe("mamba", LMSpec.model_validate(plain), [])
    with pytest.raises(ValueError, match=re.escape(message)):
        describe("mamba", LMSpec.model_validate(plain | fields), [])


@pytest.mark.parametrize("missing", ["backbone.embeddings.weight", "backbone.layers.1.mixer.D"])
def test_a_tensor_that_is_missing_is_named(glactl, tmp_path, missing):
    tensors = mamba_tensors("hf")
    write(tmp_path / "in", CONFIGS["hf"], {n: x for n, x in tensors.items() if n != missing})
    made = glactl("import", "in", "--out", "a")
    assert made.exit_code == 2
    assert f"not a whole mamba checkpoint: {missing}" in made.stderr
    assert os.listdir() == ["in"]


def test_a_head_that_should_be_the_table_and_is_not(tmp_path):
    tensors = mamba_tensors("released")
    tensors["lm_head.weight"][0] += 1
    source = write(tmp_path / "in", CONFIGS["released"], tensors)
    with pytest.raises(ValueError, match=r"lm_head.weight differs from backbone.embedding.weight"):
        read_model(source, torch.device("cpu"))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_logits_are_those_of_transformers_and_an_export_is_read_by_it(glactl, tmp_path, bias, tied):
    """To 1e-4 of the largest logit: fp32, two orders of the same sums."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(
        hidden_size=32, num_hidden_layers=2, vocab_size=90, state_size=5, conv_kernel=3, expand=3,
        layer_norm_epsilon=1e-3, initializer_range=0.3, use_bias=bias, use_conv_bias=not bias,
        time_step_rank=4, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():  # norms and D are 1 as they are made
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(tmp_path / "hf")
    tokens = torch.randint(90, (2, 70))
    lm, found = read_model(tmp_path / "hf", torch.device("cpu"))
    with torch.no_grad():
        wanted, ours = model(tokens).logits, lm.logits(lm(tokens)[0])
    assert (ours - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert (lm.head.weight is lm.embed.weight) == tied
    assert not [note for note in found.notes if "not read" in note]

    for command in (["import", "hf", "--out", "a"], ["export", "a", "--out", "back", "--json"]):
        made = glactl(*command)
        assert made.exit_code == 0, made.stderr
    assert json.loads(made.stdout)["transformers"] < 1e-4 * wanted.abs().max()
