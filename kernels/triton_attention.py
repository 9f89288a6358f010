r"""Triton kernels of `attention_step` and `attention_write` (attention.py), whose equations are
numbered there.

`_step` is one sequence, head of keys and share of its rows. (1) is of a few numbers, so every
program does it again; the new key and value never come back from memory: the program of the first
share begins its softmax with them and writes row r, which all programs leave out. So (2) needs no
launch before (3), and nothing that is read is written.

The softmax is taken online. With the scores z_s in units of log 2, over the rows s of a program,

    m = max_s z_s     l = sum_s 2^(z_s - m)     a = sum_s 2^(z_s - m) V_s     o = a / l      (5)

One query head to a head of keys: sums in plain fp32, and each of the TB rows of a tile has an m, l
and a of its own until the last tile, so that no tile waits for the sums of another thread's rows;
some 7 operations for the 4 bytes of a key's and a value's bf16 take a fifth of the time that memory
does. On the tensor cores a single query would use one row in 16 and cost three barriers a tile.
With more query heads those sums would be the limit: there they are products of queries padded to
16, p rounded to the state's type.

Where sequences and heads are fewer than PROGRAMS, rows are cut into shares, each sequence's own
ones, and `_merge` adds up what (5) leaves of each:

    o = sum_i 2^(m_i - M) a_i / sum_i 2^(m_i - M) l_i,  M = max_i m_i                        (6)

A state may lie in memory in any way that has the entries of a row of a head side by side, alike in
both parts. A head's rows one after another, as `attention_room` makes it, are faster to read than
the heads of a row side by side: at 100 sequences of 2,000 tokens, 16 heads of 64, 294 us against
318, at 63 190 against 224, of eight heads of 128 204 against 221, one sequence 7.6 against 9.3, all
in tiles of 4,096 numbers and up to 4,224 programs. Tiles of 2,048 and 2,048 programs are the best
for 143 and 200 sequences, 403 and 563 us, where it was 650; with 100, 63 and one they take 316, 212
and 8.3, where one warp and 8,448 programs would take 292, 190 and 7.3 (benchmarks/attention.py).

(4) is done by `_merge`, or by a launch of torch where there is none: all programs read p. They wait
before they read anything; all launches may be early ones (triton_rows.py).

Floor, an H100: the rows that count, 4 D H bytes each in bf16, over 3.02 TB/s. 200 sequences of
2,000 tokens, 16 heads of 64: 1.64 GB, 542 us; measured 563, 2.90 TB/s. One sequence: 2.7 us;
measured 8.3 in two launches.

`_write` is (7) of some tokens and one head, read and written once.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the parameters of a kernel have no Python types)

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from glactl.kernels.triton_rotary import circle, per_place
from glactl.kernels.triton_rows import launch_options
from glactl.kernels.triton_step import rows_apart

PROGRAMS = 2048  # some three waves of an H100's, so that few wait for the last
SHARES = 64  # of a sequence and head at most, which `_merge` reads at once
LOW = tl.constexpr(-1e38)  # below any score; 2^(LOW - LOW) is no NaN


@triton.jit
def _turned(x, j, inside, place, step, D: tl.constexpr):
    """The entries j of (1) of the heads at x, fp32; as they are without a step."""
    y = tl.load(x + j, mask=inside, other=0.0).to(tl.float32)
    if step is not None:
        low = j < D // 2
        partner = tl.where(low, j + D // 2, j - D // 2)
        z = tl.load(x + partner, mask=inside, other=0.0).to(tl.float32)
        cos, sin = circle(place.to(tl.float32) * per_place(tl.where(low, j, partner), step))
        y = y * cos + tl.where(low, -z, z) * sin  # (1)
    return y


@triton.jit
def _rows(keys, values, start, end, row, head, apart, j, TB: tl.constexpr, D: tl.constexpr):
    """TB rows of a head's keys and values from `start`, `apart` from each other, as they are, and
    which of them count: those below `end` without `row`."""
    i = start + tl.arange(0, TB)
    live = (i < end) & (i != row)
    at = head + i.to(tl.int64)[:, None] * apart + j[None, :]
    inside = live[:, None] & (j < D)[None, :]
    K = tl.load(keys + at, mask=inside, other=0.0)
    return K, tl.load(values + at, mask=inside, other=0.0), live


@triton.jit
def _step(
    q, k, v, keys, values, length, o, part, scale, step, H, L, SN, SL, SH, q_row, k_row, v_row,
    D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, TB: tl.constexpr,
    S: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """(1), (2) and (5) of one sequence, head of keys and one of S shares of its rows; DP and RP are
    D and R padded, SN D, SL D and SH D what lies between sequences, rows and heads of the state.
    Where S is 1 the result is o, else part (.., R, D + 2) gets a, m and l."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    pid = tl.program_id(0).to(tl.int64)
    at, share = pid // S, (pid % S).to(tl.int32)
    n, h = at // H, at % H
    place = tl.load(length + n)
    row, held = (place % L).to(tl.int32), tl.minimum(place, L).to(tl.int32)
    rows = tl.cdiv(tl.cdiv(held, TB), S) * TB
    first = share * rows
    end = tl.minimum(first + rows, held)
    j = tl.arange(0, DP)
    in_d = j < D
    dtype: tl.constexpr = keys.dtype.element_ty
    head = (n * SN + h * SH) * D
    K = _turned(k + n * k_row + h * D, j, in_d, place, step, D).to(dtype)
    V = tl.load(v + n * v_row + h * D + j, mask=in_d, other=0.0).to(dtype)
    if share == 0:
        new = head + row.to(tl.int64) * (SL * D) + j
        tl.store(keys + new, K, mask=in_d)
        tl.store(values + new, V, mask=in_d)  # (2)
    K, V = K.to(tl.float32), V.to(tl.float32)
    q += n * q_row + h * R * D
    r = tl.arange(0, RP)
    if R == 1:
        Q = _turned(q, j, in_d, place, step, D) * scale
        mine = (tl.arange(0, TB) == 0) & (share == 0)
        m = tl.where(mine, tl.sum(Q * K, 0), LOW)
        l = tl.where(mine, 1.0, 0.0)  # noqa: E741
        a = tl.where(mine[:, None], V[None, :], 0.0)
        for start in range(first, end, TB):
            KT, VT, live = _rows(keys, values, start, end, row, head, SL * D, j, TB, D)
            z = tl.sum(KT.to(tl.float32) * Q[None, :], 1)
            z = tl.where(live, z, -float("inf"))
            top = tl.maximum(m, z)
            p, less = tl.exp2(z - top), tl.exp2(m - top)
            l = l * less + p  # noqa: E741
            a = a * less[:, None] + VT.to(tl.float32) * p[:, None]
            m = top
        top = tl.max(m, 0)
        less = tl.exp2(m - top)
        l = tl.sum(l * less, 0) + tl.zeros((RP,), tl.float32)  # noqa: E741
        a = tl.sum(a * less[:, None], 0)[None, :]  # (5)
        m = top + tl.zeros((RP,), tl.float32)
    else:
        in_q = (r < R)[:, None] & in_d[None, :]
        Q = _turned(q + r[:, None] * D, j[None, :], in_q, place, step, D).to(dtype)
        m = tl.where(share == 0, tl.sum(Q.to(tl.float32) * K[None, :], 1) * scale, LOW)
        l = tl.where(share == 0, 1.0, 0.0) + tl.zeros((RP,), tl.float32)  # noqa: E741
        a = tl.where(share == 0, V, 0.0)[None, :] + tl.zeros((RP, DP), tl.float32)
        for start in range(first, end, TB):
            KT, VT, live = _rows(keys, values, start, end, row, head, SL * D, j, TB, D)
            z = tl.dot(Q, tl.trans(KT), input_precision="ieee") * scale
            z = tl.where(live[None, :], z, -float("inf"))
            top = tl.maximum(m, tl.max(z, 1))
            p, less = tl.exp2(z - top[:, None]), tl.exp2(m - top)
            l = l * less + tl.sum(p, 1)  # noqa: E741
            a = tl.dot(p.to(dtype), VT, a * less[:, None], input_precision="ieee")  # (5)
            m = top
    heads, in_o = at * R + r, (r < R)[:, None] & in_d[None, :]
    if S == 1:
        y = (a / l[:, None]).to(o.dtype.element_ty)
        tl.store(o + heads[:, None] * D + j[None, :], y, mask=in_o)
    else:
        to = part + (pid * R + r) * (D + 2)
        tl.store(to[:, None] + j[None, :], a, mask=in_o)
        tl.store(to + D, m, mask=r < R)
        tl.store(to + D + 1, l, mask=r < R)


@triton.jit
def _merge(
    part, o, length, HQ,
    D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, S: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """(6) of one sequence and query head; (4) by the first head's program."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    pid = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, DP)
    here = part + ((pid // R * S + tl.arange(0, S)) * R + pid % R) * (D + 2)
    m, l = tl.load(here + D), tl.load(here + D + 1)  # noqa: E741
    a = tl.load(here[:, None] + j[None, :], mask=(j < D)[None, :], other=0.0)
    less = tl.exp2(m - tl.max(m, 0))
    y = tl.sum(a * less[:, None], 0) / tl.sum(l * less, 0)  # (6)
    tl.store(o + pid * D + j, y.to(o.dtype.element_ty), mask=j < D)
    if pid % HQ == 0:
        tl.store(length + pid // HQ, tl.load(length + pid // HQ) + 1)  # (4)


@triton.jit
def _write(
    k, v, keys, values, sequence, row, M, L, SN, SL, SH, k_row, v_row,
    D: tl.constexpr, DP: tl.constexpr, TB: tl.constexpr,
):  # fmt: skip
    """(7) of TB tokens and one head; SN, SL and SH as of `_step`."""
    i, j = tl.program_id(0).to(tl.int64) * TB + tl.arange(0, TB), tl.arange(0, DP)
    h = tl.program_id(1).to(tl.int64)
    n = tl.load(sequence + i, mask=i < M, other=0)
    r = tl.load(row + i, mask=i < M, other=L)
    inside = (r < L)[:, None] & (j < D)[None, :]
    to = (n * SN + r * SL + h * SH)[:, None] * D + j[None, :]
    at = i[:, None]
    here = h * D + j[None, :]
    tl.store(keys + to, tl.load(k + at * k_row + here, mask=inside), mask=inside)
    tl.store(values + to, tl.load(v + at * v_row + here, mask=inside), mask=inside)  # (7)


def _tile(R: int, wide: int) -> tuple[int, int]:
    """TB and warps for R queries to a head of keys, of D padded to `wide`."""
    return (max(16, 2048 // wide), 2) if R == 1 else (max(16, 4096 // wide), 4)


def _shares(heads: int, L: int, rows: int, programs: int) -> int:
    """Shares, a power of two, that make so many programs and are of a tile of `rows` or more."""
    shares = 1
    while shares < SHARES and heads * shares < programs and shares * rows < L:
        shares *= 2
    return shares


def _strides(keys: Tensor, values: Tensor) -> list[int]:
    """How many D lie between sequences, rows and heads of both; ValueError where that differs, or
    where entries of a row lie apart or together with others."""
    both = [
        [step if size > 1 else 0 for size, step in zip(x.shape, x.stride(), strict=True)]
        for x in (keys, values)
    ]
    *steps, inner = both[0]
    D = keys.shape[3]
    alone = all(step > 0 for size, step in zip(keys.shape, steps, strict=False) if size > 1)
    if both[0] != both[1] or not alone or inner > 1 or any(step % D for step in steps):
        raise ValueError(
            f"state has the strides {keys.stride()} and {values.stride()}; allowed: rows of {D} in "
            "one piece and one of them or more apart, alike in both, because it is updated in place"
        )
    return [step // D for step in steps]


def attention_step_triton(
    q: Tensor, k: Tensor, v: Tensor, state: tuple[Tensor, Tensor], length: Tensor,
    theta: float | None,
) -> Tensor:  # fmt: skip
    """`attention_step` on a CUDA device; arguments, result and errors are its."""
    N, L, H, D = state[0].shape
    strides = _strides(*state)
    HQ = q.shape[1]
    R = HQ // H
    wide, padded = max(16, triton.next_power_of_2(D)), triton.next_power_of_2(R)
    padded = 1 if R == 1 else max(16, padded)
    rows, warps = _tile(R, wide)
    # with shared keys more programs have not been tried
    shares = _shares(N * H, L, rows, PROGRAMS if R == 1 else min(PROGRAMS, 264))
    q, k, v = rows_apart(q), rows_apart(k), rows_apart(v)
    o = torch.empty(N, HQ, D, dtype=v.dtype, device=v.device)
    part = None
    if shares > 1:
        part = torch.empty(N, H, shares, R, D + 2, dtype=torch.float32, device=v.device)
    begin = launch_options(q.device)
    sizes = {"D": D, "DP": wide, "R": R, "S": shares}
    _step[(N * H * shares,)](
        q, k, v, *state, length, o, part, D**-0.5 / math.log(2),
        None if theta is None else 2 * math.log2(theta) / D,
        H, L, *strides, q.stride(0), k.stride(0), v.stride(0),
        RP=padded, TB=rows, num_warps=warps, **sizes, **begin,
    )  # fmt: skip
    if part is None:
        length += 1  # (4)
    else:
        warps = 4 if shares * wide <= 4096 else 8
        _merge[(N * HQ,)](part, o, length, HQ, num_warps=warps, **sizes, **begin)
    return o


def attention_write_triton(
    k: Tensor, v: Tensor, state: tuple[Tensor, Tensor], sequence: Tensor, row: Tensor
) -> None:
    """`attention_write` on a CUDA device, without gradients; arguments are its."""
    M, H, D = k.shape
    strides, wide = _strides(*state), max(16, triton.next_power_of_2(D))
    k, v, rows = rows_apart(k), rows_apart(v), max(16, 4096 // wide)
    _write[(triton.cdiv(M, rows), H)](
        k, v, *state, sequence.contiguous(), row.contiguous(), M, state[0].shape[1], *strides,
        k.stride(0), v.stride(0), D=D, DP=wide, TB=rows, num_warps=4,
    )  # fmt: skip
