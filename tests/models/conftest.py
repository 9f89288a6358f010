"""The models that the contract and the cost model are held against: every mixer of the union."""

import sys
from pathlib import Path

import pytest

from glactl.models.lm import LMSpec
from glactl.models.mixers import MIXERS

sys.path.insert(0, str(Path(__file__).parent))  # for drawn.py, which tests of layers share

BASE = {"d_model": 16, "n_layers": 2, "vocab_size": 11, "init_std": 0.3}
MODELS = {m.model_fields["kind"].default: {} for m in MIXERS}  # each with its defaults
MODELS |= {
    f"{kind} grouped": {"mixer": {"kind": kind, "kv_heads": 2}}
    for kind, m in zip(list(MODELS), MIXERS, strict=True)
    if "kv_heads" in m.model_fields
}
for name in list(MODELS):
    MODELS[name].setdefault("mixer", name)
MODELS |= {
    "window": {"mixer": {"kind": "attention", "window": 3}},
    "no rotation": {"mixer": "attention", "positions": "none"},
    "plain gla": {
        "mixer": {
            "kind": "gla",
            "heads": 2,
            "expand_k": 1.5,
            "expand_v": 0.5,
            "gate_rank": 3,
            "feature_map": "relu",
            "output_gate": False,
        }
    },
    "gla, one decay a head": {"mixer": {"kind": "gla", "kv_heads": 2, "gate": "scalar"}},
    "gla, fixed decay": {"mixer": {"kind": "gla", "gate": "fixed"}},
    "gla, no gate": {"mixer": {"kind": "gla", "gate": "none", "feature_map": "swish"}},
    "gsa, fixed decay": {"mixer": {"kind": "gsa", "kv_heads": 2, "slots": 5, "decay": "fixed"}},
    "gsa, no decay": {"mixer": {"kind": "gsa", "slots": 5, "decay": "none"}},
    "gsa, linear read": {"mixer": {"kind": "gsa", "slots": 5, "read": "linear"}},
    "gsa, two changes": {
        "mixer": {"kind": "gsa", "kv_heads": 2, "slots": 5, "read": "swish", "decay": "none"}
    },
    "linear, elu": {"mixer": {"kind": "linear", "expand_v": 0.5, "feature_map": "elu"}},
    "retnet, made of attention": {
        "mixer": {"kind": "retnet", "kv_heads": 2, "feature_map": "swish", "output_gate": False}
    },
    "retnet, no rotation": {"mixer": {"kind": "retnet", "heads": 2}, "positions": "none"},
    "transnormer, all": {
        "mixer": {"kind": "transnormer", "heads": 2, "decay": "lightning", "lrpe": "all"}
    },
    "hgrn2, narrow heads": {"n_layers": 3, "mixer": {"kind": "hgrn2", "expand_ratio": 4}},
    "abc, cumulative": {
        "mixer": {"kind": "abc", "variant": "cumulative", "slots": 5},
        "positions": "none",
    },
    "mamba, odd": {
        "mixer": {
            "kind": "mamba",
            "expand": 1,
            "state": 3,
            "conv": 2,
            "conv_bias": False,
            "bias": True,
            "dt_rank": 2,
        },
        "short_conv": 3,
    },
    "kinds": {"n_layers": 4, "mixer": ["hgrn2", "transnormer", "hgrn2", "retnet"]},
    "one hgrn2": {"n_layers": 2, "mixer": ["hgrn2", "linear"]},
    "few slots": {"mixer": {"kind": "gsa", "heads": 1, "slots": 3}, "tie_embeddings": True},
    "hybrid": {
        "n_layers": 3,
        "mixer": ["gsa", {"kind": "attention", "window": 4, "kv_heads": 1}, "gla"],
    },
    "short_conv": {"mixer": ["gla", "attention"], "short_conv": 3},
    "learned": {
        "positions": "learned",
        "max_len": 40,
        "norm": "layernorm",
        "ffn": "glu",
        "ffn_hidden": 24,
        "embedding_scale": 4.0,
    },
    "no ffn": {"ffn": "none", "tie_embeddings": True, "short_conv": 4},
}


@pytest.fixture(params=MODELS)
def spec(request):
    return LMSpec.model_validate(BASE | MODELS[request.param])
