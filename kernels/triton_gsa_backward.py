r"""Triton kernels of gated slot attention: gradients.

Notation of triton_gsa_forward.py; D1 = dL/dS1 and D2 = dL/dS2 after the block. With do = dL/do:

    dA2 = tril(do v^T)     dp_i = sum_j dA2_ij s_j e^{G_i-G_j} + e^{G_i} (do_i S2^T)             (1)
    dz = p * (dp - sum_slots p * dp)                                                             (2)
    dA1_ij = scale sum_c dz_ic s_jc e^{G_ic-G_jc}, i >= j                                        (3)
    D2 before the block = (p e^G)^T do + diag(e^Ge) D2     D1 = (scale dz e^G)^T q + ..          (4)
    dq = dA1 k + (scale dz e^G) S1     dk = dA1^T q + s^ D1     dv = A2^T do + s^ D2             (5)
    ds~_j = sum_i (A1_ij dz_i + dA2_ij p_i) e^{G_i-G_j}
    ds = ds~ + e^{Ge-G} (k D1^T + v D2^T)                                                        (6)
    dg_t = e^Ge rowsum(S1 * D1 + S2 * D2)
           + sum_{i>=t} (p dp_state + dz z_state)_i + sum_{j<t} (s ds_state)_j
           + sum_{i>=t} (p dp~ + dz z~ - s ds~)_i                                                (7)

~ marks the sums over j or i of the block, _state the terms with S or D. dz needs neither D1 nor
D2, so `logit_gradients` comes first with (1)-(3), ds~ and the query side of (7); then one walk
(`walk` of the forward, reversed) makes both D of (4); then `gradients` does (5) and finishes (6)
and (7). (7) holds only paths that cross t, and its last sum cancels to fp32 rounding because both
terms come from the same rounded operands. With s = 1 - e^g, dg also receives -e^g ds.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the parameters of a kernel have no Python types)

import triton
import triton.language as tl

from glactl.kernels.triton_gsa_forward import (
    add_scores,
    factors,
    gate_sums,
    masked,
    strength,
)


@triton.jit
def crossing(X, Xd, Y, Yd, level, EXACT: tl.constexpr):
    """What a level adds to the last sum of (7), with the sign of the rows before t.

    Nothing where i = j: such a pair crosses no t, and its rounding is not to stand in for a zero.
    """
    out = Y.to(tl.float32) * Yd - X.to(tl.float32) * Xd
    if EXACT:
        out = tl.where(level == 7, 0.0, out)
    return out


@triton.jit
def logit_gradients(
    do, v, s, g, blocks, sums_, ge, states, p, a1, zs, dp, da1, x1, ds, dg, whole, scale,
    H,
    K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, WB: tl.constexpr, MB: tl.constexpr,
    R: tl.constexpr, GIVEN: tl.constexpr, SPLIT: tl.constexpr, EXACT: tl.constexpr,
    LIMIT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """(1)-(3) for one block and query head that decays by LIMIT at most, or EXACT: by more.

    Writes dA1 and scale dz e^G for (4) and (5), and of this head ds~, the summands of (7) that
    `gradients` adds up over rows before t, and their sum over the block of p dp_state + dz z_state
    (blocks, HQ, M); dp is scratch. Grid blocks * HQ.
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
    sums_ += (block * H + head) * (128 * M)
    p += pid * (128 * M)
    zs += pid * (128 * M)
    dp += pid * (128 * M)
    x1 += pid * (128 * M)
    ds += pid * (128 * M)
    dg += pid * (128 * M)
    whole += pid * M
    at_g = (row * H + head) * M + i[:, None] * (H * M)
    at_m = i[:, None] * M + m[None, :]
    at_A = pid * (128 * 128) + i[:, None] * 128 + i[None, :]
    c = tl.arange(0, WB)
    at_v = (row * H + head) * V + i[:, None] * (H * V) + c[None, :]
    at_do = (row * HQ + hq) * V + i[:, None] * (HQ * V) + c[None, :]
    at_S = (block * H + head) * (M * W) + m[:, None] * W + K + c[None, :]
    dA = tl.zeros((128, 128), tl.float32)
    through = tl.zeros((128, M), tl.float32)
    for n in range(0, V, WB):
        E = tl.load(do + at_do + n, mask=live, other=0.0).to(dtype)
        Y = tl.load(v + at_v + n, mask=live, other=0.0).to(dtype)
        S = tl.load(states + at_S + n)
        dA = tl.dot(E, tl.trans(Y), dA, input_precision=PREC)
        through = tl.dot(E, tl.trans(S), through, input_precision=PREC)
    dA = tl.where(i[:, None] >= i[None, :], dA, 0.0)
    hi = dA.to(dtype)
    lo = (dA - hi.to(tl.float32)).to(dtype)
    if not SPLIT:  # read again in each tile: kept over a loop, the tf32x3 parts would not fit
        tl.store(da1 + at_A, hi)
    tl.store(dp + at_m, through)
    tl.debug_barrier()
    mean = tl.zeros((128,), tl.float32)
    for n in tl.range(0, M, MB, num_stages=1):
        mb = n + tl.arange(0, MB)[None, :]
        at = i[:, None] * M + mb
        P = tl.load(p + at)
        dP = tl.load(dp + at) * tl.exp(tl.load(sums_ + at))
        Z = -P * dP
        tl.store(whole + mb, -tl.sum(Z, 0)[None, :])
        w = strength(s, g, at_g + mb, live, GIVEN)
        G = gate_sums(sums_ + at, g + at_g + mb, live, EXACT)
        end = tl.load(ge + mb)
        dS = tl.zeros((128, MB), tl.float32)
        if not SPLIT:
            hi = tl.load(da1 + at_A)
        for level in range(LEVELS):
            Fq, Fk, near = factors(level, G, end, EXACT, dtype)
            X, Y = (P * Fq).to(dtype), (w * Fk).to(dtype)
            near_A = masked(hi, near, EXACT)
            Xd = tl.dot(near_A, Y, input_precision=PREC)
            Yd = tl.dot(tl.trans(near_A), X, input_precision=PREC)
            if SPLIT:
                near_A = masked(lo, near, EXACT)
                Xd = tl.dot(near_A, Y, Xd, input_precision=PREC)
                Yd = tl.dot(tl.trans(near_A), X, Yd, input_precision=PREC)
            dP += Fq * Xd  # (1)
            dS += Fk * Yd  # (6)
            Z += crossing(X, Xd, Y, Yd, level, EXACT)  # (7)
        mean += tl.sum(P * dP, 1)
        tl.store(dp + at, dP)
        tl.store(ds + at, dS)
        tl.store(dg + at, Z)
    tl.debug_barrier()

    A = tl.load(a1 + at_A)
    dA = tl.zeros((128, 128), tl.float32)
    for n in tl.range(0, M, MB, num_stages=1):
        mb = n + tl.arange(0, MB)[None, :]
        at = i[:, None] * M + mb
        dZ = tl.load(p + at) * (tl.load(dp + at) - mean[:, None])  # (2)
        tl.store(x1 + at, scale * dZ * tl.exp(tl.load(sums_ + at)))
        Z = dZ * tl.load(zs + at).to(tl.float32)
        tl.store(whole + mb, tl.load(whole + mb) + tl.sum(Z, 0)[None, :])
        Z = tl.load(dg + at) - Z
        dS = tl.load(ds + at)
        w = strength(s, g, at_g + mb, live, GIVEN)
        G = gate_sums(sums_ + at, g + at_g + mb, live, EXACT)
        end = tl.load(ge + mb)
        if not SPLIT:
            A = tl.load(a1 + at_A)
        for level in range(LEVELS):
            Fq, Fk, near = factors(level, G, end, EXACT, dtype)
            X, Y = (dZ * Fq).to(dtype), (w * Fk).to(dtype)
            near_A = masked(A, near, EXACT)
            Xd = tl.dot(near_A, Y, input_precision=PREC)
            Yd = tl.dot(tl.trans(near_A), X, input_precision=PREC)
            dS += Fk * Yd  # (6)
            Z += crossing(X, Xd, Y, Yd, level, EXACT)  # (7)
            dA = add_scores(dZ * Fq, w * Fk, dA, near, EXACT, PREC)  # (3)
        tl.store(ds + at, dS)
        tl.store(dg + at, Z)
    tl.store(da1 + at_A, tl.where(i[:, None] >= i[None, :], scale * dA, 0.0))


@triton.jit
def through_block(S, D, acc, PRODUCT: tl.constexpr, PREC: tl.constexpr):
    """acc + rowsum(S * D), as the diagonal of a product if PRODUCT.

    S and D then serve products only, and are fetched ahead (triton_gla_backward.py measured it).
    """
    if PRODUCT:
        acc = tl.dot(S, tl.trans(D), acc, input_precision=PREC)
    else:
        acc += tl.sum(S.to(tl.float32) * D.to(tl.float32), 1)[:, None]
    return acc


@triton.jit
def gradients(
    q, k, v, do, s, g, blocks, sh, ge, states, dstates, a2, da1, x1, ds_part, dg_part, whole,
    dq, dk, dv, ds, dg,
    H,
    K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr,
    R: tl.constexpr, GIVEN: tl.constexpr, SPLIT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """(5), and (6) and (7) completed, for one block and head; grid blocks * H."""
    pid = tl.program_id(0).to(tl.int64)
    head, block = pid % H, pid // H
    row = tl.load(blocks + 2 * block)
    rows = tl.load(blocks + 2 * block + 1)
    if rows == 0:
        return
    dtype = states.dtype.element_ty
    HQ = H * R
    hq0 = block * HQ + head * R
    W: tl.constexpr = K + V
    PRODUCT: tl.constexpr = M == 64
    PARTS: tl.constexpr = 1 + SPLIT
    # One head's A stay in shared memory over the loops. In fp32 their tf32x3 parts would not fit.
    HOIST: tl.constexpr = R == 1 and SPLIT
    i = tl.arange(0, 128)
    m = tl.arange(0, M)
    live = (i < rows)[:, None]
    at_m = i[:, None] * M + m[None, :]
    at_A = i[:, None] * 128 + i[None, :]
    Sh = tl.load(sh + pid * (128 * M) + at_m)
    dS = tl.zeros((128, M), tl.float32)
    SD = tl.zeros((M, M if PRODUCT else 1), tl.float32)
    states += pid * (M * W)
    dstates += pid * (M * W)

    c = tl.arange(0, VB)
    at_v = (row * H + head) * V + i[:, None] * (H * V) + c[None, :]
    at_do = (row * HQ + head * R) * V + i[:, None] * (HQ * V) + c[None, :]
    at_S = m[:, None] * W + K + c[None, :]
    if HOIST:
        hi = tl.load(a2 + hq0 * (PARTS * 128 * 128) + at_A)
        lo = tl.load(a2 + (hq0 * PARTS + SPLIT) * (128 * 128) + at_A)
    for n in range(0, V, VB):
        Y = tl.load(v + at_v + n, mask=live, other=0.0).to(dtype)
        D = tl.load(dstates + at_S + n)
        SD = through_block(tl.load(states + at_S + n), D, SD, PRODUCT, PREC)
        dS = tl.dot(Y, tl.trans(D), dS, input_precision=PREC)
        dY = tl.dot(Sh, D, input_precision=PREC)
        for r in tl.static_range(R):
            E = tl.load(do + at_do + r * V + n, mask=live, other=0.0).to(dtype)
            if not HOIST:
                hi = tl.load(a2 + (hq0 + r) * (PARTS * 128 * 128) + at_A)
                lo = tl.load(a2 + ((hq0 + r) * PARTS + SPLIT) * (128 * 128) + at_A)
            dY = tl.dot(tl.trans(hi), E, dY, input_precision=PREC)  # (5)
            if SPLIT:
                dY = tl.dot(tl.trans(lo), E, dY, input_precision=PREC)
        tl.store(dv + at_v + n, dY, mask=live)

    c = tl.arange(0, KB)
    at_k = (row * H + head) * K + i[:, None] * (H * K) + c[None, :]
    at_q = (row * HQ + head * R) * K + i[:, None] * (HQ * K) + c[None, :]
    at_S = m[:, None] * W + c[None, :]
    if HOIST:
        A = tl.load(da1 + hq0 * (128 * 128) + at_A)
        X = tl.load(x1 + hq0 * (128 * M) + at_m)
    for n in range(0, K, KB):
        Y = tl.load(k + at_k + n, mask=live, other=0.0).to(dtype)
        S = tl.load(states + at_S + n)
        D = tl.load(dstates + at_S + n)
        SD = through_block(S, D, SD, PRODUCT, PREC)
        dS = tl.dot(Y, tl.trans(D), dS, input_precision=PREC)
        dY = tl.dot(Sh, D, input_precision=PREC)
        for r in tl.static_range(R):
            Q = tl.load(q + at_q + r * K + n, mask=live, other=0.0).to(dtype)
            if not HOIST:
                A = tl.load(da1 + (hq0 + r) * (128 * 128) + at_A)
                X = tl.load(x1 + (hq0 + r) * (128 * M) + at_m)
            dY = tl.dot(tl.trans(A), Q, dY, input_precision=PREC)  # (5)
            dQ = tl.dot(X, S, input_precision=PREC)
            dQ = tl.dot(A, Y, dQ, input_precision=PREC)
            tl.store(dq + at_q + r * K + n, dQ, mask=live)
        tl.store(dk + at_k + n, dY, mask=live)

    at_g = (row * H + head) * M + i[:, None] * (H * M) + m[None, :]
    after = (i + 1 < rows)[:, None]
    after = tl.load(g + at_g + H * M, mask=after, other=0.0).to(tl.float32)
    dS *= tl.exp(tl.cumsum(after, 0, reverse=True))
    Z = strength(s, g, at_g, live, GIVEN) * dS
    if PRODUCT:
        SD = tl.where(m[:, None] == m[None, :], SD, 0.0)
    total = tl.exp(tl.load(ge + pid * M + m)) * tl.sum(SD, 1)
    for r in tl.static_range(R):
        dS += tl.load(ds_part + (hq0 + r) * (128 * M) + at_m)  # (6)
        Z += tl.load(dg_part + (hq0 + r) * (128 * M) + at_m)
        total += tl.load(whole + (hq0 + r) * M + m)
    # (7), its sums over i >= t as the whole less the rows before t; the last sum has no whole
    dG = total[None, :] + tl.cumsum(Z, 0) - Z
    if GIVEN:
        tl.store(ds + at_g, dS, mask=live)
    else:
        dG -= tl.exp(tl.load(g + at_g, mask=live, other=0.0).to(tl.float32)) * dS
    tl.store(dg + at_g, dG, mask=live)
