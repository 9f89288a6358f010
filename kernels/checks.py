"""What the operators accept: every check of an argument, each a ValueError of one line.

Values, of gates and of cu_seqlens, are looked at on the CPU only: on a GPU that would wait for the
device in every call.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Sizes = dict[str, int]
Named = tuple[str, Tensor | None, str]  # name of an argument, its value, its axes: "B T H K"


def check_tensors(tensors: Sequence[Named]) -> Sizes:
    """Shape, type and device of each, and the size of every axis.

    An axis means one size wherever it is named, and the first tensor that has it says which; None
    is skipped. The heads HQ of queries are a multiple of those, H, of keys.
    """
    sizes: Sizes = {}
    device = None
    for name, x, axes in tensors:
        if x is None:
            continue
        letters = axes.split()
        if x.dim() != len(letters) or any(
            sizes.get(a, n) != n for a, n in zip(letters, x.shape, strict=True)
        ):
            wanted = ", ".join(str(sizes.get(a, a)) for a in letters)
            raise ValueError(
                f"{name} has the shape {tuple(x.shape)}; "
                f"allowed: ({wanted}) for ({', '.join(letters)})"
            )
        sizes.update(zip(letters, x.shape, strict=True))
        if not x.is_floating_point():
            raise ValueError(f"{name} is of {x.dtype}; allowed: floating-point types")
        device = device or x.device
        if x.device != device:
            raise ValueError(f"{name} is on {x.device}; allowed: {device}, as the arguments before")
    if sizes.get("HQ", 0) % max(sizes.get("H", 1), 1):
        raise ValueError(f"q has {sizes['HQ']} heads; allowed: a multiple of the {sizes['H']} of k")
    return sizes


def check_gates(**gates: Tensor | None) -> None:
    """Log gates are at most 0, wherever they are on the CPU and no graph is traced; NaN passes, and
    comes out again."""
    if torch.compiler.is_compiling():
        return
    for name, x in gates.items():
        if x is not None and x.device.type == "cpu" and x.numel() and (top := x.max().item()) > 0:
            raise ValueError(f"{name} has a value of {top:.6g}; allowed: log gates in [-inf, 0]")


def one_gate(**gates: Tensor | None) -> str | None:
    """The name of the gate that is given, None without one."""
    given = [name for name, x in gates.items() if x is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are given; allowed: one of {', '.join(gates)}")
    return given[0] if given else None


def check_bounds(
    cu_seqlens: Tensor | None, B: int, T: int, device: torch.device, of: str = "q"
) -> int:
    """The number of sequences: B, or as many as `cu_seqlens` has; B and T are those of `of`."""
    if cu_seqlens is None:
        return B
    x = cu_seqlens
    if x.dim() != 1 or len(x) < 2 or x.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens is {x.dtype} of the shape {tuple(x.shape)}; "
            "allowed: int32 or int64 of the shape (N + 1,)"
        )
    if x.device != device:
        raise ValueError(f"cu_seqlens is on {x.device}; allowed: {device}, as {of}")
    if B != 1:
        raise ValueError(f"{of} has a batch of {B}; allowed with cu_seqlens: 1")
    if x.device.type == "cpu":
        if x[0] != 0 or x[-1] != T:
            raise ValueError(
                f"cu_seqlens goes from {x[0].item()} to {x[-1].item()}; allowed: from 0 to T = {T}"
            )
        if (x[1:] < x[:-1]).any():
            raise ValueError(f"cu_seqlens is {x.tolist()}; allowed: numbers that do not decrease")
    return len(x) - 1


def check_initial(
    name: str, state: Tensor | None, size: tuple[int, ...], device: torch.device, of: str = "q"
) -> None:
    """A state to start from: shape, type and device, which is that of `of`."""
    if state is None:
        return
    if state.shape != size:
        raise ValueError(f"{name} has the shape {tuple(state.shape)}; allowed: {size}")
    if not state.is_floating_point():
        raise ValueError(f"{name} is of {state.dtype}; allowed: floating-point types")
    if state.device != device:
        raise ValueError(f"{name} is on {state.device}; allowed: {device}, as {of}")


def check_state(name: str, state: Tensor, dtype: torch.dtype) -> None:
    """A state that is updated in place is of the type that it is computed in."""
    if state.dtype != dtype:
        raise ValueError(f"{name} is of {state.dtype}; allowed: {dtype} beside these inputs")


def operand_dtype(q: Tensor, k: Tensor, v: Tensor) -> torch.dtype:
    """What the Triton engines multiply: bf16 if all of q, k, v are, else fp32."""
    return torch.bfloat16 if q.dtype == k.dtype == v.dtype == torch.bfloat16 else torch.float32


def state_dtype(*inputs: Tensor) -> torch.dtype:
    """fp32, or fp64 where one of the inputs is."""
    dtype = torch.float32
    for x in inputs:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype
