"""Mamba's models: their fields of config.json and names of tensors.

Three projects write one set of tensors under three sets of fields: Hugging Face (hf),
flash-linear-attention (fla) and the released code of the paper (mamba_ssm), which has no model_type
and calls the table of embeddings `embedding`. A field may stand there by more than one of its
names, if all say the same; an export has the names of hf and of fla, so that both read it.

What a config says about fresh weights alone, past the range of the steps, changes nothing in a
checkpoint and is not kept.
"""

from typing import Any

from glactl.convert.config import Config, Family, need
from glactl.models.lm_spec import LMSpec

EPS = 1e-5  # of all norms, where a config does not say
# in the ssm_cfg of mamba_ssm; its other fields are no part of this model
INNER = {
    "bias", "conv_bias", "d_conv", "d_state", "dt_init", "dt_init_floor", "dt_max", "dt_min",
    "dt_rank", "dt_scale", "expand", "layer", "use_fast_path",
}  # fmt: skip
# how the weights are drawn, and how a model is run
WITHOUT_EFFECT = {
    "dt_init", "dt_init_scheme", "dt_scale", "fused_add_norm", "rescale_prenorm_residual",
    "time_step_init_scheme", "time_step_scale", "use_associative_scan", "use_fast_path",
    "use_mambapy",
}  # fmt: skip


def _flat(c: Config) -> Config:
    """The config with what is in its ssm_cfg beside its other fields, one account for both."""
    inside = c.data.get("ssm_cfg") or {}
    if not isinstance(inside, dict):
        raise ValueError(f"config.json: ssm_cfg is {inside!r}; allowed: an object")
    for name, value in inside.items():
        if name not in INNER:
            raise ValueError(
                f"config.json: ssm_cfg has {name}; allowed: {', '.join(sorted(INNER))}"
            )
        if name in c.data and c.data[name] != value:
            raise ValueError(f"config.json: ssm_cfg has {name} {value!r}, beside {c.data[name]!r}")
    c.read |= {"ssm_cfg", *WITHOUT_EFFECT}
    return Config(c.data | inside, c.read, c.notes)


def _one(c: Config, *names: str, **default: Any) -> Any:
    """What the names of one field say. Raises ValueError where they differ."""
    value = c.get(*names, **default)
    for name in names:
        c.only(name, value)
    return value


def _whole(c: Config, *names: str, **default: Any) -> int:
    """The same of a whole number of 1 or more."""
    value = c.whole(next((n for n in names if n in c.data), names[0]), **default)
    for name in names:
        c.only(name, value)
    return value


def _flag(c: Config, *names: str, default: bool) -> bool:
    """The same of true or false."""
    for name in names:
        c.only(name, True, False)
    return bool(_one(c, *names, default=default))


def _read_mamba(c: Config) -> dict[str, Any]:
    released = "hidden_size" not in c.data  # by mamba_ssm
    c = _flat(c)
    d, expand = _whole(c, "hidden_size", "d_model"), _whole(c, "expand", default=2)
    for name in ("intermediate_size", "d_inner"):
        c.only(name, expand * d)
    c.only("hidden_act", "silu", "swish")
    c.only("rms_norm", True)
    c.only("residual_in_fp32", True, False)  # nothing else is had in fp32, which the weights are
    c.only("layer", "Mamba1")
    c.only("d_intermediate", 0)  # of a channel mixer
    for name in ("attn", "attn_layer_idx"):
        c.only(name, None, [])
    c.read |= {"attn_cfg", "max_position_embeddings", "pad_vocab_size_multiple"}  # of no use
    vocab = _whole(c, "vocab_size")
    if released:  # the table has rows for more tokens than there are
        rows = c.whole("pad_vocab_size_multiple", default=8)
        vocab = rows * -(-vocab // rows)
    mixer = {
        "kind": "mamba",
        "expand": expand,
        "state": _whole(c, "state_size", "d_state", default=16),
        "conv": _whole(c, "conv_kernel", "d_conv", default=4),
        "conv_bias": _flag(c, "use_conv_bias", "conv_bias", default=True),
        "bias": _flag(c, "use_bias", "bias", default=False),
        "dt_rank": _rank(c, d),
        "dt_min": _one(c, "time_step_min", "dt_min", default=1e-3),
        "dt_max": _one(c, "time_step_max", "dt_max", default=0.1),
        "dt_floor": _one(c, "time_step_floor", "dt_init_floor", default=1e-4),
    }
    fields = {
        "d_model": d,
        "n_layers": _whole(c, "num_hidden_layers", "n_layer"),
        "vocab_size": vocab,
        "ffn": "none",
        "norm_eps": _one(c, "layer_norm_epsilon", "norm_eps", default=EPS),
        "positions": "none",
        "mixer": mixer,
    }
    if released or "layer_norm_epsilon" in c.data:  # of these a table is tied unless they say no
        fields["tie_embeddings"] = _flag(
            c, "tie_word_embeddings", "tie_embeddings", default=True
        )  # fla's is as its tensors are
    return fields


def _rank(c: Config, d: int) -> int | None:
    """R of the steps; None where it is d / 16, rounded up."""
    names = [n for n in ("time_step_rank", "dt_rank") if c.data.get(n, "auto") != "auto"]
    c.read |= {"time_step_rank", "dt_rank"}
    rank = _whole(c, *names) if names else None
    return None if rank == -(-d // 16) else rank


def _write_mamba(spec: LMSpec, m: Any) -> dict[str, Any]:
    learned = spec.positions if spec.positions == "learned" else None
    need("positions", learned, None, "rope or none")
    rank = m.rank(spec.d_model)
    return {
        "hidden_act": "silu",
        "state_size": m.state,
        "conv_kernel": m.conv,
        "expand": m.expand,
        "intermediate_size": m.expand * spec.d_model,
        "use_bias": m.bias,
        "use_conv_bias": m.conv_bias,
        "residual_in_fp32": True,
        "rescale_prenorm_residual": False,
        # hf
        "layer_norm_epsilon": spec.norm_eps,
        "time_step_rank": rank,
        "time_step_min": m.dt_min,
        "time_step_max": m.dt_max,
        "time_step_floor": m.dt_floor,
        # fla
        "norm_eps": spec.norm_eps,
        "dt_rank": rank,
        "dt_min": m.dt_min,
        "dt_max": m.dt_max,
        "dt_init_floor": m.dt_floor,
    }


_MIXER = {"in_proj": "inner", "x_proj": "select", "dt_proj": "dt", "out_proj": "out"}
_LAYER = {
    "norm.weight": ".norm.weight",
    **{f"mixer.{n}.{w}": f"{mine}.{w}" for n, mine in _MIXER.items() for w in ("weight", "bias")},
    **{f"mixer.conv1d.{w}": w for w in ("weight", "bias")},
    **{f"mixer.{n}": n for n in ("A_log", "D")},
}
_OUTER = {
    "backbone.embeddings.weight": "embed.weight",
    "backbone.norm_f.weight": "norm.weight",
    "lm_head.weight": "head.weight",
}
MAMBA: dict[str, Family] = {
    "mamba": Family(
        "mamba", _LAYER, _OUTER, _read_mamba, _write_mamba, layers="backbone.layers.", ffn="none"
    )
}
