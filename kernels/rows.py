r"""A product of a few rows with a matrix, with what stands before and behind it, for decoding.

For each of N rows x (K), a matrix W (R, K) and groups of K / groups neighbouring entries:

    s = x or silu(x)                                                                         (1)
    n = w s / sqrt(mean(s^2) + eps) group by group, or s where there is no norm              (2)
    p = n silu(z), or n where there is no gate z                                             (3)
    y = W p, or silu(W_1 p) * (W_2 p) of the halves W = (W_1; W_2) of a pair                 (4)
    result: y + r, or y where there is no residual r                                         (5)

A step of one token reads every weight once, and at batch 1 nothing else counts but how many
launches stand in between: as one launch, (1) to (5) are what a block of a language model is made of
round its mixer.

`product_rows_reference` is the definition; the Triton kernels of triton_rows.py compute it without
rounding between its parts. `gla_step_rows` and `gsa_step_rows` are the mixers' steps with the gate
and the feature maps before them,

    gk = log sigma(U l + b) / c        g = log sigma(a) / c                                  (6)

`greedy_rows` ends a greedy step: y of (4) are the logits, rounded to their type, and of every row
the token with the largest one is put where the next step begins, with its embedding E_j:

    j = the first of the largest y; a NaN is the largest                                     (7)
    token = made_slot = j   h = scale E_j   slot = slot + 1   position = position + 1        (8)
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from glactl.kernels.backend import launches
from glactl.kernels.gla import gla_step
from glactl.kernels.gsa import gsa_step

FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "swish": F.silu,
}


def product_rows(
    x: Tensor, weight: Tensor, *, norm: Tensor | None = None, eps: float = 0.0, groups: int = 1,
    gate: Tensor | None = None, swish: bool = False, pair: bool = False,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """(1) to (5) without gradients.

    Args:
        x: (N, K); rows may lie apart, entries may not, as in gate and residual.
        weight: W, (R, K), contiguous, in x's dtype.
        norm: w of (2), (K / groups,), shared by the groups; None: no norm.
        eps: of (2).
        groups: a divisor of K.
        gate: z of (3), (N, K).
        swish: whether s is silu(x).
        pair: whether W is a pair, R even.
        residual: r of (5), (N, R) or, of a pair, (N, R / 2); it is used up: the result may be in
            its place.

    Returns:
        (N, R), or (N, R / 2) of a pair, in x's dtype; sums are fp32.

    Cost: on a CUDA device one launch for one row, at most three for more; else as plain torch.
    """
    if launches(x):
        from glactl.kernels.triton_rows import product_rows_triton

        return product_rows_triton(x, weight, norm, eps, groups, gate, swish, pair, residual)
    return product_rows_reference(
        x, weight, norm=norm, eps=eps, groups=groups, gate=gate, swish=swish, pair=pair,
        residual=residual,
    )  # fmt: skip


@torch.no_grad()
def product_rows_reference(
    x: Tensor, weight: Tensor, *, norm: Tensor | None = None, eps: float = 0.0, groups: int = 1,
    gate: Tensor | None = None, swish: bool = False, pair: bool = False,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """(1) to (5) in fp32, or in fp64 where x is; arguments and result as of `product_rows`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    p = F.silu(x.to(wide)) if swish else x.to(wide)  # (1)
    if norm is not None:
        parts = p.unflatten(1, (groups, -1))
        parts = norm.to(wide) * parts * (parts.square().mean(-1, keepdim=True) + eps).rsqrt()
        p = parts.flatten(1)  # (2)
    if gate is not None:
        p = p * F.silu(gate.to(wide))  # (3)
    y = p @ weight.to(wide).T
    if pair:
        first, second = y.chunk(2, 1)
        y = F.silu(first) * second  # (4)
    return (y if residual is None else y + residual.to(wide)).to(x.dtype)  # (5)


@torch.no_grad()
def gla_step_rows(
    q: Tensor, k: Tensor, v: Tensor, low: Tensor, up: Tensor, bias: Tensor, state: Tensor, *,
    normalizer: float, feature_map: str = "none",
) -> Tensor:  # fmt: skip
    """`gla_step` with gk of (6).

    Args:
        q, k, v: (N, HQ, K), (N, H, K), (N, H, V); sequences may lie apart.
        low, up, bias: l (N, rank), U (H K, rank), b (H K,).
        state: (N, H, K, V), fp32 or fp64, contiguous; updated in place. The launch just before
            must not write it.
        normalizer: c.
        feature_map: of q and k, "none", "relu" or "swish".

    Returns:
        o: (N, HQ, V) in v's dtype.

    Cost: on a CUDA device one launch.
    """
    if launches(q):
        from glactl.kernels.triton_step import LowRank, gla_step_triton

        gate = LowRank(low, up, bias, normalizer)
        return gla_step_triton(q, k, v, state, low_rank=gate, feature_map=feature_map)
    f, wide = FEATURES[feature_map], torch.promote_types(low.dtype, torch.float32)
    logits = low.to(wide) @ up.to(wide).T + bias.to(wide)
    gk = (F.logsigmoid(logits) / normalizer).unflatten(1, k.shape[1:])  # (6)
    return gla_step(f(q), f(k), v, state, gk=gk)


@torch.no_grad()
def gsa_step_rows(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, state: tuple[Tensor, Tensor], *,
    normalizer: float, feature_map: str = "none",
) -> Tensor:  # fmt: skip
    """`gsa_step` with g of (6), writes 1 - exp(g) and logits as they are.

    Args:
        q, k, v, a: (N, HQ, K), (N, H, K), (N, H, V), (N, H, M); sequences may lie apart.
        state: (N, H, K, M) and (N, H, M, V), fp32 or fp64, contiguous; updated in place.
        normalizer: c.
        feature_map: of q, k and v, "none", "relu" or "swish".

    Returns:
        o: (N, HQ, V) in v's dtype.

    Cost: on a CUDA device one launch, or two where heads are few.
    """
    if launches(a):
        from glactl.kernels.triton_step_gsa import gsa_step_triton

        return gsa_step_triton(
            q, k, v, None, a, state, normalizer=normalizer, feature_map=feature_map
        )
    f, wide = FEATURES[feature_map], torch.promote_types(a.dtype, torch.float32)
    g = F.logsigmoid(a.to(wide)) / normalizer  # (6)
    return gsa_step(f(q), f(k), f(v), None, g, state)


class Next(NamedTuple):
    """What (8) writes: token (N,), made (N, places), slot and position (N,) int64, and h (N, d);
    all contiguous, slot in [0, places)."""

    token: Tensor
    made: Tensor
    slot: Tensor
    position: Tensor
    h: Tensor


@torch.no_grad()
def greedy_rows(
    x: Tensor, weight: Tensor, *, norm: Tensor, eps: float, embedding: Tensor, scale: float,
    into: Next,
) -> None:  # fmt: skip
    """(7) and (8) for the norms of N rows, in place.

    Args:
        x: (N, K), contiguous; it may be h of `into`.
        weight: W, (R, K), R at most 2^31 - 1, contiguous, in x's dtype; its rows are the tokens
            that may be taken.
        norm: w of (2), (K,).
        eps: of (2).
        embedding: E, (R or more, K), contiguous.
        scale: of (8).
        into: what is written.

    Cost: on a CUDA device two launches for one row, three for more; else as plain torch.
    """
    if launches(x):
        from glactl.kernels.triton_rows import greedy_rows_triton

        greedy_rows_triton(x, weight, norm, eps, embedding, scale, into)
        return
    y = product_rows_reference(x, weight, norm=norm, eps=eps)
    torch.argmax(y, 1, out=into.token)  # (7)
    into.made.scatter_(1, into.slot[:, None], into.token[:, None])
    into.h.copy_(scale * embedding[into.token])
    into.slot.add_(1)
    into.position.add_(1)  # (8)
