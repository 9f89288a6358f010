r"""Triton kernels of the selective scan: gradients.

One block of BT rows, one channel and entry n, from the state h_0 before the block and the gradient
q_{BT+1} that the rows after it have for its last state; p = dy silu(z), letters as in scan.py:

    k_t = a_t h_{t-1}       h_t = k_t + d_t u_t B_t                   forwards               (1)
    g_t = p_t C_t + q_{t+1}       q_t = a_t g_t                       backwards              (2)
    s_t = sum_n g_t B_t     r_t = sum_n A g_t k_t     dA = sum_t d_t g_t k_t                 (3)
    dB_t = sum_c g_t d_t u_t          dC_t = sum_c p_t h_t                                   (4)
    du = d s + D p     ddt = (u s + r) sigmoid(dt + bias)     dz = dy (bracket) silu'(z)     (5)

Both recurrences are scans along a thread's own rows, and exp(d A) is taken once for both. k_t has a
place of its own in (1): as h_t - d_t u_t B_t it would lose its digits where a_t is small. Entries
are the outer loop and rows the inner one, so that no state of a row outlives its entry; what an
entry starts from is fetched while the one before is worked on.

(4) are sums over channels, which are spread over threads and programs. Of its BD channels a program
writes one sum each into `shares`, which `gather` adds up: repeated runs are bit-equal. Within the
program the sum is taken as SUM says: "lanes" by exchange between threads, 5 steps for each row and
entry; or "dot", the product of both tiles (2 BT, BD) with ones, whose column n is kept. Its
operands go to the tensor cores as they are, cut to the 10 bits of tf32, in fp32 in three passes.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the parameters of a kernel have no Python types)

import triton
import triton.language as tl

from glactl.kernels.triton_scan_forward import (
    fetch,
    fetch_rows,
    fetch_tile,
    of_channels,
    read,
    read_out,
    row,
    steps,
    walk_rows,
)
from glactl.kernels.triton_segments import walk_at


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
def entry(states, A, later, dA, b, c, n, inside, W: tl.constexpr, BT: tl.constexpr):
    """Of entry n of a block: h_0, the rate, q behind the block, dA up to it, B and C; the first
    four from where entry 0 has its channels."""
    h = tl.load(states + n * W, mask=inside, other=0.0).to(tl.float32)
    rate = tl.load(A + n * W, mask=inside, other=0.0)
    q = tl.load(later + n * W, mask=inside, other=0.0)
    sum_A = tl.load(dA + n * W, mask=inside, other=0.0)
    at = n * BT + tl.arange(0, BT)
    return h, rate, q, sum_A, tl.load(b + at), tl.load(c + at)


@triton.jit(do_not_specialize=["D"])
def gradients(
    u, dt, z, bias, A, D_, b, c, dy, segments, start, states,
    du, ddt, dz, shares, later, dA, dD, dbias, dstart, all_blocks, D,
    W: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    CUT: tl.constexpr, SUM: tl.constexpr, FETCH: tl.constexpr,
):  # fmt: skip
    """(1) to (5) of one segment and BD channels, from its last block to its first.

    states (blocks, M, D): h_0 of every block. start: q behind the segments if CUT, else behind the
    sequences, or None for zero. shares (tiles, blocks, 2, M, BT): of dB and dC; dA (segments, M,
    D), dD and dbias (segments, D): sums over the segment's rows. later (segments, M, D): a place
    for q and, as dA is, read and written once a block: kept in registers, what all entries have
    would spill, and code for each entry of its own takes minutes to compile. dstart (N, M, D) or
    None: q_1 of the sequences. Grid segments * cdiv(D, BD).
    """
    pid, NT = tl.program_id(0).to(tl.int64), tl.cdiv(D, BD)
    # neighbours on a multiprocessor, every 132nd program, share few segments and so B and C
    seg, tile = pid % (tl.num_programs(0) // NT), pid // (tl.num_programs(0) // NT)
    seq, block0, chunks, row0, row_end, ends = walk_at(segments, seg, True)
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
    shift, skip = of_channels(bias, ch, D), of_channels(D_, ch, D)
    dD_sum, dbias_sum = tl.zeros((BD,), tl.float32), tl.zeros((BD,), tl.float32)
    count = walk_rows(chunks, row0, row_end, BT)
    digits: tl.constexpr = "tf32x3" if u.dtype.element_ty == tl.float32 else "tf32"
    N: tl.constexpr = MP if MP > 16 else 16
    column = tl.arange(0, N)[None, :]
    ones = tl.full((BD, N), 1.0, tl.float32)
    in_D = ch < D
    A_0, later_0, dA_0 = A + ch, later + seg * M * D + ch, dA + seg * M * D + ch
    for k in range(count):
        t = count - 1 - k
        first, block = row0 + t * BT, block0 * (128 // BT) + t
        live = (i < row_end - first) & in_D[None, :]
        whole = (first + BT <= row_end) & (tile * BD + BD <= D)
        at = first * D + (i * W + ch[None, :])
        x, U = read(dt, at, live, whole), read(u, at, live, whole)
        dout = read(dy, at, live, whole)
        gates = read(z, at, live, whole) if z is not None else None
        before, column_0 = first - BT, tile * BD
        fetch_rows(dt, before, row0, row_end, column_0, D, BT, BD, FETCH)
        fetch_rows(u, before, row0, row_end, column_0, D, BT, BD, FETCH)
        fetch_rows(dy, before, row0, row_end, column_0, D, BT, BD, FETCH)
        if z is not None:
            fetch_rows(z, before, row0, row_end, column_0, D, BT, BD, FETCH)
        fetch_tile(b, block - 1, t > 0, MP * BT, FETCH)
        fetch_tile(c, block - 1, t > 0, MP * BT, FETCH)
        entries = tl.arange(0, MP)
        to_h = ((block - 1) * M + entries) * D + column_0
        fetch(states, to_h, (entries < M) & (t > 0), FETCH)
        d, slope = steps(x, shift, live)
        U, dout = U.to(tl.float32), dout.to(tl.float32)
        Y, gate, bend = read_out(skip, gates, U, tl.zeros((BT, BD), tl.float32))
        p, v, bend = dout * gate, d * U, dout * bend
        s, r = tl.zeros((BT, BD), tl.float32), tl.zeros((BT, BD), tl.float32)
        states_0 = states + block * M * D + ch
        b_0, c_0 = b + block * MP * BT, c + block * MP * BT
        share = shares + (tile * all_blocks + block) * (2 * M * BT)
        sums = tl.zeros((2 * BT, N), tl.float32)
        h, rate, q, sum_A, Bn, Cn = entry(states_0, A_0, later_0, dA_0, b_0, c_0, 0, in_D, W, BT)
        for n in tl.range(M, loop_unroll_factor=2):
            # fetched an entry ahead: else every entry waits for memory
            h_next, rate_next, q_next, sum_next, B_next, C_next = entry(
                states_0, A_0, later_0, dA_0, b_0, c_0, tl.minimum(n + 1, M - 1), in_D, W, BT
            )
            a = tl.exp2(d * rate[None, :])
            k0 = tl.where(i == 0, a * h[None, :], 0.0)
            _, hs, ks = tl.associative_scan((a, k0 + v * Bn[:, None], k0), 0, follow_both)  # (1)
            g, q = backwards(a, p * Cn[:, None], q, i, BT)  # (2)
            Y += Cn[:, None] * hs
            s += Bn[:, None] * g
            w = g * ks
            r += rate[None, :] * w
            tl.store(later_0 + n * W, q, mask=in_D)
            tl.store(dA_0 + n * W, sum_A + tl.sum(d * w, 0), mask=in_D)  # (3)
            if SUM == "dot":
                both = tl.join(g * v, p * hs).permute(2, 0, 1).reshape(2 * BT, BD)
                found = tl.dot(both, ones, input_precision=digits)
                sums = tl.where(column == n, found, sums)  # (4)
            else:
                to = share + n * BT + tl.arange(0, BT)
                tl.store(to, tl.sum(g * v, 1))
                tl.store(to + M * BT, tl.sum(p * hs, 1))  # (4)
            h, rate, q, sum_A, Bn, Cn = h_next, rate_next, q_next, sum_next, B_next, C_next
        tl.debug_barrier()  # what was stored is read again, by whichever thread
        if SUM == "dot":
            j = tl.arange(0, 2 * BT)[:, None]  # first BT rows of dB, then of dC
            to = share + (j // BT * M + column) * BT + j % BT
            tl.store(to, sums, mask=column < M)
        ddt_ = tl.where(live, (U * s + r * 0.6931471805599453) * slope, 0.0)  # rates: times log2 e
        dbias_sum += tl.sum(ddt_, 0)
        dD_sum += tl.sum(p * U, 0)
        tl.store(du + at, d * s + skip[None, :] * p, mask=live)
        tl.store(ddt + at, ddt_, mask=live)
        if z is not None:
            tl.store(dz + at, Y * bend, mask=live)  # (5)
    tl.store(dD + seg * D + ch, dD_sum, mask=ch < D)
    tl.store(dbias + seg * D + ch, dbias_sum, mask=ch < D)
    if dstart is not None and ends and chunks > 0:
        ahead = tl.load(later + seg * M * D + at_h, mask=inside, other=0.0)
        tl.store(dstart + seq * M * D + at_h, ahead, mask=inside)


@triton.jit
def gather(
    shares, blocks, out_b, out_c, count, tiles,
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
    at = pid * 2 * M * BT + n * BT + i
    B = tl.zeros((MP, BT), tl.float32)
    C = tl.zeros((MP, BT), tl.float32)
    for tile in tl.range(tiles, num_stages=4):
        share = shares + tile * count * (2 * M * BT) + at
        B += tl.load(share, mask=n < M, other=0.0)
        C += tl.load(share + M * BT, mask=n < M, other=0.0)
    to = (first + i) * M + n
    live = (i < rows) & (n < M)
    tl.store(out_b + to, B, mask=live)
    tl.store(out_c + to, C, mask=live)
