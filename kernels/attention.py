r"""Softmax attention of one token, for decoding: a step of each of N sequences; how a state is
written; and attention of packed sequences, for reading.

A sequence that has read p tokens holds keys K_s and values V_s in rows s of a state of L rows, and
its new token has q, k and v. theta is the base of the rotation, D the width of a head:

    (a, b) -> (a cos pf - b sin pf, a sin pf + b cos pf),  f_i = theta^(-2i/D)               (1)
    K_r = rotate(k, p),  V_r = v,  r = p mod L                                               (2)
    o = sum_s softmax_s(rotate(q, p) K_s^T / sqrt(D)) V_s  over s < min(p + 1, L)            (3)
    p = p + 1                                                                                (4)

Tokens i of many places at once, k_i after (1), of sequence n_i and in row r_i, if r_i < L:

    K_{n_i, r_i} = k_i,  V_{n_i, r_i} = v_i                                                  (7)

Sequences laid end to end, n with the keys r_n to r_{n+1} and, of as many of its last tokens, the
queries b_n to b_{n+1}:

    o_{b_n + i} = sum_j softmax_j(q_{b_n + i} K_{r_n + j}^T / sqrt(D)) V_{r_n + j}
                  over j <= i + (r_{n+1} - r_n) - (b_{n+1} - b_n)                            (8)

(5) and (6) are in triton_attention.py. a and b are the two halves of a head. A state with room for
all tokens has token s in row s; one of L rows that are written over is a window of L tokens. Rows
from min(p + 1, L) on are never read.

Sources: (1) Su et al. 2021, arXiv:2104.09864, in the two-halves order of LLaMA; fewer heads of keys
than of queries: Ainslie et al. 2023, arXiv:2305.13245.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from glactl.kernels.backend import launches

WIDEST = 256  # D of the Triton kernels
PACKED = (torch.bfloat16, torch.float16), (64,)  # types and D in which (8) was measured faster
State = tuple[Tensor, Tensor]  # keys and values


def attention_room(
    N: int, L: int, H: int, D: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Zeros (N, L, H, D) for one of a state's two parts, in memory a head's rows one after another,
    as they are read fastest."""
    return torch.zeros(N, H, L, D, dtype=dtype, device=device).transpose(1, 2)


def attention_more_room(x: Tensor, L: int) -> Tensor:
    """A copy of x (N, .., H, D), one of a state's two parts, with L rows, as many or more; new ones
    are 0, and it lies in memory as of `attention_room`. Differentiable in x."""
    return F.pad(x.transpose(1, 2), (0, 0, 0, L - x.shape[1])).transpose(1, 2)


def attention_write(
    k: Tensor, v: Tensor, state: State, sequence: Tensor, row: Tensor, drops: bool = False
) -> None:
    """(7), in place.

    Args:
        k, v: keys after (1) and values of M tokens, (M, H, D); differentiable in both.
        state: as of `attention_step`; k and v are rounded to its dtype.
        sequence: n, (M,) int64 in [0, N).
        row: r, (M,) int64, 0 or more; L: the token is left out. No two tokens have the same place.
        drops: whether some r may be L.

    Raises:
        ValueError: as of `attention_step`.

    Cost: where gradients are not asked for, on a CUDA device, k and v are read and written once, in
    one launch; elsewhere a copy of the state more with `drops`.
    """
    grad = torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)
    if launches(k) and not grad and k.shape[2] <= WIDEST:
        from glactl.kernels.triton_attention import attention_write_triton

        attention_write_triton(k, v, state, sequence, row)
    else:
        attention_write_reference(k, v, state, sequence, row, drops)


def attention_write_reference(
    k: Tensor, v: Tensor, state: State, sequence: Tensor, row: Tensor, drops: bool = False
) -> None:
    """(7); arguments as of `attention_write`."""
    for held, new in zip(state, (k, v), strict=True):
        new = new.to(held.dtype)
        if drops:  # to a row more, which is cut off: nothing is asked of the device
            wide = F.pad(held, (0, 0, 0, 0, 0, 1)).index_put((sequence, row), new)
            held.copy_(wide[:, :-1])
        else:
            held.index_put_((sequence, row), new)  # (7)


def packs(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attention_packed` may stand for torch's kernels: without gradients, and in the types
    and widths in which it is faster."""
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    types, widths = PACKED
    alike = q.dtype == k.dtype == v.dtype
    return launches(q) and not grad and alike and q.dtype in types and q.shape[2] in widths


@torch.no_grad()
def attention_packed(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, rows: Tensor, most: int
) -> Tensor:
    """(8) without gradients.

    Args:
        q: (M, HQ, D); tokens may lie apart, as in k and v. D of the Triton kernel: a power of two,
            16 to 128.
        k, v: (MK, H, D); H divides HQ.
        bounds: b, (N + 1,) int32, from 0 to M.
        rows: r, (N + 1,) int32, each sequence with as many as in bounds or more.
        most: at least the queries of any sequence.

    Returns:
        o: (M, HQ, D) in q's dtype.

    Cost: on a CUDA device one launch, and nothing waits for it; else a loop over the sequences, for
    which its bounds are looked up.
    """
    if launches(q):
        from glactl.kernels.triton_packed import attention_packed_triton

        return attention_packed_triton(q, k, v, bounds, rows, most)
    return attention_packed_reference(q, k, v, bounds, rows)


def attention_packed_reference(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, rows: Tensor
) -> Tensor:
    """(8), sequence by sequence; arguments and result as of `attention_packed`."""
    o, shared = torch.empty_like(q), q.shape[1] // k.shape[1]
    for (a, b), (c, d) in zip(pairwise(bounds.tolist()), pairwise(rows.tolist()), strict=True):
        keys, values = (x[c:d].repeat_interleave(shared, 1).transpose(0, 1) for x in (k, v))
        z = q[a:b].transpose(0, 1) @ keys.mT * q.shape[2] ** -0.5
        seen = torch.ones(b - a, d - c, device=q.device, dtype=torch.bool).tril((d - c) - (b - a))
        o[a:b] = (z.masked_fill(~seen, -torch.inf).softmax(-1) @ values).transpose(0, 1)  # (8)
    return o


@torch.no_grad()
def attention_step(
    q: Tensor, k: Tensor, v: Tensor, state: State, length: Tensor, theta: float | None = None
) -> Tensor:
    """(1) to (4) without gradients.

    Args:
        q: queries before (1), (N, HQ, D); sequences may lie apart, as in k and v.
        k: keys before (1), (N, H, D); H divides HQ.
        v: values, (N, H, D).
        state: keys, after (1), and values, each (N, L, H, D), L at least 1, in one dtype, to which
            k and v are rounded; updated in place. In memory it may lie in any way, alike in both.
        length: p, (N,) int64, 0 or more, below L where the state is no window; updated in place.
        theta: more than 0; None: no rotation, and D may be odd.

    Returns:
        o: (N, HQ, D) in v's dtype.

    Raises:
        ValueError: on a CUDA device, a state whose parts lie differently in memory, or with the
            entries of a row apart.

    Cost: on a CUDA device the rows that count are read once, up to each sequence's own length, in
    one launch and one for (4), or in two; else as plain torch, which reads all L rows.
    """
    if launches(q) and q.shape[2] <= WIDEST:
        from glactl.kernels.triton_attention import attention_step_triton

        return attention_step_triton(q, k, v, state, length, theta)
    return attention_step_reference(q, k, v, state, length, theta)


@torch.no_grad()
def attention_step_reference(
    q: Tensor, k: Tensor, v: Tensor, state: State, length: Tensor, theta: float | None = None
) -> Tensor:
    """(1) to (4) in the state's dtype; arguments and result as of `attention_step`."""
    if theta is not None:
        q, k = rotate_reference(q, length, theta), rotate_reference(k, length, theta)  # (1)
    L = state[0].shape[1]
    n = torch.arange(len(length), device=q.device)
    for held, new in zip(state, (k, v), strict=True):
        held[n, length % L] = new.to(held.dtype)  # (2)
    length += 1  # (4)
    counts = torch.arange(L, device=q.device) < length[:, None]
    keys, values = (held.transpose(1, 2) for held in state)
    o = F.scaled_dot_product_attention(
        q[:, :, None].to(keys.dtype), keys, values, attn_mask=counts[:, None, None],
        enable_gqa=q.shape[1] != k.shape[1],
    )  # (3)  # fmt: skip
    return o[:, :, 0].to(v.dtype)


def rotate_reference(x: Tensor, place: Tensor, theta: float) -> Tensor:
    """(1) of x (..., H, D) at places p (...), in x's dtype; the angles are fp32 or wider."""
    D = x.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    f = theta ** (-torch.arange(0, D, 2, device=x.device, dtype=wide) / D)
    angle = (place[..., None] * f)[..., None, :]  # (..., 1, D / 2)
    cos, sin = angle.cos(), angle.sin()
    a, b = x.to(wide).chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)  # (1)
