"""A model on the whole validation split."""

import math
from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import nn

from glactl.device import Precision, products
from glactl.models.layers import to_device
from glactl.models.lm import LM
from glactl.tasks import Batch, Task
from glactl.train.distributed import ALONE, Group, settle
from glactl.train.loss import Objective
from glactl.train.positions import Positions
from glactl.train.slices import Slices
from glactl.train.stages import packed


@torch.no_grad()
def validate(
    model: LM,
    task: Task,
    batch_size: int,
    device: torch.device,
    stopped: Callable[[], bool] = lambda: False,
    precision: Precision = "fp32",
    called: nn.Module | None = None,
    group: Group = ALONE,
) -> dict[str, float] | None:
    """The model on the whole validation split, which the processes of `group` share.

    Args:
        model: in any mode; left in evaluation mode.
        task: the data.
        batch_size: rows of a batch.
        device: where the model is.
        stopped: asked before each batch; the same answer in all processes.
        precision: of products.
        called: the objective of `model` that processes share; None: one of its own.
        group: the processes.

    Returns:
        loss in nats a target; ppl = exp(loss); accuracy, the share of targets that are the most
        likely token, in a mixture as in slices.py, with its slices; bpb, bits per byte of the
        text that the targets stand for, where the task counts bytes; the loss by position in text,
        see positions.py. None when told to stop meanwhile.
    """
    run = Objective(model) if called is None else called
    run.eval()
    sums, slices, places = torch.zeros(4, dtype=torch.float64), Slices(), Positions()
    for batch, counts in _shares(task.valid_batches(batch_size), group):
        if stopped():
            return None
        tokens, targets, bounds = packed(batch)
        with products(device, precision):
            losses, right = run(to_device(tokens, device), targets, bounds, True)
        if counts:
            found = [losses.double().sum().item(), int(right.sum()), len(losses)]
            sums += torch.tensor([*found, batch.n_bytes or 0], dtype=torch.float64)
            slices.add(batch, right)
            places.add(batch, losses)
    settle(run)
    loss, correct, count, n_bytes = group.sum(sums).tolist()
    mean = loss / max(count, 1)
    valid = {"loss": mean, "ppl": math.exp(min(mean, 700.0)), "accuracy": correct / max(count, 1)}
    valid |= slices.join(group.gathered(slices)).numbers()
    if n_bytes:
        valid["bpb"] = loss / math.log(2) / n_bytes
    places.sums = group.sum(places.sums)
    return valid | places.numbers()


def _shares(batches: Iterator[Batch], group: Group) -> Iterator[tuple[Batch, bool]]:
    """This process's batches, as many as each has; False of one that is another's."""
    while turn := list(islice(batches, group.world)):
        mine = group.rank < len(turn)
        yield turn[group.rank if mine else 0], mine
