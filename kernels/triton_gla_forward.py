r"""Triton kernels of gated linear attention with a key gate: operands, states and outputs.

One head, one chunk of 64 rows; G_t the running sum of the log gates in the chunk, Ge its last row,
S the state before the chunk:

    q^ = scale q e^G      k^ = k e^{Ge-G}     A_ij = scale sum_c q_ic k_jc e^{G_ic-G_jc}, i >= j (1)
    o = A v + q^ S                                                                               (2)
    S+ = diag(e^Ge) S + k^^T v                                                                   (3)

`prepare` writes q^, k^, A, G and Ge for all chunks at once; `sweep` walks a segment of chunks with
the state of (K, VB) in registers and writes o, and S once in 128 rows for the backward.

Scores. While no channel decays by more than LIMIT nats in the chunk, A is one product of the
operands scaled to the chunk's middle, q e^{G-Ge/2} and k e^{Ge/2-G}. Beyond (`prepare_exact`), A
is built by binary halving: for h = 1, 2, .., 32 the rows i of the upper half of each block of 2h
meet the rows j of its lower half through the boundary between them,

    A_ij = scale sum_c (q_ic e^{P_ic}) (k_jc e^{X_jc})                                           (4)

P the sum of g over (boundary, i], X over (j, boundary], both read off one product of a 0/1 matrix
with g. They are sums of numbers <= 0, never a difference, so any gate in [-inf, 0] keeps its
precision and no factor exceeds 1.

Few sequences: each is cut into segments; `local_states` gives each segment's state from zero and
its decay, and `sweep` starts from their sum over the segments before it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the parameters of a kernel have no Python types)

import triton
import triton.language as tl

FLOOR = tl.constexpr(-1e4)  # stands for -inf where gates are multiplied by 0; e^FLOOR is 0


@triton.jit
def halving(level, N: tl.constexpr):
    """Level h = 2^level of (4) for N rows.

    Returns upper (N, 1), rows in the upper half of their block of 2h; near (N, N), pairs of one
    block; and the 0/1 matrix (N, N) whose product with g is P in upper rows and X in lower ones.
    """
    i = tl.arange(0, N)
    block = i >> (level + 1)
    first = ((block << (level + 1)) + (1 << level))[:, None]  # the first row past the boundary
    upper = (i >= ((block << (level + 1)) + (1 << level)))[:, None]
    near = block[:, None] == block[None, :]
    s = i[None, :]
    after = (s >= first) & (s <= i[:, None])
    before = (s < first) & (s > i[:, None])
    return upper, near, tl.where(after | before, 1.0, 0.0)


@triton.jit
def sums(selected, g, dtype: tl.constexpr):
    """The 0/1 matrix `selected` times g, to 2^-17 of each term (dtype bf16) or in fp32.

    A product, not a scan: a scan across warps costs some 8 shared loads an element.
    """
    if dtype == tl.bfloat16:
        M, hi = selected.to(tl.bfloat16), g.to(tl.bfloat16)
        out = tl.dot(M, hi)
        out = tl.dot(M, (g - hi.to(tl.float32)).to(tl.bfloat16), out)
    else:
        out = tl.dot(selected, g, input_precision="tf32x3")
    return out


@triton.jit
def prefix_sums(g, N: tl.constexpr, dtype: tl.constexpr):
    """P_i = sum of g over rows <= i and X_i over rows > i."""
    i = tl.arange(0, N)
    upto = tl.where(i[:, None] >= i[None, :], 1.0, 0.0)
    return sums(upto, g, dtype), sums(1.0 - upto, g, dtype)


@triton.jit
def store_scores(A, a_hi, a_lo, SPLIT: tl.constexpr):
    """The lower triangle of A as one or two numbers."""
    i = tl.arange(0, 64)
    A = tl.where(i[:, None] >= i[None, :], A, 0.0)
    at = i[:, None] * 64 + i[None, :]
    hi = A.to(a_hi.dtype.element_ty)
    tl.store(a_hi + at, hi)
    if SPLIT:
        tl.store(a_lo + at, A - hi.to(tl.float32))


@triton.jit
def prepare(
    q, k, g, blocks, qh, kh, G, a_hi, a_lo, ge, scale,
    H,
    K: tl.constexpr, KB: tl.constexpr, R: tl.constexpr, STORE: tl.constexpr,
    SPLIT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """q^, k^, A, Ge, and G if STORE, of one chunk and query head; grid (chunks * HQ).

    All but Ge is wrong where a channel decays by more than LIMIT: `prepare_exact` runs next.
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
    store_scores(A, a_hi + pid * 64 * 64, a_lo + pid * 64 * 64, SPLIT)


@triton.jit
def prepare_exact(
    q, k, g, blocks, qh, kh, G, a_hi, a_lo, ge, scale,
    H,
    K: tl.constexpr, KB: tl.constexpr, R: tl.constexpr, STORE: tl.constexpr,
    SPLIT: tl.constexpr, LIMIT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """The same with (4) for the chunks that `prepare` gets wrong; the others cost a look at Ge."""
    pid = tl.program_id(0).to(tl.int64)
    HQ = H * R
    hq, chunk = pid % HQ, pid // HQ
    block, half = chunk // 2, chunk % 2
    head = hq // R
    all_rows = tl.load(blocks + 2 * block + 1)
    if all_rows == 0:
        return
    ge += (chunk * H + head) * K
    if tl.max(-tl.load(ge + tl.arange(0, K)), 0) <= LIMIT:
        return
    row = tl.load(blocks + 2 * block) + 64 * half
    i = tl.arange(0, 64)
    c = tl.arange(0, KB)[None, :]
    live = (i < all_rows - 64 * half)[:, None]
    dtype = qh.dtype.element_ty
    A = tl.zeros((64, 64), tl.float32)
    for s in range(0, K, KB):
        at_q = (row * HQ + hq) * K + i[:, None] * (HQ * K) + s + c
        at_k = (row * H + head) * K + i[:, None] * (H * K) + s + c
        at_kh = (chunk * H + head) * 64 * K + i[:, None] * K + s + c
        Q = tl.load(q + at_q, mask=live, other=0.0).to(tl.float32) * scale
        Y = tl.load(k + at_k, mask=live, other=0.0).to(tl.float32)
        G1 = tl.maximum(tl.load(g + at_k, mask=live, other=0.0).to(tl.float32), FLOOR)
        A += tl.where(i[:, None] == i[None, :], tl.sum(Q * Y, 1)[:, None], 0.0)
        for level in range(6):
            upper, near, between = halving(level, 64)
            E = tl.exp(sums(between, G1, dtype))
            Qh, Yh = tl.where(upper, Q * E, 0.0), tl.where(upper, 0.0, Y * E)
            A += tl.where(near, tl.dot(Qh, tl.trans(Yh), input_precision=PREC), 0.0)  # (4)
        P, X = prefix_sums(G1, 64, dtype)
        tl.store(qh + pid * 64 * K + i[:, None] * K + s + c, Q * tl.exp(P))
        if hq % R == 0:
            tl.store(kh + at_kh, Y * tl.exp(X))
            if STORE:
                tl.store(G + at_kh, P)
    store_scores(A, a_hi + pid * 64 * 64, a_lo + pid * 64 * 64, SPLIT)


@triton.jit
def start_state(
    S, local, decay, head, first, last, H, kk, vv,
    K: tl.constexpr, V: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """S carried through segments first..last-1 (REVERSE: last-1..first): S = e^decay S + local."""
    for n in range(last - first):
        m = (last - 1 - n) if REVERSE else (first + n)
        at = m * H + head
        d = tl.exp(tl.load(decay + at * K + kk))
        S = S * d[:, None] + tl.load(local + at * (K * V) + kk[:, None] * V + vv[None, :])
    return S


@triton.jit
def local_states(
    x, y, ge, segments, local, decay,
    H,
    K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, R: tl.constexpr,
    REVERSE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """A segment's state from zero: S = e^Ge S + x^T y over its chunks, backwards if REVERSE.

    x (chunks, H R, 64, K) as `prepare` writes it, y rows of (H R, V). Grid segments * H * tiles.
    """
    pid = tl.program_id(0).to(tl.int64)
    NV: tl.constexpr = V // VB
    NK: tl.constexpr = K // KB
    tile = pid % (NV * NK)
    head = (pid // (NV * NK)) % H
    seg = pid // (NV * NK * H)
    count = tl.load(segments + 6 * seg + 1)
    if count == 0:
        return
    first = tl.load(segments + 6 * seg) * 2
    row0 = tl.load(segments + 6 * seg + 2)
    row_end = tl.load(segments + 6 * seg + 3)
    i = tl.arange(0, 64)
    kk = (tile // NV) * KB + tl.arange(0, KB)
    vv = (tile % NV) * VB + tl.arange(0, VB)
    HQ = H * R
    at_x = i[:, None] * K + kk[None, :]
    at_y = i[:, None] * (HQ * V) + vv[None, :]
    S = tl.zeros((KB, VB), tl.float32)
    total = tl.zeros((KB,), tl.float32)
    chunks = (count * 2).to(tl.int32)
    for n in range(chunks):
        t = (chunks - 1 - n) if REVERSE else n
        chunk = first + t
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
    qh, kh, a, ge, v, segments, bounds, s0, local, decay, o, states, final,
    H,
    K: tl.constexpr, V: tl.constexpr, VB: tl.constexpr, R: tl.constexpr,
    INITIAL: tl.constexpr, LOCAL: tl.constexpr, STORE: tl.constexpr, FINAL: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """Outputs (2) of one segment and V tile; states at the first row of each block of 128."""
    pid = tl.program_id(0).to(tl.int64)
    NV: tl.constexpr = V // VB
    head = (pid // NV) % H
    seg = pid // (NV * H)
    count = tl.load(segments + 6 * seg + 1)
    if count == 0:
        return
    block0 = tl.load(segments + 6 * seg)
    row0 = tl.load(segments + 6 * seg + 2)
    row_end = tl.load(segments + 6 * seg + 3)
    seq = tl.load(segments + 6 * seg + 4)
    seg0 = tl.load(segments + 6 * seg + 5)
    HQ = H * R
    i = tl.arange(0, 64)
    kk = tl.arange(0, K)
    vv = (pid % NV) * VB + tl.arange(0, VB)
    at_S = kk[:, None] * V + vv[None, :]
    at_h, at_a = i[:, None] * K + kk[None, :], i[:, None] * 64 + i[None, :]
    at_v, at_o = i[:, None] * (H * V) + vv[None, :], i[:, None] * (HQ * V) + vv[None, :]
    S = tl.zeros((K, VB), tl.float32)
    if INITIAL:
        S += tl.load(s0 + (seq * H + head) * (K * V) + at_S)
    if LOCAL:
        S = start_state(S, local, decay, head, seg0, seg, H, kk, vv, K, V, False)
    chunks = (count * 2).to(tl.int32)
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
    if FINAL and seg + 1 == tl.load(bounds + 2 * seq) + tl.load(bounds + 2 * seq + 1):
        tl.store(final + (seq * H + head) * (K * V) + at_S, S)
