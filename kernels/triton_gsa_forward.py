r"""Triton kernels of gated slot attention: states, logits and outputs.

One head, one block of 128 rows between two stored states. s_t are the M write strengths of row t,
G_t the running sum of the log gates in the block, Ge its last row, S1 (M, K) and S2 (M, V) the
states before the block (S1 is the transpose of the operator's Sk):

    s^ = s e^{Ge-G}     S1+ = diag(e^Ge) S1 + s^^T k     S2+ = diag(e^Ge) S2 + s^^T v            (1)
    A1 = scale tril(q k^T)     z_i = sum_{j<=i} A1_ij s_j e^{G_i-G_j} + scale e^{G_i} (q_i S1^T) (2)
    p = softmax(z)                                                                               (3)
    A2_ij = sum_c p_ic s_jc e^{G_ic-G_jc}, i >= j     o = A2 v + (p e^G) S2                      (4)

Both states have the slots as their keys, so (1) is one walk (`walk`) with the values [k | v], and
neither state depends on q; the same walk carries the gradients of the states backwards.
`slots` writes G and s^, `walk` a state of (M, columns) a block, `outputs` does (2)-(4) with all
blocks at once.

Products with e^{G_i-G_j}. `factors` writes it as Fq_i Fk_j. While no slot decays by more than
LIMIT nats in the block, one pair of factors serves all (i, j), scaled to the block's middle:
e^{G-Ge/2} and e^{Ge/2-G}. Beyond, eight pairs: the seven levels of binary halving that
triton_gla_forward.py explains, and one for i = j. The two cases are two launches of one source
(EXACT), each of which leaves the other's blocks alone.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the parameters of a kernel have no Python types)

import triton
import triton.language as tl

from glactl.kernels.triton_gla_forward import FLOOR, halving, start_state, sums


@triton.jit
def strength(s, g, at, live, GIVEN: tl.constexpr):
    """The write strengths: s, or 1 - e^g if they are not GIVEN. 0 where not live."""
    if GIVEN:
        w = tl.load(s + at, mask=live, other=0.0).to(tl.float32)
    else:
        w = 1.0 - tl.exp(tl.load(g + at, mask=live, other=0.0).to(tl.float32))
    return w


@triton.jit
def gate_sums(G, g, live, EXACT: tl.constexpr):
    """What `factors` starts from: the running sums at G, or if EXACT the gates at g, finite."""
    if EXACT:
        out = tl.load(g, mask=live, other=0.0).to(tl.float32)
        out = tl.maximum(out, FLOOR)
    else:
        out = tl.load(G)
    return out


@triton.jit
def factors(level, G, end, EXACT: tl.constexpr, dtype: tl.constexpr):
    """Fq, Fk (128, M) and near (128, 128): e^{G_i-G_j} = Fq_i Fk_j for the pairs with near_ij.

    G as `gate_sums` gives it; end is Ge (1, M). One level, or 8 if EXACT: every pair i >= j is near
    in exactly one of them.
    """
    i = tl.arange(0, 128)
    if EXACT:
        upper, near, between = halving(level, 128)
        E = tl.exp(sums(between, G, dtype))
        own = level == 7
        Fq = tl.where(own, 1.0, tl.where(upper, E, 0.0))
        Fk = tl.where(own, 1.0, tl.where(upper, 0.0, E))
        near = tl.where(own, i[:, None] == i[None, :], near)
    else:
        P = G - 0.5 * end
        Fq, Fk = tl.exp(P), tl.exp(-P)
        near = i[:, None] >= i[None, :]
    return Fq, Fk, near


@triton.jit
def masked(A, near, EXACT: tl.constexpr):
    """A with zeros outside of near if EXACT; else A, whose lower triangle is all there is."""
    if EXACT:
        A = tl.where(near, A, 0.0).to(A.dtype)
    return A


@triton.jit
def add_scores(X, Y, A, near, EXACT: tl.constexpr, PREC: tl.constexpr):
    """A + X Y^T where near; if not EXACT everywhere, and the upper triangle is not meant."""
    if EXACT:
        A += tl.where(near, tl.dot(X, tl.trans(Y), input_precision=PREC), 0.0)
    else:
        A = tl.dot(X, tl.trans(Y), A, input_precision=PREC)
    return A


@triton.jit
def slots(
    s, g, blocks, sh, G, ge,
    H,
    M: tl.constexpr, MB: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """s^ (blocks, H, 128, M), G alike in fp32, Ge (blocks, H, M); grid blocks * H * M / MB."""
    pid = tl.program_id(0).to(tl.int64)
    NM: tl.constexpr = M // MB
    head = (pid // NM) % H
    block = pid // (NM * H)
    row = tl.load(blocks + 2 * block)
    rows = tl.load(blocks + 2 * block + 1)
    if rows == 0:
        return
    i = tl.arange(0, 128)[:, None]
    c = (pid % NM) * MB + tl.arange(0, MB)
    at_g = (row * H + head) * M + i * (H * M) + c[None, :]
    at = (block * H + head) * (128 * M) + i * M + c[None, :]
    g1 = tl.load(g + at_g, mask=i < rows, other=0.0).to(tl.float32)
    after = tl.load(g + at_g + H * M, mask=i + 1 < rows, other=0.0).to(tl.float32)
    w = strength(s, g, at_g, i < rows, GIVEN)
    tl.store(G + at, tl.cumsum(g1, 0))
    tl.store(ge + (block * H + head) * M + c, tl.sum(g1, 0))
    # Ge - G as a sum of its own: a difference would be inf - inf, or cancel after a strong gate
    tl.store(sh + at, w * tl.exp(tl.cumsum(after, 0, reverse=True)))


@triton.jit
def walk(
    x1, y1, x2, y2, ge, segments, bounds, s0, local, decay, states, last,
    H,
    M: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, WB: tl.constexpr, R: tl.constexpr,
    REVERSE: tl.constexpr, SUMMARY: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr,
    LAST: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """S = diag(e^Ge) S + x^T y over the blocks of a segment, from its last block if REVERSE.

    S (M, W1 + W2) is [x1^T y1 | x2^T y2], WB columns of it a program; x (blocks, H R, 128, M),
    y rows of (H R, W). Stores S before each step, and LAST after the sequence's end. SUMMARY:
    starts from zero and stores only `local`, what the segment adds, and `decay`, for the walks
    that LOCAL then starts from them. Grid segments * H * tiles.
    """
    pid = tl.program_id(0).to(tl.int64)
    W: tl.constexpr = W1 + W2
    NW: tl.constexpr = W // WB
    tile = pid % NW
    head = (pid // NW) % H
    seg = pid // (NW * H)
    count = tl.load(segments + 6 * seg + 1)
    if count == 0:
        return
    block0 = tl.load(segments + 6 * seg)
    row0 = tl.load(segments + 6 * seg + 2)
    row_end = tl.load(segments + 6 * seg + 3)
    seq = tl.load(segments + 6 * seg + 4)
    seg0 = tl.load(segments + 6 * seg + 5)
    seg_end = seg0 + tl.load(bounds + 2 * seq + 1)
    leads_on = (seg > seg0) if REVERSE else (seg + 1 < seg_end)
    if SUMMARY and not leads_on:  # no segment follows that would ask for it
        return
    HQ = H * R
    i = tl.arange(0, 128)
    m = tl.arange(0, M)
    cc = tile * WB + tl.arange(0, WB)
    first = tile * WB < W1
    if first:
        x, y, width = x1, y1 + tile * WB, W1
    else:
        x, y, width = x2, y2 + (tile * WB - W1), W2
    at_S = m[:, None] * W + cc[None, :]
    at_x = i[:, None] * M + m[None, :]
    at_y = i[:, None] * (HQ * width) + tl.arange(0, WB)[None, :]
    S = tl.zeros((M, WB), tl.float32)
    total = tl.zeros((M,), tl.float32)
    if INITIAL:
        S += tl.load(s0 + (seq * H + head) * (M * W) + at_S)
    if LOCAL:
        if REVERSE:
            S = start_state(S, local, decay, head, seg + 1, seg_end, H, m, cc, M, W, True)
        else:
            S = start_state(S, local, decay, head, seg0, seg, H, m, cc, M, W, False)
    steps = count.to(tl.int32)
    for n in range(steps):
        t = (steps - 1 - n) if REVERSE else n
        block = block0 + t
        row = row0 + t * 128
        end = tl.load(ge + (block * H + head) * M + m)
        if SUMMARY:
            total += end
        else:
            tl.store(states + (block * H + head) * (M * W) + at_S, S)
        S *= tl.exp(end)[:, None]
        for r in tl.static_range(R):
            hq = head * R + r
            X = tl.load(x + (block * HQ + hq) * (128 * M) + at_x)
            live = (i < row_end - row)[:, None]
            Y = tl.load(y + (row * HQ + hq) * width + at_y, mask=live, other=0.0)
            S = tl.dot(tl.trans(X), Y.to(X.dtype), S, input_precision=PREC)  # (1)
    if SUMMARY:
        tl.store(local + (seg * H + head) * (M * W) + at_S, S)
        if tile == 0:
            tl.store(decay + (seg * H + head) * M + m, total)
    if LAST and not leads_on:
        tl.store(last + (seq * H + head) * (M * W) + at_S, S)


@triton.jit
def outputs(
    q, k, v, s, g, blocks, sums_, ge, states, o, p, a1, a2, zs, x2, scale, slots,
    H,
    K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, WB: tl.constexpr, MB: tl.constexpr,
    R: tl.constexpr, GIVEN: tl.constexpr, SAVE: tl.constexpr, SPLIT: tl.constexpr,
    EXACT: tl.constexpr, LIMIT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """(2)-(4) for one block and query head that decays by LIMIT at most, or EXACT: by more.

    Writes p in fp32 (z meanwhile: a tile of MB slots at a time needs few registers). SAVE keeps
    for the backward A1, A2 (as two numbers if SPLIT), the state's part of z, and p e^G; all
    (blocks, HQ, 128, ..). Grid blocks * HQ.
    """
    pid = tl.program_id(0).to(tl.int64)
    HQ = H * R
    hq, block = pid % HQ, pid // HQ
    head = hq // R
    row = tl.load(blocks + 2 * block)
    rows = tl.load(blocks + 2 * block + 1)
    if rows == 0:
        return
    i = tl.arange(0, 128)
    m = tl.arange(0, M)
    ge += (block * H + head) * M
    if (tl.max(-tl.load(ge + m), 0) > LIMIT) != EXACT:
        return
    dtype = states.dtype.element_ty
    live = (i < rows)[:, None]
    W: tl.constexpr = K + V
    LEVELS: tl.constexpr = 8 if EXACT else 1
    states += (block * H + head) * (M * W)
    sums_ += (block * H + head) * (128 * M)
    p += pid * (128 * M)
    at_g = (row * H + head) * M + i[:, None] * (H * M)
    at_m = i[:, None] * M + m[None, :]
    at_A = i[:, None] * 128 + i[None, :]
    c = tl.arange(0, WB)
    at_S = m[:, None] * W + c[None, :]

    A = tl.zeros((128, 128), tl.float32)
    Z = tl.zeros((128, M), tl.float32)
    at_q = (row * HQ + hq) * K + i[:, None] * (HQ * K) + c[None, :]
    at_k = (row * H + head) * K + i[:, None] * (H * K) + c[None, :]
    for n in range(0, K, WB):
        Q = tl.load(q + at_q + n, mask=live, other=0.0).to(dtype)
        Y = tl.load(k + at_k + n, mask=live, other=0.0).to(dtype)
        S = tl.load(states + at_S + n)
        A = tl.dot(Q, tl.trans(Y), A, input_precision=PREC)
        Z = tl.dot(Q, tl.trans(S), Z, input_precision=PREC)
    A = tl.where(i[:, None] >= i[None, :], scale * A, 0.0)
    Z *= scale * tl.exp(tl.load(sums_ + at_m))
    tl.store(p + at_m, Z)
    if SAVE:
        tl.store(a1 + pid * (128 * 128) + at_A, A)
        tl.store(zs + pid * (128 * M) + at_m, Z)
    tl.debug_barrier()
    for n in tl.range(0, M, MB, num_stages=1):
        mb = n + tl.arange(0, MB)[None, :]
        at = i[:, None] * M + mb
        w = strength(s, g, at_g + mb, live, GIVEN)
        G = gate_sums(sums_ + at, g + at_g + mb, live, EXACT)
        end = tl.load(ge + mb)
        logit = tl.load(p + at)
        for level in range(LEVELS):
            Fq, Fk, near = factors(level, G, end, EXACT, dtype)
            near_A = masked(A, near, EXACT)
            logit += Fq * tl.dot(near_A, w * Fk, input_precision=PREC)  # (2)
        tl.store(p + at, tl.where(mb < slots, logit, float("-inf")))  # padding gets no weight
    tl.debug_barrier()

    Z = tl.load(p + at_m)
    Z = tl.exp(Z - tl.max(Z, 1)[:, None])
    Z = Z / tl.sum(Z, 1)[:, None]  # (3)
    tl.store(p + at_m, Z)
    X = (Z * tl.exp(tl.load(sums_ + at_m))).to(dtype)
    if SAVE:
        tl.store(x2 + pid * (128 * M) + at_m, X)
    tl.debug_barrier()
    A = tl.zeros((128, 128), tl.float32)
    for n in tl.range(0, M, MB, num_stages=1):
        mb = n + tl.arange(0, MB)[None, :]
        at = i[:, None] * M + mb
        w = strength(s, g, at_g + mb, live, GIVEN)
        G = gate_sums(sums_ + at, g + at_g + mb, live, EXACT)
        end = tl.load(ge + mb)
        P = tl.load(p + at)
        for level in range(LEVELS):
            Fq, Fk, near = factors(level, G, end, EXACT, dtype)
            A = add_scores(P * Fq, w * Fk, A, near, EXACT, PREC)  # (4)
    A = tl.where(i[:, None] >= i[None, :], A, 0.0)
    hi = A.to(dtype)
    if SAVE:
        a2 += pid * ((1 + SPLIT) * 128 * 128)
        tl.store(a2 + at_A, hi)
        if SPLIT:
            tl.store(a2 + 128 * 128 + at_A, A - hi.to(tl.float32))

    at_v = (row * H + head) * V + i[:, None] * (H * V) + c[None, :]
    at_o = (row * HQ + hq) * V + i[:, None] * (HQ * V) + c[None, :]
    for n in range(0, V, WB):
        Y = tl.load(v + at_v + n, mask=live, other=0.0).to(dtype)
        S = tl.load(states + at_S + K + n)
        out = tl.dot(X, S, input_precision=PREC)
        out = tl.dot(hi, Y, out, input_precision=PREC)  # (4)
        tl.store(o + at_o + n, out, mask=live)
