"""The kinds of checkpoints that are known: Hugging Face's Llama and Mistral, fla's, and Mamba."""

from typing import Any

from glactl.convert.config import Config, Family, need
from glactl.convert.fla import FFN, FLA
from glactl.convert.mamba import MAMBA
from glactl.models.lm_spec import LMSpec


def _read_llama(c: Config) -> dict[str, Any]:
    d, heads = c.whole("hidden_size"), c.whole("num_attention_heads")
    c.only("head_dim", None, d // heads)
    for name in ("attention_bias", "mlp_bias"):
        c.only(name, False, None)
    c.only("hidden_act", "silu", "swish")
    c.only("rope_scaling", None)
    c.read |= {"rope_parameters"}  # of transformers from 5.0 on
    rope = c.data.get("rope_parameters") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
        raise ValueError(f"config.json: rope_parameters is {rope}; allowed: rope_type default")
    theta = rope["rope_theta"] if "rope_theta" in rope else c.get("rope_theta", default=10_000.0)
    mixer = {"kind": "attention", "heads": heads, "rope_theta": theta}
    kv = c.get("num_key_value_heads", default=None)
    mixer["kv_heads"] = None if kv == heads else kv
    if c.data.get("model_type") == "mistral":
        mixer["window"] = c.get("sliding_window", default=4096)
    else:
        c.only("sliding_window", None)
    return {
        "d_model": d,
        "n_layers": c.get("num_hidden_layers"),
        "vocab_size": c.get("vocab_size"),
        "ffn_hidden": c.get("intermediate_size"),
        "norm_eps": c.get("rms_norm_eps", default=1e-6),
        "max_len": c.get("max_position_embeddings", default=2048),
        "positions": "rope",
        "mixer": mixer,
    }


def _write_llama(spec: LMSpec, m: Any) -> dict[str, Any]:
    need("positions", spec.positions, "rope", "rope")
    config = {
        "hidden_act": "silu",
        "num_attention_heads": m.heads,
        "num_key_value_heads": m.groups,
        "head_dim": spec.d_model // m.heads,
        "rms_norm_eps": spec.norm_eps,
        "rope_theta": m.rope_theta,
    }
    if m.window is None:
        return config | {"attention_bias": False, "mlp_bias": False}
    return config | {"sliding_window": m.window}


_HF = FFN | {
    "input_layernorm.weight": ".norm.weight",
    "post_attention_layernorm.weight": ".ffn_norm.weight",
    **{f"self_attn.{n}_proj.weight": f"{n}.weight" for n in "qkv"},
    "self_attn.o_proj.weight": "out.weight",
}
_HF_OUTER = {
    "model.embed_tokens.weight": "embed.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
}
FAMILIES: dict[str, Family] = {
    "llama": Family("attention", _HF, _HF_OUTER, _read_llama, _write_llama),
    "mistral": Family("attention", _HF, _HF_OUTER, _read_llama, _write_llama),
    **FLA,
    **MAMBA,
}

# Tensors that tell the kinds apart, in this order: a hybrid has those of attention, too.
MARKS: tuple[tuple[set[str], tuple[str, ...]], ...] = (
    ({"self_attn.q_proj.weight", "input_layernorm.weight"}, ("llama", "mistral")),
    ({"attn.gk_proj.0.weight"}, ("gla",)),
    ({"attn.f_proj.weight", "attn.i_proj.weight"}, ("hgrn2",)),
    ({"attn.f_proj.weight"}, ("gsa",)),
    ({"attn.s_proj.weight"}, ("abc",)),
    ({"attn.g_proj.weight"}, ("retnet",)),
    ({"attn.q_proj.weight", "attn.o_proj.weight"}, ("transformer",)),
    ({"mixer.x_proj.weight", "mixer.A_log"}, ("mamba",)),
)

# Other names that a tensor has had, or has with another setting of the same mathematics.
OLDER = {
    "attn_norm.weight": ("attn.norm.weight",),
    "mlp_norm.weight": ("mlp.norm.weight",),
    "attn.g_norm_swish_gate.weight": ("attn.g_norm.weight",),
    "backbone.embeddings.weight": ("backbone.embedding.weight",),
}

# Weights that are absent, and 1, where the config has elementwise_affine false.
OPTIONAL = {"attn.g_norm_swish_gate.weight", "attn.g_norm.weight"}

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "transformer": "TransformerForCausalLM",
    "gla": "GLAForCausalLM",
    "gsa": "GSAForCausalLM",
    "retnet": "RetNetForCausalLM",
    "hgrn2": "HGRN2ForCausalLM",
    "abc": "ABCForCausalLM",
    "mamba": "MambaForCausalLM",
}
