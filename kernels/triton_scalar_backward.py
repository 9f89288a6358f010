r"""Triton kernels of gated linear attention with a scalar decay: gradients.

Notation of triton_scalar_forward.py; D = dL/dS after the chunk. The block of 128 rows between two
stored states takes the chunk's place in (3)-(5), with P, X and L over its rows.

    dv = A^T do + k^ D                  D before the chunk = e^Ge D + q^^T do                 (1)
    dA = scale tril(do v^T) * L                                                               (2)
    dq = dq_state + dA k                dq_state = scale e^P (do S^T)                         (3)
    dk = dk_state + dA^T q              dk_state = e^X (v D^T)                                (4)
    dg_t = e^Ge <S, D> + sum_{i>=t} q_i.dq_state_i + sum_{j<t} k_j.dk_state_j
           + sum_{i>=t} (q.(dA k) - k.(dA^T q))_i                                             (5)

(1) is `sweep_back` of triton_gla_backward.py, which stores D once in a block; `score_gradient` is
(2); `gradients` makes dq and dk of a block and K tile from S, D and dA, and,
where g wants a gradient, that tile's share of (5), which `gate_gradient` adds up. (5) holds only
paths that cross t and starts anew in every block; its last sum cancels to fp32 rounding, because
both terms come from the same operands, and leaves out the diagonal of dA, which crosses no t and
under strong decays would be all there is to cancel.

Every transposed operand comes from memory, none from registers: tl.trans of a product's result as
the first operand of another is what Triton 3.4 to 3.7.0 compiles wrongly on sm_90.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the parameters of a kernel have no Python types)

import triton
import triton.language as tl

from glactl.kernels.triton_scalar_forward import decays_between, gate_rows


@triton.jit
def score_gradient(
    do, v, g, blocks, da, own, scale,
    H,
    V: tl.constexpr, VB: tl.constexpr, R: tl.constexpr, GATE: tl.constexpr, GRAD: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """(2) for one block and query head; grid (blocks * HQ). If GRAD, its diagonal goes into own
    (blocks, HQ, 128) instead."""
    pid = tl.program_id(0).to(tl.int64)
    HQ = H * R
    hq, block = pid % HQ, pid // HQ
    row = tl.load(blocks + 2 * block)
    rows = tl.load(blocks + 2 * block + 1)
    if rows == 0:
        return
    dtype = da.dtype.element_ty
    i = tl.arange(0, 128)
    c = tl.arange(0, VB)
    live = (i < rows)[:, None]
    do += (row * HQ + hq) * V
    v += (row * H + hq // R) * V
    at_do = i[:, None] * (HQ * V) + c[None, :]
    at_v = i[:, None] * (H * V) + c[None, :]
    dA = tl.zeros((128, 128), tl.float32)
    for s in range(0, V, VB):
        E = tl.load(do + at_do + s, mask=live, other=0.0).to(dtype)
        W = tl.load(v + at_v + s, mask=live, other=0.0).to(dtype)
        dA = tl.dot(E, tl.trans(W), dA, input_precision=PREC)
    if GATE != 0:
        dA *= decays_between(g, row, rows, hq // R, H, 128, GATE, dtype)
    if GRAD:
        diagonal = tl.where(i[:, None] == i[None, :], dA, 0.0)
        tl.store(own + pid * 128 + i, tl.sum(diagonal, 1) * scale)
    kept = i[:, None] > i[None, :] if GRAD else i[:, None] >= i[None, :]
    dA = tl.where(kept, dA * scale, 0.0)
    tl.store(da + pid * (128 * 128) + i[:, None] * 128 + i[None, :], dA)


@triton.jit
def gradients(
    q, k, g, do, v, states, dstates, da, own, blocks, dq, dk, shares, through, scale,
    H,
    K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, R: tl.constexpr,
    GATE: tl.constexpr, GRAD: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """(3), (4) of one block, head and K tile; grid (blocks * H * K / KB).

    If GRAD, into shares (blocks, H, K / KB, 3, 128) the tile's q.dq, k.dk_state and k.dk of every
    row, all without the diagonal of dA, and into through (blocks, H, K / KB) its <S, D>.
    """
    pid = tl.program_id(0).to(tl.int64)
    NK: tl.constexpr = K // KB
    head = (pid // NK) % H
    block = pid // (NK * H)
    row = tl.load(blocks + 2 * block)
    rows = tl.load(blocks + 2 * block + 1)
    if rows == 0:
        return
    HQ = H * R
    dtype = da.dtype.element_ty
    i = tl.arange(0, 128)
    kk = (pid % NK) * KB + tl.arange(0, KB)
    c = tl.arange(0, VB)
    live = (i < rows)[:, None]
    at_v, at_do = i[:, None] * (H * V) + c[None, :], i[:, None] * (HQ * V) + c[None, :]
    at_S = (block * H + head) * (K * V) + kk[:, None] * V + c[None, :]
    at_k, at_q = i[:, None] * (H * K) + kk[None, :], i[:, None] * (HQ * K) + kk[None, :]
    at_dA = i[:, None] * 128 + i[None, :]
    v += (row * H + head) * V
    k += (row * H + head) * K
    shares += pid * 384 + i
    dK = tl.zeros((128, KB), tl.float32)
    SD = tl.zeros((KB, KB if KB >= 64 else 1), tl.float32)
    q_dq = tl.zeros((128,), tl.float32)
    for r in tl.static_range(R):
        hq = head * R + r
        do_r = do + (row * HQ + hq) * V
        dQ = tl.zeros((128, KB), tl.float32)
        for s in range(0, V, VB):
            E = tl.load(do_r + at_do + s, mask=live, other=0.0).to(dtype)
            S = tl.load(states + at_S + s)
            dQ = tl.dot(E, tl.trans(S), dQ, input_precision=PREC)
            if r == 0:
                W = tl.load(v + at_v + s, mask=live, other=0.0).to(dtype)
                D = tl.load(dstates + at_S + s)
                dK = tl.dot(W, tl.trans(D), dK, input_precision=PREC)
                if GRAD:  # <S, D> as a diagonal: S and D then serve products only
                    if KB >= 64:
                        SD = tl.dot(S, tl.trans(D), SD, input_precision=PREC)
                    else:
                        SD += tl.sum(S.to(tl.float32) * D.to(tl.float32), 1)[:, None]
        here = gate_rows(g, row, head, i, i < rows, H, GATE)
        dQ *= scale * tl.exp(tl.cumsum(here, 0))[:, None]
        if r == 0:
            after = gate_rows(g, row, head, i + 1, (i < 127) & (i + 1 < rows), H, GATE)
            dK *= tl.exp(tl.cumsum(after, 0, reverse=True))[:, None]
            if GRAD:
                if KB >= 64:
                    j = tl.arange(0, KB)
                    SD = tl.where(j[:, None] == j[None, :], SD, 0.0)
                tl.store(through + pid, tl.sum(SD))
                Y = tl.load(k + at_k, mask=live, other=0.0)
                tl.store(shares + 128, tl.sum(Y.to(tl.float32) * dK, 1))
        # q and k are read again for every use, a store or barrier between so that the compiler
        # does not join the reads: kept, they cost a block its place beside another
        Y = tl.load(k + at_k, mask=live, other=0.0).to(dtype)
        Q = tl.load(q + (row * HQ + hq) * K + at_q, mask=live, other=0.0).to(dtype)
        M = tl.load(da + (block * HQ + hq) * (128 * 128) + at_dA)
        dQ = tl.dot(M, Y, dQ, input_precision=PREC)
        dK = tl.dot(tl.trans(M), Q, dK, input_precision=PREC)
        if GRAD:
            tl.debug_barrier()
            Q = tl.load(q + (row * HQ + hq) * K + at_q, mask=live, other=0.0)
            q_dq += tl.sum(Q.to(tl.float32) * dQ, 1)
            tl.store(shares, q_dq)
            same = tl.load(own + (block * HQ + hq) * 128 + i)[:, None]
            dQ += same * tl.load(k + at_k, mask=live, other=0.0).to(tl.float32)
        tl.store(dq + (row * HQ + hq) * K + at_q, dQ, mask=live)
    if GRAD:
        Y = tl.load(k + at_k, mask=live, other=0.0)
        tl.store(shares + 256, tl.sum(Y.to(tl.float32) * dK, 1))
        for r in tl.static_range(R):
            hq = head * R + r
            same = tl.load(own + (block * HQ + hq) * 128 + i)[:, None]
            Q = tl.load(q + (row * HQ + hq) * K + at_q, mask=live, other=0.0)
            dK += same * Q.to(tl.float32)
    tl.store(dk + (row * H + head) * K + at_k, dK, mask=live)


@triton.jit
def gate_gradient(
    g, blocks, shares, through, dg,
    H,
    NK: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """(5) of one block and head from the shares of its K tiles; dg (rows, H); grid (blocks * H)."""
    pid = tl.program_id(0).to(tl.int64)
    head, block = pid % H, pid // H
    row = tl.load(blocks + 2 * block)
    rows = tl.load(blocks + 2 * block + 1)
    if rows == 0:
        return
    i = tl.arange(0, 128)
    up_to = tl.zeros((128,), tl.float32)
    before = tl.zeros((128,), tl.float32)
    whole = 0.0
    for n in tl.static_range(NK):
        at = shares + (pid * NK + n) * 384 + i
        k_dk_state = tl.load(at + 128)
        up_to += tl.load(at) - (tl.load(at + 256) - k_dk_state)
        before += tl.load(at + 127, mask=i > 0, other=0.0)  # k.dk_state of the row before
        whole += tl.load(through + pid * NK + n)
    whole *= tl.exp(tl.sum(gate_rows(g, row, head, i, i < rows, H, GATE), 0))
    dG = whole + tl.cumsum(up_to, 0, reverse=True) + tl.cumsum(before, 0)
    tl.store(dg + (row + i) * H + head, dG, mask=i < rows)
