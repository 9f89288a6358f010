"""Tokens on disk: shards that are read through memory maps, and the manifest that commits them.

    DIR/manifest.json     written last, whole or not at all; a folder without one is not finished
    DIR/tokenizer/        as Tokenizer.save writes it
    DIR/shards/S-00000    shard 0 of split S, train or valid; little-endian arrays without a head:
        .tokens           framed documents laid end to end; uint16 where the vocabulary is at most
                          65,536, else uint32
        .starts           int64: where each document's frame begins in the shard
        .crc              uint32: the CRC-32 of each BLOCK bytes of .tokens
        .sizes            of valid only: int32, the bytes of text that each token stands for

A split is its shards laid end to end; where streams are joined (frames.py), END stands behind the
last. The manifest has the size and the BLAKE2b hash of every file. All sizes are looked at when a
folder is opened; a file but .tokens is held against its hash when its shard is opened, and of
.tokens each block against its CRC when something of it is read: so a flipped bit or a cut is found
at the cost of the bytes that are read anyway, and is never trained on.

The fingerprint of a folder is the sha256 of its tokens' type and hashes, in order, of the frame and
of the tokenizer.
"""

import hashlib
import json
import os
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from glactl.tasks.frames import Frames
from glactl.tasks.tokenizer import Tokenizer, load_tokenizer

FORMAT = 1
BLOCK = 16_384  # bytes; a row of 2,048 uint16 is 4,096
OPEN = 256  # shards that are open at once: each takes a file descriptor
MANIFEST = "manifest.json"
TYPES = {".starts": "<i8", ".crc": "<u4", ".sizes": "<i4"}


class Damaged(ValueError):
    """A file of a prepared folder is not as it was written; the message names it, in one line."""

    exit_code = 3


def blake2b(data: bytes) -> str:
    """32 hex digits."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def commit(path: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all, and is on the disk when this returns."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name, too
    finally:
        os.close(folder)


def write_shard(folder: Path, name: str, frames: Frames) -> dict[str, Any]:
    """Write the files of shard `name`; its entry for the manifest."""
    tokens = frames.tokens().astype(frames.tokens().dtype.newbyteorder("<"))
    raw = tokens.tobytes()
    crc = np.array([zlib.crc32(raw[i : i + BLOCK]) for i in range(0, len(raw), BLOCK)], "<u4")
    files = {".tokens": raw, ".starts": np.array(frames.starts, "<i8").tobytes()}
    files[".crc"] = crc.tobytes()
    if (sizes := frames.sizes()) is not None:
        files[".sizes"] = sizes.astype("<i4").tobytes()
    entry: dict[str, Any] = {
        "name": name,
        "tokens": frames.length,
        "documents": len(frames.starts),
        "bytes": frames.n_bytes,
        "files": {},
    }
    for suffix, data in files.items():
        commit(folder / (name + suffix), data)
        entry["files"][suffix] = {"bytes": len(data), "blake2b": blake2b(data)}
    return entry


def fingerprint(manifest: dict[str, Any]) -> str:
    """64 hex digits that tell the tokens of a prepared folder and their splits from others."""
    tokens = {
        split: [s["files"][".tokens"]["blake2b"] for s in found["shards"]]
        for split, found in manifest["splits"].items()
    }
    seen = [manifest["dtype"], manifest["frame"], manifest["tokenizer"]["sha256"], tokens]
    return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()


class Split:
    """One split of a prepared folder, a stream as packing.Stream has it.

    Raises:
        Damaged: here, where a file has another size than it was written with; in the methods,
            where what is read is not what was written.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], split: str) -> None:
        self.folder = folder / "shards"
        self._entries = manifest["splits"][split]["shards"]
        self._type = np.dtype(manifest["dtype"]).newbyteorder("<")
        self._end = manifest["tokenizer"]["end"]
        self.joined = self._end is not None
        self._first = np.cumsum([0, *(e["tokens"] for e in self._entries)])
        self.length = int(self._first[-1]) + (self.joined and bool(self._entries))
        for entry in self._entries:
            for suffix, file in entry["files"].items():
                _sized(self.folder / (entry["name"] + suffix), file["bytes"])
        self._shard = lru_cache(OPEN)(self._opened)

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens from start up to stop, or to the end; (n,)."""
        parts = [self._shard(i).read(a, b) for i, a, b in self._pieces(start, stop)]
        if self.joined and start < stop and stop >= self.length:
            parts.append(np.array([self._end], self._type))
        return np.concatenate(parts) if parts else np.zeros(0, self._type)

    def bytes_of(self, start: int, stop: int) -> np.ndarray | None:
        """The bytes of text that each of them stands for; None where that is not kept."""
        parts = []
        for i, a, b in self._pieces(start, stop):
            if (sizes := self._shard(i).small.get(".sizes")) is None:
                return None
            parts.append(sizes[a:b])
        if self.joined and start < stop and stop >= self.length:
            parts.append(np.zeros(1, np.int32))
        return np.concatenate(parts) if parts else np.zeros(0, np.int32)

    def begun(self, start: int, stop: int) -> np.ndarray:
        """Where documents begin, from start up to stop; (n,) int64."""
        parts = [np.zeros(0, np.int64)]
        for i, a, b in self._pieces(start, stop):
            starts = self._shard(i).small[".starts"]
            parts.append(starts[np.searchsorted(starts, a) : np.searchsorted(starts, b)])
            parts[-1] = parts[-1] + self._first[i]
        return np.concatenate(parts)

    def check(self) -> int:
        """Hold every byte against its hash; returns the bytes. Raises Damaged."""
        total = 0
        for entry in self._entries:
            for suffix, file in entry["files"].items():
                _whole(self.folder / (entry["name"] + suffix), file)
                total += file["bytes"]
        return total

    def _pieces(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """The shards that have these tokens, each with the tokens' bounds in it."""
        first = int(np.searchsorted(self._first, start, "right")) - 1
        found = []
        for i in range(first, len(self._entries)):
            if self._first[i] >= stop:
                break
            a = max(start - int(self._first[i]), 0)
            b = min(stop - int(self._first[i]), self._entries[i]["tokens"])
            if a < b:
                found.append((i, a, b))
        return found

    def _opened(self, i: int) -> "_Shard":
        return _Shard(self.folder, self._entries[i], self._type)


class _Shard:
    """An open shard: its tokens as a memory map, its small files read and checked."""

    def __init__(self, folder: Path, entry: dict[str, Any], dtype: "np.dtype[Any]") -> None:
        self.path = folder / (entry["name"] + ".tokens")
        self.small = {
            suffix: np.frombuffer(_whole(folder / (entry["name"] + suffix), file), TYPES[suffix])
            for suffix, file in entry["files"].items()
            if suffix in TYPES
        }
        self._raw = np.memmap(self.path, np.uint8, "r")
        self._tokens = self._raw.view(dtype)
        self._good = np.zeros(len(self.small[".crc"]), bool)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens, once the blocks that they are in have been held against their CRC."""
        width = self._tokens.itemsize
        for block in range(start * width // BLOCK, -(-stop * width // BLOCK)):
            if not self._good[block]:
                data = self._raw[block * BLOCK : (block + 1) * BLOCK].tobytes()
                if zlib.crc32(data) != self.small[".crc"][block]:
                    raise Damaged(f"{self.path} is damaged in bytes {block * BLOCK} and following")
                self._good[block] = True
        return self._tokens[start:stop]


class Prepared:
    """A folder that `glactl data prepare` made.

    Attributes:
        manifest, tokenizer, fingerprint; train and valid, its splits.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it is not finished, or of another format.
        Damaged: see Split.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.fingerprint: str = self.manifest["fingerprint"]
        self.train = Split(self.folder, self.manifest, "train")
        self.valid = Split(self.folder, self.manifest, "valid")

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of its tokens."""
        return load_tokenizer(str(self.folder / "tokenizer"))

    def check(self) -> int:
        """Hold every file against its hash; returns the bytes read. Raises Damaged."""
        if fingerprint(self.manifest) != self.fingerprint:
            raise Damaged(f"{self.folder / MANIFEST} is damaged: its fingerprint is of other data")
        return self.train.check() + self.valid.check()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared folder. Raises as Prepared does."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise FileNotFoundError(f"no prepared data at {folder}; make it: glactl data prepare")
    if not path.is_file():
        begun = (folder / "shards").is_dir()
        raise ValueError(
            f"{folder} is not finished; the same `glactl data prepare` goes on"
            if begun
            else f"{folder} has no {MANIFEST}; make one: glactl data prepare SOURCE --out DIR"
        )
    try:
        manifest = json.loads(path.read_bytes())
        found = manifest["format"]
    except (ValueError, KeyError, TypeError):
        raise Damaged(f"{path} is damaged: not a manifest of prepared data") from None
    if found != FORMAT:
        raise ValueError(f"{path} is of format {found}; this version reads {FORMAT}")
    return dict(manifest)


def _sized(path: Path, size: int) -> None:
    have = path.stat().st_size if path.is_file() else None
    if have != size:
        state = "is missing" if have is None else f"has {have} bytes of {size}"
        raise Damaged(f"{path} {state}; copy it again, or prepare into another folder")


def _whole(path: Path, file: dict[str, Any]) -> bytes:
    _sized(path, file["bytes"])
    data = path.read_bytes()
    if blake2b(data) != file["blake2b"]:
        raise Damaged(f"{path} is damaged: its bytes are not those that were written")
    return data
