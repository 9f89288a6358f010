"""Cross-entropies of a language model's hidden states, (3) of lm.py."""

from typing import Literal, overload

import torch.nn.functional as F
from torch import Tensor

from glactl.models.layers import to_device, wide
from glactl.models.lm import LM


@overload
def token_losses(
    lm: LM, hidden: Tensor, targets: Tensor, correct: Literal[False] = False
) -> Tensor: ...
@overload
def token_losses(
    lm: LM, hidden: Tensor, targets: Tensor, correct: Literal[True]
) -> tuple[Tensor, Tensor]: ...
def token_losses(
    lm: LM, hidden: Tensor, targets: Tensor, correct: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropies of the targets that are asked for.

    Args:
        lm: the model that hidden comes from.
        hidden: (..., d_model).
        targets: (...) int64; what follows each token, below 0 where nothing is asked. On the CPU,
            which is where they are made, a GPU is not waited for; on a GPU it is.
        correct: also tell whether a target is the most likely token.

    Returns:
        losses (n,) in nats, fp32 or wider, of the n targets of 0 or more in order; with `correct`
        also (n,) bool; on the device of hidden.

    Cost: logits, n * vocab_size, of the targets asked for alone.
    """
    asked = (targets.flatten() >= 0).nonzero().squeeze(-1)
    hidden, wanted = hidden.flatten(0, -2), targets.flatten()
    if len(asked) < len(wanted):
        hidden = hidden.index_select(0, to_device(asked, hidden.device))
        wanted = wanted.index_select(0, asked)
    wanted = to_device(wanted, hidden.device)
    logits = lm.logits(hidden)
    losses = F.cross_entropy(logits.to(wide(logits.dtype)), wanted, reduction="none")
    return (losses, logits.argmax(-1) == wanted) if correct else losses
