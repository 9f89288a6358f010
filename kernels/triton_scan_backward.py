r"""Triton kernels of the selective scan: gradients.

One block of BT rows, one channel and entry n, from the state h_0 before the block and the gradient
q_{BT+1} that the rows after it have for its last state; p = dy silu(z), letters as in scan.py:

    k_t = a_t h_{t-1}       h_t = k_t + d_t u_t B_t                   forwards               (1)
    g_t = p_t C_t + q_{t+1}       q_t = a_t g_t                       backwards              (2)
    s_t = sum_n g_t B_t     r_t = sum_n A g_t k_t     dA = sum_t d_t g_t k_t                 (3)
    dB_t = sum_c g_t d_t u_t          dC_t = sum_c p_t h_t                                   (4)
    du = d s + D p     ddt = (u s + r) sigmoid(dt + bias)     dz = dy (bracket) silu'(z)     (5)

Both recurrences are scans along a thread's own rows, and exp(d A) is taken once for both. k_t has a
place of its own in (1): as h_t - d_t u_t B_t it would lose its digits where a_t is small.

(4) are sums over channels, which are spread over threads and programs. Of its BD channels a program
writes one sum each into `shares`, which `gather` adds up: repeated runs are bit-equal. Within the
program the sum is taken as SUM says: "lanes" by exchange between threads, 5 steps for each row and
entry; or "dot", the product of the (BT, BD) tile with a matrix whose n-th column is 1 and which
gathers all entries in one accumulator, operands rounded to bf16 or, in fp32, in three tf32 passes.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the parameters of a kernel have no Python types)

import triton
import triton.language as tl

from glactl.kernels.triton_scan_forward import read_out, row, steps, walk_rows
from glactl.kernels.triton_segments import this_walk


@triton.jit
def follow_both(a, h, k, b, x, m):
    """Two stretches of (1) as one: the product of decays, h and k of its last row from zero."""
    return a * b, b * h + x, b * h + m


@triton.jit
def backwards(a, g0, q, i, BT: tl.constexpr):
    """g of (2) for g0 = p C, from q behind the last row, and q of the first row. Row after row:
    Triton's reverse scans exchange every number with other threads, five times (triton 3.7)."""
    G = g0
    for j in tl.static_range(BT):
        g = row(g0, i, BT - 1 - j) + q
        G = tl.where(i == BT - 1 - j, g[None, :], G)
        q = row(a, i, BT - 1 - j) * g
    return G, q


@triton.jit
def gradients(
    u, dt, z, bias, A, D_, b, c, dy, segments, start, states,
    du, ddt, dz, db, dc, later, dA, dD, dbias, dstart, all_blocks,
    D,
    M: tl.constexpr, MP: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, CUT: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    """(1) to (5) of one segment and BD channels, from its last block to its first.

    states (blocks, M, D): h_0 of every block. start: q behind the segments if CUT, else behind the
    sequences, or None for zero. db, dc: shares (tiles, blocks, M, BT); dA (segments, M, D), dD and
    dbias (segments, D): sums over the segment's rows. later (segments, M, D): a place for q and, as
    dA is, read and written once a block: kept in registers, what all entries have would spill, and
    code for each entry of its own takes minutes to compile. dstart (N, M, D) or None: q_1 of the
    sequences. Grid segments * cdiv(D, BD).
    """
    NT = tl.cdiv(D, BD)
    seg, seq, _head, tile, block0, chunks, row0, row_end, ends = this_walk(segments, 1, NT, True)
    i, nn = tl.arange(0, BT)[:, None], tl.arange(0, MP)[:, None]
    ch = tile * BD + tl.arange(0, BD)
    inside = (nn < M) & (ch < D)[None, :]
    at_h = nn * D + ch[None, :]
    behind = tl.zeros((MP, BD), tl.float32)
    tl.store(dA + seg * M * D + at_h, behind, mask=inside)
    if start is not None and chunks > 0:
        behind += tl.load(start + (seg if CUT else seq) * M * D + at_h, mask=inside, other=0.0)
    tl.store(later + seg * M * D + at_h, behind, mask=inside)
    tl.debug_barrier()
    dD_sum, dbias_sum = tl.zeros((BD,), tl.float32), tl.zeros((BD,), tl.float32)
    count = walk_rows(chunks, row0, row_end, BT)
    ones: tl.constexpr = tl.float32 if u.dtype.element_ty == tl.float32 else tl.bfloat16
    entry = tl.arange(0, 16)[None, :]
    for k in range(count):
        t = count - 1 - k
        first, block = row0 + t * BT, block0 * (128 // BT) + t
        live = (i < row_end - first) & (ch < D)[None, :]
        at = (first + i) * D + ch[None, :]
        d, slope = steps(dt, bias, at, ch, live, D)
        U = tl.load(u + at, mask=live, other=0.0).to(tl.float32)
        dout = tl.load(dy + at, mask=live, other=0.0).to(tl.float32)
        Y = tl.zeros((BT, BD), tl.float32)
        _, gate, _ = read_out(None, z, U, Y, at, ch, live, D)
        p, v = dout * gate, d * U
        s, r = tl.zeros((BT, BD), tl.float32), tl.zeros((BT, BD), tl.float32)
        column = block * M * BT + tl.arange(0, BT)
        share = (tile * all_blocks + block) * M * BT
        if SUM == "dot":
            dB = tl.zeros((BT, 16), tl.float32)
            dC = tl.zeros((BT, 16), tl.float32)
        for n in range(M):
            at_n = (seg * M + n) * D + ch
            h = tl.load(states + (block * M + n) * D + ch, mask=ch < D, other=0.0).to(tl.float32)
            rate = tl.load(A + n * D + ch, mask=ch < D, other=0.0)[None, :]  # times log2 e
            Q = tl.load(later + at_n, mask=ch < D, other=0.0)
            sum_A = tl.load(dA + at_n, mask=ch < D, other=0.0)
            Bn = tl.load(b + column + n * BT)[:, None]
            Cn = tl.load(c + column + n * BT)[:, None]
            a = tl.exp2(d * rate)
            k0 = tl.where(i == 0, a * h[None, :], 0.0)
            _, hs, ks = tl.associative_scan((a, k0 + v * Bn, k0), 0, follow_both)  # (1)
            g, Q = backwards(a, p * Cn, Q, i, BT)  # (2)
            Y += Cn * hs
            s += Bn * g
            w = g * ks
            r += rate * w
            tl.store(later + at_n, Q, mask=ch < D)
            tl.store(dA + at_n, sum_A + tl.sum(d * w, 0), mask=ch < D)  # (3)
            if SUM == "dot":
                column_n = ((entry == n) & (tl.arange(0, BD)[:, None] >= 0)).to(ones)
                dB = tl.dot((g * v).to(ones), column_n, dB, input_precision="tf32x3")
                dC = tl.dot((p * hs).to(ones), column_n, dC, input_precision="tf32x3")
            else:
                tl.store(db + share + n * BT + tl.arange(0, BT), tl.sum(g * v, 1))
                tl.store(dc + share + n * BT + tl.arange(0, BT), tl.sum(p * hs, 1))  # (4)
        tl.debug_barrier()  # what was stored is read again, by whichever thread
        if SUM == "dot":
            to = share + entry * BT + i
            tl.store(db + to, dB, mask=entry < M)
            tl.store(dc + to, dC, mask=entry < M)
        r *= 0.6931471805599453  # rates are times log2 e
        full, _, bend = read_out(D_, z, U, Y, at, ch, live, D)
        ddt_ = (U * s + r) * slope
        dU = d * s
        if D_ is not None:
            dU += tl.load(D_ + ch, mask=ch < D, other=0.0).to(tl.float32)[None, :] * p
            dD_sum += tl.sum(p * U, 0)
        dbias_sum += tl.sum(tl.where(live, ddt_, 0.0), 0)
        tl.store(du + at, dU, mask=live)
        tl.store(ddt + at, ddt_, mask=live)
        if z is not None:
            tl.store(dz + at, dout * full * bend, mask=live)  # (5)
    tl.store(dD + seg * D + ch, dD_sum, mask=ch < D)
    tl.store(dbias + seg * D + ch, dbias_sum, mask=ch < D)
    if dstart is not None and ends and chunks > 0:
        ahead = tl.load(later + seg * M * D + at_h, mask=inside, other=0.0)
        tl.store(dstart + seq * M * D + at_h, ahead, mask=inside)


@triton.jit
def gather(
    db, dc, blocks, out_b, out_c, count, tiles,
    M: tl.constexpr, MP: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """(4): the shares of all tiles of one block of BT rows, in order; grid count = all blocks."""
    pid = tl.program_id(0).to(tl.int64)
    part = pid % (128 // BT)
    first = tl.load(blocks + 2 * (pid // (128 // BT))) + part * BT
    rows = tl.load(blocks + 2 * (pid // (128 // BT)) + 1) - part * BT
    if rows <= 0:
        return
    n, i = tl.arange(0, MP)[:, None], tl.arange(0, BT)[None, :]
    at = (pid * M + n) * BT + i
    B = tl.zeros((MP, BT), tl.float32)
    C = tl.zeros((MP, BT), tl.float32)
    for tile in tl.range(tiles, num_stages=4):
        B += tl.load(db + tile * count * M * BT + at, mask=n < M, other=0.0)
        C += tl.load(dc + tile * count * M * BT + at, mask=n < M, other=0.0)
    to = (first + i) * M + n
    live = (i < rows) & (n < M)
    tl.store(out_b + to, B, mask=live)
    tl.store(out_c + to, C, mask=live)
