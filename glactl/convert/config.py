"""How another project's config.json is read, with an account of what it says.

What our model cannot do is an error that names field and value; a field that is not there has the
project's own default, which is noted; so is a field that nobody read.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from glactl.models.lm_spec import LMSpec

_NEEDED = object()

# What changes no number here: how fla and transformers run, train and write a model.
HARMLESS = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "attn_mode",
        "auto_map",
        "bos_token_id",
        "conv_bias",
        "conv_size",
        "dtype",
        "eos_token_id",
        "fuse_cross_entropy",
        "fuse_linear_cross_entropy",
        "fuse_norm",
        "fuse_swiglu",
        "gate_low_rank_dim",
        "initializer_range",
        "model_type",
        "norm_first",
        "pad_token_id",
        "pretraining_tp",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "use_l2warp",
    }
)


@dataclass
class Config:
    """A config.json, with an account of what was read of it and what was not in it."""

    data: dict[str, Any]
    read: set[str] = field(default_factory=lambda: set(HARMLESS))
    notes: list[str] = field(default_factory=list)

    def get(self, *names: str, default: Any = _NEEDED) -> Any:
        """The first of the fields there is; else the default, which is noted, of the first name."""
        self.read |= set(names)
        for name in names:
            if name in self.data:
                return self.data[name]
        if default is _NEEDED:
            raise ValueError(f"config.json has no field {names[0]}")
        self.notes.append(f"config.json has no {names[0]}: taken as {default}")
        return default

    def whole(self, name: str, default: Any = _NEEDED) -> int:
        """A field that is a whole number of 1 or more."""
        value = self.get(name, default=default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"config.json: {name} is {value!r}; allowed: a whole number above 0")
        return value

    def only(self, name: str, *allowed: Any) -> None:
        """Raise ValueError where the field is there and says what our model cannot do."""
        self.read.add(name)
        if name in self.data and self.data[name] not in allowed:
            shown = " or ".join(str(v) for v in allowed)
            raise ValueError(f"config.json: {name} is {self.data[name]!r}; allowed: {shown}")


class Family(NamedTuple):
    """A kind of checkpoint.

    mixer: ours. layer: their names in a layer -> ours, in the mixer unless they begin with a dot.
    outer: the same around the layers. read: the fields of our spec. write: the fields of theirs.
    layers: what stands before the number of a layer. ffn: our channel mixer.
    """

    mixer: str
    layer: dict[str, str]
    outer: dict[str, str]
    read: Callable[[Config], dict[str, Any]]
    write: Callable[[LMSpec, Any], dict[str, Any]]
    layers: str = "model.layers."
    ffn: str = "swiglu"


def need(name: str, value: Any, wanted: Any, shown: str) -> None:
    """Raise ValueError where a field of our spec is not to be had in the format."""
    if value != wanted:
        raise ValueError(f"model.{name} is {value}; allowed in this format: {shown}")
