r"""Triton kernels of gated linear attention with a scalar decay: scores, states and outputs.

One head, one chunk of 64 rows; g_t the log decay of row t, S the state before the chunk:

    P_i = sum_{s<=i} g_s     X_j = sum_{s>j} g_s     L_ij = exp sum_{j<s<=i} g_s, i >= j      (1)
    A = scale (q k^T) * L                                                                     (2)
    o = A v + scale e^P (q S)                                                                 (3)
    S+ = e^Ge S + k^T (e^X v)          Ge = P of the last row                                 (4)

P and X are running sums of their own over numbers <= 0, never a difference of two (`decays_between`
says what L does instead): any decay in [-inf, 0] keeps its precision and no factor exceeds 1. The
decays scale rows of products and of v, so q and k are read as they are, and never copied.

`scores` writes A, P and X of all chunks at once; `sweep` walks a segment of chunks with the state
of (K, VB) in registers and writes o, and S once in 128 rows for the backward; `local_states` gives
each segment's state from zero where sequences are cut (triton_layout.py).

A decay is GATE = 0: none, 1: one number a head, 2: one a token and head.
Source: the scalar case of Yang et al., arXiv:2312.06635v6, in chunks.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the parameters of a kernel have no Python types)

import triton
import triton.language as tl

from glactl.kernels.triton_gla_forward import store_scores
from glactl.kernels.triton_segments import this_walk

CLOSED = tl.constexpr(-128.0)  # stands for any lower decay: e^-128 is 0 in fp32


@triton.jit
def gate_rows(g, row, head, at, live, H, GATE: tl.constexpr):
    """Log decays of the rows row + at, in fp32; 0 where not live."""
    if GATE == 2:
        out = tl.load(g + (row + at) * H + head, mask=live, other=0.0).to(tl.float32)
    elif GATE == 1:
        out = tl.where(live, tl.load(g + head).to(tl.float32), 0.0)
    else:
        out = tl.zeros(at.shape, tl.float32)
    return out


@triton.jit
def decays_between(g, row, rows, head, H, N: tl.constexpr, GATE: tl.constexpr, dtype: tl.constexpr):
    """L of (1) for N rows, of which `rows` are live; 1 above the diagonal.

    Differences of running sums, the one place of them: in fp64, right to fp32 rounding, where dtype
    is fp32; in fp32 for bf16, right to N 128 2^-24 = 1e-3 at worst, since CLOSED bounds each term.
    A sum of its own for every pair, a scan of N x N, costs 45 registers a thread at N = 128, and
    with them the second block on a multiprocessor.
    """
    i = tl.arange(0, N)
    x = tl.maximum(gate_rows(g, row, head, i, i < rows, H, GATE), CLOSED)
    P = tl.cumsum(x if dtype == tl.bfloat16 else x.to(tl.float64), 0)
    return tl.exp(tl.minimum((P[:, None] - P[None, :]).to(tl.float32), 0.0))


@triton.jit
def scores(
    q, k, g, blocks, a, sums, scale,
    H,
    K: tl.constexpr, KB: tl.constexpr, R: tl.constexpr, GATE: tl.constexpr,
    BF16: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """(2) of one chunk and query head, and P, X into sums (chunks, H, 2, 64); grid chunks * HQ."""
    pid = tl.program_id(0).to(tl.int64)
    HQ = H * R
    hq, chunk = pid % HQ, pid // HQ
    block, half = chunk // 2, chunk % 2
    head = hq // R
    row = tl.load(blocks + 2 * block) + 64 * half
    rows = tl.load(blocks + 2 * block + 1)
    if rows == 0:
        return
    rows -= 64 * half
    dtype: tl.constexpr = tl.bfloat16 if BF16 else tl.float32
    i = tl.arange(0, 64)
    c = tl.arange(0, KB)[None, :]
    live = (i < rows)[:, None]
    at_q = (row * HQ + hq) * K + i[:, None] * (HQ * K) + c
    at_k = (row * H + head) * K + i[:, None] * (H * K) + c
    A = tl.zeros((64, 64), tl.float32)
    for s in range(0, K, KB):
        Q = tl.load(q + at_q + s, mask=live, other=0.0).to(dtype)
        Y = tl.load(k + at_k + s, mask=live, other=0.0).to(dtype)
        A = tl.dot(Q, tl.trans(Y), A, input_precision=PREC)
    A *= scale
    if GATE != 0:
        A *= decays_between(g, row, rows, head, H, 64, GATE, dtype)
    store_scores(A, a + pid * 64 * 64)
    if hq % R == 0:
        at = sums + (chunk * H + head) * 128 + i
        here = gate_rows(g, row, head, i, i < rows, H, GATE)
        after = gate_rows(g, row, head, i + 1, (i < 63) & (i + 1 < rows), H, GATE)
        tl.store(at, tl.cumsum(here, 0))
        tl.store(at + 64, tl.cumsum(after, 0, reverse=True))


@triton.jit
def local_states(
    x, y, sums, segments, local, decay, scale,
    H,
    K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, R: tl.constexpr,
    GATE: tl.constexpr, REVERSE: tl.constexpr, BF16: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """A segment's state from zero, (4) with x = k, y = v; or, if REVERSE, its gradient from zero:
    D = e^Ge D + x^T (scale e^P y) with x = q, y = do, backwards.

    x, y: rows of (H R, K) and (H R, V). decay (segments, H, K): the decay over the segment, in K
    copies, as `carry` reads it. Grid segments * H * tiles. The segment that ends the walk over a
    sequence is left out: no other starts from it.
    """
    NV: tl.constexpr = V // VB
    NK: tl.constexpr = K // KB
    seg, _, head, tile, block0, chunks, row0, row_end, ends = this_walk(
        segments, H, NV * NK, REVERSE
    )
    if (chunks == 0) | ends:
        return
    dtype: tl.constexpr = tl.bfloat16 if BF16 else tl.float32
    i = tl.arange(0, 64)
    kk = (tile // NV) * KB + tl.arange(0, KB)
    vv = (tile % NV) * VB + tl.arange(0, VB)
    HQ = H * R
    at_x = i[:, None] * (HQ * K) + kk[None, :]
    at_y = i[:, None] * (HQ * V) + vv[None, :]
    S = tl.zeros((KB, VB), tl.float32)
    total = 0.0
    for n in range(chunks):
        t = (chunks - 1 - n) if REVERSE else n
        row = row0 + t * 64
        live = (i < row_end - row)[:, None]
        at = sums + ((block0 * 2 + t) * H + head) * 128
        end = tl.load(at + 63)
        factor = tl.exp(tl.load(at + i + (0 if REVERSE else 64)))
        if REVERSE:
            factor *= scale
        S *= tl.exp(end)
        total += end
        for r in tl.static_range(R):
            hq = head * R + r
            X = tl.load(x + (row * HQ + hq) * K + at_x, mask=live, other=0.0).to(dtype)
            Y = tl.load(y + (row * HQ + hq) * V + at_y, mask=live, other=0.0)
            if GATE != 0 or REVERSE:
                Y = Y.to(tl.float32) * factor[:, None]
            S = tl.dot(tl.trans(X), Y.to(dtype), S, input_precision=PREC)
    at = seg * H + head
    tl.store(local + at * (K * V) + kk[:, None] * V + vv[None, :], S)
    if tile % NV == 0:
        tl.store(decay + at * K + kk, tl.zeros((KB,), tl.float32) + total)


@triton.jit
def sweep(
    q, k, a, sums, v, segments, start, o, states, final, scale,
    H,
    K: tl.constexpr, V: tl.constexpr, VB: tl.constexpr, R: tl.constexpr, GATE: tl.constexpr,
    START: tl.constexpr, CUT: tl.constexpr, STORE: tl.constexpr, FINAL: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """(3) of one segment and V tile; states at the first row of each block of 128.

    start: states of the segments if CUT, else of the sequences. Grid segments * H * V / VB.
    """
    seg, seq, head, tile, block0, chunks, row0, row_end, ends = this_walk(
        segments, H, V // VB, False
    )
    if chunks == 0:
        return
    HQ = H * R
    dtype = a.dtype.element_ty
    i = tl.arange(0, 64)
    kk = tl.arange(0, K)
    vv = tile * VB + tl.arange(0, VB)
    at_S = kk[:, None] * V + vv[None, :]
    at_a = i[:, None] * 64 + i[None, :]
    at_q, at_k = i[:, None] * (HQ * K) + kk[None, :], i[:, None] * (H * K) + kk[None, :]
    at_v, at_o = i[:, None] * (H * V) + vv[None, :], i[:, None] * (HQ * V) + vv[None, :]
    S = tl.zeros((K, VB), tl.float32)
    if START:
        S += tl.load(start + ((seg if CUT else seq) * H + head) * (K * V) + at_S)
    for t in range(chunks):
        chunk = block0 * 2 + t
        row = row0 + t * 64
        live = (i < row_end - row)[:, None]
        at = sums + (chunk * H + head) * 128
        W = tl.load(v + (row * H + head) * V + at_v, mask=live, other=0.0).to(dtype)
        Y = tl.load(k + (row * H + head) * K + at_k, mask=live, other=0.0).to(dtype)
        Sb = S.to(dtype)
        if STORE and t % 2 == 0:
            tl.store(states + ((block0 + t // 2) * H + head) * (K * V) + at_S, Sb)
        into = scale * tl.exp(tl.load(at + i))[:, None]
        for r in tl.static_range(R):
            hq = head * R + r
            Q = tl.load(q + (row * HQ + hq) * K + at_q, mask=live, other=0.0).to(dtype)
            A = tl.load(a + (chunk * HQ + hq) * (64 * 64) + at_a)
            out = tl.dot(Q, Sb, input_precision=PREC) * into
            out = tl.dot(A, W, out, input_precision=PREC)  # (3)
            tl.store(o + (row * HQ + hq) * V + at_o, out, mask=live)
        if GATE != 0:
            W = (W.to(tl.float32) * tl.exp(tl.load(at + 64 + i))[:, None]).to(dtype)
            S *= tl.exp(tl.load(at + 63))
        S = tl.dot(tl.trans(Y), W, S, input_precision=PREC)  # (4)
    if FINAL and ends:
        tl.store(final + (seq * H + head) * (K * V) + at_S, S)
