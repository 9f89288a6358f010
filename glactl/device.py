"""Where a command computes."""

import os
import platform
from typing import Literal

import torch

Precision = Literal["auto", "fp32", "bf16"]


class DeviceUnavailable(OSError):
    """The machine lacks the device that was asked for."""


def pick_device(name: str | None = None) -> torch.device:
    """The device to compute on.

    Args:
        name: "cpu", "cuda" or "cuda:1"; None asks the environment variable GLACTL_DEVICE, and
            without it takes the first CUDA device, or the CPU where there is none.

    Raises:
        ValueError: a name that is none of these.
        DeviceUnavailable: this machine, or this build of torch, has no such device.
    """
    name = name or os.environ.get("GLACTL_DEVICE") or None
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()) or name.endswith(":"):
        raise ValueError(f"device {name!r} is not known; allowed: cpu, cuda, cuda:0, cuda:1, ...")
    if kind == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= count:
        have = f"{count} CUDA device(s)" if count else "no CUDA device"
        raise DeviceUnavailable(f"device {name!r} is not here: {have}; --device cpu always works")
    return torch.device(kind, int(index)) if index else torch.device(kind)


def precision_on(device: torch.device, wanted: Precision) -> Literal["fp32", "bf16"]:
    """The type of products that "auto" stands for on a device: bf16 on a GPU that has it."""
    if wanted != "auto":
        return wanted
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else "fp32"


def products(device: torch.device, wanted: Precision) -> torch.autocast:
    """Within, products are of this precision; all else is as wide as its weights."""
    enabled = precision_on(device, wanted) == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def device_name(device: torch.device) -> str:
    """What a report calls a device: the name of the GPU, of a CPU its kind."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {platform.machine()}"
