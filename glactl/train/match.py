r"""Layers taught to give what others gave: the first stage of a transfer.

In a model in which mixers f_l stand in the place of the attention layers g_l of an original, with
h the original's own hidden states and norm, ffn its other parts, which both have,

    x_l = norm(h),   h <- h + g_l(x_l),   h <- h + ffn(norm(h))                        (1)
    loss = mean_l  sum |f_l(x_l) - g_l(x_l)|^2 / sum |g_l(x_l)|^2                      (2)

with the sums over all tokens of a micro-batch. No f_l sees what another one gave, so all layers
learn at once, in one pass; a loss of 1 is that of layers that give nothing. Layers of attention
that were kept are not in (2).

Source: layers matched one by one on the original's inputs, as in Zhang et al. 2024 (LoLCATs),
arXiv:2410.10254, Sec. 3.2, where only feature maps move.

Cost: memory for the weights of all g_l; per token their forward pass, and forward and backward of
all f_l.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from glactl.convert.original import Original
from glactl.models.layers import State
from glactl.models.lm import LM, Block
from glactl.models.mixers.attention import Attention


class Pair(nn.Module):
    """A layer in the place of another one: gives what that one gives, and compares the two.

    After a call, distance is the layer's term of (2), and gain the factor by which what the other
    layer gave is larger, root mean squares over all tokens.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher
        self.distance = self.gain = torch.zeros(())

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        cu_seqlens: Tensor | None = None,
        longest: int | None = None,
    ) -> tuple[Tensor, None]:
        """(B, T, d) -> (B, T, d), the teacher's; there is no state."""
        with torch.no_grad():
            target: Tensor = self.teacher(x, None, cu_seqlens, longest)[0]
        with torch.enable_grad():
            y = self.student(x.detach(), None, cu_seqlens, longest)[0]
            y, target = y.to(x.dtype), target.to(x.dtype)  # products may be narrower
            size = target.square().sum().clamp(min=torch.finfo(target.dtype).tiny)
            self.distance = (y - target).square().sum() / size
        self.gain = (size / y.detach().square().sum()).sqrt()
        return target, None


def teachers(lm: LM, original: Original) -> dict[int, Attention]:
    """The original's attention in every layer of `lm` that has another mixer, by its number."""
    found: dict[int, Attention] = {}
    for i, (mine, theirs) in enumerate(zip(lm.spec.mixers, original.spec.mixers, strict=True)):
        if mine.kind == theirs.kind:
            continue
        assert isinstance(theirs, Attention.Spec)
        with torch.device("meta"):
            layer = Attention(lm.spec.d_model, theirs, original.spec.rope)
        layer = layer.to_empty(device="cpu").requires_grad_(False)
        for name, x in layer.state_dict().items():
            x.copy_(original.read(f"blocks.{i}.mixer.{name}"))
        found[i] = layer.to(lm.device)
    return found


@contextmanager
def paired(lm: LM, attention: dict[int, Attention]) -> Iterator[list[Pair]]:
    """Within, `lm` computes (1), and the pairs have what their layers made of it."""
    blocks = {i: cast(Block, lm.blocks[i]) for i in attention}
    pairs = {i: Pair(blocks[i].mixer, layer) for i, layer in attention.items()}
    try:
        for i, pair in pairs.items():
            blocks[i].mixer = pair  # type: ignore[assignment]
        yield list(pairs.values())
    finally:
        for i, pair in pairs.items():
            blocks[i].mixer = pair.student  # type: ignore[assignment]


def distance(
    lm: LM, attention: dict[int, Attention], tokens: Tensor, cu_seqlens: Tensor | None
) -> Tensor:
    """(2) of tokens (B, T), with gradients for the parameters of the new mixers alone."""
    with paired(lm, attention) as pairs:
        with torch.no_grad():
            lm(tokens, cu_seqlens=cu_seqlens)  # (1)
        return torch.stack([pair.distance for pair in pairs]).mean()  # (2)
