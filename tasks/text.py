"""Language modelling on text: documents, split by their hash, as rows of one stream of tokens.

The documents of a split are framed and laid end to end in one stream (frames.py), of which row r of
T tokens reads stream[r T : r T + T] and is asked for the same one token further on (packing.py).
With rows "documents", row r is document r alone, from the beginning of its frame; what is behind
its first T targets is left out. A document is held out for validation where the first byte of its
sha256 is below 16, one in 16 of them; where none is, the one with the least hash. So copies of a
document are on one side, and adding documents moves no other one. Where `valid` names a source of
its own, its documents are those held out, and all others are trained on.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator

from glactl.models.spec import Spec
from glactl.tasks.corpus import documents
from glactl.tasks.floors import MAX_TEXT, floors
from glactl.tasks.frames import Frame, Frames
from glactl.tasks.packing import pack
from glactl.tasks.task import Batch, RowOrder
from glactl.tasks.tokenizer import Tokenizer, load_tokenizer

HELD_OUT = 16  # of 256 values of a hash's first byte


class TextSpec(Spec):
    """Language modelling on the documents of a source; see glactl.tasks.corpus.documents."""

    kind: Literal["text"] = "text"
    source: str = "pydoc"  # pydoc, a file, a folder, or owner/name[:config] on the hub
    tokenizer: str = "byte"  # byte, a tokenizer.json or its folder, or a name on the hub
    seq_len: int = Field(256, ge=1)  # tokens a row
    packed: bool = False  # the state begins anew at each document, not only at each row
    limit: int | None = Field(None, ge=1)  # documents to read; needed for data of the hub
    rows: Literal["stream", "documents"] = "stream"  # documents: one a row, at most seq_len tokens
    frame: Frame = "both"  # bos: BOS alone, as Llama's data have it
    valid: str | None = None  # a source of held-out documents; None: one in 16 of `source`

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.packed and self.rows == "documents":
            raise ValueError("packed is true, but rows of documents begin with one each already")
        return self


class TextTask:
    """The text of `spec`, read and turned into tokens once; a `Task` (see there).

    Args:
        spec: what to read.
        seed: of the order of the training rows; it has no influence on the split.
        tokenizer: that of `spec`; None: it is loaded.

    Raises:
        ValueError, FileNotFoundError, DataUnavailable: see `documents` and `load_tokenizer`; also
            ValueError where a split has no document or training fills no row, or where frame
            "bos" has no BOS.

    Cost: 2 bytes a token of memory where the vocabulary is at most 65,536, else 4, while reading
    up to twice as much and the file.
    """

    def __init__(self, spec: TextSpec, seed: int, tokenizer: Tokenizer | None = None) -> None:
        self.spec = spec
        tokenizer = load_tokenizer(spec.tokenizer) if tokenizer is None else tokenizer
        self.tokenizer: Tokenizer | None = tokenizer
        self.vocab_size = tokenizer.vocab_size
        if spec.frame == "bos" and tokenizer.bos_id is None:
            raise ValueError(f"frame is bos, but tokenizer {spec.tokenizer} has no BOS")
        self._train = _Side(tokenizer, spec.frame)
        self._valid = _Side(tokenizer, spec.frame, sized=True)
        settings: dict[str, Any] = {"tokenizer": spec.tokenizer, "seq_len": spec.seq_len}
        settings["packed"] = spec.packed
        for name in ("rows", "frame"):  # at their defaults they are not in older fingerprints
            if (value := getattr(spec, name)) != TextSpec.model_fields[name].default:
                settings[name] = value
        digest = hashlib.sha256(json.dumps(settings).encode())
        for hashed, text, held_out in _sides(spec):
            digest.update(hashed + b"held out" * (held_out and spec.valid is not None))
            (self._valid if held_out else self._train).add(text)
        self.fingerprint = digest.hexdigest()
        if not self._valid.n_bytes:
            raise ValueError(f"source {spec.valid or spec.source} has no text")
        if not self._train.n_bytes:
            raise ValueError(
                f"source {spec.source} has one document, which is held out for validation; "
                "allowed: two or more different ones"
            )
        self._train.close()
        self._valid.close()
        tokens = len(self._train.tokens())
        self.n_train = (tokens - 1) // spec.seq_len
        if spec.rows == "documents":
            self.n_train = len(self._train.starts)
        if self.n_train == 0:
            raise ValueError(
                f"source {spec.source} has {tokens} tokens to train on; one row of seq_len "
                f"{spec.seq_len} needs {spec.seq_len + 1}"
            )
        self._order = RowOrder(self.n_train, seed)

    def train_batch(self, index: int, batch_size: int) -> Batch:
        """Rows index * batch_size and following of the epochs, each epoch in an order of its own.

        Returns:
            tokens and targets (batch_size, seq_len); cu_seqlens where the spec says packed. Rows
            of documents are packed end to end into one, with their bounds.
        """
        return self._batch(self._train, self._order.rows(index, batch_size))

    def valid_batches(self, batch_size: int) -> Iterator[Batch]:
        """The held-out stream in order, with n_bytes; its last row asks for what is left.

        Every token but the stream's first is asked for once (packed: but each document's first).
        """
        n_rows = -(-(len(self._valid.tokens()) - 1) // self.spec.seq_len)
        if self.spec.rows == "documents":
            n_rows = len(self._valid.starts)
        for start in range(0, n_rows, batch_size):
            yield self._batch(self._valid, np.arange(start, min(start + batch_size, n_rows)))

    def floors(self) -> dict[str, float]:
        """Bits per byte of simple compressors on the held-out text; see glactl.tasks.floors."""
        return floors(
            bytes(self._train.text) if self._train.n_bytes <= MAX_TEXT else None,
            bytes(self._valid.text),
        )

    def _documents(self, side: "_Side", rows: np.ndarray) -> Batch:
        stream, starts = side.tokens(), np.frombuffer(side.starts, np.int64)
        # where there is one token for both ends, that of the next document is asked for, too
        stops = np.append(starts[1:] + side.joined, len(stream))[rows]
        length = np.minimum(stops - starts[rows] - 1, self.spec.seq_len)
        bounds = np.append(0, length.cumsum())
        at = np.arange(bounds[-1]) + np.repeat(starts[rows] - bounds[:-1], length)
        tokens, targets = (torch.from_numpy(stream[i].astype(np.int64)) for i in (at, at + 1))
        sizes = side.sizes()
        n_bytes = None if sizes is None else int(sizes[at + 1].sum())
        packed = torch.from_numpy(bounds.astype(np.int32))
        return Batch(tokens[None], targets[None], n_bytes, cu_seqlens=packed)

    def _batch(self, side: "_Side", rows: np.ndarray) -> Batch:
        if self.spec.rows == "documents":
            return self._documents(side, rows)
        return pack([(side, int(r)) for r in rows], self.spec.seq_len, self.spec.packed)


class _Side(Frames):
    """One side of the split: its stream, and its text as far as `floors` needs it.

    text: the documents, each with a NUL behind, up to the one that passes MAX_TEXT.
    """

    def __init__(self, tokenizer: Tokenizer, frame: Frame, sized: bool = False) -> None:
        super().__init__(tokenizer, frame, sized)
        self.text = bytearray()

    def add(self, text: str) -> None:
        """Append a document."""
        if self.n_bytes <= MAX_TEXT:
            self.text += text.encode() + b"\0"
        super().add(text)


def _sides(spec: TextSpec) -> Iterator[tuple[bytes, str, bool]]:
    """(sha256, text, whether it is held out) of all documents."""
    if spec.valid is None:
        yield from _split(documents(spec.source, spec.limit))
        return
    for source, limit, held_out in ((spec.source, spec.limit, False), (spec.valid, None, True)):
        for text in documents(source, limit):
            yield hashlib.sha256(text.encode()).digest(), text, held_out


def _split(texts: Iterator[str]) -> Iterator[tuple[bytes, str, bool]]:
    """(sha256, text, whether it is held out) of each document, in order."""
    waiting: list[tuple[bytes, str]] = []  # all, until one of them is held out
    found = False
    for text in texts:
        waiting.append((hashlib.sha256(text.encode()).digest(), text))
        found = found or waiting[-1][0][0] < HELD_OUT
        if found:
            yield from ((h, t, h[0] < HELD_OUT) for h, t in waiting)
            waiting.clear()
    least = min((h for h, _ in waiting), default=b"")
    yield from ((h, t, h == least) for h, t in waiting)
