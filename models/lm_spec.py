"""The spec of a language model: what `glactl.models.lm.build_lm` builds."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from glactl.models.layers import glu_hidden
from glactl.models.mixers import MixerSpec
from glactl.models.mixers.base import Depth
from glactl.models.mixers.gla import GLA
from glactl.models.spec import Spec


class LMSpec(Spec):
    """Shapes and kinds of a language model.

    mixer is one for all layers, or a list that is repeated over them. ffn is the channel mixer,
    ffn_hidden its inner width (None: about 8/3 d_model). positions: rope turns the queries and
    keys of attention, retnet and abc and touches no other mixer; learned adds a table of max_len
    rows to the embeddings. embedding_scale multiplies the token embeddings. short_conv is the width
    of a causal depthwise convolution in front of every mixer. vocab_size None is filled in from the
    data.
    """

    d_model: int = Field(128, ge=1)
    n_layers: int = Field(4, ge=1)
    mixer: MixerSpec | Annotated[list[MixerSpec], Field(min_length=1)] = GLA.Spec()
    vocab_size: int | None = Field(None, ge=1)
    ffn: Literal["swiglu", "glu", "none"] = "swiglu"
    ffn_hidden: int | None = Field(None, ge=1)
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = Field(1e-6, gt=0)
    positions: Literal["rope", "learned", "none"] = "rope"
    max_len: int | None = Field(None, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    embed_dropout: float = Field(0.0, ge=0, lt=1)
    tie_embeddings: bool = False
    embedding_scale: float = Field(1.0, gt=0)
    init_std: float | None = Field(None, gt=0)
    short_conv: int | None = Field(None, ge=2)

    @model_validator(mode="after")
    def _check(self) -> Self:
        cycle = self.mixer if isinstance(self.mixer, list) else [self.mixer]
        if self.n_layers % len(cycle):
            raise ValueError(
                f"n_layers {self.n_layers} is not a multiple of the {len(cycle)} mixers listed"
            )
        for mixer in cycle:
            try:
                mixer.check(self.d_model, self.rope)
            except ValueError as error:
                raise ValueError(f"mixer {mixer.kind}: {error}") from None
        if self.positions == "learned" and self.max_len is None:
            raise ValueError("positions learned needs max_len, the number of positions")
        if self.ffn == "none" and self.ffn_hidden is not None:
            raise ValueError(f"ffn_hidden is {self.ffn_hidden}, but ffn is none")
        return self

    @property
    def rope(self) -> bool:
        """Whether mixers with rotary positions turn their queries and keys."""
        return self.positions == "rope"

    @property
    def mixers(self) -> list[MixerSpec]:
        """The mixer of every layer."""
        cycle = self.mixer if isinstance(self.mixer, list) else [self.mixer]
        return cycle * (self.n_layers // len(cycle))

    @property
    def depths(self) -> list[Depth]:
        """Where every layer stands among the layers of its kind."""
        kinds = [mixer.kind for mixer in self.mixers]
        return [Depth(kinds[:i].count(kind), kinds.count(kind)) for i, kind in enumerate(kinds)]

    @property
    def hidden(self) -> int:
        """The inner width of the channel mixer, 0 where there is none."""
        return 0 if self.ffn == "none" else self.ffn_hidden or glu_hidden(self.d_model)

    @property
    def std(self) -> float:
        """The standard deviation of fresh weights."""
        return self.init_std or min(0.08, self.d_model**-0.5)

    @property
    def vocab(self) -> int:
        """vocab_size. Raises ValueError where it is not known yet."""
        if self.vocab_size is None:
            raise ValueError("vocab_size is not set; a model needs the number of its tokens")
        return self.vocab_size
