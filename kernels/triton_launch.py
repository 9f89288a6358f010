"""Launches of Triton kernels: at a third of the host's time, and compiled side by side.

Triton looks at every argument of every launch to find the kernel compiled for it (27 us a launch on
an H100's host, 10 us of it the launch itself; 7 to 13 launches a layer and step). All arguments of
the engines' launches but a few are buffers that they allocate, so what a kernel is compiled for
follows from the shapes and types of a call: `signature` names those by a number, and `launch` keeps
what Triton returned for the number and the constants.

A compilation takes one to four seconds, most of it in parts that leave Python to other threads. So
before the first call that wants a backward, `compile_ahead` has all of its launches named, by a
rehearsal on tensors without memory, and compiles them at once.
"""

import os
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from itertools import count
from typing import Any, TypeVar

import torch
from torch import Tensor

P = TypeVar("P")
KEPT = 4096  # launches remembered; lengths that never repeat make one each
_numbers: dict[tuple[Any, ...], int] = {}
_next = count()
_runners: dict[tuple[Any, ...], Callable[..., None]] = {}
_rehearsed: set[Hashable] = set()
_rehearsal = threading.local()  # named: the launches so far, by kernel and constants


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
    named = getattr(_rehearsal, "named", None)
    if named is not None:
        named[id(kernel), *constants.values()] = kernel, args, constants
        return
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


def on_meta(plan: P) -> P:
    """The plan, a dataclass, with its tensors of the meta device."""
    found = {f.name: getattr(plan, f.name) for f in fields(plan)}  # type: ignore[arg-type]
    tensors = {name: x.to("meta") for name, x in found.items() if isinstance(x, Tensor)}
    return replace(plan, **tensors)  # type: ignore[type-var]


def rehearsed(plan: Any, start: Tensor | None, call: Callable[..., object], *facts: Any) -> None:
    """`compile_ahead` of call(plan, start, *facts), forward and backward.

    Args:
        plan: of an engine, with `q`, `number`, `tiles` and `layout`.
        start: the initial state, or None.
        call: both directions of the engine, whose launches follow from its arguments.
        facts: the rest of these.
    """

    def rehearse() -> None:
        call(on_meta(plan), None if start is None else start.to("meta"), *facts)

    key = type(plan), plan.number, id(plan.tiles), plan.layout.split, start is None, *facts
    compile_ahead(plan.q.device, key, rehearse)


def compile_ahead(device: torch.device, key: Hashable, rehearse: Callable[[], object]) -> None:
    """Compile the launches of a call in threads, where they are not, once for every key.

    Args:
        device: where the call will run; on other than CUDA devices nothing is done.
        key: what decides which kernels are launched, and for which types.
        rehearse: makes the call on tensors of the meta device. Its launches are only named.

    What cannot be compiled says so when it is launched.
    """
    if device.type != "cuda" or (device, key) in _rehearsed:
        return
    _rehearsed.add((device, key))
    _rehearsal.named = {}
    try:
        rehearse()
        launches = list(_rehearsal.named.values())
    finally:
        _rehearsal.named = None

    def build(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        with torch.cuda.device(device):
            kernel.warmup(*args, grid=(1,), **constants)

    with ThreadPoolExecutor(min(len(launches), os.cpu_count() or 1)) as pool:
        for work in [pool.submit(build, *launch) for launch in launches]:
            work.exception()  # waits
