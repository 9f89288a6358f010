"""Checkpoints that are written while the training goes on.

A save copies weights and moments to the memory of the host, which takes as long as that copy, and
leaves the rest to a thread: the files, their sums, the mark. One save is under way at a time; the
next one, and the end of a run, wait for it. What went wrong in the thread is raised at the next
`poll`, `save` or `wait`, so a run on a full disk ends, with all that was committed before.

One process, and each of DDP, has all tensors: the first one writes them. Of FSDP every process
writes its part through torch.distributed.checkpoint, over a gloo group of the saver's own, so that
its messages meet no others, and the first one commits when all parts are durable.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from glactl import checkpoints


class Saver:
    """Saves into one folder.

    Args:
        folder: of the checkpoints.
        keep: the newest so many stay.
        every: and those of multiples of it; None: no others.
        lead: whether this process commits.
        together: the processes with parts of one model; None: this one has all of it.
        told: called with the step and the seconds since the save began, once it is committed.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        every: int | None = None,
        lead: bool = True,
        together: dist.ProcessGroup | None = None,
        told: Callable[[int, float], None] = lambda step, seconds: None,
    ) -> None:
        self.folder, self.keep, self.every = folder, keep, every
        self.lead, self.together, self.told = lead, together, told
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._last: int | None = None  # processes agree on it, as they may not on what is there

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        position: dict[str, Any],
    ) -> Path:
        """Begin to commit the state after `step`; where it will be.

        A checkpoint of this step that is committed already is left as it is.

        Raises:
            OSError: the save before failed.
        """
        self.wait()
        path = self.folder / f"step-{step:06}"
        there = self.together is None and (path / "COMMITTED").exists()
        if there or step == self._last or not (self.lead or self.together):
            return path
        self._last = step
        began = time.monotonic()
        found = checkpoints.states(model, optimizer)
        kept = {name: BlockingAsyncStager().stage(state) for name, state in found.items()}

        def work() -> None:
            try:
                checkpoints.commit(path, kept, position, self.together)
                if self.lead:
                    checkpoints.prune(self.folder, self.keep, self.every)
                    self.told(step, time.monotonic() - began)
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=work, name=f"save-{step}")
        self._thread.start()
        return path

    def poll(self) -> None:
        """Raise what went wrong, without waiting."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is under way; raises what went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
