"""Checkpoints that exist whole or not at all.

A checkpoint is written to `.tmp-step-000123`, every file flushed to the disk, listed with its
sha256 in manifest.sha256 (`sha256sum -c` reads it), marked by a file COMMITTED, and only then
renamed to `step-000123`. A process killed at any moment leaves a folder that no reader looks at.
Which one is the newest is computed from the names, never stored.

    step-000123/model/, optim/    torch.distributed.checkpoint, keyed by parameter names
    step-000123/position.json     where in the data and the run it was taken
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)


class DiskFailure(OSError):
    """A checkpoint could not be written; no committed one is touched."""

    exit_code = 3

    def __init__(self, path: Path, reason: OSError) -> None:
        last = committed(path.parent)
        kept = f"{last[-1].name} is whole" if last else "there is no earlier one"
        super().__init__(f"{path} was not written: {reason.strerror or reason}; {kept}")


def committed(folder: Path) -> list[Path]:
    """The committed checkpoints in `folder`, oldest first."""
    found = [
        p for p in folder.glob("step-*") if p.name[5:].isdigit() and (p / "COMMITTED").exists()
    ]
    return sorted(found, key=lambda p: int(p.name[5:]))


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    position: dict[str, Any],
    keep: int,
    every: int | None = None,
) -> Path:
    """Commit the state after `step`, and delete what `prune` says.

    A checkpoint of this step that is committed already is left as it is.

    Raises:
        DiskFailure: the disk is full, or fails.
    """
    path = folder / f"step-{step:06}"
    if not (path / "COMMITTED").exists():
        commit(path, states(model, optimizer), position)
    prune(folder, keep, every)
    return path


def states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """What a checkpoint holds, by folder; the tensors are those of the model and the optimizer."""
    optim: dict[str, Any] = dict(get_optimizer_state_dict(model, optimizer))
    for group in optim["param_groups"]:
        group["lr"] = float(group["lr"])  # of a captured step it is a tensor
    return {"model": model.state_dict(), "optim": optim}


def commit(
    path: Path,
    found: dict[str, dict[str, Any]],
    position: dict[str, Any],
    together: dist.ProcessGroup | None = None,
) -> None:
    """Write `found` of `states` to `path`, whole or not at all.

    together: the processes that each have a part of the tensors and all call this; the first one
    commits. None: this one has all of them.
    """

    def write(part: Path) -> None:
        for name, state in found.items():
            _write(part / name, state, together)

    if together is None or dist.get_rank() == 0:
        _commit(path, write, position, together)
        return
    dist.barrier(together)  # the folder is there
    write(_part(path))


def prune(folder: Path, keep: int, every: int | None = None) -> None:
    """Delete committed checkpoints but for the newest `keep` and those of multiples of `every`."""
    for old in committed(folder)[: -max(keep, 1)]:
        if every is None or int(old.name[5:]) % every:
            (old / "COMMITTED").unlink()  # first, so that half of a deleted one is nobody's
            shutil.rmtree(old)


def save_weights(
    folder: Path,
    step: int,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    position: dict[str, Any],
) -> Path:
    """Commit weights without the state of an optimizer, each fetched when it is written.

    Args:
        shapes: of all weights, by name; they are fp32.
        read: gives the weight of a name.

    Cost: the memory of one weight.
    """
    path = folder / f"step-{step:06}"
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}

    def write(part: Path) -> None:
        # one file a weight: of a common file the writer holds all weights until it is closed
        files = dcp.FileSystemWriter(part / "model", single_file_per_rank=False)
        with _one_process():
            dcp.save(state, storage_writer=files, planner=_Fetching(read), no_dist=True)

    _commit(path, write, position)
    return path


class _Fetching(dcp.DefaultSavePlanner):
    """Plans by tensors without data, and fetches each when it is its turn to be written."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        super().__init__()
        self._fetch = read

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self._fetch(index.fqn)


def load_model(path: Path, model: nn.Module) -> None:
    """Read the weights at `path` into `model`, on its device. Raises ValueError."""
    verify(path)
    state = model.state_dict()
    try:
        _read(path / "model", state)
    except (RuntimeError, dcp.CheckpointException) as error:
        raise ValueError(f"{path} does not hold the weights of this model: {error}") from None
    model.load_state_dict(state)


def read_weight(path: Path, name: str, shape: tuple[int, ...]) -> Tensor:
    """The weight of this name at `path`, fp32; nothing is verified."""
    state = {name: torch.empty(shape)}
    _read(path / "model", state)
    return state[name]


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Read weights and optimizer state at `path`; returns the position. Raises ValueError.

    Where weights are alone, the optimizer begins anew.
    """
    load_model(path, model)
    if not (path / "optim").is_dir():
        return read_position(path)
    ours = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    state = states(model, optimizer)["optim"]
    _read(path / "optim", state)
    set_optimizer_state_dict(model, optimizer, state)
    for group, kept in zip(optimizer.param_groups, ours, strict=True):
        group.update(kept)  # rates and the like are the spec's, and the kernels the device's
    return read_position(path)


def read_position(path: Path) -> dict[str, Any]:
    """The position that the checkpoint at `path` was taken at."""
    position: dict[str, Any] = json.loads((path / "position.json").read_text())
    return position


def verify(path: Path) -> None:
    """Raise ValueError naming the first file at `path` that is not as it was committed."""
    for line in (path / "manifest.sha256").read_text().splitlines():
        expected, _, name = line.partition("  ")
        file = path / name
        if not file.exists() or _sha256(file) != expected:
            what = "is missing" if not file.exists() else "has changed since it was written"
            raise ValueError(f"{file} {what}; delete {path} to fall back to the one before it")


def sync(folder: Path) -> None:
    """Flush every file and folder under `folder` to the disk."""
    for name in _files(folder):
        with open(folder / name, "rb") as f:
            os.fsync(f.fileno())
    for inner in [p for p in folder.rglob("*") if p.is_dir()] + [folder]:
        _sync_folder(inner)


@contextmanager
def _one_process() -> Iterator[None]:
    """Without the warning that this is a single process: it is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _part(path: Path) -> Path:
    return path.with_name(f".tmp-{path.name}")


def _commit(
    path: Path,
    write: Callable[[Path], None],
    position: dict[str, Any],
    together: dist.ProcessGroup | None = None,
) -> None:
    """Make the checkpoint `path` of what `write` puts into the folder that it is given."""
    part = _part(path)
    try:
        _clear(path.parent)
        shutil.rmtree(path, ignore_errors=True)  # uncommitted, so nobody's
        part.mkdir(parents=True)
        if together is not None:
            dist.barrier(together)
        write(part)
        (part / "position.json").write_text(json.dumps(position, indent=1) + "\n")
        sums = "".join(f"{_sha256(part / name)}  {name}\n" for name in _files(part))
        (part / "manifest.sha256").write_text(sums)
        sync(part)
        (part / "COMMITTED").write_text("")
        sync(part)
        part.rename(path)
        _sync_folder(path.parent)
    except (OSError, dcp.CheckpointException) as error:
        reason = _of_disk(error)
        if reason is None:
            raise
        shutil.rmtree(part, ignore_errors=True)  # half of one helps nobody and fills the disk
        raise DiskFailure(path, reason) from None


def _of_disk(error: BaseException) -> OSError | None:
    """The error of a disk that `error` is or that happened inside of torch's writer."""
    if isinstance(error, OSError):
        return error
    if isinstance(error, dcp.CheckpointException):
        inner = [failure[0] for failure in error.failures.values()]
        return next((e for e in inner if isinstance(e, OSError)), None)
    return None


def _write(path: Path, state: dict[str, Any], together: dist.ProcessGroup | None = None) -> None:
    with _one_process():
        dcp.save(state, checkpoint_id=path, process_group=together, no_dist=together is None)


def _read(path: Path, state: dict[str, Any]) -> None:
    with _one_process():
        dcp.load(state, checkpoint_id=path, no_dist=True)


def _clear(folder: Path) -> None:
    """Remove what killed processes left."""
    for left in folder.glob(".tmp-*"):
        shutil.rmtree(left)


def _files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(file: Path) -> str:
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
