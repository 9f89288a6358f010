r"""Triton kernels of gated linear attention with a key gate: gradients.

Notation of triton_gla_forward.py; D = dL/dS after the chunk, L the block of 128 rows between two
stored states.

    dA = tril(do v^T)                                                                            (1)
    dv = A^T do + k^ D      D before the chunk = q^^T do + diag(e^Ge) D                          (2)
    dq = scale e^G (do S^T) + dq~     dk = e^{Ge-G} (v D^T) + dk~                                (3)
    dq~_i = scale sum_j dA_ij k_j e^{G_i-G_j}     dk~_j = scale sum_i dA_ij q_i e^{G_i-G_j}      (4)
    dg_t = e^Ge rowsum(S * D) + sum_{i>=t} (q dq_state)_i + sum_{j<t} (k dk_state)_j
           + sum_{i>=t} (q dq~ - k dk~)_i                                                        (5)

(2) is one walk per segment with D of (K, VB) in registers (`sweep_back`), which stores D once in
a block; (3)-(5) take G, Ge over the block and need S before it and D after it (`gradients`).
(5) holds only paths that cross t, and its last sum cancels to fp32 rounding because both terms
come from the same rounded operands. The products (4) take dA as the sum of two bf16 numbers, as
(2) takes A: rounded once they would be the largest error of dq, dk and dv. The scaled operands of
(4) follow prepare's two forms, with the block of 128 rows in place of the chunk.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the parameters of a kernel have no Python types)

import triton
import triton.language as tl

from glactl.kernels.triton_gla_forward import FLOOR, halving, prefix_sums, start_state, sums


@triton.jit
def score_gradient(
    do, v, blocks, da,
    H,
    V: tl.constexpr, VB: tl.constexpr, R: tl.constexpr, SPLIT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """(1) for one block and query head; grid (blocks * HQ)."""
    pid = tl.program_id(0).to(tl.int64)
    HQ = H * R
    hq, block = pid % HQ, pid // HQ
    row = tl.load(blocks + 2 * block)
    rows = tl.load(blocks + 2 * block + 1)
    if rows == 0:
        return
    i = tl.arange(0, 128)
    c = tl.arange(0, VB)
    live = (i < rows)[:, None]
    do += (row * HQ + hq) * V
    v += (row * H + hq // R) * V
    at_do = i[:, None] * (HQ * V) + c[None, :]
    at_v = i[:, None] * (H * V) + c[None, :]
    dA = tl.zeros((128, 128), tl.float32)
    for s in range(0, V, VB):
        E = tl.load(do + at_do + s, mask=live, other=0.0).to(da.dtype.element_ty)
        W = tl.load(v + at_v + s, mask=live, other=0.0).to(da.dtype.element_ty)
        dA = tl.dot(E, tl.trans(W), dA, input_precision=PREC)
    dA = tl.where(i[:, None] >= i[None, :], dA, 0.0)
    da += pid * ((1 + SPLIT) * 128 * 128)
    at = i[:, None] * 128 + i[None, :]
    hi = dA.to(da.dtype.element_ty)
    tl.store(da + at, hi)
    if SPLIT:
        tl.store(da + 128 * 128 + at, dA - hi.to(tl.float32))


@triton.jit
def sweep_back(
    qh, kh, a_hi, a_lo, ge, do, segments, bounds, dfinal, local, decay, dv, dstates, ds0,
    H,
    K: tl.constexpr, V: tl.constexpr, VB: tl.constexpr, R: tl.constexpr,
    FINAL: tl.constexpr, LOCAL: tl.constexpr, INITIAL: tl.constexpr,
    SPLIT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """(2) over one segment and V tile, from its last chunk to its first."""
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
    at_v, at_do = i[:, None] * (H * V) + vv[None, :], i[:, None] * (HQ * V) + vv[None, :]
    D = tl.zeros((K, VB), tl.float32)
    if FINAL:
        D += tl.load(dfinal + (seq * H + head) * (K * V) + at_S)
    if LOCAL:
        seg_end = seg0 + tl.load(bounds + 2 * seq + 1)
        D = start_state(D, local, decay, head, seg + 1, seg_end, H, kk, vv, K, V, True)
    chunks = (count * 2).to(tl.int32)
    for n in range(chunks):
        t = chunks - 1 - n
        chunk = block0 * 2 + t
        row = row0 + t * 64
        live = (i < row_end - row)[:, None]
        Y = tl.load(kh + (chunk * H + head) * (64 * K) + at_h)
        end = tl.load(ge + (chunk * H + head) * K + kk)
        Db = D.to(Y.dtype)
        if t % 2 == 1:
            tl.store(dstates + ((block0 + t // 2) * H + head) * (K * V) + at_S, Db)
        dV = tl.dot(Y, Db, input_precision=PREC)
        D *= tl.exp(end)[:, None]
        for r in tl.static_range(R):
            hq = head * R + r
            Q = tl.load(qh + (chunk * HQ + hq) * (64 * K) + at_h)
            E = tl.load(do + (row * HQ + hq) * V + at_do, mask=live, other=0.0).to(Y.dtype)
            A = tl.load(a_hi + (chunk * HQ + hq) * (64 * 64) + at_a)
            dV = tl.dot(tl.trans(A), E, dV, input_precision=PREC)
            if SPLIT:
                A = tl.load(a_lo + (chunk * HQ + hq) * (64 * 64) + at_a)
                dV = tl.dot(tl.trans(A), E, dV, input_precision=PREC)
            D = tl.dot(tl.trans(Q), E, D, input_precision=PREC)
        tl.store(dv + (row * H + head) * V + at_v, dV, mask=live)
    if INITIAL and seg == seg0:
        tl.store(ds0 + (seq * H + head) * (K * V) + at_S, D)


@triton.jit
def products(da, at, near, X, Y, MASKED: tl.constexpr, SPLIT: tl.constexpr, PREC: tl.constexpr):
    """dA Y and dA^T X for the one or two parts of dA at da; only where near holds if MASKED."""
    Xd = tl.zeros(X.shape, tl.float32)
    Yd = tl.zeros(X.shape, tl.float32)
    for part in range(1 + SPLIT):  # a loop, so that the parts are copied without registers
        M = tl.load(da + part * (128 * 128) + at, mask=near, other=0.0 if MASKED else None)
        Xd = tl.dot(M, Y, Xd, input_precision=PREC)
        Yd = tl.dot(tl.trans(M), X, Yd, input_precision=PREC)
    return Xd, Yd


@triton.jit
def magnitude(x):
    """A power of two near the largest |x|; 1 if x is zero or not finite."""
    top = tl.max(tl.max(tl.abs(x), 1), 0)
    top = tl.where((top > 1e-30) & (top < 1e30), top, 1.0)
    return tl.exp2(tl.floor(tl.log2(top)))


@triton.jit
def state_gradients(
    do, v, states, dstates, blocks, dqs, dks, sizes, through,
    H,
    K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, R: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """do S^T, v D^T and rowsum(S * D) of one block, query head and K tile.

    dqs (blocks, HQ, 128, K), dks (blocks, H, 128, K), both over the tile's size in `sizes`
    (blocks, HQ, K / KB, 2), so that fp16 holds them to 2^-12; through (blocks, H, K). Kept apart
    from `gradients`: together they want more registers than a thread has.
    """
    pid = tl.program_id(0).to(tl.int64)
    NK: tl.constexpr = K // KB
    HQ = H * R
    hq = (pid // NK) % HQ
    head = hq // R
    block = pid // (NK * HQ)
    row = tl.load(blocks + 2 * block)
    rows = tl.load(blocks + 2 * block + 1)
    if rows == 0:
        return
    dtype = states.dtype.element_ty
    i = tl.arange(0, 128)
    kk = (pid % NK) * KB + tl.arange(0, KB)
    c = tl.arange(0, VB)
    live = (i < rows)[:, None]
    do += (row * HQ + hq) * V
    v += (row * H + head) * V
    states += (block * H + head) * (K * V)
    dstates += (block * H + head) * (K * V)
    at_v, at_do = i[:, None] * (H * V) + c[None, :], i[:, None] * (HQ * V) + c[None, :]
    at_S = kk[:, None] * V + c[None, :]
    at = i[:, None] * K + kk[None, :]
    dQ = tl.zeros((128, KB), tl.float32)
    if hq % R == 0:
        dK = tl.zeros((128, KB), tl.float32)
        SD = tl.zeros((KB, KB if KB >= 64 else 1), tl.float32)
        for s in range(0, V, VB):
            E = tl.load(do + at_do + s, mask=live, other=0.0).to(dtype)
            W = tl.load(v + at_v + s, mask=live, other=0.0).to(dtype)
            S = tl.load(states + at_S + s)
            D = tl.load(dstates + at_S + s)
            dQ = tl.dot(E, tl.trans(S), dQ, input_precision=PREC)
            dK = tl.dot(W, tl.trans(D), dK, input_precision=PREC)
            # rowsum(S * D) as a diagonal: S and D then serve products only, and are fetched ahead
            if KB >= 64:
                SD = tl.dot(S, tl.trans(D), SD, input_precision=PREC)
            else:
                SD += tl.sum(S.to(tl.float32) * D.to(tl.float32), 1)[:, None]
        size = magnitude(dK)
        tl.store(sizes + 2 * pid + 1, size)
        tl.store(dks + (block * H + head) * (128 * K) + at, dK / size)
        if KB >= 64:
            j = tl.arange(0, KB)
            SD = tl.where(j[:, None] == j[None, :], SD, 0.0)
        tl.store(through + (block * H + head) * K + kk, tl.sum(SD, 1))
    else:
        for s in range(0, V, VB):
            E = tl.load(do + at_do + s, mask=live, other=0.0).to(dtype)
            dQ = tl.dot(E, tl.trans(tl.load(states + at_S + s)), dQ, input_precision=PREC)
    size = magnitude(dQ)
    tl.store(sizes + 2 * pid, size)
    tl.store(dqs + (block * HQ + hq) * (128 * K) + at, dQ / size)


@triton.jit
def gradients(
    q, k, G, da, ge, blocks, dqs, dks, sizes, through, dq, dk, dg, scale,
    H,
    K: tl.constexpr, KB: tl.constexpr, R: tl.constexpr,
    KS: tl.constexpr, SPLIT: tl.constexpr, LIMIT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """(3)-(5) for one block, head and K tile that decays by LIMIT at most."""
    pid = tl.program_id(0).to(tl.int64)
    NK: tl.constexpr = K // KB
    head = (pid // NK) % H
    block = pid // (NK * H)
    row = tl.load(blocks + 2 * block)
    rows = tl.load(blocks + 2 * block + 1)
    HQ = H * R
    dtype = da.dtype.element_ty
    i = tl.arange(0, 128)
    kk = (pid % NK) * KB + tl.arange(0, KB)
    live = (i < rows)[:, None]
    at_k = i[:, None] * (H * K) + kk[None, :]
    at_q = i[:, None] * (HQ * K) + kk[None, :]
    at = i[:, None] * K + kk[None, :]
    at_dA = i[:, None] * 128 + i[None, :]
    at_G = ((i // 64) * (H * 64) + i % 64)[:, None] * K + kk[None, :]
    tile = (pid % NK) * KB // KS
    # All reads before the first use, and before the return, are in flight at once.
    ge += (block * 2 * H + head) * K + kk
    first, end = tl.load(ge)[None, :], tl.load(ge + H * K)[None, :]
    P = tl.load(G + (block * 2 * H + head) * (64 * K) + at_G)
    Y = tl.load(k + (row * H + head) * K + at_k, mask=live, other=0.0)
    Q = tl.load(q + (row * HQ + head * R) * K + at_q, mask=live, other=0.0)
    dK = tl.load(dks + (block * H + head) * (128 * K) + at)
    dQ = tl.load(dqs + (block * HQ + head * R) * (128 * K) + at)
    size_k = tl.load(sizes + 2 * ((block * HQ + head * R) * (K // KS) + tile) + 1)
    through = tl.load(through + (block * H + head) * K + kk)[None, :]
    end += first  # Ge of the block, from its two chunks
    if (rows == 0) | (tl.max(-tl.sum(end, 0), 0) > LIMIT):
        return
    P += tl.where(i[:, None] >= 64, first, 0.0) - 0.5 * end
    to_q, to_k = tl.exp(P), tl.exp(-P)
    middle = tl.exp(0.5 * end)
    Y = Y.to(tl.float32) * to_k
    Ym = Y.to(dtype)
    dK = dK.to(tl.float32) * (size_k * middle)
    whole = tl.exp(end) * through
    Z = Y * dK
    for r in tl.static_range(R):
        hq = head * R + r
        if r > 0:
            Q = tl.load(q + (row * HQ + hq) * K + at_q, mask=live, other=0.0)
            dQ = tl.load(dqs + (block * HQ + hq) * (128 * K) + at)
        size = tl.load(sizes + 2 * ((block * HQ + hq) * (K // KS) + tile))
        Qf = Q.to(tl.float32) * (scale * to_q)
        dQf = dQ.to(tl.float32) * (size * middle)
        into = Qf * dQf
        whole += tl.sum(into, 0)[None, :]
        Qm = Qf.to(dtype)
        da_r = da + (block * HQ + hq) * ((1 + SPLIT) * 128 * 128)
        Qd, Yd = products(da_r, at_dA, None, Qm, Ym, False, SPLIT, PREC)
        Z += Ym.to(tl.float32) * Yd - Qm.to(tl.float32) * Qd - into
        dK += Yd
        dQf = (dQf + Qd) * (scale * to_q)
        tl.store(dq + (row * HQ + hq) * K + at_q, dQf, mask=live)
    tl.store(dk + (row * H + head) * K + at_k, dK * to_k, mask=live)
    # (5), its sums over i >= t as the whole less the rows before t; the scores' part has no whole
    dG = whole + tl.cumsum(Z, 0) - Z
    tl.store(dg + (row * H + head) * K + at_k, dG, mask=live)


@triton.jit
def gradients_exact(
    q, k, g, da, ge, blocks, dqs, dks, sizes, through, dq, dk, dg, scale,
    H,
    K: tl.constexpr, KB: tl.constexpr, R: tl.constexpr,
    SPLIT: tl.constexpr, LIMIT: tl.constexpr, PREC: tl.constexpr,
    NARROW: tl.constexpr, KS: tl.constexpr,
):  # fmt: skip
    """What `gradients`, with tiles of NARROW columns, leaves out; grid (blocks * H)."""
    pid = tl.program_id(0).to(tl.int64)
    head, block = pid % H, pid // H
    row = tl.load(blocks + 2 * block)
    rows = tl.load(blocks + 2 * block + 1)
    HQ = H * R
    dtype = da.dtype.element_ty
    i = tl.arange(0, 128)
    live = (i < rows)[:, None]
    k += (row * H + head) * K
    g += (row * H + head) * K
    dk += (row * H + head) * K
    dg += (row * H + head) * K
    ge += (block * 2 * H + head) * K
    at_dA = i[:, None] * 128 + i[None, :]
    channels = tl.arange(0, K)
    decay = tl.max(-tl.load(ge + channels) - tl.load(ge + H * K + channels), 0)
    if (rows == 0) | (decay <= LIMIT):
        return
    for s in range(0, K, KB):
        kk = s + tl.arange(0, KB)
        wide = s // NARROW * NARROW + tl.arange(0, NARROW)
        if tl.max(-tl.load(ge + wide) - tl.load(ge + H * K + wide), 0) > LIMIT:
            at_k = i[:, None] * (H * K) + kk[None, :]
            at_q = i[:, None] * (HQ * K) + kk[None, :]
            at = i[:, None] * K + kk[None, :]
            end = (tl.load(ge + kk) + tl.load(ge + H * K + kk))[None, :]
            G1 = tl.load(g + at_k, mask=live, other=0.0).to(tl.float32)
            G1 = tl.maximum(G1, FLOOR)
            Y = tl.load(k + at_k, mask=live, other=0.0).to(tl.float32)
            P, X = prefix_sums(G1, 128, dtype)
            size = tl.load(sizes + 2 * ((block * HQ + head * R) * (K // KS) + s // KS) + 1)
            dK = tl.load(dks + (block * H + head) * (128 * K) + at).to(tl.float32)
            dK *= size * tl.exp(X)
            to_q = tl.exp(P)
            Z = Y * dK
            whole = tl.exp(end) * tl.load(through + (block * H + head) * K + kk)[None, :]
            for r in tl.static_range(R):
                hq = head * R + r
                da_r = da + (block * HQ + hq) * ((1 + SPLIT) * 128 * 128)
                own = tl.load(da_r + i * 129).to(tl.float32)  # the diagonal of dA
                if SPLIT:
                    own += tl.load(da_r + 128 * 128 + i * 129).to(tl.float32)
                Q = tl.load(q + (row * HQ + hq) * K + at_q, mask=live, other=0.0)
                Q = Q.to(tl.float32) * scale
                size = tl.load(sizes + 2 * ((block * HQ + hq) * (K // KS) + s // KS))
                dQ = tl.load(dqs + (block * HQ + hq) * (128 * K) + at).to(tl.float32)
                dQ *= size * to_q
                whole += tl.sum(Q * dQ, 0)[None, :]
                Z -= Q * dQ
                dQ += own[:, None] * Y
                dK += own[:, None] * Q
                for level in range(7):
                    upper, near, between = halving(level, 128)
                    factor = tl.exp(sums(between, G1, dtype))
                    Qm = tl.where(upper, Q * factor, 0.0).to(dtype)
                    Ym = tl.where(upper, 0.0, Y * factor).to(dtype)
                    Qd, Yd = products(da_r, at_dA, near, Qm, Ym, True, SPLIT, PREC)
                    Z += Ym.to(tl.float32) * Yd - Qm.to(tl.float32) * Qd
                    dQ += tl.where(upper, Qd * factor, 0.0)
                    dK += tl.where(upper, 0.0, Yd * factor)
                tl.store(dq + (row * HQ + hq) * K + at_q, dQ * scale, mask=live)
            tl.store(dk + at_k, dK, mask=live)
            tl.store(dg + at_k, whole + tl.cumsum(Z, 0) - Z, mask=live)
