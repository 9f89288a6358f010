"""Launches of Triton kernels at a third of the host's time.

Triton looks at every argument of every launch to find the kernel compiled for it (27 us a launch on
an H100's host, 10 us of it the launch itself; 7 to 13 launches a layer and step). All arguments of
the engines' launches but a few are buffers that they allocate, so what a kernel is compiled for
follows from the shapes and types of a call: `signature` names those by a number, and `launch` keeps
what Triton returned for the number and the constants.
"""

from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from torch import Tensor

KEPT = 4096  # launches remembered; lengths that never repeat make one each
_numbers: dict[tuple[Any, ...], int] = {}
_next = count()
_runners: dict[tuple[Any, ...], Callable[..., None]] = {}


def signature(device: torch.device, *facts: Any) -> int:
    """A number for a device and what decides the types and values of a call's arguments."""
    key = device, *facts
    number = _numbers.get(key)
    if number is None:
        number = _numbers[key] = next(_next)
    return number


def aligned(*xs: Tensor | None) -> list[Any]:
    """The tensors, contiguous and at addresses that a kernel for 16-byte reads takes."""
    found = []
    for x in xs:
        y = None if x is None else x.contiguous()
        found.append(y if y is None or y.data_ptr() % 16 == 0 else y.clone())
    return found


def launch(number: int, kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """kernel[(programs,)](*args, **constants).

    Args:
        number: of the call, from `signature`. Two launches of a kernel with one number, one set of
            constants and a None in the same places have arguments of the same types, integers of
            the same value, and tensors at multiples of 16 bytes.
        kernel: a function under triton.jit whose constants come after all other parameters.
        programs: the grid.
        args: the parameters that are no constants, in order.
        constants: the others, and the launch options.
    """
    key = (number, id(kernel), programs, *constants.values())
    run = _runners.get(key)
    if run is not None:
        run(*args)
        return
    compiled = kernel[(programs,)](*args, **constants)
    if compiled is None:  # Triton's interpreter compiles nothing
        return
    if len(_runners) >= KEPT:
        _runners.clear()
    start = compiled[(programs, 1, 1)]
    tail = tuple(constants[name] for name in kernel.arg_names[len(args) :])
    _runners[key] = lambda *xs: start(*xs, *tail)
