r"""Triton kernels of gated linear attention with a key gate: what strong gates ask for.

`prepare` (triton_gla_forward.py) and `gradients` (triton_gla_backward.py) scale q and k to the
middle of a chunk or block, which overflows where a channel decays by more than LIMIT nats in it.
The two kernels here redo those, K tile by K tile. With G the running sum of the log gates,

    A_ij = scale sum_c q_ic k_jc e^{G_ic-G_jc}                                                   (1)
    dq~_i = scale sum_j dA_ij k_j e^{G_i-G_j}     dk~_j = scale sum_i dA_ij q_i e^{G_i-G_j}      (2)

split by pairs (i, j) into masked products, each with a reference r of its own,

    e^{G_i-G_j} = e^{G_i-r} e^{r-G_j}                                                            (3)

Rows of the upper and of the lower half of each 64 and each 128 rows meet through the boundary
between the halves: neither factor exceeds 1, whatever the gate. What is left are the pairs of one
group of 32 rows, in one of two ways, chosen for each tile:

*Middle*, where no channel decays by more than LIMIT in 32 rows: one more product with r the middle
of the group. The exponents are differences of running sums of the chunk, at most 2 LIMIT.

*Exact*, any gate in [-inf, 0]: the halves of 32 rows through their boundary, and the pairs of one
group of 16 rows without a product, row i against row i-d for d = 0, .., 15,

    e^{G_i-G_{i-d}} = e^{W_d}     W_0 = 0     W_{d+1} = W_d + g_{i-d}                            (4)
    e^{G_{j+d}-G_j} = e^{U_d}     U_0 = 0     U_{d+1} = U_d + g_{j+d+1}                          (5)

which ends with the sums over the group's rows <= i and > j. From those to the sums over 32, 64 and
128 rows it is one term a step, the sum of g over the sibling group:

    before_i += [i in the upper half] sibling     after_j += [j in the lower half] sibling       (6)

Every exponent is a sum of numbers <= 0, never a difference.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the parameters of a kernel have no Python types)

import triton
import triton.language as tl

from glactl.kernels.triton_gla_backward import products
from glactl.kernels.triton_gla_forward import store_scores


@triton.jit
def sibling_sums(g, level, N: tl.constexpr):
    """For each of N rows the sum of g over the other half of its block of 2^(level+1) >= 32 rows.

    By sums over 16 rows, of which each row wants a few; no product: a matrix times fewer than 64
    columns from registers is what Triton 3.6 lets read past the end of shared memory.
    """
    G: tl.constexpr = N // 16
    sixteens = tl.sum(tl.reshape(g.to(tl.float32), (G, 16, g.shape[1])), 1)
    half = tl.arange(0, G) >> (level - 4)
    sibling = (half ^ 1)[:, None] == half[None, :]
    out = tl.sum(tl.where(sibling[:, :, None], sixteens[None, :, :], 0.0), 1)
    return tl.reshape(tl.broadcast_to(out[:, None, :], (G, 16, g.shape[1])), g.shape)


@triton.jit
def prefix_sums(g, N: tl.constexpr):
    """For each of N rows the sum of g over the rows up to it; in 16s, then over them."""
    g = g.to(tl.float32)
    rows = tl.reshape(g, (N // 16, 16, g.shape[1]))
    sixteens = tl.sum(rows, 1)
    before = tl.cumsum(sixteens, 0) - sixteens
    return tl.reshape(tl.cumsum(rows, 1) + before[:, None, :], g.shape)


@triton.jit
def exact_chunk(
    pid, block, half, all_rows, hq, head, chunk, q, k, g, blocks, qh, kh, a, ge, scale,
    H,
    K: tl.constexpr, KB: tl.constexpr, R: tl.constexpr,
    LIMIT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """q^, k^ and A of one chunk and query head, K tile by K tile."""
    HQ = H * R
    ge += (chunk * H + head) * K
    row = tl.load(blocks + 2 * block) + 64 * half
    i = tl.arange(0, 64)
    c = tl.arange(0, KB)
    rows = all_rows - 64 * half
    live = (i < rows)[:, None]
    q += (row * HQ + hq) * K
    k += (row * H + head) * K
    g += (row * H + head) * K
    qh += pid * 64 * K
    kh += (chunk * H + head) * 64 * K
    shift = tl.arange(0, 16)[None, :]
    upper, upper16 = (i >= 32)[:, None], (i % 32 >= 16)[:, None]
    halves = tl.zeros((64, 64), tl.float32)  # pairs of the chunk's upper and lower half
    groups = tl.zeros((64, 64), tl.float32)  # pairs of one group of 32 rows
    band = tl.zeros((64, 16), tl.float32)  # pairs (i, i-d) of one group of 16 rows
    shifts = 0
    for s in range(0, K, KB):
        at_q = i[:, None] * (HQ * K) + s + c[None, :]
        at_k = i[:, None] * (H * K) + s + c[None, :]
        end = tl.load(ge + s + c)
        G1 = tl.load(g + at_k, mask=live, other=0.0)
        Q = tl.load(q + at_q, mask=live, other=0.0).to(tl.float32) * scale
        Y = tl.load(k + at_k, mask=live, other=0.0).to(tl.float32)
        low = tl.sum(tl.where(upper, 0.0, G1.to(tl.float32)), 0)
        narrow = (-low <= LIMIT) & (low - end <= LIMIT)
        exact = tl.min(narrow.to(tl.int32), 0) == 0
        if exact:
            before = G1.to(tl.float32)
            after = tl.zeros((64, KB), tl.float32)
            band += tl.where(shift == 0, tl.sum(Q * Y, 1)[:, None], 0.0)
            for d in range(1, 16):
                pair = live & (i % 16 >= d)[:, None]
                E = tl.exp(before)
                Yd = tl.load(k + at_k - d * (H * K), mask=pair, other=0.0).to(tl.float32)
                Gd = tl.load(g + at_k - d * (H * K), mask=pair, other=0.0).to(tl.float32)
                band += tl.where(shift == d, tl.sum(Q * Yd * E, 1)[:, None], 0.0)  # (4)
                before += Gd
                pair = (i + d < rows)[:, None] & (i % 16 + d < 16)[:, None]
                after += tl.load(g + at_k + d * (H * K), mask=pair, other=0.0).to(tl.float32)
            E = tl.exp(tl.where(upper16, before, after))
            to_q, to_k = tl.where(upper16, E, 0.0), tl.where(upper16, 0.0, E)
            sibling = sibling_sums(G1, 4, 64)
            before += tl.where(upper16, sibling, 0.0)  # (6)
            after += tl.where(upper16, 0.0, sibling)
            E = tl.exp(tl.where(upper, before, after))
            sibling = sibling_sums(G1, 5, 64)
            before += tl.where(upper, sibling, 0.0)
            after += tl.where(upper, 0.0, sibling)
            shifts = 16
        else:
            before = prefix_sums(G1, 64)
            after = end[None, :] - before
            D = before - low[None, :]
            E = tl.exp(tl.where(upper, D, -D))
            D = before - 0.5 * (low[None, :] + tl.where(upper, end[None, :], 0.0))
            to_q, to_k = tl.exp(D), tl.exp(-D)
        at_h = i[:, None] * K + s + c[None, :]
        tl.store(qh + at_h, Q * tl.exp(before))
        if hq % R == 0:
            tl.store(kh + at_h, Y * tl.exp(after))
        Qm, Ym = tl.where(upper, Q * E, 0.0), tl.where(upper, 0.0, Y * E)
        halves = tl.dot(Qm, tl.trans(Ym), halves, input_precision=PREC)  # (3)
        Qm, Ym = Q * to_q, Y * to_k
        groups = tl.dot(Qm, tl.trans(Ym), groups, input_precision=PREC)
    A = halves + tl.where(i[:, None] // 32 == i[None, :] // 32, groups, 0.0)
    for d in range(shifts):
        own = tl.sum(tl.where(shift == d, band, 0.0), 1)[:, None]
        A += tl.where(i[:, None] - i[None, :] == d, own, 0.0)
    store_scores(A, a + pid * 64 * 64)


@triton.jit(do_not_specialize=["n"])
def prepare_exact(
    q, k, g, blocks, qh, kh, a, ge, scale, n,
    H,
    K: tl.constexpr, KB: tl.constexpr, R: tl.constexpr, EACH: tl.constexpr,
    LIMIT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """q^, k^ and A of those of n chunks that `prepare` gets wrong; the others cost a look at Ge.

    Grid (n / EACH, HQ) in one axis: EACH chunks a program, so that all can be looked at in two
    rounds of the chip. What `prepare` writes into Ge and G is right for any gate.
    """
    pid = tl.program_id(0).to(tl.int64)
    HQ = H * R
    hq = pid % HQ
    head, first = hq // R, pid // HQ * EACH
    c = first + tl.arange(0, EACH)[:, None]
    ends = tl.load(ge + (c * H + head) * K + tl.arange(0, K)[None, :], mask=c < n, other=0.0)
    if tl.max(tl.max(-ends, 1), 0) <= LIMIT:
        return
    for j in range(EACH):
        chunk = first + j
        if chunk < n:
            block, half = chunk // 2, chunk % 2
            all_rows = tl.load(blocks + 2 * block + 1)
            end = tl.load(ge + (chunk * H + head) * K + tl.arange(0, K))
            if (all_rows > 0) & (tl.max(-end, 0) > LIMIT):
                exact_chunk(
                    chunk * HQ + hq, block, half, all_rows, hq, head, chunk, q, k, g, blocks, qh,
                    kh, a, ge, scale, H, K, KB, R, LIMIT, PREC,
                )  # fmt: skip


@triton.jit
def diagonal(da, d, mask, SPLIT: tl.constexpr):
    """dA_{i,i-d} for the 128 rows i; 0 outside mask."""
    at = tl.arange(0, 128) * 129 - d
    x = tl.load(da + at, mask=mask, other=0.0).to(tl.float32)
    if SPLIT:
        x += tl.load(da + 128 * 128 + at, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def meet(da, level, Q, Y, E, dQ, dK, Z, SPLIT: tl.constexpr, PREC: tl.constexpr):
    """(2) for the upper rows i and the lower rows j of each block of 2^(level+1).

    E is e^{G-r} in upper rows and e^{r-G} in lower ones, so one operand holds q' of (3) in the
    first and k' in the second, and one sum, with dA masked to the pairs, takes both products.
    """
    i = tl.arange(0, 128)
    group = i // 16  # a mask made of it is one value for 16 columns, which then are copied at once
    is_upper = ((group >> (level - 4)) & 1) == 1
    upper = is_upper[:, None]
    near = (group[:, None] >> (level - 3)) == (group[None, :] >> (level - 3))
    near &= upper & ~is_upper[None, :]
    at = i[:, None] * 128 + i[None, :]
    X = (tl.where(upper, Q, Y) * E).to(da.dtype.element_ty)
    Xd = tl.zeros(X.shape, tl.float32)
    for part in range(1 + SPLIT):  # a loop, so that the parts are copied without registers
        M = tl.load(da + part * (128 * 128) + at, mask=near, other=0.0)
        Xd = tl.dot(M, X, Xd, input_precision=PREC)
        Xd = tl.dot(tl.trans(M), X, Xd, input_precision=PREC)
    crossing = X.to(tl.float32) * Xd
    Z += tl.where(upper, -crossing, crossing)
    Xd *= E
    return dQ + tl.where(upper, Xd, 0.0), dK + tl.where(upper, 0.0, Xd), Z


@triton.jit
def exact_tile(
    tile, block, head, row, rows, first, second, q, k, g, G, da, ge, dqs, dks, sizes, through,
    dq, dk, dg, scale,
    H,
    K: tl.constexpr, KB: tl.constexpr, R: tl.constexpr,
    KS: tl.constexpr, SPLIT: tl.constexpr, LIMIT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dq, dk, dg of one K tile; first, second: Ge (KB,) of the block's chunks, also at ge."""
    HQ = H * R
    dtype: tl.constexpr = da.dtype.element_ty
    i = tl.arange(0, 128)
    kk = tile * KB + tl.arange(0, KB)
    live = (i < rows)[:, None]
    later = (i >= 64)[:, None]
    k += (row * H + head) * K
    g += (row * H + head) * K
    q += (row * HQ + head * R) * K
    dq += (row * HQ + head * R) * K
    G += (block * 2 * H + head) * (64 * K)
    da += (block * HQ + head * R) * ((1 + SPLIT) * 128 * 128)
    dqs += (block * HQ + head * R) * (128 * K)
    dks += (block * H + head) * (128 * K)
    sizes += 2 * ((block * HQ + head * R) * (K // KS) + tile * KB // KS)
    at_k = i[:, None] * (H * K) + kk[None, :]
    at_q = i[:, None] * (HQ * K) + kk[None, :]
    at = i[:, None] * K + kk[None, :]
    upper = (i % 64 >= 32)[:, None]
    at_dA = i[:, None] * 128 + i[None, :]
    at_G = ((i // 64) * (H * 64) + i % 64)[:, None] * K + kk[None, :]
    at_low = ((i // 64) * (H * 64) + 31)[:, None] * K + kk[None, :]
    at_end = (i // 64)[:, None] * (H * K) + kk[None, :]
    # G after 32 rows of both chunks; a gate of -inf makes a difference inf or NaN: not narrow
    low0 = tl.load(G + 31 * K + kk)
    low1 = tl.load(G + (H * 64 + 31) * K + kk)
    narrow = (-low0 <= LIMIT) & (low0 - first <= LIMIT)
    narrow &= (-low1 <= LIMIT) & (low1 - second <= LIMIT)
    size_k = tl.load(sizes + 1)
    whole = tl.exp(second + first) * tl.load(through + (block * H + head) * K + kk)
    dK = tl.zeros((128, KB), tl.float32)
    Z = tl.zeros((128, KB), tl.float32)
    if tl.min(narrow.to(tl.int32), 0) == 1:
        Y = tl.load(k + at_k, mask=live, other=0.0).to(tl.float32)
        dK = tl.load(dks + at).to(tl.float32)
        D = tl.load(ge + at_end) - tl.load(G + at_G)
        dK *= size_k * tl.exp(D + tl.where(later, 0.0, second[None, :]))
        Z = Y * dK
        for r in range(R):
            Q = tl.load(q + r * K + at_q, mask=live, other=0.0).to(tl.float32) * scale
            dQ = tl.load(dqs + r * (128 * K) + at).to(tl.float32)
            dQ *= tl.load(sizes + r * (2 * (K // KS)))
            dQ *= tl.exp(tl.load(G + at_G) + tl.where(later, first[None, :], 0.0))
            whole += tl.sum(Q * dQ, 0)
            Z -= Q * dQ
            da_r = da + r * ((1 + SPLIT) * 128 * 128)
            near = (i // 32)[:, None] == (i // 32)[None, :]
            low = tl.load(G + at_low)
            D = tl.load(G + at_G) - 0.5 * tl.where(upper, low + tl.load(ge + at_end), low)
            Qm, Ym = (Q * tl.exp(D)).to(dtype), (Y * tl.exp(-D)).to(dtype)
            Qd, Yd = products(da_r, at_dA, near, Qm, Ym, True, SPLIT, PREC)
            Z += Ym.to(tl.float32) * Yd - Qm.to(tl.float32) * Qd
            dQ += Qd * tl.exp(D)
            dK += Yd * tl.exp(-D)
            for level in range(5, 7):
                if level == 5:
                    D = tl.load(G + at_G) - tl.load(G + at_low)
                    E = tl.exp(tl.where(upper, D, -D))
                else:
                    D = tl.load(G + at_G)
                    E = tl.exp(tl.where(later, D, tl.load(ge + at_end) - D))
                dQ, dK, Z = meet(da_r, level, Q, Y, E, dQ, dK, Z, SPLIT, PREC)
            tl.store(dq + r * K + at_q, dQ * scale, mask=live)
    else:
        for r in range(R):
            da_r = da + r * ((1 + SPLIT) * 128 * 128)
            before = tl.load(g + at_k, mask=live, other=0.0).to(tl.float32)
            after = tl.zeros((128, KB), tl.float32)
            dQ = tl.zeros((128, KB), tl.float32)
            Yd = tl.zeros((128, KB), tl.float32)
            for d in range(1, 16):
                pair = i % 16 >= d
                mask = live & pair[:, None]
                E = tl.load(k + at_k - d * (H * K), mask=mask, other=0.0).to(tl.float32)
                E *= tl.exp(before)
                dQ += diagonal(da_r, d, pair, SPLIT)[:, None] * E  # (4)
                before += tl.load(g + at_k - d * (H * K), mask=mask, other=0.0).to(tl.float32)
                pair = i % 16 + d < 16
                mask = (i + d < rows)[:, None] & pair[:, None]
                after += tl.load(g + at_k + d * (H * K), mask=mask, other=0.0).to(tl.float32)
                E = tl.load(q + r * K + at_q + d * (HQ * K), mask=mask, other=0.0).to(tl.float32)
                E *= tl.exp(after)
                Yd += diagonal(da_r + d * 128, 0, pair, SPLIT)[:, None] * E  # (5)
            Q = tl.load(q + r * K + at_q, mask=live, other=0.0).to(tl.float32) * scale
            Y = tl.load(k + at_k, mask=live, other=0.0).to(tl.float32)
            Yd *= scale
            Z += Y * Yd - Q * dQ
            own = diagonal(da_r, 0, i >= 0, SPLIT)[:, None]  # crosses no t: not in Z
            dQ += own * Y
            dK += own * Q + Yd
            for level in range(4, 7):
                upper = (((i >> level) & 1) == 1)[:, None]
                E = tl.exp(tl.where(upper, before, after))
                dQ, dK, Z = meet(da_r, level, Q, Y, E, dQ, dK, Z, SPLIT, PREC)
                G1 = tl.load(g + at_k, mask=live, other=0.0)
                sibling = sibling_sums(G1, level, 128)
                before += tl.where(upper, sibling, 0.0)  # (6)
                after += tl.where(upper, 0.0, sibling)
            into = tl.load(dqs + r * (128 * K) + at).to(tl.float32)
            into *= tl.load(sizes + r * (2 * (K // KS))) * tl.exp(before)
            whole += tl.sum(Q * into, 0)
            Z -= Q * into
            tl.store(dq + r * K + at_q, (dQ + into) * scale, mask=live)
            into = tl.load(dks + at, mask=r == 0, other=0.0).to(tl.float32)
            into *= size_k * tl.exp(after)
            dK += into
            Z += Y * into
    dk += (row * H + head) * K
    dg += (row * H + head) * K
    tl.store(dk + at_k, dK, mask=live)
    tl.store(dg + at_k, whole[None, :] + tl.cumsum(Z, 0) - Z, mask=live)


@triton.jit
def gradients_exact(
    q, k, g, G, da, ge, blocks, dqs, dks, sizes, through, dq, dk, dg, scale,
    H,
    K: tl.constexpr, KB: tl.constexpr, R: tl.constexpr, TILES: tl.constexpr,
    KS: tl.constexpr, SPLIT: tl.constexpr, LIMIT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dq, dk, dg of the tiles that `gradients`, with the same KB, leaves out; its grid."""
    pid = tl.program_id(0).to(tl.int64)
    NK: tl.constexpr = K // (KB * TILES)
    head = (pid // NK) % H
    block = pid // (NK * H)
    row = tl.load(blocks + 2 * block)
    rows = tl.load(blocks + 2 * block + 1)
    ge += (block * 2 * H + head) * K
    all_k = (pid % NK) * (KB * TILES) + tl.arange(0, KB * TILES)
    end = tl.load(ge + all_k) + tl.load(ge + H * K + all_k)
    if (rows == 0) | (tl.max(-end, 0) <= LIMIT):
        return
    for n in range(TILES):
        tile = (pid % NK) * TILES + n
        kk = tile * KB + tl.arange(0, KB)
        first, second = tl.load(ge + kk), tl.load(ge + H * K + kk)
        if tl.max(-(second + first), 0) > LIMIT:
            exact_tile(
                tile, block, head, row, rows, first, second, q, k, g, G, da, ge, dqs, dks, sizes,
                through, dq, dk, dg, scale, H, K, KB, R, KS, SPLIT, LIMIT, PREC,
            )  # fmt: skip
