r"""One token of each of N sequences by Triton kernels, the states updated in place.

Gated linear attention, one head (`gla_step_triton`):

    S = diag(exp gk) S diag(exp gv) + k v^T     o = scale S^T q                               (1)

Gated slot attention, one head (`gsa_step_triton`):

    Sk = Sk diag(exp g) + k s^T     p = softmax(scale Sk^T q)                                 (2)
    Sv = diag(exp g) Sv + s v^T     o = Sv^T p                                                (3)

What stands before them in a layer can be taken in, so that a step needs no launches for it:

    q, k (of (2) and v) are a feature map's: x, max(x, 0) or silu(x)                          (4)
    gk = log sigma(U l + b) / c of l (rank), or g = log sigma(a) / c of logits a              (5)

Each is one launch that reads and writes every state once, which is the floor: 2 N H K V 4 bytes
for (1), 2 N H M (K + V) 4 for (2), (3). (1) is independent over columns of V, so its grid cuts V
until the chip is full. In (2) the softmax needs all of K before (3) may begin, so one program
takes a head, in tiles as large as its registers hold; where that leaves most of the chip idle, (2)
is a launch whose programs cut K and leave their shares of the logits, and (3) one that adds them up
and cuts V.

Measured on an H100 inside a CUDA graph, 4 heads, bf16: (1), K 128, V 256, N = 1 2.6 us, N = 64 23
(67 MB; floor 22); (2) with (3), K = V = 256, 64 slots, in one launch N = 1 8.1, N = 64 25 (67 MB).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the parameters of a kernel have no Python types)

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from glactl.kernels.triton_edges import log_sigma, sigma
from glactl.kernels.triton_rows import launch_options

PROGRAMS = 264  # two a multiprocessor of an H100
TILE = 16384  # state elements a program of `_gsa_step` holds: 32 a thread
FEW = 128  # heads of all sequences; below, a head is cut into programs


@triton.jit
def _feature(x, MAP: tl.constexpr):
    """(4)."""
    if MAP == "swish":
        x *= sigma(x)
    elif MAP == "relu":
        x = tl.where(x > 0, x, 0.0)
    return x


@triton.jit
def _low_rank(
    low, up, bias, head, kk, in_k, c, K: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr
):
    """gk of (5) of one head from its rows of up (H K, RANK)."""
    j = tl.arange(0, RP)
    row = (head * K + kk).to(tl.int64)
    U = tl.load(
        up + row[:, None] * RANK + j[None, :], mask=in_k[:, None] & (j < RANK)[None, :], other=0.0
    )
    x = tl.load(low + j, mask=j < RANK, other=0.0)
    logits = tl.sum(U.to(tl.float32) * x.to(tl.float32)[None, :], 1)
    return log_sigma(logits + tl.load(bias + row, mask=in_k, other=0.0).to(tl.float32)) / c


@triton.jit
def _gla_step(
    q, k, v, gk, gv, g, low, up, bias, state, o, scale, c,
    H, q_row, k_row, v_row, low_row,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VB: tl.constexpr, R: tl.constexpr,
    PER_TOKEN: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr, MAP: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """(1) for one sequence, head and VB columns of V; KP is K up to a power of two."""
    pid = tl.program_id(0).to(tl.int64)
    NV = tl.cdiv(V, VB)
    at = pid // NV  # sequence and head
    n, head = at // H, at % H
    kk = tl.arange(0, KP)
    vv = (pid % NV) * VB + tl.arange(0, VB)
    in_k, in_v = kk < K, vv < V
    inside = in_k[:, None] & in_v[None, :]
    here = state + at * K * V + kk[:, None] * V + vv[None, :]
    S = tl.load(here, mask=inside, other=0.0)  # written by the step before, whose end ended it
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    dtype = S.dtype
    if low is not None:
        gates = _low_rank(low + n * low_row, up, bias, head, kk, in_k, c, K, RANK, RP)
        S *= tl.exp(gates.to(dtype))[:, None]
    if gk is not None:
        S *= tl.exp(tl.load(gk + at * K + kk, mask=in_k, other=0.0).to(dtype))[:, None]
    if gv is not None:
        S *= tl.exp(tl.load(gv + at * V + vv, mask=in_v, other=0.0).to(dtype))[None, :]
    if g is not None:
        S *= tl.exp(tl.load(g + (at if PER_TOKEN else head)).to(dtype))
    Y = tl.load(k + n * k_row + head * K + kk, mask=in_k, other=0.0).to(dtype)
    W = tl.load(v + n * v_row + head * V + vv, mask=in_v, other=0.0).to(dtype)
    S += _feature(Y, MAP)[:, None] * W[None, :]
    tl.store(here, S, mask=inside)
    for r in tl.static_range(R):
        hq = head * R + r
        Q = _feature(tl.load(q + n * q_row + hq * K + kk, mask=in_k, other=0.0).to(dtype), MAP)
        out = scale * tl.sum(S * Q[:, None], 0)
        tl.store(o + (at * R + r) * V + vv, out, mask=in_v)


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
    """Write strengths and decays of the slots m of one head; g logits of (5) if LOGITS."""
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
    """The rows kk of Sk of (2), and their share of the logits added to Z (RP, MP)."""
    dtype: tl.constexpr = keys.dtype.element_ty
    inside = (kk < K)[:, None] & in_m[None, :]
    here = keys + kk[:, None] * M + m[None, :]
    Y = _feature(tl.load(k + kk, mask=kk < K, other=0.0).to(dtype), MAP)
    S = tl.load(here, mask=inside, other=0.0) * decay[None, :] + Y[:, None] * w[None, :]
    tl.store(here, S, mask=inside)
    for r in tl.static_range(R):
        Q = _feature(tl.load(q + r * K + kk, mask=kk < K, other=0.0).to(dtype), MAP)
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
    """(3) for the columns vv, p in Z (RP, MP)."""
    dtype: tl.constexpr = values.dtype.element_ty
    inside = in_m[:, None] & (vv < V)[None, :]
    here = values + m[:, None] * V + vv[None, :]
    W = _feature(tl.load(v + vv, mask=vv < V, other=0.0).to(dtype), MAP)
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
    """(2), (3) for one sequence and head; MP, RP are M, R up to powers of two."""
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
    """(2) for one sequence, head and KB rows: shares of the logits into part (.., RP, MP)."""
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
    """(3) for one sequence, head and VB columns, the logits' NK shares in part."""
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


class LowRank(NamedTuple):
    """gk of (5): l (N, rank), U (H K, rank), b (H K,) and c."""

    low: Tensor
    up: Tensor
    bias: Tensor
    normalizer: float


def _in_place(name: str, state: Tensor) -> None:
    if not state.is_contiguous():
        raise ValueError(
            f"{name} has the strides {state.stride()}; allowed: a contiguous state, "
            "because it is updated in place"
        )


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def _rows(x: Tensor) -> Tensor:
    """x (N, H, D), whose sequences may lie apart but not what one has."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def column_tile(programs: int, K: int, V: int) -> int:
    """Columns of V a program of (1) takes: 64, halved while that leaves multiprocessors idle or
    the tile over 128 registers a thread, down to the 8 columns of one memory sector."""
    width = min(64, triton.next_power_of_2(V))
    while width > 8 and (
        programs * triton.cdiv(V, width) < PROGRAMS or triton.next_power_of_2(K) * width > TILE
    ):
        width //= 2
    return width


def gla_step_triton(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, *, gk: Tensor | None = None,
    gv: Tensor | None = None, g: Tensor | None = None, scale: float | None = None,
    low_rank: LowRank | None = None, feature_map: str = "none",
) -> Tensor:  # fmt: skip
    """`gla_step` in one launch; the arguments are taken to be right.

    Args:
        q: queries, (N, HQ, K).
        k: keys, (N, H, K).
        v: values, (N, H, V).
        state: S, (N, H, K, V), fp32 or fp64, contiguous; updated in place.
        gk, gv, g: log gates, (N, H, K), (N, H, V), and (N, H) or (H,).
        scale: factor on the read-out; K**-0.5 if None.
        low_rank: what gk is made of, (5), in its place.
        feature_map: of q and k, (4): "none", "relu" or "swish".

    Returns:
        o: (N, HQ, V) in v's dtype.

    Raises:
        ValueError: the state is not contiguous.
    Cost: the state read once and written once. Nothing waits for the device.
    """
    _in_place("state", state)
    N, H, K, V = state.shape
    HQ = q.shape[1]
    o = torch.empty(N, HQ, V, dtype=v.dtype, device=v.device)
    width = column_tile(N * H, K, V)
    q, k, v = _rows(q), _rows(k), _rows(v)
    low, up, bias, c = low_rank or (None, None, None, 1.0)
    rank = 1 if up is None else up.shape[1]
    _gla_step[(N * H * triton.cdiv(V, width),)](
        q, k, v, *_contiguous(gk, gv, g), low, up, bias, state, o,
        K**-0.5 if scale is None else scale, c,
        H, q.stride(0), k.stride(0), v.stride(0), 0 if low is None else low.stride(0),
        K=K, V=V, KP=triton.next_power_of_2(K), VB=width, R=HQ // H,
        PER_TOKEN=g is not None and g.dim() == 2, RANK=rank, RP=triton.next_power_of_2(rank),
        MAP=feature_map,
        num_warps=8 if triton.next_power_of_2(K) * width >= 8192 else 4, **launch_options(q.device),
    )  # fmt: skip
    return o


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
        normalizer: c of (5), g being logits; None: g is log gates.
        feature_map: of q, k and v, (4): "none", "relu" or "swish".

    Returns:
        o: (N, HQ, V) in v's dtype.

    Raises:
        ValueError: a state is not contiguous.
    Cost: the states read once and written once. Nothing waits for the device.
    """
    Sk, Sv = state
    _in_place("state[0]", Sk)
    _in_place("state[1]", Sv)
    N, H, K, M = Sk.shape
    V, HQ = Sv.shape[3], q.shape[1]
    o = torch.empty(N, HQ, V, dtype=v.dtype, device=v.device)
    q, k, v = _rows(q), _rows(k), _rows(v)
    s, g = None if s is None else s.contiguous(), None if g is None else _rows(g)
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
