"""The loss of a micro-batch, with logits that are never all there at once.

For hidden states h_i (d), the head's matrix W (V, d), targets t_i, i = 1 .. n:

    z_i = W h_i,   L = sum_i logsumexp(z_i) - z_i[t_i]                                 (1)
    dz_i = softmax(z_i) - onehot(t_i),   dh_i = W^T dz_i,   dW = sum_i dz_i h_i^T      (2)

n V logits in fp32 are 2 GiB at n = 16,384, V = 32,000, more than the weights of the model. As L is
one number, (2) is known in the forward pass up to one factor; so rows are taken in chunks of at
most LARGEST logits, and of each only dh and its share of dW are kept. Products are of autocast's
type, logits rounded to it as without chunks; softmax, L and dW are fp32 or wider.

`auto` takes chunks where there is more than one. `liger` is the same idea in Liger's kernels
(Hsu et al. 2024, arXiv:2410.10989), where that package is installed.
"""

from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glactl.models.layers import to_device, wide
from glactl.models.lm import LM
from glactl.models.losses import token_losses
from glactl.train.layers import compile_alike

Kind = Literal["auto", "whole", "chunked", "liger"]

IGNORED = -100
LARGEST = 2**26  # logits of a chunk, 256 MiB in fp32


class Objective(nn.Module):
    """The summed loss of a model as a module, which processes can share (see distributed.py)."""

    def __init__(self, lm: LM, kind: Kind = "auto", compiled: bool = False) -> None:
        super().__init__()
        self.lm, self.kind, self.compiled = lm, kind, compiled

    def forward(
        self, tokens: Tensor, targets: Tensor, bounds: Tensor | None = None, tell: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Read tokens and compare with targets.

        Args:
            tokens: (B, T) int64, on the model's device.
            targets: (B, T) int64, below 0 where nothing is asked. On the CPU those alone cost
                logits, and no GPU is waited for; on a GPU all do, in shapes that do not change.
            bounds: (N + 1,), of packed documents.
            tell: each loss, and whether the target is the most likely token; no gradients.

        Returns:
            () fp32 or wider, in nats; with `tell` (n,) and (n,) bool of the targets asked for.
        """
        targets, asked = targets.flatten(), None
        if targets.device.type == "cpu":
            places = (targets >= 0).nonzero().squeeze(-1)
            if len(places) < len(targets):
                targets, asked = targets.index_select(0, places), to_device(places, tokens.device)
        hidden, _ = self.lm(tokens, cu_seqlens=bounds, asked=asked)
        hidden = hidden.view(-1, hidden.shape[-1])
        if tell:
            return self._told(hidden, targets)
        return self.total(hidden, to_device(targets, hidden.device))

    def total(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The summed loss of hidden states (n, d) with targets (n,) on their device."""
        weight = self.lm.head.weight
        many = len(targets) * len(weight) > LARGEST
        if self.kind == "liger":
            return _liger()(weight, hidden, targets.masked_fill(targets < 0, IGNORED))
        if self.kind == "chunked" or (self.kind == "auto" and many):
            return chunked_loss(hidden, weight, targets, self.compiled)
        logits = self.lm.logits(hidden)
        logits, targets = logits.to(wide(logits.dtype)), targets.masked_fill(targets < 0, IGNORED)
        return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none").sum()  # (1)

    def _told(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        rows = max(LARGEST // len(self.lm.head.weight), 1)
        pairs = zip(hidden.split(rows), targets.split(rows), strict=True)
        found = [token_losses(self.lm, h, t, correct=True) for h, t in pairs]
        losses, right = (torch.cat(parts) for parts in zip(*found, strict=True))
        return losses, right


def chunked_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, compiled: bool = False, largest: int = LARGEST
) -> Tensor:
    """(1), with the gradients (2).

    Args:
        hidden: (n, d).
        weight: (V, d).
        targets: (n,) int64, below 0 where nothing is asked.
        compiled: what is element-wise goes through torch.compile.
        largest: logits of a chunk.

    Returns:
        () in fp32 or wider, once differentiable.
    """
    loss: Tensor = _Chunked.apply(hidden, weight, targets, compiled, largest)
    return loss


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, compiled: bool, largest: int
    ) -> Tensor:
        n, V, kind = len(targets), len(weight), hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        chunks = max(-(-n * V // largest), 1)
        slope = _compiled_slope() if compiled else _slope
        with torch.autocast(kind, enabled=False):
            W, loss = weight.to(dtype), hidden.new_zeros((), dtype=wide(dtype))
            dh, dW = torch.empty_like(hidden), torch.zeros_like(weight, dtype=wide(weight.dtype))
            rows = max(-(-n // chunks), 1)
            for at in range(0, n, rows):
                h = hidden[at : at + rows].to(dtype)
                part, dz = slope(h @ W.t(), targets[at : at + rows])
                loss = loss + part
                dh[at : at + rows] = dz @ W  # (2)
                dW += _product(dz.t(), h)
        ctx.save_for_backward(dh, dW)
        ctx.dtypes = hidden.dtype, weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        dh, dW = ctx.saved_tensors
        g = grads[0]
        one, two = ctx.dtypes
        return (dh * g).to(one), (dW * g).to(two), None, None, None


def _slope(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of losses of logits z (m, V), and dz of (2) in z's type."""
    wider, asked = z.to(wide(z.dtype)), targets >= 0
    target = targets.clamp(min=0)[:, None]
    total = wider.logsumexp(-1, keepdim=True)
    loss = ((total - wider.gather(-1, target)).squeeze(-1) * asked).sum()  # (1)
    hot = torch.arange(z.shape[-1], device=z.device) == target
    dz = ((wider - total).exp() - hot.to(wider.dtype)) * asked[:, None]  # (2)
    return loss, dz.to(z.dtype)


@cache
def _compiled_slope() -> Any:
    return compile_alike(_slope, dynamic=False)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b, its sums not rounded to the type of a and b where the device's library can."""
    if a.device.type == "cuda" and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).to(wide(a.dtype))


@cache
def _liger() -> Any:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
