"""Batches of associative recall made where the model is, for steps captured in a CUDA graph.

Step s takes rows s B, ..., s B + B - 1 of the epochs, those of `MQARTask.train_batch(s, B)`. With N
rows an epoch, of which those of segment i begin at f_i, row r is number

    order[e mod 2, r mod N - f_i],   e = r div N                                         (1)

of its segment. The number of the step is read on the device, and so are the orders of two epochs,
all that a batch can reach; the host puts the next one there when it comes near.
"""

import numpy as np
import torch
from torch import Tensor

from glactl.models.layers import to_device
from glactl.tasks.mqar import MQARTask, rows_of


class DeviceBatches:
    """The training batches of `task` on `device`.

    Args:
        task: what to draw.
        batch_size: B, rows a step.
        device: where.
    """

    def __init__(self, task: MQARTask, batch_size: int, device: torch.device) -> None:
        self._task, self.batch_size, self._device = task, batch_size, device
        parts = range(len(task.spec.segments("train")))
        self._rows = [rows_of(task.spec, task.seed, "train", i, device) for i in parts]
        self._first = np.cumsum([0, *(part.rows for part in task.spec.segments("train"))])
        self._number = torch.arange(batch_size, device=device)
        self._orders = [self._empty(i) for i in parts] if task.spec.shuffle else None
        self._held: list[list[int | None]] = [[None, None] for _ in parts]  # epochs in each order

    def segment(self, step: int) -> int | None:
        """That of all rows of the step; None where they are of several, or of over two epochs."""
        first = step * self.batch_size
        if len(self._rows) == 1:
            return 0 if self.batch_size <= self._task.n_train else None
        place = first % self._task.n_train
        found = int(np.searchsorted(self._first, place, side="right")) - 1
        return found if place + self.batch_size <= self._first[found + 1] else None

    def prepare(self, step: int, segment: int) -> None:
        """Put the orders of the step's rows on the device; before `draw`, and in no graph."""
        if self._orders is None:
            return
        first = step * self.batch_size
        last = first + self.batch_size - 1
        places = np.arange(self._orders[segment].shape[1])
        for epoch in range(first // self._task.n_train, last // self._task.n_train + 1):
            if self._held[segment][epoch % 2] != epoch:
                order = torch.from_numpy(self._task.order(segment, epoch, places))
                self._orders[segment][epoch % 2].copy_(to_device(order, self._device))
                self._held[segment][epoch % 2] = epoch

    def draw(self, step: Tensor, segment: int) -> tuple[Tensor, Tensor, Tensor]:
        """The rows of a step, all of one segment.

        Args:
            step: (1,) int64 on the device, the number of the step, which `prepare` was told.
            segment: as `segment` says.

        Returns:
            tokens (B, L), the indices (B n,) of what is asked in the B L places laid end to end,
            ascending, and the targets there (B n,).
        """
        row = step * self.batch_size + self._number
        n_train = self._task.n_train
        epoch, place = row.div(n_train, rounding_mode="floor"), row % n_train
        number = place - int(self._first[segment])
        if self._orders is not None:
            order = self._orders[segment]
            number = order.flatten()[epoch % 2 * order.shape[1] + number]  # (1)
        tokens, asked, wanted = self._rows[segment](number)
        asked = asked + self._number[:, None] * tokens.shape[1]
        return tokens, asked.flatten(), wanted.flatten()

    def _empty(self, segment: int) -> Tensor:
        rows = self._first[segment + 1] - self._first[segment]
        return torch.zeros(2, int(rows), dtype=torch.int64, device=self._device)
