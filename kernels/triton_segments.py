r"""Triton kernels over segments: where a walk starts, and the states carried from one to the next.

A sequence cut into segments (triton_layout.py) is walked by one program for each segment, head and
tile of the state. `local_states` of an engine gives every segment n but the last its state from
zero, s_n, and its log decay d_n, a number for each row of the state; `carry` turns them into the
states that the segments start from,

    S_{n+1} = diag(e^{d_n}) S_n + s_n        from the sequence's initial state                   (1)

and for gradients the same from the last segment to the first, whose s_n nobody wants. A walk then
loads one state, however many segments its sequence has.

Bytes: (1) reads and writes 4 K V of each segment and head once. At K 256, V 512,
4 heads and 16 segments 67 MB, 0.022 ms at 3.02 TB/s; 0.03 predicted, not measured.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the parameters of a kernel have no Python types)

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from glactl.kernels.triton_launch import launch
from glactl.kernels.triton_layout import Layout


@triton.jit
def walk_at(segments, seg, REVERSE: tl.constexpr):
    """Of segment seg: its sequence, first block, chunks (0 for an unused entry), first row, the row
    after the last one of the sequence; and whether the walk, backwards if REVERSE, ends where the
    sequence does."""
    at = segments + 6 * seg
    block0, blocks, row0 = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    row_end, seq = tl.load(at + 3), tl.load(at + 4)
    ends = tl.load(at + 5) == seg if REVERSE else row_end <= row0 + blocks * 128
    return seq, block0, (blocks * 2).to(tl.int32), row0, row_end, ends


@triton.jit
def this_walk(segments, H, TILES: tl.constexpr, REVERSE: tl.constexpr):
    """What this program of a grid of segments * H * TILES walks: the segment, its sequence, head
    and tile, and the rest of `walk_at`."""
    pid = tl.program_id(0).to(tl.int64)
    tile, head, seg = pid % TILES, (pid // TILES) % H, pid // (TILES * H)
    seq, block0, chunks, row0, row_end, ends = walk_at(segments, seg, REVERSE)
    return seg, seq, head, tile, block0, chunks, row0, row_end, ends


@triton.jit
def carry(
    local, decay, initial, bounds, start,
    H,
    K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr,
    INITIAL: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """(1) for one sequence, head and (KB, VB) of the state; grid N * H * tiles.

    local, start: (segments, H, K, V); decay (segments, H, K); initial (N, H, K, V). Not in place:
    a tile smaller than the threads is read by several of them and written by one.
    """
    pid = tl.program_id(0).to(tl.int64)
    NV: tl.constexpr = V // VB
    NK: tl.constexpr = K // KB
    tile, head, seq = pid % (NV * NK), (pid // (NV * NK)) % H, pid // (NV * NK * H)
    first = tl.load(bounds + 2 * seq)
    count = tl.load(bounds + 2 * seq + 1).to(tl.int32)
    if count == 0:
        return
    kk = (tile // NV) * KB + tl.arange(0, KB)
    vv = (tile % NV) * VB + tl.arange(0, VB)
    at_S = kk[:, None] * V + vv[None, :]
    S = tl.zeros((KB, VB), tl.float32)
    if INITIAL:
        S += tl.load(initial + (seq * H + head) * (K * V) + at_S)
    for n in tl.range(count - 1, num_stages=4):  # no read waits for the state: fetched ahead
        at = (first + (count - 1 - n if REVERSE else n)) * H + head
        tl.store(start + at * (K * V) + at_S, S)
        d = tl.exp(tl.load(decay + at * K + kk))
        S = S * d[:, None] + tl.load(local + at * (K * V) + at_S)  # (1)
    at = (first + (0 if REVERSE else count - 1)) * H + head
    tl.store(start + at * (K * V) + at_S, S)


def carried(
    number: int, layout: Layout, local: Tensor, decay: Tensor, initial: Tensor | None, reverse: bool
) -> Tensor:
    """The state each segment starts from, or its gradient: (segments, H, K, V) as local.

    Args:
        number: of the call, see triton_launch.py.
        layout: the cut; entries of segments it does not use stay unwritten.
        local: (segments, H, K, V), fp32: each segment's state from zero; the last of a sequence, or
            the first if reverse, is not read.
        decay: (segments, H, K), fp32: the log decay over each segment.
        initial: (N, H, K, V), fp32: what the first segments start from; None for zero.
        reverse: from the last segment to the first.
    """
    H, K, V = local.shape[1:]
    kb, vb = min(K, 8), gcd(V, 64)  # 16 bytes a thread, so that few heads still fill the chip
    start = torch.empty_like(local)
    launch(
        number, carry, len(layout.bounds) * H * (K // kb) * (V // vb),
        local, decay, initial, layout.bounds, start, H,
        K=K, V=V, KB=kb, VB=vb, INITIAL=initial is not None, REVERSE=reverse, num_warps=4,
    )  # fmt: skip
    return start
