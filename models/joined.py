"""Products of one input with several matrices as one product, for steps and prompts on a GPU.

    y_i = W_i x, i = 1 .. n        (y_1, .., y_n) = (W_1; ..; W_n) x                   (1)

A step of one sequence takes as long as its weights take to be read, and some 2 us for each launch
besides, whatever it reads. So within a `Joined` a layer takes its whole step in as few launches as
its data allow (`glactl.kernels.rows`), for which the W_i of one input lie behind one another.

A module says what belongs together by a method together(), and asks by `whole`.
"""

import torch
from torch import Tensor, nn


def whole(first: nn.Module) -> Tensor | None:
    """(W_1; ..; W_n) of the layer that comes first, within a `Joined`; else None."""
    found: Tensor | None = getattr(first, "joined", None)
    return found


class Joined:
    """A context in which the products of `module` and its parts are joined.

    Args:
        module: the weights that are joined become slices of the joined matrix, for good.

    Cost: once, a copy of each joined matrix; no memory that lasts.
    """

    def __init__(self, module: nn.Module) -> None:
        self._wholes: list[tuple[nn.Linear, Tensor]] = []
        for part in module.modules():
            layers: list[nn.Linear] = getattr(part, "together", list)()
            if layers:
                self._wholes.append((layers[0], _join(layers)))

    def __enter__(self) -> None:
        for layer, matrix in self._wholes:
            layer.joined = matrix

    def __exit__(self, *_: object) -> None:
        for layer, _matrix in self._wholes:
            del layer.joined


@torch.inference_mode(False)
@torch.no_grad()
def _join(layers: list[nn.Linear]) -> Tensor:
    weights = [layer.weight for layer in layers]
    rows, end = sum(len(w) for w in weights), weights[0].data_ptr()
    adjacent = all(w.is_contiguous() for w in weights)
    for w in weights:
        adjacent, end = adjacent and w.data_ptr() == end, end + w.nbytes
    if adjacent and weights[0].untyped_storage().nbytes() >= rows * weights[0].stride(0) * (
        weights[0].element_size()
    ):
        return weights[0].detach().as_strided((rows, weights[0].shape[1]), weights[0].stride())
    matrix = torch.cat([w.detach() for w in weights])
    for layer, part in zip(layers, matrix.split([len(w) for w in weights]), strict=True):
        layer.weight.data = part
    return matrix
