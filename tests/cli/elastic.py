"""A part of a run in one of several processes, for test_elastic.py: RUN, steps to take, fault."""

import sys

import torch

from glactl.models.lm import build_lm
from glactl.run import Run
from glactl.train import distributed
from glactl.train.distributed import joined
from glactl.train.loop import train


def poisoned(*args, **options):
    """A model whose gradient is infinite in every second backward pass."""
    model, count = build_lm(*args, **options), 0

    def hook(grad):
        nonlocal count
        count += 1
        return grad * torch.inf if count % 2 == 0 else grad

    model.blocks[1].mixer.out.weight.register_hook(hook)
    return model


def main():
    path, steps, fault = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    with joined("cpu") as (group, device):
        run = Run.open(path)
        if fault == "poison" and group.rank == 1:
            import glactl.train.loop

            glactl.train.loop.build_lm = poisoned
        if fault == "again":
            distributed.KEPT = 0
        resume = any((run.path / "checkpoints").iterdir())
        going = train(run.spec, device=device, run=run, resume=resume, group=group)
        for _ in range(steps):
            next(going)
        going.close()


if __name__ == "__main__":
    main()
