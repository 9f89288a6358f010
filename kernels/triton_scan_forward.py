r"""Triton kernels of the selective scan: tiles of B and C, states and outputs.

One block of BT rows, one channel and entry n of its state, h_0 the state before the block; a_t
stands for exp(d_t A) and x_t for d_t u_t B_t:

    h_t = a_t h_{t-1} + x_t            a scan along time                                     (1)
    y_t = (sum_n C_t h_t + D u_t) silu(z_t)                                                  (2)

A thread owns a channel: all BT rows of its inputs and all M entries of its state, in registers.
Rows are taken one after the other, so the sum over n and the next state are plain instructions,
without exchange between threads. exp(d A) is exp2 of d times A log2 e, which is handed in.

That a thread owns a channel is the compiler's choice, made for the widest loads it can prove: where
the number of channels D is known to be a multiple of 16, a thread reads 8 channels at once, the
rows are spread over 8 threads, and every step along them is an exchange (in the first design 2,304
of 7,760 instructions a block, in place of none of 2,678). So D is not specialised, and all
addresses start from it; the constant W, the same number, only makes the way from row to row a
constant.

B and C are wanted by all threads alike; `tiles` writes them in fp32, 0 behind the end of a
sequence, as a kernel reads them, four numbers at once: by rows (blocks of BT rows, BT, MP), or, for
the gradients, whose outer loop is over entries, (blocks, MP, BT).

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
    e = tl.exp2(-1.4426950408889634 * tl.abs(x))
    s = e / (2 + e)
    q = s * s
    tail = 1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13)))))
    d = tl.maximum(x, 0.0) + 2 * s * (1 + q * tail)
    return d, tl.where(x >= 0, 1.0, e) / (1 + e)


@triton.jit
def of_channels(x, ch, D):
    """The numbers x (D,) of the channels ch; 0 where x is None."""
    found = tl.zeros(ch.shape, tl.float32)
    if x is not None:
        found += tl.load(x + ch, mask=ch < D, other=0.0).to(tl.float32)
    return found


@triton.jit
def read(x, at, live, whole):
    """The numbers x + at, 0 where not live; whole: all are. Without masks all rows are on their way
    at once; with them ptxas gives 16-bit numbers one register in turn, and waits for each."""
    if whole:  # noqa: SIM108 (a branch: one block of code for each)
        found = tl.load(x + at)
    else:
        found = tl.load(x + at, mask=live, other=0.0)
    return found


@triton.jit
def fetch(x, at, live, FETCH: tl.constexpr):
    """Ask for the cache lines of x + at where live, for a block that is read later."""
    if FETCH:
        tl.inline_asm_elementwise(
            "prefetch.global.L1 [$1]; mov.u32 $0, 0;", "=r,l", [x + tl.where(live, at, 0)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def fetch_rows(
    x, first, begin, end, column, D, BT: tl.constexpr, BD: tl.constexpr, FETCH: tl.constexpr
):
    """The same for BT rows from `first`, those of begin to end, of the BD channels from column: an
    address a cache line of 64 numbers, whatever the type."""
    LINES: tl.constexpr = BD // 64 if BD > 64 else 1
    i = tl.arange(0, BT * LINES)
    t, ch = first + i // LINES, column + i % LINES * 64
    fetch(x, t * D + ch, (t >= begin) & (t < end) & (ch < D), FETCH)


@triton.jit
def fetch_tile(x, block, live, SIZE: tl.constexpr, FETCH: tl.constexpr):
    """The same for the SIZE fp32 numbers of a block's tile of B or C."""
    LINES: tl.constexpr = SIZE // 32 if SIZE > 32 else 1
    at = block * SIZE + tl.arange(0, LINES) * 32
    fetch(x, at, (at >= 0) & live, FETCH)


@triton.jit
def steps(dt, shift, live):
    """d of the rows dt and its derivative, shift the bias; 0 where not live."""
    d, slope = softplus(dt.to(tl.float32) + shift[None, :])
    return tl.where(live, d, 0.0), slope


@triton.jit
def tiles(
    b, c, blocks, b_out, c_out,
    M: tl.constexpr, MP: tl.constexpr, BT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """B and C for BT rows, by entries if COLUMNS, else by rows; grid blocks * 128 / BT."""
    pid = tl.program_id(0).to(tl.int64)
    part = pid % (128 // BT)
    first = tl.load(blocks + 2 * (pid // (128 // BT))) + part * BT
    rows = tl.load(blocks + 2 * (pid // (128 // BT)) + 1) - part * BT
    i, n = tl.arange(0, BT)[:, None], tl.arange(0, MP)[None, :]
    live = (i < rows) & (n < M)
    at = (first + i) * M + n
    to = pid * MP * BT + (n * BT + i if COLUMNS else i * MP + n)
    tl.store(b_out + to, tl.load(b + at, mask=live, other=0.0).to(tl.float32))
    tl.store(c_out + to, tl.load(c + at, mask=live, other=0.0).to(tl.float32))


@triton.jit
def read_out(skip, z, u, y):
    """The bracket of (2) of the sums y, and silu(z) with its derivative (1 and 0 without z)."""
    y += skip[None, :] * u
    if z is not None:
        x = z.to(tl.float32)
        s = 1 / (1 + tl.exp2(-1.4426950408889634 * x))
        gate, slope = x * s, s * (1 + x * (1 - s))
    else:
        gate, slope = tl.full(y.shape, 1.0, tl.float32), tl.zeros(y.shape, tl.float32)
    return y, gate, slope


@triton.jit
def walk_rows(chunks, row0, row_end, BT: tl.constexpr):
    """The blocks of BT rows of a segment."""
    rows = tl.minimum(chunks.to(tl.int64) * 64, row_end - row0)
    return ((rows + BT - 1) // BT).to(tl.int32)


@triton.jit(do_not_specialize=["D"])
def local_states(
    u, dt, dy, z, bias, A, w, segments, local, total, D,
    W: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    REVERSE: tl.constexpr, FETCH: tl.constexpr,
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
    i, nn = tl.arange(0, BT)[:, None], tl.arange(0, MP)
    ch = tile * BD + tl.arange(0, BD)
    inside = (nn < M)[:, None] & (ch < D)[None, :]
    at_h = nn[:, None] * D + ch[None, :]
    rates = tl.load(A + at_h, mask=inside, other=0.0)
    shift = of_channels(bias, ch, D)
    H = tl.zeros((MP, BD), tl.float32)
    sums = tl.zeros((BD,), tl.float32)
    count = walk_rows(chunks, row0, row_end, BT)
    for k in range(count):
        t = (count - 1 - k) if REVERSE else k
        first = row0 + t * BT
        live = (i < row_end - first) & (ch < D)[None, :]
        whole = (first + BT <= row_end) & (tile * BD + BD <= D)
        at = first * D + (i * W + ch[None, :])
        x = read(dt, at, live, whole)
        v = read(dy if REVERSE else u, at, live, whole)
        gates = read(z, at, live, whole) if z is not None else None
        ahead = -1 if REVERSE else 1
        to, column = first + ahead * BT, tile * BD
        fetch_rows(dt, to, row0, row_end, column, D, BT, BD, FETCH)
        fetch_rows(dy if REVERSE else u, to, row0, row_end, column, D, BT, BD, FETCH)
        if z is not None:
            fetch_rows(z, to, row0, row_end, column, D, BT, BD, FETCH)
        fetch_tile(w, block0 * (128 // BT) + t + ahead, k + 1 < count, BT * MP, FETCH)
        d, _ = steps(x, shift, live)
        sums += tl.sum(d, 0)
        v = v.to(tl.float32)
        if REVERSE:
            _, gate, _ = read_out(tl.zeros((BD,), tl.float32), gates, v, v)
            v *= gate
        else:
            v *= d
        rows = w + (block0 * (128 // BT) + t) * BT * MP + nn
        for j in tl.static_range(BT):
            at_j = (BT - 1 - j) if REVERSE else j
            a = tl.exp2(row(d, i, at_j)[None, :] * rates)
            write = row(v, i, at_j)[None, :] * tl.load(rows + at_j * MP)[:, None]
            H = a * (write + H) if REVERSE else a * H + write
    tl.store(local + seg * M * D + at_h, H, mask=inside)
    tl.store(total + seg * D + ch, sums, mask=ch < D)


@triton.jit(do_not_specialize=["D"])
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


@triton.jit(do_not_specialize=["D", "keep"])
def outputs(
    u, dt, z, bias, A, D_, b, c, segments, start, y, states, final, D, keep,
    W: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    CUT: tl.constexpr, KEEP: tl.constexpr, FETCH: tl.constexpr,
):  # fmt: skip
    """(2) of one segment and BD channels; the state before each KEEP rows into states
    (blocks of KEEP, M, D) if keep, and the last one into final (N, M, D) where it is given.

    keep is no constant: without the stores ptxas takes 152 registers in place of 255, each read of
    B and C waits for the one before, and the kernel takes 1.57 ms in place of 0.67.

    start: states of the segments if CUT, else of the sequences, or None. Grid segments *
    cdiv(D, BD).
    """
    seg, seq, _head, tile, block0, chunks, row0, row_end, ends = this_walk(
        segments, 1, tl.cdiv(D, BD), False
    )
    if chunks == 0:
        return
    i, nn = tl.arange(0, BT)[:, None], tl.arange(0, MP)
    ch = tile * BD + tl.arange(0, BD)
    inside = (nn < M)[:, None] & (ch < D)[None, :]
    at_h = nn[:, None] * D + ch[None, :]
    rates = tl.load(A + at_h, mask=inside, other=0.0)
    shift, skip = of_channels(bias, ch, D), of_channels(D_, ch, D)
    H = tl.zeros((MP, BD), tl.float32)
    if start is not None:
        H += tl.load(start + (seg if CUT else seq) * M * D + at_h, mask=inside, other=0.0)
    count = walk_rows(chunks, row0, row_end, BT)
    for t in range(count):
        first, block = row0 + t * BT, block0 * (128 // BT) + t
        live = (i < row_end - first) & (ch < D)[None, :]
        whole = (first + BT <= row_end) & (tile * BD + BD <= D)
        at = first * D + (i * W + ch[None, :])
        x, U = read(dt, at, live, whole), read(u, at, live, whole)
        gates = read(z, at, live, whole) if z is not None else None
        column = tile * BD
        fetch_rows(dt, first + BT, row0, row_end, column, D, BT, BD, FETCH)
        fetch_rows(u, first + BT, row0, row_end, column, D, BT, BD, FETCH)
        if z is not None:
            fetch_rows(z, first + BT, row0, row_end, column, D, BT, BD, FETCH)
        fetch_tile(b, block + 1, t + 1 < count, BT * MP, FETCH)
        fetch_tile(c, block + 1, t + 1 < count, BT * MP, FETCH)
        d, _ = steps(x, shift, live)
        U = U.to(tl.float32)
        v, Y = d * U, tl.zeros((BT, BD), tl.float32)
        rows = block * BT * MP + nn
        for j in tl.static_range(BT):
            if j % KEEP == 0:
                kept = block * (BT // KEEP) + j // KEEP
                tl.store(states + kept * M * D + at_h, H, mask=inside & (keep != 0))
            write = row(v, i, j)[None, :] * tl.load(b + rows + j * MP)[:, None]
            H = tl.exp2(row(d, i, j)[None, :] * rates) * H + write  # (1)
            sums = tl.sum(H * tl.load(c + rows + j * MP)[:, None], 0)
            Y = tl.where(i == j, sums[None, :], Y)
        Y, gate, _ = read_out(skip, gates, U, Y)
        tl.store(y + at, Y * gate, mask=live)  # (2)
    if final is not None and ends:
        tl.store(final + seq * M * D + at_h, H, mask=inside)
