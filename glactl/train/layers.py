"""Layers that are compiled, or computed again in the backward pass, while a model is trained.

compile: the forward pass of each layer through torch.compile; layers of one kind share their code,
so the first step compiles one of each, not all. recompute: of a layer its input alone is kept; the
rest is computed a second time when its gradient is (Chen et al. 2016, arXiv:1604.06174).

Both are of training alone: a model in evaluation mode runs as it is. Weights keep their names.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from glactl.models.lm import LM, Block


def compile_alike(function: Callable[..., Any], dynamic: bool | None) -> Callable[..., Any]:
    """torch.compile of a function, with sums in an order that does not depend on a timing.

    By default the compiler times several ways to add up on the device and takes the fastest, which
    may be another one in another process. See `quicken` for `dynamic`.
    """
    whole: Callable[..., Any] = torch.compile(
        function, dynamic=dynamic, options={"deterministic": True}
    )
    return whole


def quicken(lm: LM, compiled: bool, recompute: bool, dynamic: bool | None = None) -> None:
    """Have the layers of `lm` compiled, computed again, both or neither.

    dynamic: as of torch.compile; False compiles once for every shape, None for all from the second.
    """
    for block in lm.blocks:
        assert isinstance(block, Block)
        block.__dict__.pop("forward", None)
        if compiled or recompute:
            block.__dict__["forward"] = _quick(block, compiled, recompute, dynamic)


@contextmanager
def plain(lm: LM) -> Iterator[None]:
    """Within, the layers of `lm` run as they are."""
    kept = [(block, block.__dict__.pop("forward", None)) for block in lm.blocks]
    try:
        yield
    finally:
        for block, forward in kept:
            if forward is not None:
                block.__dict__["forward"] = forward


def _quick(
    block: Block, compiled: bool, recompute: bool, dynamic: bool | None
) -> Callable[..., Any]:
    plain = block.forward
    inner = compile_alike(plain, dynamic) if compiled else plain

    def forward(*inputs: Any) -> Any:
        if not block.training:
            return plain(*inputs)
        if not recompute:
            return inner(*inputs)
        drawn = block.dropout.p > 0  # the generator's state is read, for which a GPU is waited for
        return checkpoint(inner, *inputs, use_reentrant=False, preserve_rng_state=drawn)

    return forward
