"""Training steps of a recall trial that the device takes by itself.

A step draws its rows where the model is, reads them, asks for logits at the n places of each row
that have a target and nowhere else, and goes on as the plain loop in train/loop.py does: loss,
gradient, clipping, AdamW at the rate of its number, a step that is not finite left out. On a CPU
the numbers are those of the plain loop, bit for bit. On a GPU one step is captured as a CUDA graph,
one for each segment of a mixture, and replayed; the host only seeds the dropout of each step and
looks at losses once in a while. Steps run as they are, without a graph, where

- their rows are of two segments, or the batch is cut into micro-batches, or
- an engine asks for values on the way, as the chunked ones do. The second step is taken with such
  questions forbidden, which tells before anything is captured.

Small models are bound by the memory that their element-wise operations pass through, so with
train.compile the layers of a captured step go through torch.compile, and the loss takes its chunks
(train/loss.py); where nothing is captured, nothing is compiled.

A rate in a graph is the fp32 rounding of that of `learning_rate`.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from glactl.device import products
from glactl.models.layers import to_device
from glactl.models.lm import build_lm
from glactl.models.steps import WARM, Graph, captures
from glactl.spec import RunSpec
from glactl.tasks.mqar import MQARTask
from glactl.tasks.mqar_device import DeviceBatches
from glactl.train.layers import plain, quicken
from glactl.train.loop import seeded
from glactl.train.loss import Kind, Objective
from glactl.train.optim import clip, learning_rate, make_optimizer, update
from glactl.train.stages import packed

BLOCK = 32  # the most steps between two looks at the losses


class TrialSteps:
    """A model, its optimizer and the steps taken so far.

    Args:
        spec: of the run, with model.vocab_size set.
        task: its data.
        device: where.
        capture: False takes every step as it is, on a GPU too.
    """

    def __init__(
        self, spec: RunSpec, task: MQARTask, device: torch.device, capture: bool = True
    ) -> None:
        self.spec, self.task, self.device = spec, task, device
        self.model = build_lm(spec.model, spec.seed, device=device)
        self.optimizer = make_optimizer(self.model, spec.optim)
        self.batches = DeviceBatches(task, spec.rows, device)
        self.step = 0
        wanted = capture and spec.train.capture is not False
        self.captured = wanted and captures(device) and spec.parts == 1
        self._at = torch.zeros(1, dtype=torch.int64, device=device)  # step, where a graph reads it
        self._found = torch.zeros(2, BLOCK, device=device)  # losses and norms, by step mod BLOCK
        self._table = self._rates() if self.captured else None
        self._rate = torch.zeros((), device=device)  # of this step, where there is a table
        self._graphs: dict[int, Graph] = {}
        self._taken: dict[int, int] = {}  # steps of each graph
        compiled = self.captured and spec.train.compile
        if compiled:  # of one function it keeps eight forms, and trials are more
            torch.compiler.reset()
        quicken(self.model, compiled, recompute=False, dynamic=False)
        kind: Kind = "chunked" if compiled else "whole"
        self._objective = Objective(self.model, kind, compiled)
        self._ready()

    def take(self, count: int) -> tuple[list[float], list[float]]:
        """Take `count` steps, at most BLOCK; waits for the device.

        Returns:
            the loss and the gradient's norm before clipping, of each; where one of them is not
            finite the step has changed nothing.
        """
        self.model.train()
        first = self.step
        for step in range(first, first + count):
            with seeded(self.device, self.spec.seed, step, 0):
                self._take(step)
            self.step += 1
        losses, norms = self._found.tolist()
        places = [step % BLOCK for step in range(first, first + count)]
        return [losses[i] for i in places], [norms[i] for i in places]

    def state(self) -> dict[str, Any]:
        """All that later steps depend on, as tensors and numbers."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state`; before the first step."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self._at.fill_(self.step)
        self._ready()

    def _ready(self) -> None:
        for group in self.optimizer.param_groups:
            group["capturable"] = self.captured

    def _rate_of(self, step: int) -> float:
        return learning_rate(self.spec.optim, step, self.spec.train.steps)

    def _rates(self) -> Tensor:
        """The rates of all steps, where a graph can read them."""
        rates = [self._rate_of(step) for step in range(self.spec.train.steps)]
        return torch.tensor(rates, device=self.device)

    def _take(self, step: int) -> None:
        segment = self.batches.segment(step)
        if segment is None or self.spec.parts > 1:
            with plain(self.model):  # its shapes may never come again
                self._pieces(step)
            return
        self.batches.prepare(step, segment)
        call = partial(self._whole, segment)
        if not self.captured:
            call()
            return
        if segment not in self._graphs:
            self._graphs[segment] = Graph(self.device)
        graph = self._graphs[segment]
        taken = self._taken[segment] = self._taken.get(segment, 0) + 1
        if taken != WARM:
            graph(call)
        elif not self._waits_for_nothing(graph, call):
            self.captured = False
            with seeded(self.device, self.spec.seed, step, 0):  # some was drawn already
                call()

    def _waits_for_nothing(self, graph: Graph, call: Callable[[], None]) -> bool:
        """Take the step before capture; False where it would wait for the device, not taken."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it may overlook some; the capture would not
            torch.cuda.set_sync_debug_mode("error")
        try:
            graph(call)
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            return False
        finally:
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.current_stream(self.device).synchronize()
        return True

    def _whole(self, segment: int) -> None:
        """A step with all rows of one segment, and no word from the host."""
        self.optimizer.zero_grad(set_to_none=True)
        tokens, asked, wanted = self.batches.draw(self._at, segment)
        with products(self.device, self.spec.train.precision):
            hidden, _ = self.model(tokens, asked=asked)
            loss = self._objective.total(hidden, wanted) / len(wanted)
        loss.backward()
        self._move(loss.detach())

    def _pieces(self, step: int) -> None:
        """A step of packed rows, or of micro-batches, as train/loop.py takes it."""
        self.optimizer.zero_grad(set_to_none=True)
        n = self.spec.parts
        rows = self.spec.rows // n
        batches = [self.task.train_batch(step * n + m, rows) for m in range(n)]
        count = sum(int((b.targets >= 0).sum()) for b in batches)
        total = torch.zeros((), device=self.device)
        for m, batch in enumerate(batches):
            with (
                seeded(self.device, self.spec.seed, step, m),
                products(self.device, self.spec.train.precision),
            ):
                tokens, targets, bounds = packed(batch)
                tokens = to_device(tokens, self.device)
                loss = self._objective(tokens, targets, bounds) / max(count, 1)
            loss.backward()
            total += loss.detach()
        self._move(total)

    def _move(self, loss: Tensor) -> None:
        """Clip the gradient and take the optimizer's step, unless something is not finite."""
        norm = clip(self.model, self.spec.optim.clip)
        if self._table is not None:
            self._rate.copy_(self._table.index_select(0, self._at).squeeze(0))
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate_of(self.step) if self._table is None else self._rate
        update(self.optimizer, loss, norm)
        place = self._at % BLOCK
        self._found.index_copy_(1, place, torch.stack([loss, norm])[:, None].float())
        self._at += 1
