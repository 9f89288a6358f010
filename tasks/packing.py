"""Rows of T tokens from streams of documents, the documents' bounds with them; batches' hashes.

Row r of a stream reads stream[r T : r T + T] and is asked for stream[r T + 1 : r T + T + 1]. So an
epoch reads every token once and pads or crops none, but for what fills no last row; a document
that reaches beyond a row goes on in the next one, from an empty state. Packed rows carry the
places where documents begin, as cu_seqlens, from the frames themselves and never from tokens' ids.
No loss crosses a bound: a document's last token is asked for nothing where the next frame begins
with a token of its own; where one and the same token ends a document and begins the next (joined
streams, see frames.py), that token is asked for, as the end of the document.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import torch

from glactl.tasks.task import Batch


class Stream(Protocol):
    """Framed documents laid end to end; see frames.py."""

    @property
    def length(self) -> int:
        """Tokens."""

    @property
    def joined(self) -> bool:
        """Whether one token ends a document and begins the next."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens from start up to stop, or to the end; (n,)."""

    def bytes_of(self, start: int, stop: int) -> np.ndarray | None:
        """The bytes of text that each of them stands for; None where that is not kept."""

    def begun(self, start: int, stop: int) -> np.ndarray:
        """Where documents begin, from start up to stop; (n,) int64."""


def pack(rows: Sequence[tuple[Stream, int]], T: int, packed: bool) -> Batch:
    """The rows of T tokens with these numbers, each of a stream.

    Args:
        rows: the stream and the number of each; a last row may be short of tokens, but for one.
        T: tokens a row.
        packed: the state begins anew at each document; False: only at each row.

    Returns:
        tokens and targets (rows, T); cu_seqlens where packed; n_bytes where the streams keep it.
    """
    tokens = np.empty((len(rows), T + 1), np.int64)
    asked = np.zeros((len(rows), T), bool)
    bounds = [np.arange(len(rows) + 1) * T]
    n_bytes: int | None = 0
    for i, (stream, r) in enumerate(rows):
        start, stop = r * T, min(r * T + T + 1, stream.length)
        n = stop - start
        tokens[i, :n] = stream.read(start, stop)
        tokens[i, n:] = tokens[i, n - 1]
        asked[i, : n - 1] = True
        if packed:
            begun = stream.begun(start + 1, start + T + 1) - start
            if not stream.joined:  # what follows a document's last token is not its to know
                asked[i, begun - 1] = False
            bounds.append(begun + i * T)
        sizes = stream.bytes_of(start + 1, stop)
        if sizes is None:
            n_bytes = None
        elif n_bytes is not None:
            n_bytes += int(sizes[asked[i, : n - 1]].sum())
    targets = np.where(asked, tokens[:, 1:], -100)
    ends = np.unique(np.concatenate(bounds)).astype(np.int32)
    return Batch(
        tokens=torch.from_numpy(np.ascontiguousarray(tokens[:, :-1])),
        targets=torch.from_numpy(targets),
        n_bytes=n_bytes,
        cu_seqlens=torch.from_numpy(ends) if packed else None,
    )


def batch_hash(batches: Iterable[Batch]) -> str:
    """32 hex digits, BLAKE2b, of the tokens, targets and bounds of a global batch.

    batches: its rows in order, cut into micro-batches in any way; the cut does not count.
    """
    parts = [hashlib.blake2b(digest_size=16) for _ in range(3)]
    read = 0
    for batch in batches:
        for part, x in zip(parts, (batch.tokens, batch.targets), strict=False):
            part.update(x.contiguous().numpy().astype("<i8").tobytes())
        if batch.cu_seqlens is not None:
            parts[2].update((batch.cu_seqlens[:-1].numpy() + read).astype("<i8").tobytes())
        read += batch.tokens.numel()
    return hashlib.blake2b(b"".join(p.digest() for p in parts), digest_size=16).hexdigest()
