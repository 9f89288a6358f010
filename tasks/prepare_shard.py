"""One shard of a prepared folder: which documents it has, and how a process makes its files.

Shard i is made of consecutive documents: it ends with the first that brings its text to the shard's
size, so which document is in which shard follows from the source alone. A document is held out for
validation where the first 8 bytes of its sha256, over 2^64, are below the share held out; of a
source that fills no second shard the one with the least hash, where there is none. So copies are on
one side, and at a share of 1/16 the split is that of tasks/text.py.
"""

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

from glactl.tasks.corpus import Mark, documents
from glactl.tasks.frames import Frame, Frames
from glactl.tasks.shards import commit, write_shard
from glactl.tasks.tokenizer import Tokenizer, load_tokenizer

SPLITS = ("train", "valid")
MIB = 2**20


@dataclass(frozen=True)
class Recipe:
    """What a prepared folder is made of.

    source, tokenizer, frame, limit: as in TextSpec; a data set of the hub is read to its end
    where limit is None. valid: the share of documents held out, from 0 to below 1. shard_mib: MiB
    of text a shard.
    """

    source: str
    tokenizer: str = "byte"
    frame: Frame = "both"
    limit: int | None = None
    valid: float = 1 / 16
    shard_mib: float = 64.0

    def __post_init__(self) -> None:
        if not 0 <= self.valid < 1:
            raise ValueError(f"valid is {self.valid}; allowed: a share from 0 to below 1")
        if self.shard_mib <= 0:
            raise ValueError(f"shard size is {self.shard_mib} MiB; allowed: more than 0")


@dataclass(frozen=True)
class Job:
    """The text of shard `index`, which may be the only one.

    text: its hash. mark: where in the source it ends, see Mark.
    """

    index: int
    documents: list[bytes]
    text: str
    mark: dict[str, Any] | None
    alone: bool = False


def to_do(recipe: Recipe, before: Sequence[dict[str, Any]] = ()) -> Iterator[Job]:
    """The shards of a source, one after the other.

    before: records of finished ones, the first and those that follow; a source that can go on
    behind them does, without being read again.
    """
    mark = Mark(before[-1]["mark"] if before else None)
    limit = recipe.limit
    if limit is not None:
        limit -= sum(record["documents"] for record in before)
    texts: list[bytes] = []
    index, size = len(before), 0
    digest = blake2b(digest_size=16)
    for document in documents(recipe.source, limit, whole=True, mark=mark):
        text = document.encode()
        texts.append(text)
        size += len(text)
        digest.update(len(text).to_bytes(8, "little") + text)
        if size >= recipe.shard_mib * MIB:
            yield Job(index, texts, digest.hexdigest(), mark.state())
            texts, size, index = [], 0, index + 1
            digest = blake2b(digest_size=16)
    if texts:
        yield Job(index, texts, digest.hexdigest(), mark.state(), alone=index == 0)


def record_path(out: Path, index: int) -> Path:
    """Where the record of a finished shard is."""
    return out / "shards" / f"{index:05}.json"


def make(job: Job, tokenizer: Tokenizer, recipe: Recipe, out: Path) -> dict[str, Any]:
    """Write a shard of each split; its record, which is written too."""
    frames = [Frames(tokenizer, recipe.frame, sized=split == "valid") for split in SPLITS]
    for text, held_out in zip(job.documents, _held_out(job, recipe.valid), strict=True):
        frames[held_out].add(text.decode())
    record: dict[str, Any] = {"index": job.index, "text": job.text, "mark": job.mark}
    record["documents"] = len(job.documents)
    for split, found in zip(SPLITS, frames, strict=True):
        name = f"{split}-{job.index:05}"
        record[split] = write_shard(out / "shards", name, found) if found.length else None
    commit(record_path(out, job.index), json.dumps(record).encode())
    return record


def _held_out(job: Job, share: float) -> list[bool]:
    """Whether each document is for validation."""
    hashes = [sha256(text).digest() for text in job.documents]
    held = [int.from_bytes(h[:8], "big") < round(share * 2**64) for h in hashes]
    if share > 0 and job.alone and not any(held):
        return [h == min(hashes) for h in hashes]
    return held


_worker: tuple[Tokenizer, Recipe, Path] | None = None  # of a process that makes shards


def start(recipe: Recipe, out: Path) -> None:
    """Begin a process that makes shards; it ends with its parent, and leaves Ctrl-C to it."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    above = multiprocessing.parent_process()

    def leave() -> None:
        if above is not None:
            above.join()
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()
    _worker = load_tokenizer(str(out / "tokenizer")), recipe, out


def worker_make(job: Job) -> dict[str, Any]:
    """`make` in a process that `start` began."""
    assert _worker is not None
    tokenizer, recipe, out = _worker
    return make(job, tokenizer, recipe, out)
