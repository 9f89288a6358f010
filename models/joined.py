"""Products of one input with several matrices as one product, for steps and prompts on a GPU.

    y_i = W_i x, i = 1 .. n        (y_1, .., y_n) = (W_1; ..; W_n) x                   (1)

A step of one sequence takes as long as its weights take to be read, and some 2 us for each launch
besides, whatever it reads. So within a `Joined` a layer takes its whole step in as few launches as
its data allow (`glactl.kernels.rows`), for which the W_i of one input lie behind one another.

A module says what belongs together by a method together(), and asks by `whole`. What is joined is
kept with the module: 24 layers take the host 1 ms a context then, in place of 6.
"""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


def whole(first: nn.Module) -> Tensor | None:
    """(W_1; ..; W_n) of the layer that comes first, within a `Joined`; else None."""
    found: Tensor | None = getattr(first, "joined", None)
    return found


class Joined:
    """A context in which the products of `module` and its parts are joined; see `joined`.

    Args:
        module: the weights that are joined become slices of the joined matrix, for good.

    Cost: once, a copy of each joined matrix; no memory that lasts.
    """

    def __init__(self, module: nn.Module) -> None:
        self._wholes: list[tuple[list[nn.Linear], Tensor]] = []
        for part in module.modules():
            layers: list[nn.Linear] = getattr(part, "together", list)()
            if layers:
                self._wholes.append((layers, _join(layers)))

    def holds(self) -> bool:
        """Whether the weights still are slices of the joined matrices."""
        return all(_adjacent([layer.weight for layer in layers], m) for layers, m in self._wholes)

    def __enter__(self) -> None:
        for layers, matrix in self._wholes:
            layers[0].joined = matrix

    def __exit__(self, *_: object) -> None:
        for layers, _matrix in self._wholes:
            del layers[0].joined


_KEPT: WeakKeyDictionary[nn.Module, Joined] = WeakKeyDictionary()


def joined(module: nn.Module) -> Joined:
    """The `Joined` of a module, kept as long as its weights stay where they are."""
    kept = _KEPT.get(module)
    if kept is None or not kept.holds():
        kept = _KEPT[module] = Joined(module)
    return kept


def _adjacent(weights: Sequence[Tensor], matrix: Tensor) -> bool:
    """Whether these lie one behind the other from where the matrix, or the first one, begins."""
    at = matrix.data_ptr()
    for w in weights:
        if w.data_ptr() != at or w.dtype != matrix.dtype:
            return False
        at += w.nbytes
    return True


@torch.inference_mode(False)
@torch.no_grad()
def _join(layers: list[nn.Linear]) -> Tensor:
    weights = [layer.weight for layer in layers]
    rows = sum(len(w) for w in weights)
    adjacent = all(w.is_contiguous() for w in weights) and _adjacent(weights, weights[0])
    if adjacent and weights[0].untyped_storage().nbytes() >= rows * weights[0].stride(0) * (
        weights[0].element_size()
    ):
        return weights[0].detach().as_strided((rows, weights[0].shape[1]), weights[0].stride())
    matrix = torch.cat([w.detach() for w in weights])
    for layer, part in zip(layers, matrix.split([len(w) for w in weights]), strict=True):
        layer.weight.data = part
    return matrix
