"""Processes that share the requests of one evaluation, as torchrun starts them.

Every rank knows all requests. Rank r of R answers groups r, r + R, r + 2 R, ... of the list sorted
by length, so all have like work, and then each learns the answers of all.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")
PATIENCE = timedelta(hours=12)  # a rank may wait so long for one that has longer texts


@dataclass(frozen=True)
class Ranks:
    """Rank `rank` of `world` processes."""

    rank: int = 0
    world: int = 1

    def mine(self, items: Sequence[T]) -> Sequence[T]:
        """The part of `items` that this rank answers."""
        return items[self.rank :: self.world]

    def together(self, answers: dict[str, Any]) -> dict[str, Any]:
        """The answers of all ranks; a rank that fails ends the others."""
        if self.world == 1:
            return answers
        parts: list[dict[str, Any]] = [{}] * self.world
        dist.all_gather_object(parts, answers)
        return {key: value for part in parts for key, value in part.items()}


ALONE = Ranks()


def join_ranks() -> Ranks:
    """The ranks that torchrun started, this one among them; ALONE without torchrun."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or "RANK" not in os.environ:
        return ALONE
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=PATIENCE)
    return Ranks(dist.get_rank(), dist.get_world_size())


def leave_ranks() -> None:
    """The end of what join_ranks began."""
    if dist.is_initialized():
        dist.destroy_process_group()
