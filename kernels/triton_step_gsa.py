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

Measured on an H100 inside a CUDA graph, 4 heads, K = V = 256, 64 slots, bf16: in one launch N = 1
8.1 us, N = 64 25 us (67 MB; floor 22); in two N = 1 5.1 us.
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

TILE = 16384  # state elements a program of `_gsa_step` holds: 32 a thread
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
def _keys(
    q, k, keys, w, decay, Z, kk, m, in_m, heads,
    K: tl.constexpr, M: tl.constexpr, R: tl.constexpr, MAP: tl.constexpr,
):  # fmt: skip
    """The rows kk of Sk of (1), and their share of the logits added to Z (RP, MP)."""
    dtype: tl.constexpr = keys.dtype.element_ty
    inside = (kk < K)[:, None] & in_m[None, :]
    here = keys + kk[:, None] * M + m[None, :]
    Y = feature(tl.load(k + kk, mask=kk < K, other=0.0).to(dtype), MAP)
    S = tl.load(here, mask=inside, other=0.0) * decay[None, :] + Y[:, None] * w[None, :]
    tl.store(here, S, mask=inside)
    for r in tl.static_range(R):
        Q = feature(tl.load(q + r * K + kk, mask=kk < K, other=0.0).to(dtype), MAP)
        Z += tl.where(heads == r, tl.sum(S * Q[:, None], 0)[None, :], 0.0)
    return Z


@triton.jit
def _softmax(Z, in_m, scale):
    Z = tl.where(in_m[None, :], scale * Z, -float("inf"))
    Z = tl.exp(Z - tl.max(Z, 1)[:, None])
    return Z / tl.sum(Z, 1)[:, None]


@triton.jit
def _values(
    v, values, o, w, decay, Z, vv, m, in_m, heads,
    V: tl.constexpr, R: tl.constexpr, MAP: tl.constexpr,
):  # fmt: skip
    """(2) for the columns vv, p in Z (RP, MP)."""
    dtype: tl.constexpr = values.dtype.element_ty
    inside = in_m[:, None] & (vv < V)[None, :]
    here = values + m[:, None] * V + vv[None, :]
    W = feature(tl.load(v + vv, mask=vv < V, other=0.0).to(dtype), MAP)
    S = tl.load(here, mask=inside, other=0.0) * decay[:, None] + w[:, None] * W[None, :]
    tl.store(here, S, mask=inside)
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
    keys += at * K * M
    values += at * M * V
    w, decay = _slots(s, g, at * M, n * g_row + head * M, m, in_m, c, LOGITS, keys.dtype.element_ty)
    Z = tl.zeros((RP, MP), keys.dtype.element_ty)
    for start in range(0, K, KB):
        Z = _keys(
            q + n * q_row + head * R * K, k + n * k_row + head * K, keys, w, decay, Z,
            start + tl.arange(0, KB), m, in_m, heads, K, M, R, MAP,
        )  # fmt: skip
    Z = _softmax(Z, in_m, scale)
    for start in range(0, V, VB):
        _values(
            v + n * v_row + head * V, values, o + at * R * V, w, decay, Z,
            start + tl.arange(0, VB), m, in_m, heads, V, R, MAP,
        )  # fmt: skip


@triton.jit
def _gsa_logits(
    q, k, s, g, keys, part, c,
    H, q_row, k_row, g_row,
    K: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, KB: tl.constexpr,
    R: tl.constexpr, RP: tl.constexpr,
    LOGITS: tl.constexpr, MAP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """(1) for one sequence, head and KB rows: shares of the logits into part (.., RP, MP)."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    pid = tl.program_id(0).to(tl.int64)
    NK = tl.cdiv(K, KB)
    at = pid // NK
    n, head = at // H, at % H
    m = tl.arange(0, MP)
    heads = tl.arange(0, RP)[:, None]
    in_m = m < M
    dtype: tl.constexpr = keys.dtype.element_ty
    w, decay = _slots(s, g, at * M, n * g_row + head * M, m, in_m, c, LOGITS, dtype)
    Z = _keys(
        q + n * q_row + head * R * K, k + n * k_row + head * K, keys + at * K * M, w, decay,
        tl.zeros((RP, MP), dtype), (pid % NK) * KB + tl.arange(0, KB), m, in_m, heads, K, M, R, MAP,
    )  # fmt: skip
    tl.store(part + pid * RP * MP + heads * MP + m[None, :], Z)


@triton.jit
def _gsa_read(
    v, s, g, values, part, o, scale, c,
    H, v_row, g_row,
    V: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, VB: tl.constexpr, NK: tl.constexpr,
    R: tl.constexpr, RP: tl.constexpr,
    LOGITS: tl.constexpr, MAP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """(2) for one sequence, head and VB columns, the logits' NK shares in part."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    pid = tl.program_id(0).to(tl.int64)
    NV = tl.cdiv(V, VB)
    at = pid // NV
    n, head = at // H, at % H
    m = tl.arange(0, MP)
    heads = tl.arange(0, RP)[:, None]
    in_m = m < M
    dtype: tl.constexpr = values.dtype.element_ty
    w, decay = _slots(s, g, at * M, n * g_row + head * M, m, in_m, c, LOGITS, dtype)
    Z = tl.zeros((RP, MP), dtype)
    for share in tl.static_range(NK):
        Z += tl.load(part + (at * NK + share) * RP * MP + heads * MP + m[None, :])
    _values(
        v + n * v_row + head * V, values + at * M * V, o + at * R * V, w, decay,
        _softmax(Z, in_m, scale), (pid % NV) * VB + tl.arange(0, VB), m, in_m, heads, V, R, MAP,
    )  # fmt: skip


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
            VB=min(most, triton.next_power_of_2(V)), num_warps=16, **shared,
        )  # fmt: skip
        return o
    cut = max(1, min(32, FEW // (N * H)))  # programs of a head
    KB, VB = (max(8, triton.next_power_of_2(triton.cdiv(x, cut))) for x in (K, V))
    NK = triton.cdiv(K, KB)
    part = torch.empty(N * H * NK, shared["RP"], slots, dtype=Sk.dtype, device=q.device)
    _gsa_logits[(N * H * NK,)](
        q, k, s, g, Sk, part, c, H, rows[0], rows[1], g_row, K=K, KB=KB, num_warps=4, **shared
    )
    _gsa_read[(N * H * triton.cdiv(V, VB),)](
        v, s, g, Sv, part, o, scale, c, H, rows[2], g_row, V=V, VB=VB, NK=NK, num_warps=4, **shared
    )
    return o
