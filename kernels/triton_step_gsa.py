r"""One token of each of N sequences of gated slot attention, the states updated in place.

    Sk = Sk diag(exp g) + k s^T     p = softmax(scale Sk^T q)                                 (1)
    Sv = diag(exp g) Sv + s v^T     o = Sv^T p                                                (2)

What stands before them in a layer can be taken in, so that a step needs no launches for it:

    q, k, v are a feature map's: x, max(x, 0) or silu(x)                                      (3)
    g = log sigma(a) / c of logits a                                                          (4)

The floor is every state read and written once: 2 N H M (K + V) 4 bytes. The softmax needs all of K
before (2) may begin, so one program takes a head, in tiles as large as its registers hold; where
that leaves most of the chip idle, (1) is a launch whose programs cut K and leave their shares of
the logits, and (2) one that adds them up and cuts V.

In two launches the states are on their way before they wait: all launches have ended but the one
just before (triton_rows.py). Sk is written by the first, one token ago, and the second came after
it. The second waits for the first, which writes Sk and the shares alone; so v, a or s, g and Sv,
written by the second one token ago, may be read at once, and (2) is done but for p when its wait
ends. The one launch may follow itself on the same states, so it reads nothing before it has waited.

Measured on an H100 inside a CUDA graph, 4 heads, K = V = 256, 64 slots, bf16: in one launch N = 1
8.1 us, N = 64 28.6 us of states that no cache has (67 MB; floor 22), with the hints of
triton_step.py and in a step of a model of 24 such layers 25.9; in two N = 1 5.1 us. 16 warps took
34.6, a tile of 8,192 29.4: 8 warps of 128 registers are two programs a multiprocessor.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the parameters of a kernel have no Python types)

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from glactl.kernels.triton_edges import log_sigma
from glactl.kernels.triton_rows import launch_options
from glactl.kernels.triton_step import feature, in_place, rows_apart

TILE = 16384  # state elements a program of `_gsa_step` holds: 64 a thread
SHARES = 4096  # logits of shares that a program of `_gsa_read` holds: 32 a thread
FEW = 128  # heads of all sequences; below, a head is cut into programs


@triton.jit
def _strength(s, at, g, inside, dtype: tl.constexpr):
    """s, or 1 - exp g, which near 0 is summed as a series: the difference would lose digits."""
    if s is not None:
        w = tl.load(s + at, mask=inside, other=0.0).to(dtype)
    else:
        x = -g
        series = x * (1 - x / 2 * (1 - x / 3 * (1 - x / 4 * (1 - x / 5 * (1 - x / 6)))))
        w = tl.where(x < 0.1, series, 1 - tl.exp(-x))
    return w


@triton.jit
def _slots(s, g, at, g_at, m, in_m, c, LOGITS: tl.constexpr, dtype: tl.constexpr):
    """Write strengths and decays of the slots m of one head; g logits of (4) if LOGITS."""
    if g is not None:
        x = tl.load(g + g_at + m, mask=in_m, other=0.0)
        if LOGITS:
            x = log_sigma(x.to(tl.float32)) / c
        x = x.to(dtype)
    else:
        x = tl.zeros(m.shape, dtype)
    return _strength(s, at + m, x, in_m, dtype), tl.exp(x)


@triton.jit
def _tile(state, row, column, rows, columns):
    """Addresses of a tile of one head's state (rows, columns), and what of it is inside."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    return state + row[:, None] * columns + column[None, :], inside


@triton.jit
def _keys(
    q, Q, Y, S, w, decay, Z, kk, heads, K: tl.constexpr, R: tl.constexpr, MAP: tl.constexpr
):  # fmt: skip
    """(1) of the rows kk, S before, and their share of the logits added to Z (RP, MP); Q and Y are
    what was read of the first query and of the key."""
    S = S * decay[None, :] + feature(Y.to(S.dtype), MAP)[:, None] * w[None, :]
    for r in tl.static_range(R):
        if r > 0:
            Q = tl.load(q + r * K + kk, mask=kk < K, other=0.0)
        Z += tl.where(heads == r, tl.sum(S * feature(Q.to(S.dtype), MAP)[:, None], 0)[None, :], 0.0)
    return S, Z


@triton.jit
def _softmax(Z, in_m, scale):
    Z = tl.where(in_m[None, :], scale * Z, -float("inf"))
    Z = tl.exp(Z - tl.max(Z, 1)[:, None])
    return Z / tl.sum(Z, 1)[:, None]


@triton.jit
def _values(v, S, w, decay, vv, V: tl.constexpr, MAP: tl.constexpr):
    """Sv of (2) for the columns vv, S before."""
    W = feature(tl.load(v + vv, mask=vv < V, other=0.0).to(S.dtype), MAP)
    return S * decay[:, None] + w[:, None] * W[None, :]


@triton.jit
def _read(o, S, Z, vv, heads, V: tl.constexpr, R: tl.constexpr):
    """o of (2) for the columns vv of S, p in Z (RP, MP)."""
    for r in tl.static_range(R):
        p = tl.sum(tl.where(heads == r, Z, 0.0), 0)
        tl.store(o + r * V + vv, tl.sum(S * p[:, None], 0), mask=vv < V)


@triton.jit
def _gsa_step(
    q, k, v, s, g, keys, values, o, scale, c,
    H, q_row, k_row, v_row, g_row,
    K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, MP: tl.constexpr,
    KB: tl.constexpr, VB: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    LOGITS: tl.constexpr, MAP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """(1), (2) for one sequence and head; MP, RP are M, R up to powers of two."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    at = tl.program_id(0).to(tl.int64)
    n, head = at // H, at % H
    m = tl.arange(0, MP)
    heads = tl.arange(0, RP)[:, None]
    in_m = m < M
    q += n * q_row + head * R * K
    k += n * k_row + head * K
    keys += at * K * M
    values += at * M * V
    w, decay = _slots(s, g, at * M, n * g_row + head * M, m, in_m, c, LOGITS, keys.dtype.element_ty)
    Z = tl.zeros((RP, MP), keys.dtype.element_ty)
    for start in range(0, K, KB):
        kk = start + tl.arange(0, KB)
        here, inside = _tile(keys, kk, m, K, M)
        Q = tl.load(q + kk, mask=kk < K, other=0.0)
        Y = tl.load(k + kk, mask=kk < K, other=0.0)
        S = tl.load(here, mask=inside, other=0.0, eviction_policy="evict_first")
        S, Z = _keys(q, Q, Y, S, w, decay, Z, kk, heads, K, R, MAP)
        tl.store(here, S, mask=inside, cache_modifier=".cs")
    Z = _softmax(Z, in_m, scale)
    for start in range(0, V, VB):
        vv = start + tl.arange(0, VB)
        here, inside = _tile(values, m, vv, M, V)
        S = tl.load(here, mask=inside, other=0.0, eviction_policy="evict_first")
        S = _values(v + n * v_row + head * V, S, w, decay, vv, V, MAP)
        tl.store(here, S, mask=inside, cache_modifier=".cs")
        _read(o + at * R * V, S, Z, vv, heads, V, R)


@triton.jit
def _gsa_logits(
    q, k, s, g, keys, part, c,
    H, q_row, k_row, g_row,
    K: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, KB: tl.constexpr,
    R: tl.constexpr, RP: tl.constexpr,
    LOGITS: tl.constexpr, MAP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """(1) for one sequence, head and KB rows: shares of the logits into part (.., RP, MP)."""
    pid = tl.program_id(0).to(tl.int64)
    NK = tl.cdiv(K, KB)
    at = pid // NK
    n, head = at // H, at % H
    m = tl.arange(0, MP)
    heads = tl.arange(0, RP)[:, None]
    in_m = m < M
    dtype: tl.constexpr = keys.dtype.element_ty
    kk = (pid % NK) * KB + tl.arange(0, KB)
    here, inside = _tile(keys + at * K * M, kk, m, K, M)
    S = tl.load(here, mask=inside, other=0.0)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    # all loads, then what is done with them, so that one wait is for all
    q += n * q_row + head * R * K
    Q = tl.load(q + kk, mask=kk < K, other=0.0)
    Y = tl.load(k + n * k_row + head * K + kk, mask=kk < K, other=0.0)
    w, decay = _slots(s, g, at * M, n * g_row + head * M, m, in_m, c, LOGITS, dtype)
    S, Z = _keys(q, Q, Y, S, w, decay, tl.zeros((RP, MP), dtype), kk, heads, K, R, MAP)
    tl.store(part + pid * RP * MP + heads * MP + m[None, :], Z)
    tl.store(here, S, mask=inside)


@triton.jit
def _gsa_read(
    v, s, g, values, part, o, scale, c,
    H, v_row, g_row,
    V: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, VB: tl.constexpr, NK: tl.constexpr,
    NB: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    LOGITS: tl.constexpr, MAP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """(2) for one sequence, head and VB columns, the logits' NK shares in part, NB read at once."""
    pid = tl.program_id(0).to(tl.int64)
    NV = tl.cdiv(V, VB)
    at = pid // NV
    n, head = at // H, at % H
    m = tl.arange(0, MP)
    heads = tl.arange(0, RP)[:, None]
    in_m = m < M
    dtype: tl.constexpr = values.dtype.element_ty
    vv = (pid % NV) * VB + tl.arange(0, VB)
    here, inside = _tile(values + at * M * V, m, vv, M, V)
    S = tl.load(here, mask=inside, other=0.0)
    w, decay = _slots(s, g, at * M, n * g_row + head * M, m, in_m, c, LOGITS, dtype)
    S = _values(v + n * v_row + head * V, S, w, decay, vv, V, MAP)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    Z = tl.zeros((RP, MP), dtype)
    for first in tl.static_range(0, NK, NB):
        share = first + tl.arange(0, NB)[:, None, None]
        here_z = part + (at * NK + share) * RP * MP + heads[None, :, :] * MP + m[None, None, :]
        Z += tl.sum(tl.load(here_z, mask=share < NK, other=0.0), 0)
    _read(o + at * R * V, S, _softmax(Z, in_m, scale), vv, heads, V, R)
    tl.store(here, S, mask=inside)


def gsa_step_triton(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor | None, g: Tensor | None,
    state: tuple[Tensor, Tensor], *, scale: float = 1.0, normalizer: float | None = None,
    feature_map: str = "none",
) -> Tensor:  # fmt: skip
    """`gsa_step` in one launch, or in two where heads are few; the arguments are taken to be right.

    Args:
        q: queries, (N, HQ, K).
        k: keys, (N, H, K).
        v: values, (N, H, V).
        s: write strengths, (N, H, M); 1 - exp(g) if None.
        g: log gates, (N, H, M); no decay if None, and s is then needed.
        state: (Sk, Sv), (N, H, K, M) and (N, H, M, V), fp32 or fp64, contiguous; updated in place.
        scale: factor on the logits of the softmax.
        normalizer: c of (4), g being logits; None: g is log gates.
        feature_map: of q, k and v, (3): "none", "relu" or "swish".

    Returns:
        o: (N, HQ, V) in v's dtype.

    Raises:
        ValueError: a state is not contiguous.
    Cost: the states read once and written once. Nothing waits for the device.
    """
    Sk, Sv = state
    in_place("state[0]", Sk)
    in_place("state[1]", Sv)
    N, H, K, M = Sk.shape
    V, HQ = Sv.shape[3], q.shape[1]
    o = torch.empty(N, HQ, V, dtype=v.dtype, device=v.device)
    q, k, v = rows_apart(q), rows_apart(k), rows_apart(v)
    s, g = None if s is None else s.contiguous(), None if g is None else rows_apart(g)
    g_row, c = 0 if g is None else g.stride(0), normalizer or 1.0
    slots, R = triton.next_power_of_2(M), HQ // H
    shared = {
        "M": M, "MP": slots, "R": R, "RP": triton.next_power_of_2(R),
        "LOGITS": normalizer is not None, "MAP": feature_map, **launch_options(q.device),
    }  # fmt: skip
    rows = (q.stride(0), k.stride(0), v.stride(0), g_row)
    if FEW <= N * H:
        most = max(1, TILE // slots)
        _gsa_step[(N * H,)](
            q, k, v, s, g, Sk, Sv, o, scale, c, H, *rows,
            K=K, V=V, KB=min(most, triton.next_power_of_2(K)),
            VB=min(most, triton.next_power_of_2(V)), num_warps=8, **shared,
        )  # fmt: skip
        return o
    cut = max(1, min(32, FEW // (N * H)))  # programs of a head
    KB, VB = (max(8, triton.next_power_of_2(triton.cdiv(x, cut))) for x in (K, V))
    NK = triton.cdiv(K, KB)
    part = torch.empty(N * H * NK, shared["RP"], slots, dtype=Sk.dtype, device=q.device)
    _gsa_logits[(N * H * NK,)](
        q, k, s, g, Sk, part, c, H, rows[0], rows[1], g_row, K=K, KB=KB, num_warps=4, **shared,
    )  # fmt: skip
    together = min(triton.next_power_of_2(NK), max(1, SHARES // (shared["RP"] * slots)))
    _gsa_read[(N * H * triton.cdiv(V, VB),)](
        v, s, g, Sv, part, o, scale, c, H, rows[2], g_row,
        V=V, VB=VB, NK=NK, NB=together, num_warps=4, **shared,
    )  # fmt: skip
    return o
