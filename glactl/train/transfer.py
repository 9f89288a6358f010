r"""The weights a run starts with when its spec names a checkpoint: copied, or new and fitted.

Every weight that the original has is copied, but in layers whose mixer takes attention's place only
those of q, k, v and the last product; the rest of such a mixer is new. Of what is new, with
`calibrate`, the weight w of the norm in front of the last product is set, once, so that the layer
gives as much as the one that it replaces on a batch of training rows:

    w = sqrt(sum |g(x)|^2 / sum |f(x)|^2),   f the layer at w = 1, g attention                (1)

with x of the original's own hidden states. As drawn, w is 1 and f gives outputs of 3 to 4 times
the size in stories260k: GSA made of it begins at a loss of 3.58 nats with (1) and at 6.18 without
(`init.calibrate: false`), where the original has 1.42. The least-squares factor in the place of (1)
begins at 4.13. Gates drawn wider, with slots of many time scales, began at 3.80 and were behind the
gate as it is drawn after 0.7 M tokens, 1.90 against 1.88; drawn from the keys they began at 4.16.
"""

import hashlib
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glactl.convert.original import ATTENTION, Original, shapes_of
from glactl.models.layers import RMSNorm, to_device
from glactl.models.lm import LM
from glactl.tasks import Batch
from glactl.train.match import paired, teachers


class Row(NamedTuple):
    """A weight of the model: its name and shape, what it is in the checkpoint, and how it came."""

    tensor: str
    shape: tuple[int, ...]
    origin: str
    action: str  # copied, new


@dataclass(frozen=True)
class Start:
    """How a run began: the checkpoint, the sha256 of the weights read, each weight, and notes."""

    source: str
    family: str
    fingerprint: str
    rows: list[Row]
    notes: list[str]

    def record(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self) | {"rows": [row._asdict() for row in self.rows]}


def transfer(lm: LM, original: Original) -> Start:
    """Copy the weights of `original` into `lm`, whose other weights stay.

    Raises:
        ValueError: a weight of the original fits none of the model's, or has another shape.

    Cost: the memory of one weight.
    """
    state, there = lm.state_dict(), shapes_of(original.spec)
    replaced = _replaced(lm, original)
    rows, left = [], dict(there)
    hashes = []
    for name, x in state.items():
        shape = tuple(x.shape)
        fits = name in there and (_layer(name) not in replaced or ATTENTION.fullmatch(name))
        if not fits and _layer(name) not in replaced:
            raise ValueError(f"{original.source} has no {name} {shape}")
        if not fits:
            rows.append(Row(name, shape, "-", "new"))
            continue
        del left[name]
        if there[name] != shape:
            raise ValueError(
                f"{original.names[name]} of {original.source} has shape {there[name]}, "
                f"{name} {shape}"
            )
        if name == "head.weight" and lm.spec.tie_embeddings:
            continue  # it is embed.weight
        weight = original.read(name)
        hashes.append(_hash(name, weight))
        with torch.no_grad():
            x.copy_(weight)
        rows.append(Row(name, shape, original.names[name], "copied"))
    if left:
        shown = ", ".join(f"{original.names[name]} {shape}" for name, shape in left.items())
        raise ValueError(f"{shown} of {original.source} would not be used")
    return Start(original.source, original.family, _together(hashes), rows, list(original.notes))


def fingerprint(original: Original) -> str:
    """The sha256 of the weights of a checkpoint, whatever the files they are in; reads them all."""
    tied = {"head.weight"} if original.spec.tie_embeddings else set()
    return _together([_hash(n, original.read(n)) for n in original.names if n not in tied])


def _hash(name: str, x: Tensor) -> str:
    digest = hashlib.sha256(f"{name} {tuple(x.shape)}".encode())
    digest.update(x.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _together(hashes: list[str]) -> str:
    return hashlib.sha256("".join(sorted(hashes)).encode()).hexdigest()


def calibrate(lm: LM, original: Original, batch: Batch) -> dict[str, float]:
    """Set the norms of new mixers by (1) on a batch; what each was set to, by its name.

    Cost: the memory of the original's attention, for as long as this takes.
    """
    tokens, bounds = batch.tokens, batch.cu_seqlens
    tokens = tokens if bounds is None else tokens.reshape(1, -1)
    attention, found = teachers(lm, original), {}
    with paired(lm, attention) as pairs, torch.no_grad():
        lm(to_device(tokens, lm.device), cu_seqlens=bounds)
        for i, pair in zip(attention, pairs, strict=True):
            norm = pair.student.norm
            assert isinstance(norm, RMSNorm)
            if pair.gain.isfinite():
                norm.weight.mul_(pair.gain)  # (1)
            found[f"blocks.{i}.mixer.norm.weight"] = norm.weight[0].item()
    return found


def _replaced(lm: LM, original: Original) -> set[int]:
    """The layers whose mixer is of another kind than in the original."""
    kinds = zip(lm.spec.mixers, original.spec.mixers, strict=True)
    return {i for i, (mine, old) in enumerate(kinds) if mine.kind != old.kind}


def _layer(name: str) -> int | None:
    """The layer whose mixer has this weight; None of others."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blocks" and parts[2] == "mixer" else None
