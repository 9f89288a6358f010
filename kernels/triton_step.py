r"""One token of each of N sequences by Triton kernels, the states updated in place.

Gated linear attention, one head (`gla_step_triton`):

    S = diag(exp gk) S diag(exp gv) + k v^T     o = scale S^T q                               (1)

Gated slot attention, one head (`gsa_step_triton`):

    Sk = Sk diag(exp g) + k s^T     p = softmax(scale Sk^T q)                                 (2)
    Sv = diag(exp g) Sv + s v^T     o = Sv^T p                                                (3)

Each is one launch that reads and writes every state once, which is the floor: 2 N H K V 4 bytes
for (1), 2 N H M (K + V) 4 for (2), (3). (1) is independent over columns of V, so its grid cuts V
until the chip is full. In (2) the softmax needs all of K before (3) may begin, so one program
takes a head; its tiles are as large as its registers hold, to have many reads in flight.

Predicted on an H100 inside a CUDA graph, at 2.6 TB/s where the chip is full; not measured yet. K
256, V 512, 4 heads: N = 1, 4.2 MB, 4 us; N = 64, 268 MB, 0.10 ms. Slots 64, K = V = 512, 4 heads:
N = 1, four programs of 0.5 MB each, 6 us; N = 64, 134 MB, 0.06 ms.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the parameters of a kernel have no Python types)

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 264  # two a multiprocessor of an H100
TILE = 16384  # state elements a program of `_gsa_step` holds: 32 a thread


@triton.jit
def _gla_step(
    q, k, v, gk, gv, g, state, o, scale,
    H,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VB: tl.constexpr, R: tl.constexpr,
    PER_TOKEN: tl.constexpr,
):  # fmt: skip
    """(1) for one sequence, head and VB columns of V; KP is K up to a power of two."""
    pid = tl.program_id(0).to(tl.int64)
    NV = tl.cdiv(V, VB)
    at = pid // NV  # sequence and head
    kk = tl.arange(0, KP)
    vv = (pid % NV) * VB + tl.arange(0, VB)
    in_k, in_v = kk < K, vv < V
    inside = in_k[:, None] & in_v[None, :]
    here = state + at * K * V + kk[:, None] * V + vv[None, :]
    S = tl.load(here, mask=inside, other=0.0)
    dtype = S.dtype
    if gk is not None:
        S *= tl.exp(tl.load(gk + at * K + kk, mask=in_k, other=0.0).to(dtype))[:, None]
    if gv is not None:
        S *= tl.exp(tl.load(gv + at * V + vv, mask=in_v, other=0.0).to(dtype))[None, :]
    if g is not None:
        S *= tl.exp(tl.load(g + (at if PER_TOKEN else at % H)).to(dtype))
    Y = tl.load(k + at * K + kk, mask=in_k, other=0.0).to(dtype)
    W = tl.load(v + at * V + vv, mask=in_v, other=0.0).to(dtype)
    S += Y[:, None] * W[None, :]
    tl.store(here, S, mask=inside)
    for r in tl.static_range(R):
        hq = at * R + r
        Q = tl.load(q + hq * K + kk, mask=in_k, other=0.0).to(dtype)
        tl.store(o + hq * V + vv, scale * tl.sum(S * Q[:, None], 0), mask=in_v)


@triton.jit
def _strength(s, g, at, inside, dtype: tl.constexpr):
    """s, or 1 - exp g, which near 0 is summed as a series: the difference would lose digits."""
    if s is not None:
        w = tl.load(s + at, mask=inside, other=0.0).to(dtype)
    else:
        x = -tl.load(g + at, mask=inside, other=0.0).to(dtype)
        series = x * (1 - x / 2 * (1 - x / 3 * (1 - x / 4 * (1 - x / 5 * (1 - x / 6)))))
        w = tl.where(x < 0.1, series, 1 - tl.exp(-x))
    return w


@triton.jit
def _gsa_step(
    q, k, v, s, g, keys, values, o, scale,
    K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, MP: tl.constexpr,
    KB: tl.constexpr, VB: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    """(2), (3) for one sequence and head; MP, RP are M, R up to powers of two."""
    at = tl.program_id(0).to(tl.int64)
    m = tl.arange(0, MP)
    heads = tl.arange(0, RP)[:, None]
    in_m = m < M
    keys += at * K * M
    values += at * M * V
    dtype: tl.constexpr = keys.dtype.element_ty
    w = _strength(s, g, at * M + m, in_m, dtype)
    if g is not None:
        decay = tl.exp(tl.load(g + at * M + m, mask=in_m, other=0.0).to(dtype))
    else:
        decay = tl.full((MP,), 1.0, dtype)
    Z = tl.zeros((RP, MP), dtype)
    for start in range(0, K, KB):
        kk = start + tl.arange(0, KB)
        inside = (kk < K)[:, None] & in_m[None, :]
        here = keys + kk[:, None] * M + m[None, :]
        Y = tl.load(k + at * K + kk, mask=kk < K, other=0.0).to(dtype)
        S = tl.load(here, mask=inside, other=0.0) * decay[None, :] + Y[:, None] * w[None, :]
        tl.store(here, S, mask=inside)
        for r in tl.static_range(R):
            Q = tl.load(q + (at * R + r) * K + kk, mask=kk < K, other=0.0).to(dtype)
            Z += tl.where(heads == r, tl.sum(S * Q[:, None], 0)[None, :], 0.0)
    Z = tl.where(in_m[None, :], scale * Z, -float("inf"))
    Z = tl.exp(Z - tl.max(Z, 1)[:, None])
    Z /= tl.sum(Z, 1)[:, None]
    for start in range(0, V, VB):
        vv = start + tl.arange(0, VB)
        inside = in_m[:, None] & (vv < V)[None, :]
        here = values + m[:, None] * V + vv[None, :]
        W = tl.load(v + at * V + vv, mask=vv < V, other=0.0).to(dtype)
        S = tl.load(here, mask=inside, other=0.0) * decay[:, None] + w[:, None] * W[None, :]
        tl.store(here, S, mask=inside)
        for r in tl.static_range(R):
            p = tl.sum(tl.where(heads == r, Z, 0.0), 0)
            out = tl.sum(S * p[:, None], 0)
            tl.store(o + (at * R + r) * V + vv, out, mask=vv < V)


def _in_place(name: str, state: Tensor) -> None:
    if not state.is_contiguous():
        raise ValueError(
            f"{name} has the strides {state.stride()}; allowed: a contiguous state, "
            "because it is updated in place"
        )


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


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
) -> Tensor:  # fmt: skip
    """`gla_step` in one launch; the arguments are taken to be right.

    Args:
        q: queries, (N, HQ, K).
        k: keys, (N, H, K).
        v: values, (N, H, V).
        state: S, (N, H, K, V), fp32 or fp64, contiguous; updated in place.
        gk, gv, g: log gates, (N, H, K), (N, H, V), and (N, H) or (H,).
        scale: factor on the read-out; K**-0.5 if None.

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
    _gla_step[(N * H * triton.cdiv(V, width),)](
        *_contiguous(q, k, v, gk, gv, g), state, o, K**-0.5 if scale is None else scale, H,
        K=K, V=V, KP=triton.next_power_of_2(K), VB=width, R=HQ // H,
        PER_TOKEN=g is not None and g.dim() == 2, num_warps=4,
    )  # fmt: skip
    return o


def gsa_step_triton(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor | None, g: Tensor | None,
    state: tuple[Tensor, Tensor], *, scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """`gsa_step` in one launch; the arguments are taken to be right.

    Args:
        q: queries, (N, HQ, K).
        k: keys, (N, H, K).
        v: values, (N, H, V).
        s: write strengths, (N, H, M); 1 - exp(g) if None.
        g: log gates, (N, H, M); no decay if None, and s is then needed.
        state: (Sk, Sv), (N, H, K, M) and (N, H, M, V), fp32 or fp64, contiguous; updated in place.
        scale: factor on the logits of the softmax.

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
    slots, most = triton.next_power_of_2(M), max(1, TILE // triton.next_power_of_2(M))
    _gsa_step[(N * H,)](
        *_contiguous(q, k, v, s, g), Sk, Sv, o, scale,
        K=K, V=V, M=M, MP=slots,
        KB=min(most, triton.next_power_of_2(K)), VB=min(most, triton.next_power_of_2(V)),
        R=HQ // H, RP=triton.next_power_of_2(HQ // H), num_warps=16,
    )  # fmt: skip
    return o
