r"""Softmax attention of packed sequences on a GPU, in one call that reads their bounds there.

Sequence n has the queries of its new tokens, len_n of them, and the keys of its c_n tokens before
and of the new ones. Laid end to end, its keys begin at row F_n = sum_{m < n} (c_m + len_m):

    key j of the past, j < c_n, is row F_n + j      new key i, i < len_n, is row F_n + c_n + i  (1)
    query i sees the rows F_n + j with j <= c_n + i and j > c_n + i - window                     (2)

(2) is the causal mask aligned to the last key. Without gradients and a window, in types and widths
where it is faster, `attention_packed` has it. Two of torch's kernels have it too: flash attention
(bf16 and fp16, widths that are multiples of 8 up to 256) and, without a window, the
memory-efficient one (fp32 and all else; its windows are others, H100, torch 2.11). They are called
as operators of aten, as scaled_dot_product_attention and nested tensors do, because only so both
take bounds and a limit of the lengths that is not looked up on the device. A program is started for
every 64 or 128 tokens of `longest` in every sequence; those behind a sequence's end do nothing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from glactl.kernels.attention import attention_packed, packs
from glactl.models.layers import Layout

FLASH_WIDEST = 256  # width of a head
BOTTOM_RIGHT = 2  # aten's number for the mask (2) of the memory-efficient kernel

Past = tuple[Tensor, Tensor, Tensor]


def fits(q: Tensor, window: int | None) -> bool:
    """Whether one of the two kernels takes queries (..., D) of this type with this window."""
    return q.dtype != torch.float64 and (window is None or _flash(q))


def _flash(q: Tensor) -> bool:
    D = q.shape[-1]
    return q.dtype in (torch.bfloat16, torch.float16) and D % 8 == 0 and D <= FLASH_WIDEST


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: Past | None,
    at: Layout,
    longest: int,
    window: int | None,
) -> Tensor:
    """Attention of every sequence to itself.

    Args:
        q: queries of M tokens, (M, heads, D), which `fits`.
        k, v: their keys and values, (M, kv_heads, D); kv_heads divides heads.
        past: keys and values before, (N, L, kv_heads, D), in order, and which count, (N, L).
        at: where each of the M tokens belongs.
        longest: at least the keys of any sequence.
        window: tokens that a query sees, itself among them; None: all.

    Returns:
        o (M, heads, D), in q's dtype.
    """
    if q.shape[0] == 0:
        return q
    ends = at.start + at.length
    bounds = F.pad(ends, (1, 0)).int()
    rows = bounds
    if past is not None:
        k, v, rows = _behind(k, v, past, at)
    most = min(len(q), longest)
    return _kernel(q, k, v, bounds, rows, most, longest, window)


def _behind(k: Tensor, v: Tensor, past: Past, at: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """(1): all keys, all values, and the bounds of the sequences in them.

    There are rows for every entry of the past; those that do not count are written to one more,
    which is cut off, and what is left over stands behind the last sequence.
    """
    count = past[2].sum(1)
    ends = (count + at.length).cumsum(0)
    first = ends - count - at.length
    size = past[2].numel() + len(k)
    old = torch.where(past[2], first[:, None] + past[2].cumsum(1) - 1, size)
    index = torch.cat([old.flatten(), (first + count)[at.sequence] + at.place])
    both = []
    for before, new in zip(past[:2], (k, v), strict=True):
        x = torch.cat([before.flatten(0, 1).to(new.dtype), new])
        both.append(new.new_zeros(size + 1, *new.shape[1:]).index_copy(0, index, x)[:size])
    return both[0], both[1], F.pad(ends, (1, 0)).int()


def _kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    rows: Tensor,
    most: int,
    longest: int,
    window: int | None,
) -> Tensor:
    """(2), for bounds (N + 1,) int32 of at most `most` queries and rows of `longest` keys each."""
    if window is None and packs(q, k, v):
        return attention_packed(q, k, v, bounds, rows, most)
    if _flash(q):
        left = None if window is None else window - 1
        flash = torch.ops.aten._flash_attention_forward
        o: Tensor = flash(
            q,
            k,
            v,
            bounds,
            rows,
            most,
            longest,
            0.0,
            True,
            False,
            window_size_left=left,
            window_size_right=None if window is None else 0,
        )[0]
        return o
    shared = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(shared, 1) if shared > 1 else x for x in (k, v))
    efficient = torch.ops.aten._efficient_attention_forward
    o = efficient(
        q[None],
        k[None],
        v[None],
        None,
        bounds,
        rows,
        most,
        min(longest, len(k)),
        0.0,
        BOTTOM_RIGHT,
        q.requires_grad or k.requires_grad or v.requires_grad,
    )[0]
    return o[0]
