"""What `glactl profile` measures beside our operators: softmax attention by name, and fla.

On a GPU PyTorch has several kernels of softmax attention and takes one by rules of its own, so two
are asked for by name. flash-linear-attention (https://github.com/fla-org/flash-linear-attention)
has chunked kernels of the same operators; its own tuner searches for minutes at the first call.
"""

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from glactl.profile.operators import OPERATORS, Operator

KERNELS = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION"}  # of torch's SDPBackend
HALF = (torch.bfloat16, torch.float16)  # what these kernels take


class NoFla(ModuleNotFoundError):
    """flash-linear-attention was asked for and is not here."""

    exit_code = 3


def measured(names: list[str], device: torch.device, dtype: torch.dtype, fla: bool) -> list[str]:
    """The operators to measure for those asked for, ours and what stands beside each.

    Args:
        names: of OPERATORS.
        device, dtype: softmax attention is measured by kernel on a GPU, in half precision.
        fla: with fla's.

    Raises:
        NoFla: fla without a GPU, or where it is not installed.
    """
    if fla and (device.type != "cuda" or importlib.util.find_spec("fla") is None):
        why = "is not installed" if device.type == "cuda" else "runs on a CUDA device alone"
        raise NoFla(f"--fla: flash-linear-attention {why}; pip install flash-linear-attention")
    found = []
    for name in names:
        if name == "attention" and device.type == "cuda" and dtype in HALF:
            found += [f"attention {kernel}" for kernel in KERNELS]
        else:
            found += [name, f"{name} fla"] if fla and name != "attention" else [name]
    return found


def operator(name: str) -> Operator:
    """The operator of a name that `measured` gave."""
    kind, _, by = name.partition(" ")
    own = next(op for op in OPERATORS if op.name == kind)
    if not by:
        return own
    call = _fla(kind) if by == "fla" else _kernel(KERNELS[by])
    return Operator(name, own.inputs, call, own.reference, kind)


def _kernel(backend: str) -> Callable[..., Tensor]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return OPERATORS[0].call(q, k, v)

    return call


def _fla(kind: str) -> Callable[..., Tensor]:
    """fla's call, as ours is made: with the default scale of each and no state."""
    if kind == "gla":
        from fla.ops.gla import chunk_gla

        return lambda q, k, v, gk: chunk_gla(q, k, v, gk)[0]
    if kind == "decay":
        from fla.ops.simple_gla import chunk_simple_gla

        # a gate a token, so that its gradient is made too
        return lambda q, k, v, g: chunk_simple_gla(q, k, v, g.expand(q.shape[:3]))[0]
    from fla.ops.gsa import chunk_gsa

    return lambda q, k, v, g: chunk_gsa(q, k, v, (1 - g.exp()).to(k.dtype), g, scale=1.0)[0]
