"""Accuracy on recall, over all rows and for each length and number of pairs.

For rows i with n_i targets, c_i of them right,

    accuracy = mean over the rows of c_i / n_i                                          (1)

so that in a mixture a row of 4 pairs counts as much as one of 256; where all rows have as many
pairs it is the share of right targets. (1) over the rows of L tokens and n pairs is a slice, in
the numbers of a validation under "accuracy L/n".

Source: (1) Zoology's released code since its mixtures (arXiv:2312.04927), which also cuts by pairs.
"""

from torch import Tensor

from glactl.tasks import Batch

PREFIX = "accuracy "


class Slices:
    """Counts of a validation split, filled batch by batch."""

    def __init__(self) -> None:
        self._counts: dict[tuple[int, int], list[int]] = {}  # (L, n) -> rows, targets, right ones

    def add(self, batch: Batch, right: Tensor) -> None:
        """Count a batch of rows in a table; right (targets asked for,) bool, in their order.

        A batch that names no pairs counts nothing.
        """
        if batch.pairs is None or batch.lengths is None:
            return
        row = (batch.targets >= 0).nonzero()[:, 0]
        kinds = list(zip(batch.lengths.tolist(), batch.pairs.tolist(), strict=True))
        hits = right.cpu()
        for kind in sorted(set(kinds)):
            mine = row.new_tensor([k == kind for k in kinds]).bool()
            counts = self._counts.setdefault(kind, [0, 0, 0])
            counts[0] += int(mine.sum())
            counts[1] += int(mine[row].sum())
            counts[2] += int(hits[mine[row]].sum())

    def join(self, others: "list[Slices]") -> "Slices":
        """All counts of `others`, batches of one split, in the place of these."""
        joined: dict[tuple[int, int], list[int]] = {}
        for other in others:
            for kind, counts in other._counts.items():
                before = joined.get(kind, [0, 0, 0])
                joined[kind] = [a + b for a, b in zip(before, counts, strict=True)]
        self._counts = joined
        return self

    def numbers(self) -> dict[str, float]:
        """The accuracy (1) and its slices; {} where all rows are of one kind, or none came."""
        if len(self._counts) < 2:
            return {}
        rows = sum(n for n, _, _ in self._counts.values())
        mean = sum(n * right / asked for n, asked, right in self._counts.values()) / rows  # (1)
        parts = {
            f"{PREFIX}{L}/{n}": right / asked for (L, n), (_, asked, right) in self._counts.items()
        }
        return {"accuracy": mean, **parts}


def of_slices(numbers: dict[str, float]) -> dict[str, float]:
    """The slices among the numbers of a validation, "L/n" -> accuracy."""
    return {k.removeprefix(PREFIX): v for k, v in numbers.items() if k.startswith(PREFIX)}
