"""The models of flash-linear-attention (fla): their fields of config.json and names of tensors.

What fla does whatever its config says is kept: GLA's gate has rank 16 and is divided by 16, and the
norm in front of the last product of GSA and HGRN2 has an eps of 1e-5.
"""

from typing import Any

from glactl.convert.config import Config, Family, need
from glactl.models.lm_spec import LMSpec

FUSED_EPS = 1e-5  # of fla's norms that are fused with a product
FLA_GATE = 16  # the rank and the normalizer of the gate of fla's GLA


def _read_fla(c: Config, ratio: int = 4) -> dict[str, Any]:
    """What all of fla's models have."""
    d = c.whole("hidden_size")
    c.only("hidden_act", "swish", "silu")
    c.only("use_short_conv", False, None)
    c.only("attnres_block_size", None)
    c.read |= {"elementwise_affine"}  # tells only whether norms have weights, as the tensors do
    hidden = c.get("intermediate_size", default=None)
    if hidden is None:
        ratio = c.whole("hidden_ratio", default=ratio)
        hidden = 256 * -(-int(d * ratio * 2 / 3) // 256)
    else:
        c.read |= {"hidden_ratio"}
    return {
        "d_model": d,
        "n_layers": c.get("num_hidden_layers"),
        "vocab_size": c.get("vocab_size"),
        "ffn_hidden": hidden,
        "norm_eps": c.get("norm_eps", "rms_norm_eps", default=1e-6),
        "max_len": c.get("max_position_embeddings", default=2048),
        "positions": "none",
    }


def hybrid(c: Config, fields: dict[str, Any]) -> dict[str, Any]:
    """`fields` with softmax attention in the layers that the field `attn` of fla's config lists.

    It is one object or a list of them: layers, num_heads and, if wanted, num_kv_heads, window_size
    and rope_theta.

    Raises:
        ValueError: it says what our model cannot do, or lists a layer that is not there or twice.
    """
    given, own = c.data.get("attn"), fields["mixer"]
    c.read |= {"attn"}
    if given is None:
        return fields
    if own["kind"] in ("attention", "hgrn2"):  # fla counts the bounds of hgrn2 by all layers
        c.only("attn", None)
    if fields["positions"] == "none" and own["kind"] == "abc":
        raise ValueError("config.json: use_rope is False; allowed with attn: True")
    layers = [own] * c.whole("num_hidden_layers")
    last = len(layers) - 1
    for part in given if isinstance(given, list) else [given]:
        if not isinstance(part, dict) or not isinstance(part.get("layers"), list):
            raise ValueError(f"config.json: attn is {given}; allowed: objects with layers")
        a = Config(part, {"layers"})
        a.only("qkv_bias", False, None)
        mixer = {"kind": "attention", **_heads(a), "window": a.get("window_size", default=None)}
        mixer["rope_theta"] = a.get("rope_theta", default=10_000.0)
        for i in part["layers"]:
            if i not in range(last + 1) or isinstance(i, bool) or layers[i] is not own:
                raise ValueError(
                    f"config.json: attn has layer {i!r}; allowed: once each of 0 to {last}"
                )
            layers[i] = mixer
        if unread := sorted(set(part) - a.read):
            a.notes.append(f"config.json: not read in attn: {', '.join(unread)}")
        c.notes += a.notes
    return fields | {"mixer": layers, "positions": "rope"}


def _write_fla(spec: LMSpec, **fields: Any) -> dict[str, Any]:
    return {"hidden_act": "swish", "norm_eps": spec.norm_eps, **fields}


def _write_linear(spec: LMSpec, **fields: Any) -> dict[str, Any]:
    """Of all kinds but the Transformer."""
    constant = {"use_short_conv": False, "elementwise_affine": True, "attn": None}
    return _write_fla(spec, **fields, **constant)


def _heads(c: Config) -> dict[str, Any]:
    heads, kv = c.whole("num_heads"), c.get("num_kv_heads", default=None)
    return {"heads": heads, "kv_heads": None if kv == heads else kv}


def _read_transformer(c: Config) -> dict[str, Any]:
    c.only("qkv_bias", False, None)
    c.only("qk_norm", False, None)
    theta = c.get("rope_theta", default=10_000.0)
    window = c.get("window_size", default=None)
    mixer = {"kind": "attention", **_heads(c), "rope_theta": theta, "window": window}
    return _read_fla(c) | {"mixer": mixer, "positions": "rope"}


def _write_transformer(spec: LMSpec, m: Any) -> dict[str, Any]:
    need("positions", spec.positions, "rope", "rope")
    return _write_fla(
        spec,
        num_heads=m.heads,
        num_kv_heads=m.kv_heads,
        qkv_bias=False,
        qk_norm=False,
        window_size=m.window,
        rope_theta=m.rope_theta,
    )


def _read_gla(c: Config) -> dict[str, Any]:
    c.only("use_gk", True)
    c.only("use_gv", False)
    c.only("clamp_min", None)
    c.only("feature_map", None, "relu", "swish", "silu")
    feature = c.get("feature_map", default=None) or "none"
    mixer = {
        "kind": "gla",
        **_heads(c),
        "expand_k": c.get("expand_k", default=0.5),
        "expand_v": c.get("expand_v", default=1.0),
        "gate_rank": FLA_GATE,
        "gate_normalizer": float(FLA_GATE),
        "feature_map": "swish" if feature == "silu" else feature,
        "output_gate": c.get("use_output_gate", default=True),
    }
    return _read_fla(c) | {"mixer": mixer}


def _write_gla(spec: LMSpec, m: Any) -> dict[str, Any]:
    _no_learned_positions(spec)
    need("mixer.gate", m.gate, "key", "key")
    need("mixer.gate_rank", m.gate_rank, FLA_GATE, str(FLA_GATE))
    need("mixer.gate_normalizer", m.gate_normalizer, FLA_GATE, str(FLA_GATE))
    return _write_linear(
        spec,
        num_heads=m.heads,
        num_kv_heads=m.kv_heads,
        expand_k=m.expand_k,
        expand_v=m.expand_v,
        feature_map=None if m.feature_map == "none" else m.feature_map,
        use_output_gate=m.output_gate,
        use_gk=True,
        use_gv=False,
        clamp_min=None,
    )


def _read_gsa(c: Config) -> dict[str, Any]:
    c.only("feature_map", "swish", "silu")
    for name in ("expand_k", "expand_v", "exapnd_k", "exapnd_v", "scale"):
        c.only(name, 1)
    for name in ("clamp_min", "clamp_max"):
        c.only(name, None)
    c.only("use_norm", True)
    c.read |= {"use_output_gate"}  # fla's layer has none whatever it says
    mixer = {
        "kind": "gsa",
        **_heads(c),
        "slots": c.get("num_slots", default=64),
        "gate_normalizer": c.get("gate_logit_normalizer", default=8),
        "norm_eps": FUSED_EPS,
    }
    return _read_fla(c) | {"mixer": mixer}


def _write_gsa(spec: LMSpec, m: Any) -> dict[str, Any]:
    _no_learned_positions(spec)
    need("mixer.decay", m.decay, "data", "data")
    need("mixer.read", m.read, "softmax", "softmax")
    whole = int(m.gate_normalizer)
    return _write_linear(
        spec,
        num_heads=m.heads,
        num_kv_heads=m.kv_heads,
        num_slots=m.slots,
        gate_logit_normalizer=whole if whole == m.gate_normalizer else m.gate_normalizer,
        feature_map="swish",
        use_output_gate=False,
        use_norm=True,
    )


def _read_retnet(c: Config) -> dict[str, Any]:
    c.only("feature_map", None)
    c.only("use_output_gate", True)
    heads = c.whole("num_heads")
    c.only("num_kv_heads", None, heads)
    mixer = {
        "kind": "retnet",
        "heads": heads,
        "expand_k": c.get("expand_k", default=1.0),
        "expand_v": c.get("expand_v", default=2.0),
    }
    return _read_fla(c, 2) | {"mixer": mixer, "positions": "rope"}


def _write_retnet(spec: LMSpec, m: Any) -> dict[str, Any]:
    need("positions", spec.positions, "rope", "rope")
    need("mixer.rope_theta", m.rope_theta, 10_000.0, "10000")
    need("mixer.kv_heads", m.groups, m.heads, "null")  # there the heads of a group differ in decay
    need("mixer.feature_map", m.feature_map, "none", "none")
    need("mixer.output_gate", m.output_gate, True, "true")
    return _write_linear(
        spec,
        num_heads=m.heads,
        num_kv_heads=None,
        expand_k=m.expand_k,
        expand_v=m.expand_v,
        feature_map=None,
        use_output_gate=True,
    )


def _read_hgrn2(c: Config) -> dict[str, Any]:
    c.only("use_lower_bound", True)
    d = c.whole("hidden_size")
    if "expand_ratio" in c.data and c.data["expand_ratio"] is None:
        c.read |= {"expand_ratio"}
        ratio = d // c.whole("num_heads")
    else:
        ratio = c.whole("expand_ratio", default=128)
    c.only("num_heads", None, d // ratio)
    mixer = {"kind": "hgrn2", "expand_ratio": ratio, "norm_eps": FUSED_EPS}
    return _read_fla(c) | {"mixer": mixer}


def _write_hgrn2(spec: LMSpec, m: Any) -> dict[str, Any]:
    _no_learned_positions(spec)
    need("n_layers", min(spec.n_layers, 2), 2, "2 or more")
    return _write_linear(
        spec,
        num_heads=spec.d_model // m.width(spec.d_model),
        expand_ratio=m.width(spec.d_model),
        use_lower_bound=True,
    )


def _read_abc(c: Config) -> dict[str, Any]:
    c.only("clamp_min", -32)
    c.only("clamp_max", 32)
    for name in ("use_norm", "use_output_gate"):
        c.only(name, True)
    c.only("use_input_gate", False)
    mixer = {
        "kind": "abc",
        "heads": c.whole("num_heads"),
        "slots": c.get("num_slots", default=64),
        "expand_k": c.get("expand_k", "exapnd_k", default=0.5),
        "expand_v": c.get("expand_v", "exapnd_v", default=1.0),
        "variant": "rescaled",
    }
    rope = c.get("use_rope", default=True)
    return _read_fla(c) | {"mixer": mixer, "positions": "rope" if rope else "none"}


def _write_abc(spec: LMSpec, m: Any) -> dict[str, Any]:
    _no_learned_positions(spec)
    need("mixer.variant", m.variant, "rescaled", "rescaled")
    need("mixer.rope_theta", m.rope_theta, 10_000.0, "10000")
    return _write_linear(
        spec,
        num_heads=m.heads,
        num_slots=m.slots,
        expand_k=m.expand_k,
        expand_v=m.expand_v,
        clamp_min=-32,
        clamp_max=32,
        use_rope=spec.rope,
    )


def _no_learned_positions(spec: LMSpec) -> None:
    learned = spec.positions if spec.positions == "learned" else None
    need("positions", learned, None, "rope or none")


FFN = {f"mlp.{n}_proj.weight": f".ffn.{n}.weight" for n in ("gate", "up", "down")}
_FLA_OUTER = {
    "model.embeddings.weight": "embed.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
}


def _fla(**names: str) -> dict[str, str]:
    """The names in a layer of fla's, with those that all layers have."""
    parts = {"q_proj": "q", "o_proj": "out", **names}
    return {
        "attn_norm.weight": ".norm.weight",
        "mlp_norm.weight": ".ffn_norm.weight",
        **FFN,
        **{f"attn.{theirs}.weight": f"{mine}.weight" for theirs, mine in parts.items()},
    }


_KV = {"k_proj": "k", "v_proj": "v"}
_GATED = {**_KV, "g_proj": "r", "g_norm_swish_gate": "norm"}
_GLA = _fla(**_GATED, **{"gk_proj.0": "gate_down", "gk_proj.1": "gate_up"})

FLA: dict[str, Family] = {
    "transformer": Family(
        "attention", _fla(**_KV), _FLA_OUTER, _read_transformer, _write_transformer
    ),
    "gla": Family(
        "gla", _GLA | {"attn.gk_proj.1.bias": "gate_up.bias"}, _FLA_OUTER, _read_gla, _write_gla
    ),
    "gsa": Family(
        "gsa", _fla(**_KV, f_proj="gate", g_norm="norm"), _FLA_OUTER, _read_gsa, _write_gsa
    ),
    "retnet": Family("retnet", _fla(**_GATED), _FLA_OUTER, _read_retnet, _write_retnet),
    "hgrn2": Family(
        "hgrn2",
        _fla(f_proj="f", i_proj="v", g_norm="norm"),
        _FLA_OUTER | {"model.lower_bounds": "shared.hgrn2.weight"},
        _read_hgrn2,
        _write_hgrn2,
    ),
    "abc": Family(
        "abc",
        _fla(**_KV, s_proj="s", g_proj="r", g_norm="norm"),
        _FLA_OUTER,
        _read_abc,
        _write_abc,
    ),
}
