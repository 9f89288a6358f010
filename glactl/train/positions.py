"""Loss by position: how much a model gains from what it has read of a document so far.

The position of a target is the number of tokens of its document, or of its row where documents are
not packed, that stand before the token it is asked of. In the numbers of a validation "loss 64-127"
is the mean loss, nats a target, of those at positions 64 to 127; the bounds are 0, FIRST, 2 FIRST,
4 FIRST, ... A model that uses its whole past has losses that fall from part to part.

Source: perplexity by position, as in the GLA paper's test of longer texts (arXiv:2312.06635), which
has buckets of equal size.
"""

import torch
from torch import Tensor

from glactl.models.layers import layout
from glactl.tasks import Batch

FIRST = 64  # positions in the first two parts
PARTS = 32
PREFIX = "loss "


class Positions:
    """Sums over a validation split, filled batch by batch.

    sums: (PARTS, 2) float64, the losses and the targets of each part; those of several processes
    may be added up.
    """

    def __init__(self) -> None:
        self.sums = torch.zeros(PARTS, 2, dtype=torch.float64)

    def add(self, batch: Batch, losses: Tensor) -> None:
        """Count a batch; losses (targets asked for,), in their order.

        A batch of associative recall, whose positions are no text's, counts nothing.
        """
        if batch.pairs is not None:
            return
        asked = batch.targets.flatten() >= 0
        B, T = batch.tokens.shape
        place = layout(B, T, batch.cu_seqlens, asked.device).place[asked]
        part = torch.bucketize(place, FIRST * 2 ** torch.arange(PARTS - 1), right=True)
        counted = torch.stack([losses.double().cpu(), torch.ones(len(place)).double()], 1)
        self.sums.index_add_(0, part, counted)

    def numbers(self) -> dict[str, float]:
        """The mean losses; {} where all targets are in one part, or none came."""
        parts = [(i, x / n) for i, (x, n) in enumerate(self.sums.tolist()) if n]
        if len(parts) < 2:
            return {}
        return {f"{PREFIX}{FIRST * 2**i // 2 * (i > 0)}-{FIRST * 2**i - 1}": x for i, x in parts}


def without_positions(numbers: dict[str, float]) -> dict[str, float]:
    """The numbers of a validation but for these; for a line on a terminal."""
    return {name: value for name, value in numbers.items() if not name.startswith(PREFIX)}
