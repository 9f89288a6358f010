r"""Triton kernels of gated linear attention with a scalar decay: what the walks read.

One head, one chunk of 64 rows; g_t the log decay of row t, S the state before the chunk:

    P_i = sum_{s<=i} g_s     X_j = sum_{s>j} g_s     L_ij = exp sum_{j<s<=i} g_s, i >= j      (1)
    q^ = scale e^P q      k^ = e^X k      A = scale (q k^T) * L      Ge = P of the last row      (2)

With these, o and the state after the chunk are those of a key gate whose channels are equal: the
walks are `sweep` and `local_states` of triton_gla_forward.py. P and X are running sums of their own
over numbers <= 0, never a difference of two (`decays_between` says what L does instead): any decay
in [-inf, 0] keeps its precision and no factor exceeds 1.

A decay is GATE = 0: none, 1: one number a head, 2: one a token and head.
Source: the scalar case of Yang et al., arXiv:2312.06635v6, in chunks.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the parameters of a kernel have no Python types)

import triton
import triton.language as tl

from glactl.kernels.triton_gla_forward import store_scores

CLOSED = tl.constexpr(-128.0)  # stands for any lower decay: e^-128 is 0 in fp32


@triton.jit
def gate_rows(g, row, head, at, live, H, GATE: tl.constexpr):
    """Log decays of the rows row + at, in fp32; 0 where not live."""
    if GATE == 2:
        out = tl.load(g + (row + at) * H + head, mask=live, other=0.0).to(tl.float32)
    elif GATE == 1:
        out = tl.where(live, tl.load(g + head).to(tl.float32), 0.0)
    else:
        out = tl.zeros(at.shape, tl.float32)
    return out


@triton.jit
def decays_between(g, row, rows, head, H, N: tl.constexpr, GATE: tl.constexpr, dtype: tl.constexpr):
    """L of (1) for N rows, of which `rows` are live; 1 above the diagonal.

    Differences of running sums, the one place of them: in fp64, right to fp32 rounding, where dtype
    is fp32; in fp32 for bf16, right to N 128 2^-24 = 1e-3 at worst, since CLOSED bounds each term.
    A sum of its own for every pair, a scan of N x N, costs 45 registers a thread at N = 128, and
    with them the second block on a multiprocessor.
    """
    i = tl.arange(0, N)
    x = tl.maximum(gate_rows(g, row, head, i, i < rows, H, GATE), CLOSED)
    P = tl.cumsum(x if dtype == tl.bfloat16 else x.to(tl.float64), 0)
    return tl.exp(tl.minimum((P[:, None] - P[None, :]).to(tl.float32), 0.0))


@triton.jit
def scores(
    q, k, g, blocks, qh, kh, a, ge, scale,
    H,
    K: tl.constexpr, KB: tl.constexpr, R: tl.constexpr, GATE: tl.constexpr,
    BF16: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """(1) and (2) of one chunk and query head; Ge goes into ge (chunks, H, K) in K copies, as the
    walks of a key gate read it. Grid chunks * HQ."""
    pid = tl.program_id(0).to(tl.int64)
    HQ = H * R
    hq, chunk = pid % HQ, pid // HQ
    block, half = chunk // 2, chunk % 2
    head = hq // R
    row = tl.load(blocks + 2 * block) + 64 * half
    rows = tl.load(blocks + 2 * block + 1)
    if rows == 0:
        return
    rows -= 64 * half
    dtype: tl.constexpr = tl.bfloat16 if BF16 else tl.float32
    i = tl.arange(0, 64)
    c = tl.arange(0, KB)
    live = (i < rows)[:, None]
    at_q = (row * HQ + hq) * K + i[:, None] * (HQ * K) + c[None, :]
    at_k = (row * H + head) * K + i[:, None] * (H * K) + c[None, :]
    at_h = i[:, None] * K + c[None, :]
    qh += pid * 64 * K
    kh += (chunk * H + head) * 64 * K
    ge += (chunk * H + head) * K
    here = gate_rows(g, row, head, i, i < rows, H, GATE)
    into = scale * tl.exp(tl.cumsum(here, 0))[:, None]
    after = gate_rows(g, row, head, i + 1, (i < 63) & (i + 1 < rows), H, GATE)
    out = tl.exp(tl.cumsum(after, 0, reverse=True))[:, None]
    end = tl.sum(here, 0)
    A = tl.zeros((64, 64), tl.float32)
    for s in range(0, K, KB):
        Q = tl.load(q + at_q + s, mask=live, other=0.0).to(dtype)
        Y = tl.load(k + at_k + s, mask=live, other=0.0).to(dtype)
        A = tl.dot(Q, tl.trans(Y), A, input_precision=PREC)
        tl.store(qh + at_h + s, Q.to(tl.float32) * into)
        if hq % R == 0:
            tl.store(kh + at_h + s, Y.to(tl.float32) * out)
            tl.store(ge + s + c, tl.zeros((KB,), tl.float32) + end)
    A *= scale
    if GATE != 0:
        A *= decays_between(g, row, rows, head, H, 64, GATE, dtype)
    store_scores(A, a + pid * 64 * 64)
