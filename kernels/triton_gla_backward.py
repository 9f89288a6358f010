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
come from the same rounded operands. The products (4) take dA as the sum of two bf16 numbers:
rounded once it would be the largest error of dq and dk. `gradients` scales
q and k of (4) to the middle of the block, as `prepare` does to that of the chunk, and leaves tiles
that decay by more than LIMIT to triton_gla_strong.py.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the parameters of a kernel have no Python types)

import triton
import triton.language as tl

from glactl.kernels.triton_segments import this_walk


@triton.jit
def sweep_back(
    qh, kh, a, ge, do, segments, start, dv, dstates, ds0,
    H,
    K: tl.constexpr, V: tl.constexpr, VB: tl.constexpr, R: tl.constexpr,
    START: tl.constexpr, CUT: tl.constexpr, INITIAL: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """(2) over one segment and V tile, from its last chunk to its first.

    start: D after the segments if CUT, else after the sequences. Grid segments * H * V / VB.
    """
    seg, seq, head, tile, block0, chunks, row0, row_end, ends = this_walk(
        segments, H, V // VB, True
    )
    if chunks == 0:
        return
    HQ = H * R
    i = tl.arange(0, 64)
    kk = tl.arange(0, K)
    vv = tile * VB + tl.arange(0, VB)
    at_S = kk[:, None] * V + vv[None, :]
    at_h, at_a = i[:, None] * K + kk[None, :], i[:, None] * 64 + i[None, :]
    at_v, at_do = i[:, None] * (H * V) + vv[None, :], i[:, None] * (HQ * V) + vv[None, :]
    D = tl.zeros((K, VB), tl.float32)
    if START:
        D += tl.load(start + ((seg if CUT else seq) * H + head) * (K * V) + at_S)
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
            A = tl.load(a + (chunk * HQ + hq) * (64 * 64) + at_a)
            dV = tl.dot(tl.trans(A), E, dV, input_precision=PREC)
            D = tl.dot(tl.trans(Q), E, D, input_precision=PREC)
        tl.store(dv + (row * H + head) * V + at_v, dV, mask=live)
    if INITIAL and ends:
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
def score_gradient(
    do, v, da, at_do, at_v, live,
    V: tl.constexpr, VB: tl.constexpr, SPLIT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """(1) of one block and query head, from do and v at their first columns, to da."""
    dtype: tl.constexpr = da.dtype.element_ty
    i = tl.arange(0, 128)
    at = i[:, None] * 128 + i[None, :]
    dA = tl.zeros((128, 128), tl.float32)
    for s in range(0, V, VB):
        E = tl.load(do + at_do + s, mask=live, other=0.0).to(dtype)
        W = tl.load(v + at_v + s, mask=live, other=0.0).to(dtype)
        dA = tl.dot(E, tl.trans(W), dA, input_precision=PREC)
    dA = tl.where(i[:, None] >= i[None, :], dA, 0.0)
    hi = dA.to(dtype)
    tl.store(da + at, hi)
    if SPLIT:
        tl.store(da + 128 * 128 + at, dA - hi.to(tl.float32))


@triton.jit
def state_tile(
    do, v, states, dstates, dqs, dks, sizes, through, at_do, at_v, live, write_k,
    K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """do S^T of one block, query head and K tile, and if write_k v D^T and rowsum(S * D)."""
    dtype: tl.constexpr = states.dtype.element_ty
    i = tl.arange(0, 128)
    kk = tl.arange(0, KB)
    at_S = kk[:, None] * V + tl.arange(0, VB)[None, :]
    at = i[:, None] * K + kk[None, :]
    dQ = tl.zeros((128, KB), tl.float32)
    if write_k:
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
        tl.store(sizes + 1, size)
        tl.store(dks + at, dK / size)
        if KB >= 64:
            SD = tl.where(kk[:, None] == kk[None, :], SD, 0.0)
        tl.store(through + kk, tl.sum(SD, 1))
    else:
        for s in range(0, V, VB):
            E = tl.load(do + at_do + s, mask=live, other=0.0).to(dtype)
            dQ = tl.dot(E, tl.trans(tl.load(states + at_S + s)), dQ, input_precision=PREC)
    size = magnitude(dQ)
    tl.store(sizes, size)
    tl.store(dqs + at, dQ / size)


@triton.jit
def state_gradients(
    do, v, states, dstates, blocks, da, dqs, dks, sizes, through,
    H,
    K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, R: tl.constexpr,
    SPLIT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dA, do S^T, v D^T and rowsum(S * D) of one block and query head; one program for dA and one
    a K tile, next to each other so that do and v come from memory once.

    da (blocks, HQ, 1 + SPLIT, 128, 128); dqs (blocks, HQ, 128, K), dks (blocks, H, 128, K), both
    over the tile's size in `sizes` (blocks, HQ, K / KB, 2), so that fp16 holds them to 2^-12;
    through (blocks, H, K). Kept apart from `gradients`: together they want more registers than a
    thread has.
    """
    pid = tl.program_id(0).to(tl.int64)
    NK: tl.constexpr = K // KB
    HQ = H * R
    tile = pid % (NK + 1)
    at = pid // (NK + 1)  # block and query head
    hq, block = at % HQ, at // HQ
    at_k = block * H + hq // R
    row = tl.load(blocks + 2 * block)
    rows = tl.load(blocks + 2 * block + 1)
    if rows == 0:
        return
    i = tl.arange(0, 128)
    c = tl.arange(0, VB)
    live = (i < rows)[:, None]
    do += (row * HQ + hq) * V
    v += (row * H + hq // R) * V
    at_v, at_do = i[:, None] * (H * V) + c[None, :], i[:, None] * (HQ * V) + c[None, :]
    if tile == NK:
        da += at * ((1 + SPLIT) * 128 * 128)
        score_gradient(do, v, da, at_do, at_v, live, V, VB, SPLIT, PREC)
    else:
        state_tile(
            do, v, states + (at_k * K + tile * KB) * V, dstates + (at_k * K + tile * KB) * V,
            dqs + at * 128 * K + tile * KB, dks + at_k * 128 * K + tile * KB,
            sizes + 2 * (at * NK + tile), through + at_k * K + tile * KB, at_do, at_v, live,
            hq % R == 0, K, V, KB, VB, PREC,
        )  # fmt: skip


@triton.jit
def gradients(
    q, k, G, da, ge, blocks, dqs, dks, sizes, through, dq, dk, dg, scale,
    H,
    K: tl.constexpr, KB: tl.constexpr, R: tl.constexpr, TILES: tl.constexpr,
    KS: tl.constexpr, SPLIT: tl.constexpr, LIMIT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """(3)-(5) for one block, head and those of TILES K tiles that decay by LIMIT at most.

    With one query head a key head, dA stays in shared memory over the tiles. Grid blocks * H * K /
    (KB * TILES).
    """
    pid = tl.program_id(0).to(tl.int64)
    NK: tl.constexpr = K // (KB * TILES)
    KEEP: tl.constexpr = R == 1 and TILES > 1
    head = (pid // NK) % H
    block = pid // (NK * H)
    row = tl.load(blocks + 2 * block)
    rows = tl.load(blocks + 2 * block + 1)
    if rows == 0:
        return
    HQ = H * R
    dtype: tl.constexpr = da.dtype.element_ty
    i = tl.arange(0, 128)
    live = (i < rows)[:, None]
    at_dA = i[:, None] * 128 + i[None, :]
    da += (block * HQ + head * R) * ((1 + SPLIT) * 128 * 128)
    here = ge + (block * 2 * H + head) * K + (pid % NK) * (KB * TILES)
    here += tl.arange(0, TILES)[:, None] * KB + tl.arange(0, KB)[None, :]
    decays = -tl.load(here) - tl.load(here + H * K)
    if KEEP:
        high = tl.load(da + at_dA)
        if SPLIT:
            low = tl.load(da + 128 * 128 + at_dA)
    if tl.min(tl.max(decays, 1), 0) > LIMIT:  # every tile is left out
        return
    for n in tl.range(TILES, num_stages=2):  # all reads before the branch, to be fetched ahead
        first_k = (pid % NK) * (KB * TILES) + n * KB
        kk = first_k + tl.arange(0, KB)
        at_k = i[:, None] * (H * K) + kk[None, :]
        at_q = i[:, None] * (HQ * K) + kk[None, :]
        at = i[:, None] * K + kk[None, :]
        at_G = ((i // 64) * (H * 64) + i % 64)[:, None] * K + kk[None, :]
        wide = first_k // KS
        ends = ge + (block * 2 * H + head) * K + kk
        first, end = tl.load(ends)[None, :], tl.load(ends + H * K)[None, :]
        P = tl.load(G + (block * 2 * H + head) * (64 * K) + at_G)
        Y = tl.load(k + (row * H + head) * K + at_k, mask=live, other=0.0)
        Q = tl.load(q + (row * HQ + head * R) * K + at_q, mask=live, other=0.0)
        dK = tl.load(dks + (block * H + head) * (128 * K) + at)
        dQ = tl.load(dqs + (block * HQ + head * R) * (128 * K) + at)
        size = tl.load(sizes + 2 * ((block * HQ + head * R) * (K // KS) + wide))
        size_k = tl.load(sizes + 2 * ((block * HQ + head * R) * (K // KS) + wide) + 1)
        across = tl.load(through + (block * H + head) * K + kk)[None, :]
        end += first  # Ge of the block, from its two chunks
        if tl.max(-tl.sum(end, 0), 0) <= LIMIT:
            P += tl.where(i[:, None] >= 64, first, 0.0) - 0.5 * end
            to_q, to_k = tl.exp(P), tl.exp(-P)
            middle = tl.exp(0.5 * end)
            Yf = Y.to(tl.float32) * to_k
            Ym = Yf.to(dtype)
            dKf = dK.to(tl.float32) * (size_k * middle)
            whole = tl.exp(end) * across
            Z = Yf * dKf
            for r in tl.static_range(R):
                hq = head * R + r
                if r > 0:
                    Q = tl.load(q + (row * HQ + hq) * K + at_q, mask=live, other=0.0)
                    dQ = tl.load(dqs + (block * HQ + hq) * (128 * K) + at)
                    size = tl.load(sizes + 2 * ((block * HQ + hq) * (K // KS) + wide))
                Qf = Q.to(tl.float32) * (scale * to_q)
                dQf = dQ.to(tl.float32) * (size * middle)
                into = Qf * dQf
                whole += tl.sum(into, 0)[None, :]
                Qm = Qf.to(dtype)
                if KEEP:
                    Qd = tl.dot(high, Ym, input_precision=PREC)
                    Yd = tl.dot(tl.trans(high), Qm, input_precision=PREC)
                    if SPLIT:
                        Qd = tl.dot(low, Ym, Qd, input_precision=PREC)
                        Yd = tl.dot(tl.trans(low), Qm, Yd, input_precision=PREC)
                else:
                    da_r = da + r * ((1 + SPLIT) * 128 * 128)
                    Qd, Yd = products(da_r, at_dA, None, Qm, Ym, False, SPLIT, PREC)
                Z += Ym.to(tl.float32) * Yd - Qm.to(tl.float32) * Qd - into
                dKf += Yd
                dQf = (dQf + Qd) * (scale * to_q)
                tl.store(dq + (row * HQ + hq) * K + at_q, dQf, mask=live)
            tl.store(dk + (row * H + head) * K + at_k, dKf * to_k, mask=live)
            # (5), sums over i >= t as the whole less the rows before t; the scores' part has no
            # whole. The sum over rows in 16s, then over the 8 groups: fewer steps across warps.
            Z3 = tl.reshape(Z, (8, 16, KB))
            groups = tl.sum(Z3, 1)
            groups = tl.cumsum(groups, 0) - groups
            before = tl.reshape(tl.cumsum(Z3, 1) - Z3 + groups[:, None, :], (128, KB))
            tl.store(dg + (row * H + head) * K + at_k, whole + before, mask=live)
