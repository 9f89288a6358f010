"""Names, shapes and settings of other projects' checkpoints, and those of ours.

A checkpoint is a config.json and tensors by name. `understand` makes of both the spec of our model
and, for each of its weights, where it comes from; `describe` makes their config.json and their
names of a model of ours. Both go by one table of names, `FAMILIES`.

Rotary positions. Ours pair the two halves of a head, as those of Hugging Face and of
flash-linear-attention (fla) do, so rows of q and k stay in their order. Meta's own files and
llama2.c pair neighbours; their rows would have to be sorted, and such files are not read here.

Three old layouts of fla's checkpoints are known: `attn.norm` and `mlp.norm` for `attn_norm` and
`mlp_norm` (until February 2025, when both ran with an eps of 1e-5 whatever the config said);
`mlp.gate_proj` with the rows of `up_proj` below its own; and rms_norm_eps for norm_eps.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pydantic import ValidationError

from glactl.convert.config import Config, Family, need
from glactl.convert.families import ARCHITECTURES, FAMILIES, MARKS, OLDER, OPTIONAL
from glactl.convert.fla import FLA, FUSED_EPS, hybrid
from glactl.models.lm_spec import LMSpec

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


class Origin(NamedTuple):
    """Where a weight of ours comes from.

    theirs: the tensor's name, None for one that is 1 everywhere. part: (i, n), the i-th of n equal
    parts of its rows; None: all of it.
    """

    theirs: str | None
    part: tuple[int, int] | None = None


@dataclass(frozen=True)
class Understood:
    """What a checkpoint is: its kind, our spec, where each of our weights comes from, and notes.

    same: tensors that must equal another one, or are left out for want of a use (None).
    """

    family: str
    spec: LMSpec
    origins: dict[str, Origin]
    same: dict[str, str | None]
    notes: list[str]


def understand(data: dict[str, Any], found: Shapes, ours: Callable[[LMSpec], Shapes]) -> Understood:
    """What the checkpoint with this config.json and these tensors is.

    Args:
        data: the config.json.
        found: the shape of each of its tensors.
        ours: gives the shape of each weight of a model of ours.

    Raises:
        ValueError: it is of no known kind, a setting is not to be had here, or a tensor is
            missing, has another shape or belongs to nothing; each is named.
    """
    name = _family(data, found)
    family, config = FAMILIES[name], Config(data)
    fields = hybrid(config, family.read(config))
    tied = fields.get("tie_embeddings", data.get("tie_word_embeddings"))
    if tied is None:
        tied = "lm_head.weight" not in found
        config.notes.append(f"config.json has no tie_word_embeddings: taken as {tied}")
    config.read.add("tie_word_embeddings")
    if "model.layers.0.attn.norm.weight" in found and fields["norm_eps"] != FUSED_EPS:
        config.notes.append(
            f"attn.norm and mlp.norm: all norms have eps {FUSED_EPS}, with which these ran; "
            f"config.json says {fields['norm_eps']}, with which the last one did"
        )
        fields["norm_eps"] = FUSED_EPS
    unread = sorted(set(data) - config.read)
    if unread:
        config.notes.append(f"config.json: not read: {', '.join(unread)}")
    try:
        spec = LMSpec.model_validate(fields | {"tie_embeddings": tied})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if "[" not in str(part))
        raise ValueError(f"config.json makes no model: {place} {first['msg']}") from None
    bare = data.get("elementwise_affine") is False
    origins, same, problems = _match(family, spec, found, ours(spec), bare)
    if problems:
        rest = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"not a whole {name} checkpoint: {'; '.join(problems[:5])}{rest}")
    ones = sum(o.theirs is None for o in origins.values())
    if ones:
        config.notes.append(f"{ones} weights of norms are not in the checkpoint: taken as 1")
    return Understood(name, spec, origins, same, config.notes)


def describe(
    name: str, spec: LMSpec, ours: Iterable[str]
) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """The config.json of a model of ours as a checkpoint of that kind, its names, and notes.

    Returns:
        config: without the ids of special tokens.
        names: theirs -> ours.
        notes: what the other project computes otherwise.

    Raises:
        ValueError: a setting of the model is not to be had there.
    """
    family, mixer = FAMILIES[name], spec.mixers[0]
    need("mixer", [m.kind for m in spec.mixers if m != mixer], [], "the same one in all layers")
    need("ffn", spec.ffn, family.ffn, family.ffn)
    need("norm", spec.norm, "rmsnorm", "rmsnorm")
    need("short_conv", spec.short_conv, None, "null")
    need("embedding_scale", spec.embedding_scale, 1.0, "1")
    eps = getattr(mixer, "norm_eps", FUSED_EPS) or spec.norm_eps
    notes = [] if eps == FUSED_EPS else [f"{name}: a norm of eps {eps} has {FUSED_EPS} there"]
    config = {
        "model_type": name,
        "architectures": [ARCHITECTURES[name]],
        "hidden_size": spec.d_model,
        "num_hidden_layers": spec.n_layers,
        "vocab_size": spec.vocab,
        "intermediate_size": spec.hidden,
        "tie_word_embeddings": spec.tie_embeddings,
        "torch_dtype": "float32",
        **family.write(spec, mixer),
    }
    outer = {mine: theirs for theirs, mine in family.outer.items()}
    inner = {_inner(mine): theirs for theirs, mine in family.layer.items()}
    names = {}
    for mine in ours:
        if mine == "head.weight" and spec.tie_embeddings:
            continue
        if mine.startswith("blocks."):
            _, layer, rest = mine.split(".", 2)
            names[f"{family.layers}{layer}.{inner[rest]}"] = mine
        else:
            names[outer[mine]] = mine
    return config, names, notes


def _inner(mine: str) -> str:
    return mine[1:] if mine.startswith(".") else f"mixer.{mine}"


def _family(data: dict[str, Any], found: Shapes) -> str:
    """The kind that config and tensors agree on."""
    places = tuple({family.layers for family in FAMILIES.values()})
    inner = {n.split(".", 3)[3] for n in found if n.startswith(places) and n.count(".") > 3}
    known = ", ".join(FAMILIES)
    by_keys = next((kinds for marks, kinds in MARKS if marks <= inner), ())
    if not by_keys:
        raise ValueError(f"the tensors are of no known kind; known: {known}")
    name = data.get("model_type")
    if name is None:
        return by_keys[0]
    if name not in FAMILIES:
        raise ValueError(f"config.json: model_type is {name!r}; known: {known}")
    if name not in by_keys:
        raise ValueError(
            f"config.json says model_type {name}, but the tensors are named as those of "
            f"{' or '.join(by_keys)}"
        )
    return str(name)


def _match(
    family: Family, spec: LMSpec, found: Shapes, ours: Shapes, bare: bool
) -> tuple[dict[str, Origin], dict[str, str | None], list[str]]:
    """Where each weight comes from, the tensors that repeat others, and what does not fit.

    bare: whether norms of mixers have no weights there.
    """
    outer = {mine: theirs for theirs, mine in family.outer.items()}
    inner = {
        kind: {_inner(mine): theirs for theirs, mine in layer.items()}
        for kind, layer in (("attention", FLA["transformer"].layer), (family.mixer, family.layer))
    }
    kinds = [mixer.kind for mixer in spec.mixers]
    origins: dict[str, Origin] = {}
    problems, used = [], set()
    for mine, shape in ours.items():
        prefix, rest, theirs = "", mine, outer.get(mine)
        if mine.startswith("blocks."):
            _, layer, rest = mine.split(".", 2)
            prefix = f"{family.layers}{layer}."
            theirs = inner[kinds[int(layer)]].get(rest)
        if theirs is None:
            problems.append(f"{mine} has no name there")
            continue
        if mine == "head.weight" and spec.tie_embeddings:
            theirs = outer["embed.weight"]
        options = [prefix + n for n in (theirs, *OLDER.get(theirs, ()))]
        there = next((n for n in options if n in found), None)
        part = None
        if rest.startswith(("ffn.gate", "ffn.up")) and f"{prefix}mlp.up_proj.weight" not in found:
            packed = f"{prefix}mlp.gate_proj.weight"
            if packed in found and found[packed] == (2 * shape[0], *shape[1:]):
                there, part = packed, (int(rest.startswith("ffn.up")), 2)
        if there is None and bare and theirs in OPTIONAL:
            origins[mine] = Origin(None)
            continue
        if there is None:
            problems.append(f"{options[0]} {shape} is missing")
            continue
        used.add(there)
        if part is None and found[there] != shape:
            problems.append(f"{there} has shape {found[there]}, not {shape}")
        origins[mine] = Origin(there, part)
    same: dict[str, str | None] = {}
    for extra in sorted(set(found) - used):
        if extra == "lm_head.weight" and spec.tie_embeddings and "embed.weight" in origins:
            same[extra] = origins["embed.weight"].theirs
        elif extra.endswith("rotary_emb.inv_freq"):  # of old files; it follows from the config
            same[extra] = None
        else:
            problems.append(f"{extra} {found[extra]} belongs to nothing")
    return origins, same, problems
