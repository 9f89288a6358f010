"""One step of the optimizer: as it is, or as a CUDA graph.

The loss is the sum of the targets' cross-entropies over their number in the whole step, however it
is cut; dropout draws from a generator seeded by (seed, step, micro-batch). A step whose loss or
gradient is not finite changes neither weights nor moments; the host asks for both numbers once it
has nothing else to tell the device.

Captured, a step is one graph where it is one micro-batch, else a graph for the first one, one for
each that adds to it, and one for clipping and update. The rate and the number of targets are read
where they lie on the device. The first WARM steps run as they are, on a stream of their own; the
second with questions from the host forbidden, so that what cannot be captured is known before
anything is. A captured rate is the fp32 rounding of that of `learning_rate`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from glactl.device import products
from glactl.models.layers import to_device
from glactl.models.lm import LM
from glactl.models.steps import WARM, Graph
from glactl.spec import RunSpec
from glactl.train.distributed import ALONE, Group, syncing
from glactl.train.faults import not_finite
from glactl.train.feed import Portion
from glactl.train.optim import clip, update
from glactl.train.stages import Stage


@dataclass(frozen=True)
class Result:
    """Of one step: the loss (nats a target), the gradient's norm before clipping.

    bad: parameters whose gradient is not finite, in the model's order.
    """

    loss: float
    norm: float
    bad: tuple[str, ...] = ()

    @property
    def finite(self) -> bool:
        """Whether weights have changed."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


class Stepper:
    """Takes the steps of one stage.

    Args:
        spec: of the run.
        lm: the model.
        stage: its loss and optimizer.
        device: where.
        group: the processes that share each step.
        stopped: asked between micro-batches of a single process.

    Attributes:
        reason: why steps are not captured; None while they are, or may be.
    """

    def __init__(
        self,
        spec: RunSpec,
        lm: LM,
        stage: Stage,
        device: torch.device,
        group: Group = ALONE,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self.spec, self.lm, self.stage, self.device = spec, lm, stage, device
        self.group, self.stopped = group, stopped
        self.reason = capturable(spec, stage, device, group)
        self._whole = None if self.reason else _Captured(spec, stage, device)

    def __call__(
        self, portion: Portion, rate: float, meanwhile: Callable[[], None] = lambda: None
    ) -> Result | None:
        """Take a step at this learning rate; `meanwhile` is done while the device works.

        Returns:
            None where this is a single process that is to stop, and nothing has changed.
        """
        self.lm.train()
        if self.stage.objective is not None:
            self.stage.objective.train()
        if self._whole is not None:
            try:
                return self._whole(portion, rate, meanwhile)
            except _NotCaptured as error:
                self.reason, self._whole = str(error), None
                self.stage.optimizer.zero_grad(set_to_none=True)
                self.stage.optimizer.found_inf = None  # type: ignore[attr-defined]
        return self._plain(portion, rate, meanwhile)

    def _plain(self, portion: Portion, rate: float, meanwhile: Callable[[], None]) -> Result | None:
        optimizer = self.stage.optimizer
        called = self.stage.module if self.stage.objective is None else self.stage.objective
        for group in optimizer.param_groups:
            group["lr"] = rate
        total = torch.zeros((), device=self.device)
        for i, (m, batch) in enumerate(portion.batches):
            if self.group.world == 1 and self.stopped():
                optimizer.zero_grad(set_to_none=True)
                return None
            last = i + 1 == len(portion.batches)
            with seeded(self.device, self.spec.seed, portion.step, m), syncing(called, last):
                loss = self.stage.loss(batch, portion.targets, portion.parts)
                (loss * self.group.world).backward()
            total += loss.detach()
        norm, total = clip(self.stage.module, self.spec.optim.clip), self.group.sum(total)
        update(optimizer, total, norm)
        meanwhile()
        found = Result(total.item(), norm.item())
        if not found.finite:
            found = replace(found, bad=not_finite(self.stage.module, self.group))
        optimizer.zero_grad(set_to_none=True)
        return found


def capturable(spec: RunSpec, stage: Stage, device: torch.device, group: Group) -> str | None:
    """Why steps of a stage cannot be captured; None where nothing is known against it.

    Raises ValueError where train.capture demands it and they cannot.
    """
    model = spec.model
    reason = None
    if device.type != "cuda":
        reason = f"there are no graphs on {device}"
    elif stage.objective is None:
        reason = "layers are being matched"
    elif group.world > 1:
        reason = f"there are {group.world} processes"
    elif model.dropout or model.embed_dropout:
        reason = "dropout draws anew in each step"
    elif spec.train.loss == "liger":
        reason = "Liger's loss asks the device for a count"
    if spec.train.capture is True and reason is not None and stage.objective is not None:
        raise ValueError(f"train.capture is true, but {reason}; allowed: auto or false")
    return "train.capture is false" if spec.train.capture is False else reason


class _NotCaptured(Exception):
    """The reason why a step was not taken as a graph; nothing has changed."""


class _Captured:
    def __init__(self, spec: RunSpec, stage: Stage, device: torch.device) -> None:
        assert stage.objective is not None
        self.spec, self.stage, self.device = spec, stage, device
        self.objective, self.optimizer = stage.objective, stage.optimizer
        self.rate, self.scale = (torch.zeros((), device=device) for _ in range(2))
        self.total, self.found = torch.zeros((), device=device), torch.zeros(2, device=device)
        self.tokens = self.targets = torch.empty(0)
        self.graphs: dict[str, Graph] = {}
        self.taken = 0

    def __call__(self, portion: Portion, rate: float, meanwhile: Callable[[], None]) -> Result:
        self._ready(portion)
        for group in self.optimizer.param_groups:
            group["capturable"], group["lr"] = True, self.rate
        self.rate.fill_(rate)
        self.scale.fill_(1 / max(portion.targets, 1))
        one = len(portion.batches) == 1
        with self._watched():
            for i, (_, batch) in enumerate(portion.batches):
                self.tokens.copy_(to_device(batch.tokens, self.device))
                self.targets.copy_(to_device(batch.targets, self.device))
                if one:
                    self._run("whole", self._all)
                elif i == 0:
                    self._run("first", self._first)
                else:  # captured after `first`, whose gradients it adds to
                    self._run("more", self._add, len(portion.batches) - 1)
            if not one:
                self._run("update", self._update)
        self.taken += 1
        meanwhile()
        loss, norm = self.found.tolist()
        found = Result(loss, norm)
        return found if found.finite else replace(found, bad=not_finite(self.stage.module, ALONE))

    def _ready(self, portion: Portion) -> None:
        """Take the shape of the first step; raises _NotCaptured where a later one has another."""
        shapes = {batch.tokens.shape for _, batch in portion.batches}
        if any(batch.cu_seqlens is not None for _, batch in portion.batches):
            raise _NotCaptured("documents are packed, a number of them that changes")
        if self.taken == 0:
            self.tokens = torch.zeros(max(shapes), dtype=torch.int64, device=self.device)
            self.targets = torch.zeros_like(self.tokens)
        if shapes != {self.tokens.shape}:
            raise _NotCaptured(f"batches of other shapes, {sorted(map(tuple, shapes))}")

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Within the last step before the capture, a question to the device is an error."""
        if self.taken + 1 != WARM or self.device.type != "cuda":
            yield
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            raise _NotCaptured("the host asks the device on the way") from error
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def _run(self, name: str, call: Callable[[], None], times: int = 1) -> None:
        """A call that each step makes so often."""
        if name not in self.graphs:
            self.graphs[name] = Graph(self.device, WARM * times)
        self.graphs[name](call)

    def _all(self) -> None:
        self._first()
        self._update()

    def _first(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.total.zero_()
        self._add()

    def _add(self) -> None:
        with products(self.device, self.spec.train.precision):
            loss: Tensor = self.objective(self.tokens, self.targets)
        loss = loss * self.scale
        loss.backward()
        self.total += loss.detach()

    def _update(self) -> None:
        norm = clip(self.stage.module, self.spec.optim.clip)
        update(self.optimizer, self.total, norm)
        self.found.copy_(torch.stack([self.total, norm]))


@contextmanager
def seeded(device: torch.device, *numbers: int) -> Iterator[None]:
    """torch's generators seeded by `numbers` within, and as they were afterwards."""
    seed = 0
    for n in numbers:  # a polynomial over a prime keeps (seed, step, micro-batch) apart
        seed = (seed * 1_000_003 + n) % (2**61 - 1)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
