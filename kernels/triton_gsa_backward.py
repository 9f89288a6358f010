r"""Triton kernels of gated slot attention: gradients.

Notation of triton_gsa_forward.py; D1 = dL/dS1 and D2 = dL/dS2 after the block. With do = dL/do:

    dA2 = tril(do v^T)     dp_i = sum_j dA2_ij s_j e^{G_i-G_j} + e^{G_i} (do_i S2^T)             (1)
    dz = p * (dp - sum_slots p * dp / sum_slots p)                                               (2)
    dA1_ij = scale sum_c dz_ic s_jc e^{G_ic-G_jc}, i >= j                                        (3)
    D2 before the block = (p e^G)^T do + diag(e^Ge) D2     D1 = (scale dz e^G)^T q + ..          (4)
    dq = dA1 k + (scale dz e^G) S1     dk = dA1^T q + s^ D1     dv = A2^T do + s^ D2             (5)
    ds~_j = sum_i (A1_ij dz_i + dA2_ij p_i) e^{G_i-G_j}
    ds = ds~ + e^{Ge-G} (k D1^T + v D2^T)                                                        (6)
    dg_t = e^Ge rowsum(S1 * D1 + S2 * D2)
           + sum_{i>=t} (p dp_state + dz z_state)_i + sum_{j<t} (s ds_state)_j
           + sum_{i>=t} (p dp~ + dz z~ - s ds~)_i                                                (7)

The sum of p in (2) is 1 but for the rounding of p, which is kept in bf16. Without it dz is off by
that times the mean of dp, alike in all slots: where strong gates leave nearly the same rows in all
of them, dq and dk are what is left of a cancelling sum over slots, and went 16 to 33 % wrong. So
it is taken where gates are STRONG; elsewhere it changes nothing (2 % of the time at K 256).

~ marks the sums over j or i of the block, _state the terms with S or D. dz needs neither D1 nor
D2, so `logit_gradients` comes first with (1)-(3) and A2, then `slot_gradients` with ds~ and the
query side of (7), then one walk (`walk` of the forward, reversed) makes both D of (4), then
`gradients` does (5) and finishes (6) and (7). (7) holds only paths that cross t, and its last sum
cancels to fp32 rounding because both terms come from the same rounded operands; it is summed over
rows before anything is rounded. With s = 1 - e^g, dg also receives -e^g ds.

A2, dA2 and dA1 of a block may wait where dv, dk and dq of its rows will be written (IN_PLACE).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the parameters of a kernel have no Python types)

import triton
import triton.language as tl

from glactl.kernels.triton_gsa_pairs import (
    add_mix,
    factors,
    slot_scores,
    slot_tile,
    sums_after,
    sums_before,
)


@triton.jit
def score_rows(pid, row, hq, HQ, WIDTH: tl.constexpr, IN_PLACE: tl.constexpr):
    """Offsets (128, 128) of the scores of a block and query head.

    IN_PLACE: the first 128 elements of each of its rows of WIDTH in a tensor of rows of HQ heads.
    """
    i, j = tl.arange(0, 128)[:, None], tl.arange(0, 128)[None, :]
    if IN_PLACE:
        at = (row * HQ + hq) * WIDTH + i * (HQ * WIDTH) + j
    else:
        at = pid * (128 * 128) + i * 128 + j
    return at


@triton.jit
def logit_gradients(
    do, v, s, g, blocks, table, sums_, ge, levels, states, p, zs, a2, da2, da1, x1, x2, dz, dg,
    scratch, scale,
    H,
    K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, WB: tl.constexpr, MB: tl.constexpr,
    R: tl.constexpr, GIVEN: tl.constexpr, STRONG: tl.constexpr, IN_PLACE: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """(1)-(3) for one block and query head of n = 7, or STRONG: less.

    Writes A2, dA2, dA1, dz (after dp_state), and for (4) scale dz e^G and p e^G; to dg the summands
    of the first sum over rows in (7). With MB < M slots at a time, for fewer registers, `scratch`
    (blocks, HQ, 128, M) holds dp. Grid blocks * HQ.
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
    sums_ += (block * H + head) * (128 * M)
    ge += (block * H + head) * M
    p += pid * (128 * M)
    zs += pid * (128 * M)
    x1 += pid * (128 * M)
    x2 += pid * (128 * M)
    dz += pid * (128 * M)
    dg += pid * (128 * M)
    scratch += pid * (128 * M)
    s_g = (row * H + head) * M  # the block's first row of s and g
    at_m = i[:, None] * M + m[None, :]
    A = slot_scores(
        p, s, g, sums_, ge, s_g, H * M, rows, size, table, dtype, M, MB, GIVEN, STRONG, PREC
    )  # fmt: skip
    tl.store(a2 + score_rows(pid, row, hq, HQ, V, IN_PLACE), tl.where(lower, A, 0.0), mask=live)
    c = tl.arange(0, WB)
    at_v = (row * H + head) * V + i[:, None] * (H * V) + c[None, :]
    at_do = (row * HQ + hq) * V + i[:, None] * (HQ * V) + c[None, :]
    at_S = (block * H + head) * (M * W) + m[:, None] * W + K + c[None, :]
    A = tl.zeros((128, 128), tl.float32)
    dP = tl.zeros((128, M), tl.float32)
    for n in range(0, V, WB):
        E = tl.load(do + at_do + n, mask=live, other=0.0).to(dtype)
        Y = tl.load(v + at_v + n, mask=live, other=0.0).to(dtype)
        S = tl.load(states + at_S + n)
        A = tl.dot(E, tl.trans(Y), A, input_precision=PREC)
        dP = tl.dot(E, tl.trans(S), dP, input_precision=PREC)
    dA2 = tl.where(lower, A, 0.0).to(dtype)
    tl.store(da2 + score_rows(pid, row, hq, HQ, K, IN_PLACE), dA2, mask=live)
    dP *= tl.exp(tl.load(sums_ + at_m))
    tl.store(dz + at_m, dP)
    tl.debug_barrier()
    if MB == M:
        w, G, end = slot_tile(s, g, sums_, ge, s_g, H * M, rows, 0, M, MB, GIVEN, STRONG)
        dP = add_mix(dP, dA2, w, G, end, size, table, STRONG, PLAIN, PREC)  # (1)
    else:
        tl.store(scratch + at_m, dP)
        tl.debug_barrier()
        for n in tl.range(0, M, MB, num_stages=1):
            w, G, end = slot_tile(s, g, sums_, ge, s_g, H * M, rows, n, M, MB, GIVEN, STRONG)
            at = i[:, None] * M + n + tl.arange(0, MB)[None, :]
            part = add_mix(
                tl.load(scratch + at), dA2, w, G, end, size, table, STRONG, PLAIN, PREC
            )  # (1)
            tl.store(scratch + at, part)
        tl.debug_barrier()
        dP = tl.load(scratch + at_m)
    P = tl.load(p + at_m)
    mean = tl.sum(P * dP, 1)
    if STRONG:
        mean /= tl.maximum(tl.sum(P.to(tl.float32), 1), 1e-30)
    dP = P * (dP - mean[:, None])  # (2), dz from here on
    tl.store(dg + at_m, P * tl.load(dz + at_m).to(tl.float32) + dP * tl.load(zs + at_m))
    up = tl.exp(tl.load(sums_ + at_m))
    tl.store(x1 + at_m, scale * dP * up)
    tl.store(x2 + at_m, P * up)
    tl.debug_barrier()
    tl.store(dz + at_m, dP)
    tl.debug_barrier()
    A = slot_scores(
        dz, s, g, sums_, ge, s_g, H * M, rows, size, table, dtype, M, MB, GIVEN, STRONG, PREC
    )  # fmt: skip
    at_A = score_rows(pid, row, hq, HQ, K, IN_PLACE)
    tl.store(da1 + at_A, tl.where(lower, scale * A, 0.0), mask=live)  # (3)


@triton.jit
def slot_level(
    dS, Z, t, size, P, dZ, w, G, end, table, a1, da2, live,
    STRONG: tl.constexpr, PLAIN: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """What the pairs near for t add to ds~ (6) and, negative, to the last sum of (7).

    a1, da2 point to scores, read for each t: a first operand that is transposed is to come from
    memory. Nothing is added to Z where i = j is all there is: such a pair crosses no t, and its
    rounding is not to stand in for a zero.
    """
    dtype = P.dtype
    Fq, Fk, near = factors(t, size, G, end, table, STRONG, PLAIN, dtype)
    Y = (w * Fk).to(dtype)
    X = (dZ * Fq).to(dtype)
    A = tl.load(a1)
    if STRONG:
        A = tl.where(near, A, 0.0).to(dtype)
    Yd = tl.dot(tl.trans(A), X, input_precision=PREC)
    crossing = X.to(tl.float32) * tl.dot(A, Y, input_precision=PREC)
    X = (P * Fq).to(dtype)
    A = tl.load(da2, mask=live, other=0.0)
    if STRONG:
        A = tl.where(near, A, 0.0).to(dtype)
    Yd = tl.dot(tl.trans(A), X, Yd, input_precision=PREC)
    crossing += X.to(tl.float32) * tl.dot(A, Y, input_precision=PREC)
    crossing = Y.to(tl.float32) * Yd - crossing
    if STRONG:
        crossing = tl.where(t < 0, 0.0, crossing)
    return dS + Fk * Yd, Z + crossing


@triton.jit
def slot_gradients(
    s, g, blocks, table, sums_, ge, levels, p, a1, da2, ds, dg,
    H,
    K: tl.constexpr, M: tl.constexpr, MB: tl.constexpr, R: tl.constexpr, GIVEN: tl.constexpr,
    STRONG: tl.constexpr, IN_PLACE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """ds~ of one query head, and all that (7) has of it; for a block of n = 7, or STRONG: less.

    Over dz in ds, and over what `logit_gradients` left in dg. Grid blocks * HQ * M / MB.
    """
    pid = tl.program_id(0).to(tl.int64)
    NM: tl.constexpr = M // MB
    HQ = H * R
    n = (pid % NM).to(tl.int32) * MB
    pid //= NM
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
    dtype = p.dtype.element_ty
    PLAIN: tl.constexpr = g.dtype.element_ty == tl.bfloat16 and dtype == tl.bfloat16
    i = tl.arange(0, 128)
    live = (i < rows)[:, None]
    at = pid * (128 * M) + i[:, None] * M + n + tl.arange(0, MB)[None, :]
    a1 += pid * (128 * 128) + i[:, None] * 128 + i[None, :]
    da2 += score_rows(pid, row, hq, HQ, K, IN_PLACE)
    sums_ += (block * H + head) * (128 * M)
    ge += (block * H + head) * M
    s_g = (row * H + head) * M
    w, G, end = slot_tile(s, g, sums_, ge, s_g, H * M, rows, n, M, MB, GIVEN, STRONG)
    P, dZ = tl.load(p + at), tl.load(ds + at)
    dS = tl.zeros((128, MB), tl.float32)
    Z = -tl.load(dg + at).to(tl.float32)
    total = tl.sum(Z, 0)[None, :]
    if STRONG:
        for t in range(size - 1, 7):
            tl.debug_barrier()  # reads again what would not fit the registers over the loop
            w, G, end = slot_tile(s, g, sums_, ge, s_g, H * M, rows, n, M, MB, GIVEN, STRONG)
            P, dZ = tl.load(p + at), tl.load(ds + at)
            dS, Z = slot_level(
                dS, Z, t, size, P, dZ, w, G, end, table, a1, da2, live, True, PLAIN, PREC
            )  # fmt: skip
    else:
        dS, Z = slot_level(
            dS, Z, 0, 0, P, dZ, w, G, end, table, a1, da2, live, False, PLAIN, PREC
        )  # fmt: skip
    tl.debug_barrier()  # behind all reads of ds and dg
    tl.store(ds + at, dS)
    tl.store(dg + at, sums_before(Z, table, dtype) - total)  # (7)


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
    q, k, v, do, s, g, blocks, table, sh, ge, states, dstates, a2, da1, x1, ds_part, dg_part,
    dq, dk, dv, ds, dg,
    H,
    K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr,
    R: tl.constexpr, GIVEN: tl.constexpr, HOIST: tl.constexpr, IN_PLACE: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """(5), and (6) and (7) completed, for one block and head; grid blocks * H.

    HOIST: one head's scores stay in shared memory over the loops.
    """
    pid = tl.program_id(0).to(tl.int64)
    head, block = pid % H, pid // H
    row = tl.load(blocks + 2 * block)
    rows = tl.load(blocks + 2 * block + 1)
    if rows == 0:
        return
    dtype = states.dtype.element_ty
    PLAIN: tl.constexpr = g.dtype.element_ty == tl.bfloat16 and dtype == tl.bfloat16
    HQ = H * R
    hq0 = block * HQ + head * R
    W: tl.constexpr = K + V
    PRODUCT: tl.constexpr = M == 64
    i = tl.arange(0, 128)
    m = tl.arange(0, M)
    live = (i < rows)[:, None]
    at_m = i[:, None] * M + m[None, :]
    Sh = tl.load(sh + pid * (128 * M) + at_m)
    dS = tl.zeros((128, M), tl.float32)
    SD = tl.zeros((M, M if PRODUCT else 1), tl.float32)
    states += pid * (M * W)
    dstates += pid * (M * W)
    a2 += score_rows(hq0, row, head * R, HQ, V, IN_PLACE)
    da1 += score_rows(hq0, row, head * R, HQ, K, IN_PLACE)

    c = tl.arange(0, VB)
    at_v = (row * H + head) * V + i[:, None] * (H * V) + c[None, :]
    at_do = (row * HQ + head * R) * V + i[:, None] * (HQ * V) + c[None, :]
    at_S = m[:, None] * W + K + c[None, :]
    if HOIST:
        A = tl.load(a2, mask=live, other=0.0)
        tl.debug_barrier()  # IN_PLACE, dv overwrites it
    for n in range(0, V, VB):
        Y = tl.load(v + at_v + n, mask=live, other=0.0).to(dtype)
        D = tl.load(dstates + at_S + n)
        SD = through_block(tl.load(states + at_S + n), D, SD, PRODUCT, PREC)
        dS = tl.dot(Y, tl.trans(D), dS, input_precision=PREC)
        dY = tl.dot(Sh, D, input_precision=PREC)
        for r in tl.static_range(R):
            E = tl.load(do + at_do + r * V + n, mask=live, other=0.0).to(dtype)
            if not HOIST:
                A = tl.load(a2 + r * (128 * 128), mask=live, other=0.0)
            dY = tl.dot(tl.trans(A), E, dY, input_precision=PREC)  # (5)
        tl.store(dv + at_v + n, dY, mask=live)

    c = tl.arange(0, KB)
    at_k = (row * H + head) * K + i[:, None] * (H * K) + c[None, :]
    at_q = (row * HQ + head * R) * K + i[:, None] * (HQ * K) + c[None, :]
    at_S = m[:, None] * W + c[None, :]
    if HOIST:
        A = tl.load(da1, mask=live, other=0.0)
        X = tl.load(x1 + hq0 * (128 * M) + at_m)
        tl.debug_barrier()  # IN_PLACE, dq overwrites the scores
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
                A = tl.load(da1 + r * (128 * 128), mask=live, other=0.0)
                X = tl.load(x1 + (hq0 + r) * (128 * M) + at_m)
            dY = tl.dot(tl.trans(A), Q, dY, input_precision=PREC)  # (5)
            dQ = tl.dot(X, S, input_precision=PREC)
            dQ = tl.dot(A, Y, dQ, input_precision=PREC)
            tl.store(dq + at_q + r * K + n, dQ, mask=live)
        tl.store(dk + at_k + n, dY, mask=live)

    if PRODUCT:
        SD = tl.where(m[:, None] == m[None, :], SD, 0.0)
    total = tl.exp(tl.load(ge + pid * M + m)) * tl.sum(SD, 1)
    at_g = (row * H + head) * M + i[:, None] * (H * M) + m[None, :]
    # s ds_state = s^ dS before dS gets its factor e^{Ge-G}
    dG = total[None, :] + sums_before(Sh.to(tl.float32) * dS, table, dtype)
    dS *= tl.exp(sums_after(g + at_g, H * M, rows, table, PLAIN, dtype))
    for r in tl.static_range(R):
        dS += tl.load(ds_part + (hq0 + r) * (128 * M) + at_m)  # (6)
        dG += tl.load(dg_part + (hq0 + r) * (128 * M) + at_m)  # (7)
    if GIVEN:
        tl.store(ds + at_g, dS, mask=live)
    else:
        dG -= tl.exp(tl.load(g + at_g, mask=live, other=0.0).to(tl.float32)) * dS
    tl.store(dg + at_g, dG, mask=live)
