"""The state of one text in a file, so that a long prompt is read once.

A safetensors file, its numbers those of the model's types:

    layers.0.s, ...    what layer 0 needs to go on, (1, ...)
    position           the tokens read, (1,) int64
    hidden             after the last of them, (1, d_model)
    seen               the tokens read, each once, (n,) int64, for a repetition penalty

and in its metadata the checkpoint that it is of, without which it means nothing.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from glactl.models.lm import LM, LMState

FORMAT = "glactl state 1"


@dataclass(frozen=True)
class Past:
    """One text that was read: hidden (1, d_model) after it, its state, its tokens each once."""

    hidden: Tensor
    state: LMState
    seen: list[int]


def checkpoint_hash(checkpoint: Path) -> str:
    """The sha256 of a checkpoint's list of sums, which fixes every weight."""
    return hashlib.sha256((checkpoint / "manifest.sha256").read_bytes()).hexdigest()


def save_past(path: Path, past: Past, checkpoint: str) -> None:
    """Write `past`, whole or not at all, as of the checkpoint with this hash."""
    tensors = {
        f"layers.{i}.{name}": part.contiguous()
        for i, layer in enumerate(past.state.layers)
        for name, part in layer.items()
    }
    tensors |= {
        "position": past.state.position,
        "hidden": past.hidden,
        "seen": torch.tensor(past.seen, dtype=torch.int64),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".tmp-{path.name}")
    save_file(tensors, part, {"format": FORMAT, "checkpoint": checkpoint})
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    part.rename(path)


def load_past(path: Path, lm: LM, checkpoint: str) -> Past:
    """The text saved at `path`, on the model's device.

    Args:
        lm: the model of the checkpoint.
        checkpoint: its hash.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a state, or one of another checkpoint.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no state at {path}")
    try:
        with safe_open(path, framework="pt", device=str(lm.device)) as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a state: {error}") from None
    if about.get("format") != FORMAT:
        raise ValueError(f"{path} is not a state that --save-state wrote")
    if about["checkpoint"] != checkpoint:
        raise ValueError(
            f"{path} is a state of checkpoint {about['checkpoint'][:12]}; "
            f"allowed: {checkpoint[:12]}, the one that runs"
        )
    empty = lm.initial_state(1).layers
    layers = [  # of the types that the model has now, which may be of another precision
        {n: tensors[f"layers.{i}.{n}"].to(like.dtype) for n, like in part.items()}
        for i, part in enumerate(empty)
    ]
    position = tensors["position"]
    state = LMState(layers, position, int(position.max()))
    return Past(tensors["hidden"].to(lm.head.weight.dtype), state, tensors["seen"].tolist())
