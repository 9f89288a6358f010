r"""Gated slot attention (GSA): softmax attention over a fixed number of slots that forget.

For one head with M slots, with states Sk_t (K, M) and Sv_t (M, V), from 0 or states handed in:

    Sk_t = Sk_{t-1} diag(exp g_t) + k_t s_t^T                                                (1)
    Sv_t = diag(exp g_t) Sv_{t-1} + s_t v_t^T                                                (2)
    z_t = scale * Sk_t^T q_t        p_t = softmax(z_t)                                       (3)
    o_t = Sv_t^T p_t                                                                         (4)

where s_t = 1 - exp g_t unless given. (1) with (3) is linear attention of q, k and s with a gate on
the value axis, (2) with (4) that of p, s and v with a gate on the key axis, and so `gsa` runs.

Source: Zhang et al., "Gated Slot Attention for Efficient Linear-Time Sequence Modeling", NeurIPS
2024, arXiv:2409.07146: Eq. 6, and Eq. 7 for the two passes (which prints the gated axes the other
way round than its Listing 1; Eq. 6 decides). ABC (arXiv:2110.02488) is the case g = None.
Shapes: B batch, T time, H heads of keys, HQ of queries, K key width, V value width, M slots.
"""

from itertools import pairwise

import torch
from torch import Tensor

from glactl.kernels.backend import PROVEN, full_precision, pick_backend, proven_width
from glactl.kernels.checks import (
    check_bounds,
    check_gates,
    check_initial,
    check_state,
    check_tensors,
    operand_dtype,
    state_dtype,
)
from glactl.kernels.chunked import chunked

States = tuple[Tensor, Tensor]
Output = tuple[Tensor, States | None]


def gsa(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor | None, g: Tensor | None, *, scale: float = 1.0,
    initial_state: States | None = None, output_final_state: bool = False,
    cu_seqlens: Tensor | None = None, backend: str | None = None,
) -> Output:  # fmt: skip
    """Gated slot attention over whole sequences, differentiable in every tensor.

    Args:
        q: queries, (B, T, HQ, K); query head j reads the slots of head j // (HQ / H).
        k: keys, (B, T, H, K); H divides HQ.
        v: values, (B, T, H, V).
        s: write strengths, (B, T, H, M); 1 - exp(g) if None.
        g: log gates of the slots, (B, T, H, M), natural logs in [-inf, 0]; no decay if None, and
            s is then needed.
        scale: factor on the logits of the softmax; 1 as in the source.
        initial_state: (Sk, Sv), (N, H, K, M) and (N, H, M, V); zero if None.
        output_final_state: whether to return the states behind the last token.
        cu_seqlens: (N + 1,) bounds of packed sequences, as of `gla`.
        backend: see `pick_backend`. "triton" has kernels for fp32, bf16 and fp16 with up to 128
            slots, 256 in bf16; all else runs chunked.

    Returns:
        o: (B, T, HQ, V) in v's dtype, and the final (Sk, Sv), fp32 or, where q, k or v is fp64,
        fp64; None if not wanted.

    Raises:
        ValueError: shapes, types or devices do not fit, neither s nor g, a gate above 0, or bounds
            that do not go up from 0 to T (the last two are checked on the CPU only).

    Logits and softmax are fp32 (fp64) whatever the inputs and whatever autocast says.
    Source: arXiv:2409.07146; `gsa_reference` in this file is the definition.
    Cost: two calls of linear attention, O(B T H (32 (K + V + 2 M) + M (K + V))) time.
    """
    N = _check(q, k, v, s, g, initial_state, cu_seqlens)
    picked = pick_backend(q.device, backend)
    if picked == "triton" and _fits_triton(q, k, v, g if s is None else s, backend is not None):
        from glactl.kernels.triton_gsa_op import gsa_fused

        return gsa_fused(
            q, k, v, s, g, scale=scale, initial_state=initial_state,
            output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    if picked == "reference":
        return gsa_reference(
            q, k, v, s, g, scale=scale, initial_state=initial_state,
            output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    s = _strength(s, g, state_dtype(q, k, v))
    Sk, Sv = initial_state or (None, None)
    z, Sk = chunked(q, k, s, "gv" if g is not None else None, g, scale, Sk, N, cu_seqlens)  # (1, 3)
    p = z.softmax(-1)
    o, Sv = chunked(p, s, v, "gk" if g is not None else None, g, 1.0, Sv, N, cu_seqlens)  # (2, 4)
    return o, (Sk, Sv) if output_final_state else None


def _fits_triton(q: Tensor, k: Tensor, v: Tensor, slots: Tensor | None, asked: bool) -> bool:
    """Whether the Triton engine takes these inputs."""
    if slots is None or not (asked or ("gsa" in PROVEN and proven_width("gsa", q, k, v))):
        return False
    from glactl.kernels.triton_gsa import MOST_SLOTS

    most = MOST_SLOTS[operand_dtype(q, k, v)]
    rows = q.shape[0] * q.shape[1]
    return state_dtype(q, k, v) == torch.float32 and rows > 0 and slots.shape[3] <= most


@full_precision
def gsa_reference(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor | None, g: Tensor | None, *, scale: float = 1.0,
    initial_state: States | None = None, output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Output:  # fmt: skip
    """Equations (1) to (4), token after token; arguments and results as of `gsa`.

    Cost: T steps of O(B H M (K + V)), and as much memory a step where gradients are wanted.
    """
    N = _check(q, k, v, s, g, initial_state, cu_seqlens)
    dtype = state_dtype(q, k, v)
    H, K, V = *k.shape[2:], v.shape[3]
    w = _strength(s, g, dtype)
    M = w.shape[3]
    a = torch.ones_like(w) if g is None else g.to(dtype).exp()
    Sks, Svs = initial_state or (q.new_zeros(N, H, K, M), q.new_zeros(N, H, M, V))
    rows = [(0, q.shape[1])] if cu_seqlens is None else list(pairwise(cu_seqlens.tolist()))
    Sks, Svs = (
        x.to(dtype)[None] if cu_seqlens is None else x.to(dtype)[:, None] for x in (Sks, Svs)
    )
    q, k, z = q.to(dtype), k.to(dtype), v.to(dtype)
    o, finals = [v.new_zeros(len(q), 0, q.shape[2], V, dtype=dtype)], []
    for (start, stop), Sk, Sv in zip(rows, Sks, Svs, strict=True):
        for t in range(start, stop):
            Sk = Sk * a[:, t, :, None, :] + k[:, t, :, :, None] * w[:, t, :, None, :]  # (1)
            Sv = a[:, t, :, :, None] * Sv + w[:, t, :, :, None] * z[:, t, :, None, :]  # (2)
            p = (scale * (q[:, t].unflatten(1, (H, -1)) @ Sk)).softmax(-1)  # (3)
            o.append((p @ Sv).flatten(1, 2)[:, None])  # (4)
        finals.append((Sk, Sv))
    final = tuple(torch.cat(x) for x in zip(*finals, strict=True)) if output_final_state else None
    return torch.cat(o, 1).to(v.dtype), final  # type: ignore[return-value]


@full_precision
@torch.no_grad()
def gsa_step(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor | None, g: Tensor | None, state: States, *,
    scale: float = 1.0, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """One token of each of N sequences: equations (1) to (4) without gradients.

    Args:
        q: queries, (N, HQ, K).
        k: keys, (N, H, K).
        v: values, (N, H, V).
        s: write strengths, (N, H, M); 1 - exp(g) if None.
        g: log gates, (N, H, M), in [-inf, 0]; no decay if None, and s is then needed.
        state: (Sk, Sv), (N, H, K, M) and (N, H, M, V), fp32, or fp64 where q, k or v is; updated
            in place.
        scale: factor on the logits of the softmax.
        backend: "triton" for one launch on a CUDA device; see `pick_backend`.

    Returns:
        o: (N, HQ, V) in v's dtype.

    Raises:
        ValueError: as `gsa`; the states are then as they were.
    Cost: O(N H M (K + V)).
    """
    Sk, Sv = state
    check_tensors([
        ("q", q, "N HQ K"), ("k", k, "N H K"), ("v", v, "N H V"), ("s", s, "N H M"),
        ("g", g, "N H M"), ("state[0]", Sk, "N H K M"), ("state[1]", Sv, "N H M V"),
    ])  # fmt: skip
    check_gates(g=g)
    dtype = state_dtype(q, k, v)
    check_state("state[0]", Sk, dtype)
    check_state("state[1]", Sv, dtype)
    if s is None and g is None:
        raise ValueError("s and g are None; allowed: at least one of them given")
    if pick_backend(q.device, backend) == "triton" and (backend or "gsa step" in PROVEN):
        from glactl.kernels.triton_step_gsa import gsa_step_triton

        return gsa_step_triton(q, k, v, s, g, state, scale=scale)
    w = _strength(s, g, dtype)
    if g is not None:
        a = g.to(dtype).exp()
        Sk.mul_(a[..., None, :])
        Sv.mul_(a[..., :, None])
    Sk.addcmul_(k.to(dtype)[..., :, None], w[..., None, :])  # (1)
    Sv.addcmul_(w[..., :, None], v.to(dtype)[..., None, :])  # (2)
    z = q.to(dtype).unflatten(1, (k.shape[1], -1)) @ Sk
    return (z.mul_(scale).softmax(-1) @ Sv).flatten(1, 2).to(v.dtype)  # (3), (4)


def _strength(s: Tensor | None, g: Tensor | None, dtype: torch.dtype) -> Tensor:
    """s, or 1 - exp g, without the digits that the difference would lose where g is near 0."""
    if s is not None:
        return s.to(dtype)
    if g is None:
        raise ValueError("s and g are None; allowed: at least one of them given")
    return -g.to(dtype).expm1()


def _check(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor | None, g: Tensor | None, state: States | None,
    cu_seqlens: Tensor | None,
) -> int:  # fmt: skip
    """The number of sequences."""
    sizes = check_tensors([
        ("q", q, "B T HQ K"), ("k", k, "B T H K"), ("v", v, "B T H V"), ("s", s, "B T H M"),
        ("g", g, "B T H M"),
    ])  # fmt: skip
    if s is None and g is None:
        raise ValueError("s and g are None; allowed: at least one of them given")
    check_gates(g=g)
    N = check_bounds(cu_seqlens, sizes["B"], sizes["T"], q.device)
    H, K, V, M = (sizes[a] for a in "HKVM")
    for name, x, size in zip(
        ("initial_state[0]", "initial_state[1]"), state or (None, None),
        ((N, H, K, M), (N, H, M, V)), strict=True,
    ):  # fmt: skip
        check_initial(name, x, size, q.device)
    return N
