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

Products with e^{G_i-G_j} are those of scaled operands, see triton_gsa_pairs.py. Blocks that need
more than one pair of factors have a launch of their own of the same source (STRONG); each of the
two leaves the other's blocks alone.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the parameters of a kernel have no Python types)

import triton
import triton.language as tl

from glactl.kernels.triton_gsa_pairs import (
    add_mix,
    add_scores,
    gates,
    selected_sums,
    slot_scores,
    slot_tile,
    strength,
    sums_after,
    sums_before,
)
from glactl.kernels.triton_segments import this_walk


@triton.jit
def slots(
    s, g, blocks, table, sh, G, ge, levels,
    H,
    M: tl.constexpr, MB: tl.constexpr, GIVEN: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """s^ (blocks, H, 128, M), G alike in fp32, Ge (blocks, H, M), n (blocks, H, M / MB).

    n as in triton_gsa_pairs.py, for these slots; table is `selections`. Grid blocks * H * M / MB.
    """
    pid = tl.program_id(0).to(tl.int64)
    NM: tl.constexpr = M // MB
    head = (pid // NM) % H
    block = pid // (NM * H)
    row = tl.load(blocks + 2 * block)
    rows = tl.load(blocks + 2 * block + 1)
    if rows == 0:
        return
    dtype = sh.dtype.element_ty
    PLAIN: tl.constexpr = g.dtype.element_ty == tl.bfloat16 and dtype == tl.bfloat16
    i = tl.arange(0, 128)
    live = (i < rows)[:, None]
    c = (pid % NM) * MB + tl.arange(0, MB)
    at_g = (row * H + head) * M + i[:, None] * (H * M) + c[None, :]
    at = (block * H + head) * (128 * M) + i[:, None] * M + c[None, :]
    g1 = gates(g + at_g, live)
    end = tl.sum(g1, 0)
    tl.store(ge + (block * H + head) * M + c, end)
    tl.store(G + at, sums_before(g1, table, dtype) + g1)
    w = strength(s, g, at_g, live, GIVEN)
    tl.store(sh + at, w * tl.exp(sums_after(g + at_g, H * M, rows, table, PLAIN, dtype)))
    size = 7
    if tl.max(-end, 0) > LIMIT:
        size = 0
        for n in range(1, 7):
            half = selected_sums(table, n, g1, PLAIN, dtype)  # least in a group's last row
            size += (-2.0 * tl.min(half) <= LIMIT).to(tl.int32)  # so are all smaller groups
    tl.store(levels + pid, size)


@triton.jit
def walk(
    x1, y1, x2, y2, ge, segments, start, local, decay, states, last,
    H,
    M: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, WB: tl.constexpr, R: tl.constexpr,
    REVERSE: tl.constexpr, SUMMARY: tl.constexpr, START: tl.constexpr, CUT: tl.constexpr,
    LAST: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """S = diag(e^Ge) S + x^T y over the blocks of a segment, from its last block if REVERSE.

    S (M, W1 + W2) is [x1^T y1 | x2^T y2], WB columns of it a program; x (blocks, H R, 128, M),
    y rows of (H R, W). START: from start, of the segments if CUT, else of the sequences. Stores S
    before each step, and LAST after the sequence's end. SUMMARY: starts from zero and stores only
    `local`, what the segment adds, and `decay`, for `carry`. Grid segments * H * tiles.
    """
    W: tl.constexpr = W1 + W2
    seg, seq, head, tile, block0, chunks, row0, row_end, ends = this_walk(
        segments, H, W // WB, REVERSE
    )
    if chunks == 0:
        return
    if SUMMARY and ends:  # no segment follows that would ask for it
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
    if START:
        S += tl.load(start + ((seg if CUT else seq) * H + head) * (M * W) + at_S)
    steps = chunks // 2
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
    if LAST and ends:
        tl.store(last + (seq * H + head) * (M * W) + at_S, S)


@triton.jit
def outputs(
    q, k, v, s, g, blocks, table, sums_, ge, levels, states, o, p, a1, zs, scratch, scale, slots,
    H,
    K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, WB: tl.constexpr, MB: tl.constexpr,
    R: tl.constexpr, GIVEN: tl.constexpr, SAVE: tl.constexpr, STRONG: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """(2)-(4) for one block and query head of n = 7, or STRONG: less.

    SAVE keeps for the backward p, A1 and the state's part of z, all (blocks, HQ, 128, ..). With
    MB < M slots at a time, for fewer registers, `scratch` (blocks, HQ, 128, M) holds z, then p.
    Grid blocks * HQ.
    """
    pid = tl.program_id(0).to(tl.int64)
    HQ = H * R
    hq, block = pid % HQ, pid // HQ
    head = hq // R
    row = tl.load(blocks + 2 * block)
    rows = tl.load(blocks + 2 * block + 1)
    if rows == 0:
        return
    NL: tl.constexpr = M // 64 if M > 64 else 1
    size = tl.min(tl.load(levels + (block * H + head) * NL + tl.arange(0, NL)), 0)
    if (size < 7) != STRONG:
        return
    i = tl.arange(0, 128)
    m = tl.arange(0, M)
    dtype = states.dtype.element_ty
    PLAIN: tl.constexpr = g.dtype.element_ty == tl.bfloat16 and dtype == tl.bfloat16
    live = (i < rows)[:, None]
    lower = i[:, None] >= i[None, :]
    W: tl.constexpr = K + V
    states += (block * H + head) * (M * W)
    sums_ += (block * H + head) * (128 * M)
    ge += (block * H + head) * M
    scratch += pid * (128 * M)
    s_g = (row * H + head) * M  # the block's first row of s and g
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
    X = tl.where(lower, scale * A, 0.0).to(dtype)
    Z *= scale * tl.exp(tl.load(sums_ + at_m))
    if SAVE:
        tl.store(a1 + pid * (128 * 128) + at_A, X)
        tl.store(zs + pid * (128 * M) + at_m, Z)
    if MB == M:
        w, G, end = slot_tile(s, g, sums_, ge, s_g, H * M, rows, 0, M, MB, GIVEN, STRONG)
        Z = add_mix(Z, X, w, G, end, size, table, STRONG, PLAIN, PREC)  # (2)
    else:
        tl.store(scratch + at_m, Z)
        tl.debug_barrier()
        for n in tl.range(0, M, MB, num_stages=1):
            w, G, end = slot_tile(s, g, sums_, ge, s_g, H * M, rows, n, M, MB, GIVEN, STRONG)
            at = i[:, None] * M + n + tl.arange(0, MB)[None, :]
            logit = add_mix(
                tl.load(scratch + at), X, w, G, end, size, table, STRONG, PLAIN, PREC
            )  # (2)
            tl.store(scratch + at, logit)
        tl.debug_barrier()
        Z = tl.load(scratch + at_m)
    Z = tl.where(m[None, :] < slots, Z, float("-inf"))  # padding gets no weight
    Z = tl.exp(Z - tl.max(Z, 1)[:, None])
    P = (Z / tl.sum(Z, 1)[:, None]).to(dtype)  # (3), rounded once for all that follows
    if SAVE:
        tl.store(p + pid * (128 * M) + at_m, P)
    X = (P * tl.exp(tl.load(sums_ + at_m))).to(dtype)
    if MB == M:
        A = add_scores(tl.zeros_like(A), P, w, G, end, size, table, STRONG, PLAIN, PREC)
    else:
        tl.store(scratch + at_m, P)
        tl.debug_barrier()
        A = slot_scores(
            scratch, s, g, sums_, ge, s_g, H * M, rows, size, table, dtype, M, MB, GIVEN, STRONG,
            PREC,
        )  # fmt: skip
    scores = tl.where(lower, A, 0.0).to(dtype)  # (4)

    at_v = (row * H + head) * V + i[:, None] * (H * V) + c[None, :]
    at_o = (row * HQ + hq) * V + i[:, None] * (HQ * V) + c[None, :]
    for n in range(0, V, WB):
        Y = tl.load(v + at_v + n, mask=live, other=0.0).to(dtype)
        S = tl.load(states + at_S + K + n)
        out = tl.dot(X, S, input_precision=PREC)
        out = tl.dot(scores, Y, out, input_precision=PREC)  # (4)
        tl.store(o + at_o + n, out, mask=live)
