r"""One token of each of N sequences of gated linear attention, the states updated in place.

    S = diag(exp gk) S diag(exp gv) + k v^T     o = scale S^T q                               (1)

What stands before it in a layer can be taken in, so that a step needs no launches for it:

    q, k are a feature map's: x, max(x, 0) or silu(x)                                         (2)
    gk = log sigma(U l + b) / c, l (rank)                                                     (3)

One launch that reads and writes every state once, which is the floor: 2 N H K V 4 bytes. (1) is
independent over columns of V, so its grid cuts V until the chip is full.

With (3), which is a layer's step, S, U and b are on their way before the launch waits: all launches
have ended but the one just before (triton_rows.py), which makes q, k, v and l; S was written by
this kernel, one token ago. Without (3) the launch just before may be this one, on the same state,
so S is read behind the wait.

S is read again after all other weights and states were, so it is the first to leave the cache.

Measured on an H100 inside a CUDA graph, 4 heads, K 128, V 256, bf16: N = 1 2.6 us, N = 64 27.7 us
of states that no cache has (67 MB; floor 22; the library multiplies so much in place in 24.3); in a
step of a model of 24 such layers 24.7.
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
TILE = 2048  # state elements a program holds, more where K is above 256: see `column_tile`


@triton.jit
def feature(x, MAP: tl.constexpr):
    """(2)."""
    if MAP == "swish":
        x *= sigma(x)
    elif MAP == "relu":
        x = tl.where(x > 0, x, 0.0)
    return x


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
    j = tl.arange(0, RP)
    # U as (RP, KP): as (KP, RP) its layout came to S too, whose every vector was laid out twice
    if low is not None:
        row = (head * K + kk).to(tl.int64)
        in_up = (j < RANK)[:, None] & in_k[None, :]
        S = tl.load(here, mask=inside, other=0.0, eviction_policy="evict_first")
        U = tl.load(up + row[None, :] * RANK + j[:, None], mask=in_up, other=0.0)
        shift = tl.load(bias + row, mask=in_k, other=0.0)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    # all loads, then what is done with them: a conversion holds up the loads behind it
    if low is None:
        S = tl.load(here, mask=inside, other=0.0, eviction_policy="evict_first")
    else:
        x = tl.load(low + n * low_row + j, mask=j < RANK, other=0.0)
    q += n * q_row + head * R * K
    Q = tl.load(q + kk, mask=in_k, other=0.0)
    Y = tl.load(k + n * k_row + head * K + kk, mask=in_k, other=0.0)
    W = tl.load(v + n * v_row + head * V + vv, mask=in_v, other=0.0)
    dtype = S.dtype
    if low is not None:
        logits = tl.sum(U.to(tl.float32) * x.to(tl.float32)[:, None], 0) + shift.to(tl.float32)
        S *= tl.exp((log_sigma(logits) / c).to(dtype))[:, None]  # (3)
    if gk is not None:
        S *= tl.exp(tl.load(gk + at * K + kk, mask=in_k, other=0.0).to(dtype))[:, None]
    if gv is not None:
        S *= tl.exp(tl.load(gv + at * V + vv, mask=in_v, other=0.0).to(dtype))[None, :]
    if g is not None:
        S *= tl.exp(tl.load(g + (at if PER_TOKEN else head)).to(dtype))
    S += feature(Y.to(dtype), MAP)[:, None] * W.to(dtype)[None, :]
    for r in tl.static_range(R):
        if r > 0:
            Q = tl.load(q + r * K + kk, mask=in_k, other=0.0)
        out = scale * tl.sum(S * feature(Q.to(dtype), MAP)[:, None], 0)
        tl.store(o + (at * R + r) * V + vv, out, mask=in_v)
    tl.store(here, S, mask=inside, cache_modifier=".cs")


class LowRank(NamedTuple):
    """gk of (3): l (N, rank), U (H K, rank), b (H K,) and c."""

    low: Tensor
    up: Tensor
    bias: Tensor
    normalizer: float


def in_place(name: str, state: Tensor) -> None:
    """Raise ValueError where a state is not contiguous."""
    if not state.is_contiguous():
        raise ValueError(
            f"{name} has the strides {state.stride()}; allowed: a contiguous state, "
            "because it is updated in place"
        )


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def rows_apart(x: Tensor) -> Tensor:
    """x (N, H, D), whose sequences may lie apart but not what one has."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def column_tile(programs: int, K: int, V: int) -> int:
    """Columns of V a program of (1) takes: a tile of TILE elements, halved while that leaves
    multiprocessors idle, but no fewer than the 8 columns of one memory sector.

    Of 64 sequences with 4 heads, K 128, 64 columns took 33.1 us, 32 30.4, 16 28.5 (4 warps).
    """
    width = min(max(8, TILE // triton.next_power_of_2(K)), triton.next_power_of_2(V))
    while width > 8 and programs * triton.cdiv(V, width) < PROGRAMS:
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
        low_rank: what gk is made of, (3), in its place; the launch before does not write the state.
        feature_map: of q and k, (2): "none", "relu" or "swish".

    Returns:
        o: (N, HQ, V) in v's dtype.

    Raises:
        ValueError: the state is not contiguous.
    Cost: the state read once and written once. Nothing waits for the device.
    """
    in_place("state", state)
    N, H, K, V = state.shape
    HQ = q.shape[1]
    o = torch.empty(N, HQ, V, dtype=v.dtype, device=v.device)
    width = column_tile(N * H, K, V)
    q, k, v = rows_apart(q), rows_apart(k), rows_apart(v)
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
