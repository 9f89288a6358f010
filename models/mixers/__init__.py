"""The sequence mixers a spec can name. To add one: write its file, add its line here.

A mixer is an nn.Module with a nested Spec. The spec has a `kind` of its own and

    check(d_model, rope)          raises ValueError where the layer cannot be built
    build(d_model, rope, eps, at) makes it; rope: models with rotary positions; eps: of norms in it
    cost(d_model, rope, T, at)    layers.Cost
    shared(d_model, layers)       None, or a module that the model has once for all layers of this
                                  kind: called without arguments it gives a row for each of them,
                                  which forward and step then take as a last argument

at, a base.Depth, is the layer's number among those of its kind. The module has, for x (B, T, d) and
a state that is a dict of tensors with the sequences first,

    forward(x, state=None, cu_seqlens=None, longest=None) -> (y, the state after | None)
    step(x (N, d), state, longest=None) -> y (N, d), with the state updated in place
    initial_state(N, device, capacity=0) -> state

and may have extend(x, state, cu_seqlens, before, longest) -> y, which is forward without gradients
and updates the state in place, where the state after is more than is worth a copy.

longest, a number that the host knows, is at least the tokens of the longest sequence after the
call, and before before it; without longest a mixer that wants it may wait for the device. capacity
is the tokens that a state which grows has room for from the start. Weights that do not begin as
`build_lm` draws them are set by a method start() of the module that has them.
"""

from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import BeforeValidator, Field

from glactl.models.mixers.abc import ABC
from glactl.models.mixers.attention import Attention
from glactl.models.mixers.conv import Conv
from glactl.models.mixers.gla import GLA
from glactl.models.mixers.gsa import GSA
from glactl.models.mixers.hgrn2 import HGRN2
from glactl.models.mixers.linear import LinearAttention
from glactl.models.mixers.mamba import Mamba
from glactl.models.mixers.retnet import RetNet
from glactl.models.mixers.transnormer import TransNormer

__all__ = ["KINDS", "MIXERS", "MixerSpec"]

_Spec: TypeAlias = (
    Attention.Spec  # softmax attention, the baseline
    | GLA.Spec  # gated linear attention
    | GSA.Spec  # gated slot attention
    | LinearAttention.Spec  # linear attention without a gate
    | RetNet.Spec  # retention
    | TransNormer.Spec  # TransNormerLLM's linear attention
    | HGRN2.Spec  # HGRN2
    | ABC.Spec  # attention with bounded memory control
    | Mamba.Spec  # Mamba's selective scan
    | Conv.Spec  # a gated short convolution, for hybrids
)

MIXERS = get_args(_Spec)
KINDS: tuple[str, ...] = tuple(m.model_fields["kind"].default for m in MIXERS)


def _named(value: Any) -> Any:
    """`gla` is short for {kind: gla}."""
    return {"kind": value} if isinstance(value, str) else value


MixerSpec: TypeAlias = Annotated[
    _Spec,
    Field(discriminator="kind"),
    BeforeValidator(_named, json_schema_input_type=_Spec | Literal[KINDS]),
]
