"""What to tell of a step that went wrong: where numbers cease to be finite, what fills the memory.

Numbers that are not finite spread: forwards to all that follows, backwards to all that came before.
So where the loss is not finite, the micro-batches are read once more, and the first module whose
output is not finite is named, with the rows whose losses are not; and where only the gradient is
not, the last parameter, in the model's order, whose gradient is not.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from glactl.device import products
from glactl.models.layers import to_device
from glactl.models.lm import LM
from glactl.spec import RunSpec
from glactl.train.distributed import Group, settle
from glactl.train.feed import Portion
from glactl.train.layers import plain
from glactl.train.stages import packed

Fault = dict[str, Any]
MOST = 8  # rows that are named


def not_finite(module: nn.Module, group: Group) -> tuple[str, ...]:
    """The parameters whose gradient is not finite in some process, in the model's order."""
    bad = {name for name, p in module.named_parameters() if _bad(p.grad)}
    everywhere = set().union(*group.gathered(bad))
    return tuple(name for name, _ in module.named_parameters() if name in everywhere)


def _bad(x: Tensor | None) -> bool:
    local = x.to_local() if isinstance(x, DTensor) else x
    return local is not None and not bool(local.isfinite().all())


@torch.no_grad()
def first_fault(
    spec: RunSpec, lm: LM, called: nn.Module, portion: Portion, device: torch.device, group: Group
) -> Fault:
    """Read a portion again and find where it ceases to be finite.

    Args:
        spec: of the run.
        lm: the model.
        called: its objective, as processes share it.
        portion: of the step.
        device: where the model is.
        group: the processes, which all call this.

    Returns:
        "module", the first one whose output is not finite, and "rows" of the global batch, from 0;
        {} where all is finite.
    """
    found: list[Fault] = []
    micro = spec.rows // portion.parts
    lm.eval()  # without dropout, which makes nothing infinite that was not
    for m, batch in portion.batches:
        tokens, targets, bounds = packed(batch)
        with plain(lm), _Watch(lm) as watch, products(device, spec.train.precision):
            losses, _ = called(to_device(tokens, device), targets, bounds, True)
        bad = (~losses.isfinite()).cpu().nonzero().squeeze(-1)
        asked = (targets.flatten() >= 0).nonzero().squeeze(-1)
        rows = (asked[bad] // batch.tokens.shape[-1]).unique() + m * micro
        if watch.first or len(rows):
            found.append({"module": watch.first or "the loss", "rows": rows.tolist()})
    settle(called)
    everywhere = [fault for part in group.gathered(found) for fault in part]
    if not everywhere:
        return {}
    rows_of = sorted({row for fault in everywhere for row in fault["rows"]})
    return {"module": everywhere[0]["module"], "rows": rows_of}


class _Watch:
    """Looks at the outputs of all modules of a model; first: the name of the first bad one."""

    def __init__(self, lm: LM) -> None:
        self.lm, self.first = lm, ""
        self.hooks: list[Any] = []

    def __enter__(self) -> "_Watch":
        for name, module in self.lm.named_modules():
            self.hooks.append(module.register_forward_hook(self._look(name or "the model")))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _look(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            parts = output if isinstance(output, tuple) else (output,)
            if not self.first and any(isinstance(x, Tensor) and _bad(x) for x in parts):
                self.first = name

        return hook


def in_words(fault: Fault, bad: tuple[str, ...]) -> str:
    """A fault of the forward pass, or of gradients, for people."""
    if fault:
        rows = ", ".join(map(str, fault["rows"][:MOST]))
        more = len(fault["rows"]) - MOST
        shown = f" in rows {rows}{f' and {more} more' if more > 0 else ''}" if rows else ""
        return f"the first output that is not finite is that of {fault['module']}{shown}"
    if bad:
        return f"the backward pass ceases to be finite at {bad[-1]}"
    return "no single number is infinite, their sum is"
