"""A greedy step, from the embedding of one token of each row to that of the next.

    h = e(x)   h = layers(h)   x = the first j of the largest (W norm(h))_j                (1)

The end of one step is the beginning of the next, so what `LM.step` and a draw do round the layers
in some ten launches is two here, three of more rows (`glactl.kernels.rows.greedy_rows`). On an
H100, d 1024, vocabulary 32,000, bf16, the ten took 52 us of a step of one row; the bytes of W alone
take 22. Of 64 rows the draw, the counts and the embedding took 27 us in seven launches.
"""

from torch import Tensor

from glactl.kernels.rows import Next, greedy_rows
from glactl.models.layers import RMSNorm
from glactl.models.lm import LM, LMState
from glactl.models.sampling import Sampling


class Greedy:
    """(1) over buffers that stay where they are.

    Args:
        lm: the model, in evaluation mode; one that it `takes`.
        token: x, (N,) int64, drawn but not read yet; then the last token drawn.
        position: (N,) int64, the tokens read.
        made: (N, places) int64, which collects the tokens.
        slot: (N,) int64, the place in made of the next one.
        vocab: ids below it may be drawn; None: all that the model has.
    """

    def __init__(
        self, lm: LM, token: Tensor, position: Tensor, made: Tensor, slot: Tensor,
        vocab: int | None,
    ) -> None:  # fmt: skip
        assert isinstance(lm.norm, RMSNorm)
        self._lm, self._head = lm, lm.head.weight[:vocab]
        self._norm, self._scale = lm.norm, lm.spec.embedding_scale
        h = self._scale * lm.embed(token).detach()
        self._into = Next(token, made, slot, position, h)

    @staticmethod
    def takes(lm: LM, sampling: Sampling) -> bool:
        """Whether steps are (1): the draw looks for nothing but the largest logit, and the model
        has the norm and no more than an embedding before its layers."""
        return isinstance(lm.norm, RMSNorm) and lm.positions is None and sampling.largest

    def begin(self, token: Tensor) -> None:
        """Go on from other tokens, of the first rows or of all."""
        n = len(token)
        self._into.token[:n].copy_(token)
        self._into.h[:n].copy_(self._scale * self._lm.embed(token))

    def __call__(self, state: LMState) -> None:
        """One step; the layers' states and the buffers are updated in place."""
        h = self._lm.step_layers(self._into.h, state)
        greedy_rows(
            h, self._head, norm=self._norm.weight, eps=self._norm.eps,
            embedding=self._lm.embed.weight, scale=self._scale, into=self._into,
        )  # fmt: skip
