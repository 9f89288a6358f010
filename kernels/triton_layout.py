"""How the Triton engines cut a batch of sequences: blocks of 128 rows and segments of blocks.

Rows are the tokens of all sequences laid end to end, B * T of them. Each sequence is cut into
blocks of BLOCK rows (the last one ragged) and its blocks into segments, one program's walk each.
Both lists are tensors on the device, so packed sequences need no copy of their lengths to the
host: the lists then have room for the most blocks and segments that N sequences of T rows in all
can have, and the unused entries say zero rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK = 128  # rows between two stored states
CHUNK = 64  # rows of one step of the state
_cuts: ContextVar[dict[tuple[Any, ...], tuple[Tensor, "Layout"]] | None] = ContextVar(
    "cuts", default=None
)


class Layout(NamedTuple):
    """The cut of a batch, as the kernels read it.

    Attributes:
        blocks: (blocks, 2) int64: first row, rows (0 for an unused entry).
        segments: (segments, 6) int64: first block, blocks, first row, row after the sequence's
            last, sequence, first segment of the sequence.
        bounds: (N, 2) int64: first segment of each sequence, segments.
        split: whether a sequence may have more than one segment.
    """

    blocks: Tensor
    segments: Tensor
    bounds: Tensor
    split: bool


def _cut(starts: Tensor, ends: Tensor, n_blocks: int, n_segments: int, length: int) -> Layout:
    """Blocks and segments of `length` blocks for sequences of rows [starts, ends)."""
    device = starts.device
    per_seq = (ends - starts + BLOCK - 1) // BLOCK
    last = per_seq.cumsum(0)
    i = torch.arange(n_blocks, device=device)
    seq = torch.searchsorted(last, i, right=True).clamp_(max=len(starts) - 1)
    first = starts[seq] + (i - (last - per_seq)[seq]) * BLOCK
    rows = (ends[seq] - first).clamp_(0, BLOCK)
    blocks = torch.stack([first.minimum(ends[seq]), rows], 1)

    segs = (per_seq + length - 1) // length
    seg_last = segs.cumsum(0)
    j = torch.arange(n_segments, device=device)
    seq = torch.searchsorted(seg_last, j, right=True).clamp_(max=len(starts) - 1)
    head = (seg_last - segs)[seq]
    begin = (j - head) * length
    count = torch.where(j < seg_last[-1], (per_seq[seq] - begin).clamp(0, length), 0)
    segments = torch.stack(
        [
            (last - per_seq)[seq] + begin,
            count,
            starts[seq] + begin * BLOCK,
            ends[seq],
            seq,
            head,
        ],
        1,
    )
    return Layout(blocks, segments, torch.stack([seg_last - segs, segs], 1), False)


@lru_cache(maxsize=64)
def _dense(B: int, T: int, length: int, device: torch.device) -> Layout:
    per_seq = -(-T // BLOCK)
    starts = torch.arange(B, device=device) * T
    n_segments = B * -(-per_seq // length)
    layout = _cut(starts, starts + T, B * per_seq, n_segments, length)
    return layout._replace(split=per_seq > length)


def block_count(B: int, T: int, packed: int | None) -> int:
    """Blocks that B sequences of T rows need, or at most, `packed` sequences of T rows in all."""
    return B * -(-T // BLOCK) if packed is None else T // BLOCK + packed


def cut(
    B: int, T: int, cu_seqlens: Tensor | None, tiles: int, programs: int, device: torch.device
) -> Layout:
    """The layout for B sequences of T rows, or for the packed ones of cu_seqlens.

    Args:
        B, T: sequences and rows of each; with cu_seqlens B is 1.
        cu_seqlens: (N + 1,) ints on the device, or None.
        tiles: programs that walk one segment (heads times tiles of V).
        programs: how many programs are wanted, where the rows suffice.
        device: where the lists are wanted.
    """
    n = B if cu_seqlens is None else len(cu_seqlens) - 1
    most = block_count(B, T, None if cu_seqlens is None else n)
    length = max(1, -(-most * tiles // programs))
    if cu_seqlens is None:
        return _dense(B, T, length, device)
    cuts, key = _cuts.get(), (id(cu_seqlens), T, length)
    if cuts is not None and key in cuts:
        return cuts[key][1]
    cu = cu_seqlens.long()
    layout = _cut(cu[:-1], cu[1:], most, most // length + n, length)
    layout = layout._replace(split=most > length)
    if cuts is not None:
        cuts[key] = cu_seqlens, layout  # held, so that no other tensor gets its id
    return layout


@contextmanager
def steady() -> Iterator[None]:
    """Within, no cu_seqlens changes its values, so that all layers of a model share their cuts.

    Cost: without, some 20 launches for each call of an engine with packed sequences.
    """
    token = _cuts.set({})
    try:
        yield
    finally:
        _cuts.reset(token)
