"""A spec that starts from a checkpoint: what it leaves out is filled in, the rest must agree.

What map t2r asks of the mixer of a layer, in which the original has softmax attention of H heads
of width D with G of keys and values, so that projections can be copied as they are:

    gsa          heads H, kv_heads G
    gla, retnet  heads H, kv_heads G, expand_k 1, expand_v 1; and, unless the spec says otherwise,
                 feature_map relu and no output gate, as in the paper; retnet: also rope_theta
    attention    all of it: the layer is kept

Source: Zhang et al. 2024, arXiv:2409.07146, Sec. 4.2.
"""

from typing import Any

from glactl.convert.original import Original, find_original
from glactl.models.lm_spec import LMSpec
from glactl.models.mixers import MixerSpec
from glactl.spec import RunSpec
from glactl.spec_source import Source, SpecError

SAME = (  # fields of the model that copied weights fix
    *("d_model", "n_layers", "vocab_size", "ffn", "ffn_hidden", "norm", "norm_eps", "positions"),
    *("tie_embeddings", "embedding_scale", "short_conv"),
)
SHAPES = ("d_model", "n_layers", "vocab_size", "ffn_hidden", "mixer")  # without them there is none
MIXERS: dict[str, dict[str, Any]] = {  # with which projections of attention fit, by kind
    "gsa": {},
    "gla": {"expand_k": 1.0, "expand_v": 1.0},
    "retnet": {"expand_k": 1.0, "expand_v": 1.0},
}
USUAL: dict[str, dict[str, Any]] = {  # what else a spec leaves out
    "gsa": {},
    "gla": {"feature_map": "relu", "output_gate": False},
    "retnet": {"feature_map": "relu", "output_gate": False},
}


def fill(source: Source, *, plan: bool = False) -> None:
    """Put into `source` what its `init.from` gives and it leaves out: of `model`, the tokenizer.

    Args:
        source: changed in place; one without `init` is left as it is.
        plan: download nothing; where the checkpoint is not here, the spec must have all shapes.

    Raises:
        SpecError: there is nothing to fill something in from.
        ValueError, FileNotFoundError, DataUnavailable: as of find_original.
    """
    init, model = source.data.get("init"), source.data.setdefault("model", {})
    if not isinstance(init, dict) or not isinstance(init.get("from"), str):
        return  # the check of the spec tells what is wrong
    where = source.where(("init", "from"))
    original = find_original(init["from"], download=not plan)
    if not isinstance(model, dict):
        return
    if original is None:
        lacking = [f"model.{name}" for name in SHAPES if name not in model]
        if lacking:
            raise SpecError(
                f"{where}init.from: no checkpoint at {init['from']}; a plan without it needs "
                f"{', '.join(lacking)} in the spec"
            )
        return
    for name, value in _fields(original.spec).items():
        model.setdefault(name, value)
    model.setdefault("max_len", original.spec.max_len)
    if init.get("map", "same") == "same":
        model.setdefault("mixer", _plain(original.spec)["mixer"])
    elif "mixer" not in model:
        raise SpecError(f"{where}init.map is t2r, but model.mixer does not say what comes to be")
    else:
        model["mixer"] = _mixers(model["mixer"], original.spec)
    data = source.data.setdefault("data", {"kind": "text"})
    if isinstance(data, dict) and data.get("kind", "text") == "text" and "tokenizer" not in data:
        data.setdefault("kind", "text")
        if original.tokenizer is None:
            raise SpecError(f"{where}{init['from']} has no tokenizer; name one in data.tokenizer")
        data["tokenizer"] = str(original.tokenizer.resolve())


def agree(spec: RunSpec, original: Original) -> None:
    """Raise SpecError where the model of `spec` cannot take the weights of `original`."""
    assert spec.init is not None
    theirs, mine = _fields(original.spec), _fields(spec.model)
    for name in SAME:
        _same(f"model.{name}", mine[name], theirs[name], original)
    layers = zip(spec.model.mixers, original.spec.mixers, strict=True)
    for i, (new, old) in enumerate(layers):
        place = f"model.mixer of layer {i}"
        if spec.init.map == "same" or new.kind == "attention" or old.kind != "attention":
            _same(f"{place}: kind", new.kind, old.kind, original)
            for name in type(old).model_fields:
                _same(f"{place}: {name}", getattr(new, name), getattr(old, name), original)
            continue
        if new.kind not in MIXERS:
            raise SpecError(
                f"{place} is {new.kind}; allowed with init.map t2r: {', '.join(MIXERS)}, attention"
            )
        _same(f"{place}: heads", new.heads, old.heads, original)  # type: ignore[union-attr]
        _same(f"{place}: kv_heads", new.groups, old.groups, original)  # type: ignore[union-attr]
        for name, wanted in MIXERS[new.kind].items():
            if getattr(new, name) != wanted:
                raise SpecError(
                    f"{place}: {name} is {getattr(new, name):g}, but heads as wide as those of "
                    f"{original.source} need {wanted:g}"
                )


def _same(name: str, mine: Any, theirs: Any, original: Original) -> None:
    if mine != theirs:
        raise SpecError(f"{name} is {mine}, but that of {original.source} is {theirs}")


def _fields(spec: LMSpec) -> dict[str, Any]:
    found = {name: getattr(spec, name) for name in SAME}
    return found | {"ffn_hidden": spec.hidden or None}


def _plain(spec: LMSpec) -> dict[str, Any]:
    return spec.model_dump(mode="json")


def _mixers(written: Any, spec: LMSpec) -> Any:
    """The mixers of a spec, one or a list, each with what its layers have in the original."""
    entries = written if isinstance(written, list) else [written]
    filled = [
        _mixer(entry, spec.mixers[i :: len(entries)]) if entries else entry
        for i, entry in enumerate(entries)
    ]
    return filled if isinstance(written, list) else filled[0]


def _mixer(entry: Any, old: list[MixerSpec]) -> Any:
    mixer = {"kind": entry} if isinstance(entry, str) else entry
    if not isinstance(mixer, dict) or not old or old[0].kind != "attention":
        return entry  # the check of the spec, or `agree`, tells what is wrong
    kind, first = mixer.get("kind"), old[0].model_dump(mode="json")
    if kind == "attention":
        return first | mixer
    if kind not in MIXERS:
        return entry
    taken = {name: first[name] for name in ("heads", "kv_heads")}
    if kind == "retnet":
        taken["rope_theta"] = first["rope_theta"]
    return taken | MIXERS[kind] | USUAL[kind] | mixer
