"""Which engine runs an operator, and in what precision."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Literal, ParamSpec, TypeVar, get_args

import torch
from torch import Tensor

from glactl.kernels.checks import operand_dtype

Backend = Literal["chunked", "reference", "triton"]
# Kernels that were held against fp64 on a GPU, where compilers have made wrong gradients of right
# code before: gla by its gate, gsa, the steps.
PROVEN = frozenset({"gk", "g", None, "gsa", "step", "gsa step", "scan"})
HAS_TRITON = importlib.util.find_spec("triton") is not None  # a constant to torch.compile
# The widest heads that were held so where operands are fp32 (fp32 and fp16 inputs). A model with K
# 256 in fp32 and a scalar decay ended in an illegal memory access there (Triton 3.6).
PROVEN_FP32 = {"gla": 64, "gsa": 128}
P = ParamSpec("P")
R = TypeVar("R")


def pick_backend(device: torch.device | str, backend: str | None = None) -> Backend:
    """The engine that the operators run on `device`.

    Args:
        device: where the tensors are.
        backend: None for the fastest, or the one wanted.

    Returns:
        "triton" on a CUDA device where Triton is installed, else "chunked"; `backend` if given.
        What "triton" has no kernels for runs chunked, and so does, unless "triton" is asked for,
        what has kernels that are not in `PROVEN` or heads wider in fp32 than `PROVEN_FP32`.

    Raises:
        ValueError: no such backend, or "triton" without a CUDA device or without Triton.
    """
    if backend not in (None, *get_args(Backend)):
        raise ValueError(f"backend is {backend!r}; allowed: {', '.join(get_args(Backend))}, None")
    device = torch.device(device)
    usable = device.type == "cuda" and HAS_TRITON
    if backend == "triton" and not usable:
        raise ValueError(f"backend is 'triton' on {device}; allowed: a CUDA device, with Triton")
    return backend or ("triton" if usable else "chunked")  # type: ignore[return-value]


def launches(x: Tensor) -> bool:
    """Whether what is done with x is worth kernels of its own that have no backend to choose: on a
    GPU, in 32 bits or less, and not where a compiler fuses it."""
    if x.device.type != "cuda" or x.dtype == torch.float64 or torch.compiler.is_compiling():
        return False
    return x.numel() > 0 and HAS_TRITON


def proven_width(operator: str, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether heads of this width were held against fp64 in the operands' precision."""
    bf16 = operand_dtype(q, k, v) == torch.bfloat16
    return bf16 or q.shape[3] <= PROVEN_FP32[operator]


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """The function outside of autocast, which would round states and products to bf16."""

    @functools.wraps(function)
    def run(*args: P.args, **options: P.kwargs) -> R:
        kind = next(x.device.type for x in (*args, *options.values()) if isinstance(x, Tensor))
        if not torch.is_autocast_enabled(kind):
            return function(*args, **options)
        with torch.autocast(kind, enabled=False):
            return function(*args, **options)

    return run
