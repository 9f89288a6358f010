r"""The Triton kernel of `attention_packed` (attention.py), whose equation (8) is numbered there.

A program is one sequence, head and tile of BM queries. Its keys come in tiles of BN, with sums as
in (5) of triton_attention.py, of scores in units of log 2:

    z = q K^T log2(e) / sqrt(D)    m' = max(m, max z)    p = 2^(z - m')                    (1)
    l' = l 2^(m - m') + sum p    a' = a 2^(m - m') + p V    o = a / l                      (2)

Keys that all queries of the tile see need no mask; those that some see come last. p is rounded to
v's type, all else is fp32. Programs with the most keys begin first, so that none is waited for.

Floor, an H100: 4 D flops for each pair of a query and a key that it sees. 16 sequences of 2,000
tokens, 16 heads of 64: 131 GFLOP, 0.13 ms at 989 TFLOP/s, and as many exponentials (0.5 G, 16 a
clock and multiprocessor) take 0.14 ms that products hide in part. Predicted from torch's flash
attention, 0.630 ms or 206 TFLOP/s: 0.45. Measured 0.381 (340 TFLOP/s), tiles of 64 queries and 64
keys by 4 warps and 3 stages. Of all lengths it is the best or near: 128 queries by 8 warps take
0.373, but 1.410 of four sequences of 8,192 where these take 1.291; keys of 32 take 0.409, but 0.098
of 256 sequences of 128 where these take 0.114 (benchmarks/attention.py).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the parameters of a kernel have no Python types)

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from glactl.kernels.triton_attention import LOW
from glactl.kernels.triton_step import rows_apart


@triton.jit
def _tiles(
    a, l, m, Q, keys, values, start, end, i, apart_k, apart_v, scale,  # noqa: E741
    D: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(1) and (2) of the keys from start to end; masked, query row r sees those up to i_r."""
    j = tl.arange(0, D)
    for s in range(start, end, BN):
        row = s + tl.arange(0, BN)
        to_k, to_v = row[:, None] * apart_k + j[None, :], row[:, None] * apart_v + j[None, :]
        if MASKED:
            inside = (row < end)[:, None]
            K = tl.load(keys + to_k, mask=inside, other=0.0)
            V = tl.load(values + to_v, mask=inside, other=0.0)
        else:
            K, V = tl.load(keys + to_k), tl.load(values + to_v)
        z = tl.dot(Q, tl.trans(K), input_precision="ieee")
        if MASKED:
            z = tl.where(row[None, :] <= i[:, None], z, LOW)
        top = tl.maximum(m, tl.max(z, 1) * scale)
        p, less = tl.exp2(z * scale - top[:, None]), tl.exp2(m - top)  # (1), scaled as it is used
        l = l * less + tl.sum(p, 1)  # noqa: E741
        a = tl.dot(p.to(V.dtype), V, a * less[:, None], input_precision="ieee")  # (2)
        m = top
    return a, l, m


@triton.jit
def _packed(
    q, k, v, o, bounds, rows, scale, apart_q, apart_k, apart_v, tiles, HQ,
    R: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """(8) of BM queries of a head and sequence; R queries share a head of keys."""
    pid = tl.program_id(0)
    tile, h, n = tiles - 1 - pid % tiles, pid // tiles % HQ, pid // tiles // HQ
    at, first = tl.load(bounds + n).to(tl.int64), tl.load(rows + n).to(tl.int64)
    queries = (tl.load(bounds + n + 1) - at).to(tl.int32)
    held = (tl.load(rows + n + 1) - first).to(tl.int32)
    if tile * BM < queries:
        j, r = tl.arange(0, D), tile * BM + tl.arange(0, BM)
        inside = (r < queries)[:, None]
        to = (at + r)[:, None]
        Q = tl.load(q + to * apart_q + h * D + j[None, :], mask=inside, other=0.0)
        keys = k + first * apart_k + h // R * D
        values = v + first * apart_v + h // R * D
        i = held - queries + r
        most = held - queries + tl.minimum(tile * BM + BM, queries)
        all_see = (held - queries + tile * BM + 1) // BN * BN
        a, l = tl.zeros((BM, D), tl.float32), tl.zeros((BM,), tl.float32)  # noqa: E741
        m = tl.full((BM,), LOW, tl.float32)
        a, l, m = _tiles(  # noqa: E741
            a, l, m, Q, keys, values, 0, all_see, i, apart_k, apart_v, scale, D, BN, False
        )
        a, l, m = _tiles(  # noqa: E741
            a, l, m, Q, keys, values, all_see, most, i, apart_k, apart_v, scale, D, BN, True
        )
        y = (a / l[:, None]).to(o.dtype.element_ty)
        tl.store(o + (to * HQ + h) * D + j[None, :], y, mask=inside)


def _tile(D: int) -> tuple[int, int, int, int]:
    """Queries and keys of a tile, warps and stages."""
    return 64, 64, 4, 3


def attention_packed_triton(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, rows: Tensor, most: int
) -> Tensor:
    """`attention_packed` on a CUDA device; arguments and result are its."""
    M, HQ, D = q.shape
    q, k, v = rows_apart(q), rows_apart(k), rows_apart(v)
    o = torch.empty(M, HQ, D, dtype=q.dtype, device=q.device)
    BM, BN, warps, stages = _tile(D)
    tiles = triton.cdiv(most, BM)
    _packed[(tiles * HQ * (len(bounds) - 1),)](
        q, k, v, o, bounds, rows, D**-0.5 / math.log(2), q.stride(0), k.stride(0), v.stride(0),
        tiles, HQ, R=HQ // k.shape[1], D=D, BM=BM, BN=BN, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return o
