"""Products of one input with several matrices as one product, for steps of a single sequence.

    y_i = W_i x, i = 1 .. n        (y_1, .., y_n) = (W_1; ..; W_n) x                   (1)

A step of one sequence takes as long as its weights take to be read, and some 1.3 us for each launch
besides, whatever it reads. Of more sequences the y_i would lie strided in the result, and making
them contiguous for the kernels behind would cost the launches again.

A module says what belongs together by a method together(), and calls `products`; the right side of
(1) is taken within a `Joined`, the left side everywhere else.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def products(x: Tensor, *parts: nn.Linear) -> list[Tensor]:
    """(1) of x (..., d), by parts without biases."""
    whole: Tensor | None = getattr(parts[0], "joined", None)
    if whole is None:
        return [part(x) for part in parts]
    return list(F.linear(x, whole).split([part.out_features for part in parts], -1))


class Joined:
    """A context in which the products of `module` and its parts are joined.

    Args:
        module: its weights are copied now, and must not change as long as this is used.

    Cost: the memory of the matrices that are joined.
    """

    def __init__(self, module: nn.Module) -> None:
        self._wholes: list[tuple[nn.Linear, Tensor]] = []
        for part in module.modules():
            together = getattr(part, "together", None)
            if together is not None:
                layers: list[nn.Linear] = together()
                whole = torch.cat([layer.weight.detach() for layer in layers])
                self._wholes.append((layers[0], whole))

    def __enter__(self) -> None:
        for layer, whole in self._wholes:
            layer.joined = whole

    def __exit__(self, *_: object) -> None:
        for layer, _whole in self._wholes:
            del layer.joined
