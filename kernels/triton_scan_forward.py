r"""Triton kernels of the selective scan: tiles of B and C, states and outputs.

One block of BT rows, one channel and entry n of its state, h_0 the state before the block; a_t
stands for exp(d_t A) and x_t for d_t u_t B_t:

    h_t = a_t h_{t-1} + x_t            a scan along time                                     (1)
    y_t = (sum_n C_t h_t + D u_t) silu(z_t)                                                  (2)

A warp owns 32 channels or more, a thread all BT rows and all entries of its channels: the scan and
the sum over n are then plain instructions, without exchange between threads. Entries are taken one
after the other, each a (BT, BD) tile; exp(d A) is exp2 of d times A log2 e, which is handed in.

B and C are wanted by all threads alike, one column for a tile; `tiles` writes them as columns once,
(blocks of BT rows, M, BT) in fp32 and 0 behind the end of a sequence, so that a thread reads four
numbers at once.

Source: (1), (2) are equations (2), (3) of scan.py.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the parameters of a kernel have no Python types)

import triton
import triton.language as tl

from glactl.kernels.triton_segments import this_walk


@triton.jit
def row(x, at, j):
    """Row j of x (rows, BD): a choice of registers, since no thread holds less than a column."""
    bits = tl.where(at == j, x.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, 0).to(tl.float32, bitcast=True)


@triton.jit
def softplus(x):
    """d = log(1 + e^x) and its derivative, to fp32's precision, near 0 as well.

    With e = e^-|x| and s = e / (2 + e), at most 1/3, log(1 + e) = 2 (s + s^3/3 + s^5/5 + ..).
    """
    e = tl.exp(-tl.abs(x))
    s = e / (2 + e)
    q = s * s
    tail = 1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13)))))
    d = tl.maximum(x, 0.0) + 2 * s * (1 + q * tail)
    return d, tl.where(x >= 0, 1.0, e) / (1 + e)


@triton.jit
def steps(dt, bias, at, ch, live, D):
    """d of the rows `at` and its derivative; 0 where not live."""
    x = tl.load(dt + at, mask=live, other=0.0).to(tl.float32)
    if bias is not None:
        x += tl.load(bias + ch, mask=ch < D, other=0.0).to(tl.float32)[None, :]
    d, slope = softplus(x)
    return tl.where(live, d, 0.0), slope


@triton.jit
def follow(a, x, b, y):
    """Two stretches of (1) as one: the product of decays, and the state from zero."""
    return a * b, b * x + y


@triton.jit
def tiles(b, c, blocks, b_out, c_out, M: tl.constexpr, MP: tl.constexpr, BT: tl.constexpr):
    """The columns of B and C for BT rows; grid blocks * 128 / BT."""
    pid = tl.program_id(0).to(tl.int64)
    part = pid % (128 // BT)
    first = tl.load(blocks + 2 * (pid // (128 // BT))) + part * BT
    rows = tl.load(blocks + 2 * (pid // (128 // BT)) + 1) - part * BT
    i, n = tl.arange(0, BT)[:, None], tl.arange(0, MP)[None, :]
    live = (i < rows) & (n < M)
    at, to = (first + i) * M + n, (pid * M + n) * BT + i
    tl.store(b_out + to, tl.load(b + at, mask=live, other=0.0).to(tl.float32), mask=n < M)
    tl.store(c_out + to, tl.load(c + at, mask=live, other=0.0).to(tl.float32), mask=n < M)


@triton.jit
def read_out(D_, z, u, y, at, ch, live, D):
    """The bracket of (2) of the sums y, and silu(z) with its derivative (1 and 0 without z)."""
    if D_ is not None:
        y += tl.load(D_ + ch, mask=ch < D, other=0.0).to(tl.float32)[None, :] * u
    if z is not None:
        x = tl.load(z + at, mask=live, other=0.0).to(tl.float32)
        s = 1 / (1 + tl.exp(-x))
        gate, slope = x * s, s * (1 + x * (1 - s))
    else:
        gate, slope = tl.full(y.shape, 1.0, tl.float32), tl.zeros(y.shape, tl.float32)
    return y, gate, slope


@triton.jit
def walk_rows(chunks, row0, row_end, BT: tl.constexpr):
    """The blocks of BT rows of a segment."""
    rows = tl.minimum(chunks.to(tl.int64) * 64, row_end - row0)
    return ((rows + BT - 1) // BT).to(tl.int32)


@triton.jit
def local_states(
    u, dt, dy, z, bias, A, w, segments, local, total, D,
    M: tl.constexpr, MP: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """A segment's state from zero, w = B; or, if REVERSE, its gradient from zero, exp(d A) g of
    the first row, with w = C.

    u of (1) if not REVERSE, else dy and z. local (segments, M, D); total (segments, D): the sum of
    d over the segment. Grid segments * cdiv(D, BD). The segment that ends the walk over a sequence
    is left out: no other starts from it.
    """
    seg, _seq, _head, tile, block0, chunks, row0, row_end, ends = this_walk(
        segments, 1, tl.cdiv(D, BD), REVERSE
    )
    if (chunks == 0) | ends:
        return
    i, nn = tl.arange(0, BT)[:, None], tl.arange(0, MP)[:, None]
    ch = tile * BD + tl.arange(0, BD)
    inside = (nn < M) & (ch < D)[None, :]
    rates = tl.load(A + nn * D + ch[None, :], mask=inside, other=0.0)
    H = tl.zeros((MP, BD), tl.float32)
    sums = tl.zeros((BD,), tl.float32)
    count = walk_rows(chunks, row0, row_end, BT)
    for k in range(count):
        t = (count - 1 - k) if REVERSE else k
        first = row0 + t * BT
        live = (i < row_end - first) & (ch < D)[None, :]
        at = (first + i) * D + ch[None, :]
        d, _ = steps(dt, bias, at, ch, live, D)
        sums += tl.sum(d, 0)
        if REVERSE:
            v = tl.load(dy + at, mask=live, other=0.0).to(tl.float32)
            v, gate, _ = read_out(None, z, v, v, at, ch, live, D)
            v *= gate
        else:
            v = d * tl.load(u + at, mask=live, other=0.0).to(tl.float32)
        column = w + (block0 * (128 // BT) + t) * M * BT + tl.arange(0, BT)
        for n in tl.static_range(M):
            if n % 4 == 0:
                tl.debug_barrier()
            a = tl.exp2(d * row(rates, nn, n)[None, :])
            x = v * tl.load(column + n * BT)[:, None]
            if REVERSE:
                last = row(H, nn, n)
                for j in tl.static_range(BT):  # see `backwards` of triton_scan_backward.py
                    last = row(a, i, BT - 1 - j) * (row(x, i, BT - 1 - j) + last)
            else:
                x += tl.where(i == 0, a * row(H, nn, n)[None, :], 0.0)
                _, hs = tl.associative_scan((a, x), 0, follow)
                last = row(hs, i, BT - 1)
            H = tl.where(nn == n, last[None, :], H)
    tl.store(local + (seg * M + nn) * D + ch[None, :], H, mask=inside)
    tl.store(total + seg * D + ch, sums, mask=ch < D)


@triton.jit
def carry(
    local, total, initial, A, bounds, start, D,
    M: tl.constexpr, MP: tl.constexpr, BD: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The states that the segments of a sequence start from, each that of the segment before times
    exp(A total) plus its local one; grid N * cdiv(D, BD). initial (N, M, D) or None for zero."""
    pid = tl.program_id(0).to(tl.int64)
    NT = tl.cdiv(D, BD)
    seq = pid // NT
    first = tl.load(bounds + 2 * seq)
    count = tl.load(bounds + 2 * seq + 1).to(tl.int32)
    if count == 0:
        return
    nn = tl.arange(0, MP)[:, None]
    ch = (pid % NT) * BD + tl.arange(0, BD)
    inside = (nn < M) & (ch < D)[None, :]
    at = nn * D + ch[None, :]
    rates = tl.load(A + at, mask=inside, other=0.0)
    H = tl.zeros((MP, BD), tl.float32)
    if initial is not None:
        H += tl.load(initial + seq * M * D + at, mask=inside, other=0.0)
    for k in range(count - 1):
        seg = first + (count - 1 - k if REVERSE else k)
        tl.store(start + seg * M * D + at, H, mask=inside)
        d = tl.load(total + seg * D + ch, mask=ch < D, other=0.0)[None, :]
        H = tl.exp2(d * rates) * H + tl.load(local + seg * M * D + at, mask=inside, other=0.0)
    seg = first + (0 if REVERSE else count - 1)
    tl.store(start + seg * M * D + at, H, mask=inside)


@triton.jit
def outputs(
    u, dt, z, bias, A, D_, b, c, segments, start, y, states, final, D,
    M: tl.constexpr, MP: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """(2) of one segment and BD channels; the state before each block of BT rows into states
    (blocks, M, D), and the last one into final (N, M, D), where these are given.

    start: states of the segments if CUT, else of the sequences, or None. Grid segments *
    cdiv(D, BD).
    """
    seg, seq, _head, tile, block0, chunks, row0, row_end, ends = this_walk(
        segments, 1, tl.cdiv(D, BD), False
    )
    if chunks == 0:
        return
    i, nn = tl.arange(0, BT)[:, None], tl.arange(0, MP)[:, None]
    ch = tile * BD + tl.arange(0, BD)
    inside = (nn < M) & (ch < D)[None, :]
    at_h = nn * D + ch[None, :]
    rates = tl.load(A + at_h, mask=inside, other=0.0)
    H = tl.zeros((MP, BD), tl.float32)
    if start is not None:
        H += tl.load(start + (seg if CUT else seq) * M * D + at_h, mask=inside, other=0.0)
    for t in range(walk_rows(chunks, row0, row_end, BT)):
        first, block = row0 + t * BT, block0 * (128 // BT) + t
        live = (i < row_end - first) & (ch < D)[None, :]
        at = (first + i) * D + ch[None, :]
        d, _ = steps(dt, bias, at, ch, live, D)
        U = tl.load(u + at, mask=live, other=0.0).to(tl.float32)
        if states is not None:
            tl.store(states + block * M * D + at_h, H, mask=inside)
        v, Y = d * U, tl.zeros((BT, BD), tl.float32)
        column = block * M * BT + tl.arange(0, BT)
        for n in tl.static_range(M):
            if n % 4 == 0:
                tl.debug_barrier()  # else the reads of all entries are fetched first, and spill
            a = tl.exp2(d * row(rates, nn, n)[None, :])
            x = v * tl.load(b + column + n * BT)[:, None]
            x += tl.where(i == 0, a * row(H, nn, n)[None, :], 0.0)
            _, hs = tl.associative_scan((a, x), 0, follow)  # (1)
            H = tl.where(nn == n, row(hs, i, BT - 1)[None, :], H)
            Y += tl.load(c + column + n * BT)[:, None] * hs
        Y, gate, _ = read_out(D_, z, U, Y, at, ch, live, D)
        tl.store(y + at, Y * gate, mask=live)  # (2)
    if final is not None and ends:
        tl.store(final + seq * M * D + at_h, H, mask=inside)
