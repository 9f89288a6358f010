"""The batches of a step, and this process's share of them."""

from dataclasses import dataclass

import torch

from glactl.spec import RunSpec
from glactl.tasks import Batch, Task
from glactl.train.distributed import ALONE, Group, parts_of

AHEAD = 4  # global batches in the hash by which a resumed run shows that it reads the same data


@dataclass(frozen=True)
class Portion:
    """Micro-batches of one step, with their numbers among the `parts` of all processes.

    targets and tokens count those of all processes.
    """

    step: int
    parts: int
    batches: list[tuple[int, Batch]]
    targets: int
    tokens: int


class Feed:
    """Draws the steps of a run for one process.

    The rows of micro-batch m of step s are those that task.train_batch numbers s * parts + m, so a
    step has the same rows however it is cut and shared.
    """

    def __init__(self, spec: RunSpec, task: Task, group: Group = ALONE) -> None:
        self.task, self.group, self.rows = task, group, spec.rows
        self.steps = spec.steps
        self.parts = parts_of(spec.rows, spec.parts, group.world)
        self._next: Portion | None = None

    @property
    def micro(self) -> int:
        """Rows of a micro-batch."""
        return self.rows // self.parts

    def __call__(self, step: int) -> Portion:
        """The portion of step number `step`, from 0."""
        found, self._next = self._next, None
        return found if found is not None and found.step == step else self._draw(step)

    def ahead(self, step: int) -> None:
        """Draw a step that will be asked for next, while the device is busy."""
        if step < self.steps:
            self._next = self._draw(step)

    def hash(self, step: int) -> str:
        """32 hex digits of the next AHEAD global batches, or as many as there are, from `step`."""
        from glactl.tasks.packing import batch_hash

        last = min(step + AHEAD, self.steps)
        return batch_hash(self.task.train_batch(s, self.rows) for s in range(step, last))

    def _draw(self, step: int) -> Portion:
        mine = range(self.group.rank, self.parts, self.group.world)
        batches = [(m, self.task.train_batch(step * self.parts + m, self.micro)) for m in mine]
        counts = torch.tensor(
            [
                sum(int((b.targets >= 0).sum()) for _, b in batches),
                sum(b.tokens.numel() for _, b in batches),
            ]
        )
        targets, tokens = self.group.sum(counts).tolist()
        return Portion(step, self.parts, batches, targets, tokens)
