r"""Triton kernels of gated linear attention with a key gate: operands, states and outputs.

One head, one chunk of 64 rows; G_t the running sum of the log gates in the chunk, Ge its last row,
S the state before the chunk:

    q^ = scale q e^G      k^ = k e^{Ge-G}     A_ij = scale sum_c q_ic k_jc e^{G_ic-G_jc}, i >= j (1)
    o = A v + q^ S                                                                               (2)
    S+ = diag(e^Ge) S + k^^T v                                                                   (3)

`prepare` writes q^, k^, A, G and Ge for all chunks at once; `sweep` walks a segment of chunks with
the state of (K, VB) in registers and writes o, and S once in 128 rows for the backward.

Scores. While no channel decays by more than LIMIT nats in the chunk, A is one product of the
operands scaled to the chunk's middle, q e^{G-Ge/2} and k e^{Ge/2-G}. Other chunks are redone by
`prepare_exact` of triton_gla_strong.py.

Few sequences: each is cut into segments; `local_states` gives each segment's state from zero and
its decay, of which triton_segments.py makes the state that `sweep` starts the segment from.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the parameters of a kernel have no Python types)

import triton
import triton.language as tl

from glactl.kernels.triton_segments import this_walk


@triton.jit
def store_scores(A, a):
    """The lower triangle of A (64, 64)."""
    i = tl.arange(0, 64)
    A = tl.where(i[:, None] >= i[None, :], A, 0.0)
    tl.store(a + i[:, None] * 64 + i[None, :], A)


@triton.jit
def prepare(
    q, k, g, blocks, qh, kh, G, a, ge, scale,
    H,
    K: tl.constexpr, KB: tl.constexpr, R: tl.constexpr, STORE: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """q^, k^, A, Ge, and G if STORE, of one chunk and query head; grid (chunks * HQ).

    q^, k^ and A are wrong where a channel decays by more than LIMIT: `prepare_exact` runs next.
    """
    pid = tl.program_id(0).to(tl.int64)
    HQ = H * R
    hq, chunk = pid % HQ, pid // HQ
    block, half = chunk // 2, chunk % 2
    head = hq // R
    row = tl.load(blocks + 2 * block) + 64 * half
    all_rows = tl.load(blocks + 2 * block + 1)
    if all_rows == 0:
        return
    i = tl.arange(0, 64)
    c = tl.arange(0, KB)
    live = (i < all_rows - 64 * half)[:, None]
    q += (row * HQ + hq) * K
    k += (row * H + head) * K
    g += (row * H + head) * K
    qh += pid * 64 * K
    kh += (chunk * H + head) * 64 * K
    G += (chunk * H + head) * 64 * K
    ge += (chunk * H + head) * K
    at_q, at_k, at_h = i[:, None] * (HQ * K), i[:, None] * (H * K), i[:, None] * K
    write_k = hq % R == 0
    A = tl.zeros((64, 64), tl.float32)
    for s in range(0, K, KB):
        at = s + c[None, :]
        G1 = tl.load(g + at_k + at, mask=live, other=0.0).to(tl.float32)
        Q = tl.load(q + at_q + at, mask=live, other=0.0).to(tl.float32) * scale
        Y = tl.load(k + at_k + at, mask=live, other=0.0).to(tl.float32)
        end = tl.sum(G1, 0)
        P = tl.cumsum(G1, 0)
        if STORE:
            tl.store(G + at_h + at, P)
        end_row = end[None, :]
        middle = tl.exp(0.5 * end_row)
        P -= 0.5 * end_row
        Q *= tl.exp(P)
        Y *= tl.exp(-P)
        tl.store(qh + at_h + at, Q * middle)
        if write_k:
            tl.store(ge + s + c, end)
            tl.store(kh + at_h + at, Y * middle)
        A = tl.dot(Q, tl.trans(Y), A, input_precision=PREC)
    store_scores(A, a + pid * 64 * 64)


@triton.jit
def local_states(
    x, y, ge, segments, local, decay,
    H,
    K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, R: tl.constexpr,
    REVERSE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """A segment's state from zero: S = e^Ge S + x^T y over its chunks, backwards if REVERSE.

    x (chunks, H R, 64, K) as `prepare` writes it, y rows of (H R, V). Grid segments * H * tiles.
    The segment that ends the walk over a sequence is left out: no other starts from it.
    """
    NV: tl.constexpr = V // VB
    NK: tl.constexpr = K // KB
    seg, _, head, tile, block0, chunks, row0, row_end, ends = this_walk(
        segments, H, NV * NK, REVERSE
    )
    if (chunks == 0) | ends:
        return
    i = tl.arange(0, 64)
    kk = (tile // NV) * KB + tl.arange(0, KB)
    vv = (tile % NV) * VB + tl.arange(0, VB)
    HQ = H * R
    at_x = i[:, None] * K + kk[None, :]
    at_y = i[:, None] * (HQ * V) + vv[None, :]
    S = tl.zeros((KB, VB), tl.float32)
    total = tl.zeros((KB,), tl.float32)
    for n in range(chunks):
        t = (chunks - 1 - n) if REVERSE else n
        chunk = block0 * 2 + t
        row = row0 + t * 64
        end = tl.load(ge + (chunk * H + head) * K + kk)
        S *= tl.exp(end)[:, None]
        total += end
        for r in tl.static_range(R):
            hq = head * R + r
            X = tl.load(x + (chunk * HQ + hq) * (64 * K) + at_x)
            live = (i < row_end - row)[:, None]
            Y = tl.load(y + (row * HQ + hq) * V + at_y, mask=live, other=0.0)
            S = tl.dot(tl.trans(X), Y.to(X.dtype), S, input_precision=PREC)
    at = seg * H + head
    tl.store(local + at * (K * V) + kk[:, None] * V + vv[None, :], S)
    if tile % NV == 0:
        tl.store(decay + at * K + kk, total)


@triton.jit
def sweep(
    qh, kh, a, ge, v, segments, start, o, states, final,
    H,
    K: tl.constexpr, V: tl.constexpr, VB: tl.constexpr, R: tl.constexpr,
    START: tl.constexpr, CUT: tl.constexpr, STORE: tl.constexpr, FINAL: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """Outputs (2) of one segment and V tile; states at the first row of each block of 128.

    start: states of the segments if CUT, else of the sequences. Grid segments * H * V / VB.
    """
    seg, seq, head, tile, block0, chunks, row0, row_end, ends = this_walk(
        segments, H, V // VB, False
    )
    if chunks == 0:
        return
    HQ = H * R
    i = tl.arange(0, 64)
    kk = tl.arange(0, K)
    vv = tile * VB + tl.arange(0, VB)
    at_S = kk[:, None] * V + vv[None, :]
    at_h, at_a = i[:, None] * K + kk[None, :], i[:, None] * 64 + i[None, :]
    at_v, at_o = i[:, None] * (H * V) + vv[None, :], i[:, None] * (HQ * V) + vv[None, :]
    S = tl.zeros((K, VB), tl.float32)
    if START:
        S += tl.load(start + ((seg if CUT else seq) * H + head) * (K * V) + at_S)
    for t in range(chunks):
        chunk = block0 * 2 + t
        row = row0 + t * 64
        live = (i < row_end - row)[:, None]
        Y = tl.load(kh + (chunk * H + head) * (64 * K) + at_h)
        W = tl.load(v + (row * H + head) * V + at_v, mask=live, other=0.0).to(Y.dtype)
        end = tl.load(ge + (chunk * H + head) * K + kk)
        Sb = S.to(Y.dtype)
        if STORE and t % 2 == 0:
            tl.store(states + ((block0 + t // 2) * H + head) * (K * V) + at_S, Sb)
        for r in tl.static_range(R):
            hq = head * R + r
            Q = tl.load(qh + (chunk * HQ + hq) * (64 * K) + at_h)
            A = tl.load(a + (chunk * HQ + hq) * (64 * 64) + at_a)
            out = tl.dot(Q, Sb, input_precision=PREC)
            out = tl.dot(A, W, out, input_precision=PREC)  # (2)
            tl.store(o + (row * HQ + hq) * V + at_o, out, mask=live)
        S = tl.dot(tl.trans(Y), W, S * tl.exp(end)[:, None], input_precision=PREC)  # (3)
    if FINAL and ends:
        tl.store(final + (seq * H + head) * (K * V) + at_S, S)
