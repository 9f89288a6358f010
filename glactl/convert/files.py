"""Files of checkpoints: safetensors or PyTorch's, one or many, a folder here or a name on the hub.

A tensor is read when it is asked for and written when it is handed over, so that a file of any size
passes through the memory of one tensor. Nothing in a file is executed: of PyTorch's files only
weights are read.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glactl import console
from glactl.tasks import hub
from glactl.tasks.errors import DataUnavailable

FLOATS = {"F64", "F32", "F16", "BF16"}
KINDS = ("*.safetensors", "*.bin", "*.pt", "*.pth")
SMALL = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


class Weights:
    """The tensors in the files of a checkpoint.

    Args:
        path: the folder, or one file of it.

    Attributes:
        folder: where they are.
        shapes: of every tensor, by name.

    Raises:
        FileNotFoundError: no weights there, or a file that the index names is not.
        ValueError: a file is no checkpoint of weights, the index does not agree with the files, two
            files have one tensor, or a tensor is not of floating point.
    """

    def __init__(self, path: Path) -> None:
        self.folder = path if path.is_dir() else path.parent
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._read: dict[str, Callable[[], Tensor]] = {}
        index = {} if path.is_file() else _index(path)
        files = [path] if path.is_file() else _files(path, index)
        for file in files:
            parts = _safetensors(file) if file.suffix == ".safetensors" else _pickled(file)
            for name, (shape, read) in parts.items():
                if name in self.shapes:
                    raise ValueError(f"{file}: the tensor {name} is in another file, too")
                self.shapes[name], self._read[name] = shape, read
        for name in sorted(set(index) ^ set(self.shapes) if index else ()):
            fault = "names {}, which no file has" if name in index else "lacks {} of a file"
            raise ValueError(f"the index of {path} {fault.format(name)}")

    def read(self, name: str) -> Tensor:
        """The tensor of this name, as it is stored."""
        return self._read[name]()


def config(folder: Path) -> dict[str, Any]:
    """The config.json in the folder. Raises FileNotFoundError, ValueError."""
    return _json(folder / "config.json")


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Write tensors as one safetensors file, one after the other.

    The format: 8 bytes with the length of a JSON header, the header, which has the type, the shape
    and the place of each tensor, and the tensors.
    """
    kind, size = {torch.float32: ("F32", 4), torch.bfloat16: ("BF16", 2)}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, x in tensors.items():
        end = at + x.numel() * size
        header[name] = {"dtype": kind, "shape": list(x.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for x in tensors.values():
            plain = x.detach().to("cpu", dtype).contiguous()
            f.write(plain.flatten().view(torch.uint8).numpy().data)


def find(source: str) -> Path:
    """The folder or file `source`, or that of the repository of this name on the hub.

    What must be downloaded is told before, with its size.

    Raises:
        FileNotFoundError: it is neither here nor a name that a repository can have.
        DataUnavailable: the hub has it not or cannot be reached.
    """
    path = Path(source)
    if path.exists():
        return path
    if source.count("/") != 1 or source.startswith((".", "/", "~")) or source.endswith("/"):
        raise FileNotFoundError(f"no checkpoint at {source}")
    from huggingface_hub import HfApi, constants, snapshot_download

    hub.reach("model", source)
    patterns: list[str] = []
    try:
        if not constants.HF_HUB_OFFLINE:
            info = HfApi().model_info(source, files_metadata=True, timeout=10)
            sizes = {s.rfilename: s.size or 0 for s in info.siblings or []}
            patterns = _wanted(sizes)
            total = sum(sizes[name] for name in patterns) / 1e9
            console.note(f"from the hub: {source}, {len(patterns)} files, {total:.2f} GB")
        offline = {"local_files_only": True} if not patterns else {"allow_patterns": patterns}
        return Path(snapshot_download(source, **offline))
    except Exception as error:
        raise DataUnavailable(
            f"{source!r} is no folder here, nor to be had from the hub: {hub.reason(error)}"
        ) from None


def copy_tokenizer(run: Path, to: Path) -> bool:
    """Copy a run's tokenizer into an export, named as transformers wants it; False: none for it."""
    file = run / "tokenizer" / "tokenizer.json"
    if not file.is_file():
        return False
    shutil.copyfile(file, to / file.name)
    names = _json(file.with_name("tokenizer_config.json"))
    names["tokenizer_class"] = "PreTrainedTokenizerFast"
    (to / "tokenizer_config.json").write_text(json.dumps(names, indent=1) + "\n")
    return True


def _wanted(names: Iterable[str]) -> list[str]:
    """The files of a repository that are read: its weights in one form, config, tokenizer."""
    top = [n for n in names if "/" not in n]
    weights = [n for n in top if n.endswith((".safetensors", ".safetensors.index.json"))]
    if not weights:
        weights = [n for n in top if n.endswith((".bin", ".bin.index.json"))]
    return [n for n in top if n in SMALL or n in weights]


def _index(folder: Path) -> dict[str, str]:
    """Tensor -> file of a checkpoint of several files, {} where there is no index."""
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / name).is_file():
            found = _json(folder / name).get("weight_map")
            if not isinstance(found, dict) or not found:
                raise ValueError(f"{folder / name} has no weight_map")
            return {str(k): str(v) for k, v in found.items()}
    return {}


def _files(folder: Path, index: dict[str, str]) -> list[Path]:
    if index:
        files = [folder / name for name in sorted(set(index.values()))]
        for file in files:
            if file.parent != folder or not file.is_file():
                raise FileNotFoundError(f"{file} is missing, which the index names")
        return files
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
    for pattern in KINDS:
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            raise ValueError(f"{folder} has {len(found)} files {pattern} and no index; name one")
        if found:
            return found
    raise FileNotFoundError(f"{folder} has no weights ({', '.join(KINDS)})")


Parts = dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]]


def _safetensors(file: Path) -> Parts:
    from safetensors import SafetensorError, safe_open

    parts: Parts = {}
    try:
        handle = safe_open(os.fspath(file), framework="pt")
        for name in handle.keys():  # noqa: SIM118 (not a mapping)
            piece = handle.get_slice(name)
            if piece.get_dtype() not in FLOATS:
                raise ValueError(f"{file}: {name} is of {piece.get_dtype()}; allowed: floats")
            parts[name] = (tuple(piece.get_shape()), partial(handle.get_tensor, name))
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from None
    return parts


def _pickled(file: Path) -> Parts:
    """Of a file of torch.save, of which nothing but tensors in plain containers is accepted."""
    try:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the form of before torch 1.6 cannot be mapped
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file makes the library raise
        first = str(error).strip().split("\n")[0][:160]
        raise ValueError(f"{file} is not a file of weights alone: {first}") from None
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        raise ValueError(f"{file} is no mapping of names to tensors")
    for name, x in state.items():
        if not x.is_floating_point():
            raise ValueError(f"{file}: {name} is of {x.dtype}; allowed: floats")
    return {name: (tuple(x.shape), partial(state.__getitem__, name)) for name, x in state.items()}


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {file}") from None
    except ValueError:
        raise ValueError(f"{file} is not JSON") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} is a JSON {type(found).__name__}; allowed: an object")
    return found
