"""The optimizer of OptimSpec: the learning rate, the groups of weights, the clipping."""

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from glactl.spec import OptimSpec


def learning_rate(spec: OptimSpec, step: int, steps: int) -> float:
    """The rate of step number `step` (from 0) of `steps`; see OptimSpec."""
    if step < spec.warmup_steps:
        return spec.lr * (step + 1) / spec.warmup_steps
    low = spec.lr * spec.lr_min_ratio
    if spec.schedule == "cosine":
        done = (step + 1 - spec.warmup_steps) / max(steps - spec.warmup_steps, 1)
        return low + (spec.lr - low) * (1 + math.cos(math.pi * done)) / 2
    if spec.schedule == "wsd":
        fall = max(round(spec.decay_fraction * steps), 1)
        return spec.lr - (spec.lr - low) * max(step + 1 - (steps - fall), 0) / fall
    return spec.lr


def make_optimizer(model: nn.Module, spec: OptimSpec) -> torch.optim.AdamW:
    """AdamW in two groups: weights of two or more dimensions decay, all others do not, and neither
    do those that a module names in `undecayed`."""
    spared = {id(getattr(m, name)) for m in model.modules() for name in getattr(m, "undecayed", ())}
    weights = [p for p in model.parameters() if p.ndim >= 2 and id(p) not in spared]
    others = [p for p in model.parameters() if p.ndim < 2 or id(p) in spared]
    groups = [
        {"params": weights, "weight_decay": spec.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=spec.lr, betas=spec.betas, eps=spec.eps, fused=True
    )


def clip(model: nn.Module, largest: float | None) -> Tensor:
    """Scale the whole gradient down to the norm `largest`, if there is one; its norm () before.

    Of parameters that several processes have parts of, it is the norm of all. A gradient whose norm
    is not finite stays as it is, so that it can be looked at. Nothing waits.
    """
    limit = math.inf if largest is None else largest
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    found = nn.utils.get_total_norm(grads)
    norm = found.full_tensor() if isinstance(found, DTensor) else found
    nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm.nan_to_num(0, 0, 0))
    return norm


def update(optimizer: torch.optim.Optimizer, loss: Tensor, norm: Tensor) -> None:
    """Take the step of a fused optimizer where loss () and norm () are finite; nothing waits.

    It is told what GradScaler tells it: at 1 weights, moments and counts stay as they are.
    """
    optimizer.found_inf = (~(loss + norm).isfinite()).float()  # type: ignore[attr-defined]
    optimizer.step()
