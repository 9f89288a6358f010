"""Batches by budget, and requests that begin alike.

A batch holds groups of rows up to a budget; one group that is larger is a batch alone. Batches are
as few as that allows, and much alike, so that none is left with a few rows. When memory runs out,
the budget becomes half of what the batch held, the batch is made again smaller, and the smaller
budget stays: nothing that was done is done twice. Groups come from the largest to the smallest, so
a machine with too little memory shows it in the first batch.

Rows that begin with the same tokens, as the answers to one question do, make a group: the model
reads what they share once, and goes on from there with each. Of rows with lengths n_i that share p
tokens

    sum_i n_i   tokens are read row by row,   p + sum_i (n_i - p)   as a group          (1)

at the price of a copy of the state for each row, so short beginnings are not shared.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

SHORTEST = 32  # tokens that are worth a copy of the state
GPU_TOKENS, CPU_TOKENS = 32_768, 16_384  # with fewer a GPU waits for the host


@dataclass(frozen=True)
class Group:
    """Rows, by index, whose first `shared` tokens are the same."""

    rows: tuple[int, ...]
    shared: int = 0


def alone(rows: Sequence[int]) -> list[Group]:
    """Every row in a group of its own."""
    return [Group((row,)) for row in rows]


def grouped(
    rows: Sequence[int],
    ids: Sequence[list[int]],
    most: Sequence[int],
    shortest: int = SHORTEST,
) -> list[Group]:
    """Rows in groups that share a beginning.

    Args:
        rows: indices into ids and most.
        ids: the tokens of each row.
        most: tokens of each row that may be shared, so that the rest is not empty.
        shortest: groups share at least so many tokens, 1 or more, and half of their longest row.

    Rows are taken in the order of their tokens; one joins the group before it if (1) then saves
    more than it did.
    """
    groups: list[Group] = []
    group: list[int] = []
    shared = 0

    def close() -> None:
        if group:
            groups.append(Group(tuple(group), shared if len(group) > 1 else 0))

    for row in sorted(rows, key=lambda r: ids[r]):
        if group:
            first = ids[group[0]]
            limit = min(most[row], most[group[0]] if len(group) == 1 else shared)
            common = _common(first, ids[row], limit)
            longest = max(len(ids[row]), *(len(ids[r]) for r in group))
            saved = (len(group) - 1) * shared
            if 2 * common >= longest and common >= shortest and len(group) * common > saved:
                group.append(row)
                shared = common
                continue
        close()
        group, shared = [row], 0
    close()
    return groups


def _common(a: Sequence[int], b: Sequence[int], limit: int) -> int:
    """How many tokens a and b begin with alike, at most `limit`."""
    n = min(len(a), len(b), limit)
    return next((i for i in range(n) if a[i] != b[i]), n)


class Budget:
    """How much a batch may hold, in any unit.

    Args:
        size: 1 or more.

    Attributes:
        size: as it is now.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"batch_tokens is {size}; allowed: 1 or more")
        self.size = size

    def run(
        self,
        groups: Sequence[Group],
        weight: Callable[[Group], int],
        do: Callable[[list[Group]], None],
        most: int | None = None,
        least: int | None = None,
    ) -> None:
        """Call do(batch) for all groups in batches, the heaviest first.

        Args:
            groups: in any order.
            weight: of a group, in the unit of the budget.
            do: works on one batch; it may end in an out-of-memory error at any place, and is then
                called again with fewer groups.
            most: rows in a batch of several groups; None: any number.
            least: `do` cuts a row into pieces of the budget, so one row alone is tried again while
                the budget is more than this; None: it is not.

        Raises:
            what `do` raises; the out-of-memory error of one row alone.
        """
        left = sorted(groups, key=weight)
        total, count = sum(map(weight, left)), sum(len(group.rows) for group in left)
        while left:
            # what the fewest batches that can hold all would hold each, if they were alike
            even = total / max(-(-total // self.size), 1 if most is None else -(-count // most))
            batch = [left.pop()]
            held, rows = weight(batch[0]), len(batch[0].rows)
            while left and held < even and held + weight(left[-1]) <= self.size:
                if most is not None and rows + len(left[-1].rows) > most:
                    break
                batch.append(left.pop())
                held, rows = held + weight(batch[-1]), rows + len(batch[-1].rows)
            try:
                do(batch)
            except Exception as error:
                whole = rows == 1 and (least is None or self.size <= least)
                if whole or not out_of_memory(error):
                    raise
            else:
                total, count = total - held, count - rows
                continue
            self.size = max(1, min(held, self.size) // 2)
            if len(batch) == 1 and rows > 1:
                batch = _halves(batch[0])
            left += reversed(batch)
            _give_back()


def budget(batch_tokens: int | None, device: torch.device) -> Budget:
    """Of so many tokens; None: GPU_TOKENS or CPU_TOKENS.

    Raises:
        ValueError: batch_tokens below 1.
    """
    most = GPU_TOKENS if device.type == "cuda" else CPU_TOKENS
    return Budget(most if batch_tokens is None else batch_tokens)


def _halves(group: Group) -> list[Group]:
    half = len(group.rows) // 2
    return [Group(group.rows[:half], group.shared), Group(group.rows[half:], group.shared)]


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out; the CPU's allocator tells it by its text alone."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def _give_back() -> None:
    """Memory of the failed attempt back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
