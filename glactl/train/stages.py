"""The stages of a run: matching layers, where the spec asks for it, and training.

Step s of a run, counted from 0, is one of matching while s < init.match.steps, else one of training
with number s - init.match.steps for its learning rate. Both draw batch s of the data, go through
the same loop and are resumed from the same checkpoints; each has an optimizer of its own. A stage
of training begins from weights alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from glactl.convert.original import Original, find_original
from glactl.device import products
from glactl.init import agree
from glactl.models.layers import to_device
from glactl.models.lm import LM, Block
from glactl.spec import OptimSpec, RunSpec
from glactl.tasks import Batch
from glactl.train.loss import Objective
from glactl.train.match import distance, teachers
from glactl.train.optim import make_optimizer
from glactl.train.transfer import calibrate, fingerprint, transfer


@dataclass(frozen=True)
class Stage:
    """Steps first to last - 1.

    optim: of its learning rate, over its own steps. module: has the parameters that move. loss: of
    a micro-batch, given the targets of the step and its number of micro-batches; these sum up.
    objective: of training, the module that the loss goes through.
    """

    name: str
    first: int
    last: int
    optim: OptimSpec
    module: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[Batch, int, int], Tensor]
    objective: nn.Module | None = None


def stage_at(
    step: int,
    spec: RunSpec,
    lm: LM,
    find: Callable[[], Original],
    copied: frozenset[str],
    wrap: Callable[[Objective], nn.Module] = lambda objective: objective,
) -> Stage:
    """The stage of step number `step`.

    Args:
        step: of the run, from 0.
        spec: of the run.
        lm: the model; which of its parameters have gradients is set.
        find: gives the checkpoint that the run began with, which matching needs.
        copied: the names of the weights that come from there.
        wrap: gives what stands in the place of the objective of training, before there is an
            optimizer.
    """
    match, device = None if spec.init is None else spec.init.match, lm.device
    begun = 0 if match is None else match.steps
    lm.requires_grad_(True)
    if match is None or step >= begun:
        objective = wrap(Objective(lm, spec.train.loss, spec.train.compile))
        device = lm.device  # where the weights are now

        def loss(batch: Batch, targets: int, parts: int) -> Tensor:
            tokens, wanted, bounds = packed(batch)
            with products(device, spec.train.precision):
                total: Tensor = objective(to_device(tokens, device), wanted, bounds)
            return total / max(targets, 1)

        optimizer = make_optimizer(lm, spec.optim)
        return Stage("train", begun, spec.steps, spec.optim, lm, optimizer, loss, objective)
    attention = teachers(lm, find())
    for name, p in lm.named_parameters():
        p.requires_grad_(match.moves == "mixer" or name not in copied)
    mixers = nn.ModuleList([cast(Block, lm.blocks[i]).mixer for i in attention])
    update = {"lr": match.lr, "warmup_steps": match.warmup_steps}
    optim = spec.optim.model_copy(update=update)

    def gap(batch: Batch, targets: int, parts: int) -> Tensor:
        tokens, _, bounds = packed(batch)
        with products(device, spec.train.precision):
            return distance(lm, attention, to_device(tokens, device), bounds) / parts

    return Stage("match", 0, begun, optim, mixers, make_optimizer(mixers, optim), gap)


def packed(batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens, targets and bounds of a batch; packed documents are one row, with their bounds."""
    if batch.cu_seqlens is None:
        return batch.tokens, batch.targets, None
    return batch.tokens.reshape(1, -1), batch.targets.reshape(1, -1), batch.cu_seqlens


class Source:
    """The checkpoint that the run of `spec` begins with; it is read when it is needed.

    wrap: as of `stage_at`. copied: the weights that come from there. then: what a resumed run has
    noted of it.
    """

    def __init__(
        self,
        spec: RunSpec,
        wrap: Callable[[Objective], nn.Module] = lambda objective: objective,
    ) -> None:
        self.spec, self.wrap = spec, wrap
        self.copied: frozenset[str] = frozenset()
        self.then: dict[str, str] | None = None
        self._found: Original | None = None

    def stage(self, step: int, lm: LM) -> Stage:
        """The stage of this step; its optimizer is new."""
        return stage_at(step, self.spec, lm, self._original, self.copied, self.wrap)

    def begin(self, lm: LM, batch: Batch) -> dict[str, Any]:
        """Give `lm` the weights to start with, fitted on a batch; the record of both.

        Raises:
            ValueError: the checkpoint and the spec do not agree, or it has other weights.
        """
        assert self.spec.init is not None
        original = self._original()
        agree(self.spec, original)
        start = transfer(lm, original)
        self.copied = frozenset(row.tensor for row in start.rows if row.action == "copied")
        fitted = {}
        if self.spec.init.calibrate and len(self.copied) < len(start.rows):
            lm.eval()
            fitted = calibrate(lm, original, batch)
        return start.record() | {"calibrated": fitted}

    def _original(self) -> Original:
        assert self.spec.init is not None
        if self._found is None:
            self._found = find_original(self.spec.init.source)
            assert self._found is not None
            if self.then is not None and fingerprint(self._found) != self.then["fingerprint"]:
                raise ValueError(
                    f"init.from {self.spec.init.source} has other weights than those that the run "
                    "began with"
                )
        return self._found
