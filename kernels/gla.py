r"""Gated linear attention: the recurrence behind every linear mixer, with one of three gates.

For one head, with the state S_t (K, V), from S_0 = 0 or a state handed in:

    S_t = diag(exp gk_t) S_{t-1} diag(exp gv_t) + k_t v_t^T                                  (1)
    o_t = scale * S_t^T q_t                                                                  (2)

A scalar decay g_t is (1) with every entry of gk_t equal to g_t. A token is read undecayed: the
state decays, the token is written, and then it is read.

`gla_reference` is the definition and `gla_step` one token of it; `chunked` and the Triton kernels
compute the same over chunks.

Source: Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training",
ICML 2024, arXiv:2312.06635v6: Eq. 3 (gk), App. C (gv).
Shapes: B batch, T time, H heads of keys, HQ of queries, K key width, V value width, N sequences.
"""

from collections.abc import Callable
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
    one_gate,
    state_dtype,
)
from glactl.kernels.chunked import chunked

Output = tuple[Tensor, Tensor | None]
TRITON_WIDEST_KEY = 512


def gla(
    q: Tensor, k: Tensor, v: Tensor, *, gk: Tensor | None = None, gv: Tensor | None = None,
    g: Tensor | None = None, scale: float | None = None, initial_state: Tensor | None = None,
    output_final_state: bool = False, cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Output:  # fmt: skip
    """Gated linear attention over whole sequences, differentiable in every tensor.

    Args:
        q: queries, (B, T, HQ, K); query head j reads the state j // (HQ / H).
        k: keys, (B, T, H, K); H divides HQ.
        v: values, (B, T, H, V).
        gk: log gates of the key axis, (B, T, H, K).
        gv: log gates of the value axis, (B, T, H, V).
        g: log decay of the whole state, (B, T, H), or (H,) for one that does not change.
            At most one of the three; natural logs in [-inf, 0], 0 keeps all and -inf nothing.
        scale: factor on the read-out; K**-0.5 if None.
        initial_state: S_0, (N, H, K, V); zero if None.
        output_final_state: whether to return S_T.
        cu_seqlens: (N + 1,) int32 or int64 on q's device, from 0 to T: sequence n is the rows
            cu_seqlens[n] to cu_seqlens[n + 1], which may be none. B is then 1, N otherwise B.
        backend: see `pick_backend`. "triton" has kernels for gk, g and no gate in fp32, bf16 and
            fp16 with K at most 512; all else runs chunked.

    Returns:
        o: (B, T, HQ, V) in v's dtype, and the final state (N, H, K, V), fp32 or, where q, k or v
        is fp64, fp64; None if not wanted.

    Raises:
        ValueError: shapes, types or devices do not fit, two gates, a gate above 0, or bounds that
            do not go up from 0 to T (the last two are checked on the CPU only).

    Sums are fp32 (fp64) whatever the inputs and whatever autocast says. Gradients are of first
    order. "chunked" with cu_seqlens on a GPU reads them on the host, and waits for the device.
    Source: arXiv:2312.06635v6; `gla_reference` in this file is the definition.
    Cost: O(B T H (32 (K + V) + K V)) time, linear in T; for the backward, the state of every 32nd
    row (chunked) or 128th (triton).
    """
    gate, N = _check(q, k, v, gk, gv, g, initial_state, cu_seqlens)
    picked = pick_backend(q.device, backend)
    if picked == "reference":
        return gla_reference(
            q, k, v, gk=gk, gv=gv, g=g, scale=scale, initial_state=initial_state,
            output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    scale = q.shape[3] ** -0.5 if scale is None else scale
    engine = _triton(gate, q, k, v, backend is not None) if picked == "triton" else None
    if engine is not None:
        return engine(
            q, k, v, gk if gate == "gk" else g, scale=scale, initial_state=initial_state,
            output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    if g is not None:
        g = g.expand(k.shape[:3])
    given = next((x for x in (gk, gv, g) if x is not None), None)
    o, final = chunked(q, k, v, gate, given, scale, initial_state, N, cu_seqlens)
    return o, final if output_final_state else None


def _triton(
    gate: str | None, q: Tensor, k: Tensor, v: Tensor, asked: bool
) -> Callable[..., Output] | None:
    """The Triton engine for these inputs, or None where there is none; imported when first used."""
    fits = state_dtype(q, k, v) == torch.float32 and q.shape[0] * q.shape[1] > 0
    if gate == "gv" or not fits or q.shape[3] > TRITON_WIDEST_KEY:
        return None
    if not (asked or (gate in PROVEN and proven_width("gla", q, k, v))):
        return None
    if gate == "gk":
        from glactl.kernels.triton_gla_op import gla_key

        return gla_key
    from glactl.kernels.triton_scalar_op import gla_scalar

    return gla_scalar


@full_precision
def gla_reference(
    q: Tensor, k: Tensor, v: Tensor, *, gk: Tensor | None = None, gv: Tensor | None = None,
    g: Tensor | None = None, scale: float | None = None, initial_state: Tensor | None = None,
    output_final_state: bool = False, cu_seqlens: Tensor | None = None,
) -> Output:  # fmt: skip
    """Equations (1) and (2), token after token; arguments and results as of `gla`.

    Cost: T steps of O(B H K V), and as much memory a step where gradients are wanted.
    """
    _, N = _check(q, k, v, gk, gv, g, initial_state, cu_seqlens)
    dtype = state_dtype(q, k, v)
    H, K, V = *k.shape[2:], v.shape[3]
    scale = K**-0.5 if scale is None else scale
    decay = _decay(gk, gv, None if g is None else g.expand(k.shape[:3]), dtype)
    S_0 = q.new_zeros(N, H, K, V, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    rows = [(0, q.shape[1])] if cu_seqlens is None else list(pairwise(cu_seqlens.tolist()))
    states = S_0[None] if cu_seqlens is None else S_0[:, None]
    x, y, z = (x.to(dtype) for x in (q, k, v))
    o, finals = [v.new_zeros(len(q), 0, q.shape[2], V, dtype=dtype)], []
    for (start, stop), S in zip(rows, states, strict=True):
        for t in range(start, stop):
            if decay is not None:
                S = decay[:, t] * S
            S = S + y[:, t, :, :, None] * z[:, t, :, None, :]  # (1)
            o.append(scale * (x[:, t].unflatten(1, (H, -1)) @ S).flatten(1, 2)[:, None])  # (2)
        finals.append(S)
    final = torch.cat(finals) if output_final_state else None
    return torch.cat(o, 1).to(v.dtype), final


@full_precision
@torch.no_grad()
def gla_step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, *, gk: Tensor | None = None,
    gv: Tensor | None = None, g: Tensor | None = None, scale: float | None = None,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """One token of each of N sequences: equations (1) and (2) without gradients.

    Args:
        q: queries, (N, HQ, K).
        k: keys, (N, H, K).
        v: values, (N, H, V).
        state: S, (N, H, K, V), fp32, or fp64 where q, k or v is; updated in place.
        gk: log gates of the key axis, (N, H, K).
        gv: log gates of the value axis, (N, H, V).
        g: log decay, (N, H) or (H,). At most one of the three, in [-inf, 0].
        scale: factor on the read-out; K**-0.5 if None.
        backend: "triton" for one launch on a CUDA device; see `pick_backend`.

    Returns:
        o: (N, HQ, V) in v's dtype.

    Raises:
        ValueError: as `gla`; the state is then as it was.
    Cost: O(N H K V), the state read twice and written twice.
    """
    check_tensors([
        ("q", q, "N HQ K"), ("k", k, "N H K"), ("v", v, "N H V"), ("gk", gk, "N H K"),
        ("gv", gv, "N H V"), ("g", g, "H" if g is not None and g.dim() == 1 else "N H"),
        ("state", state, "N H K V"),
    ])  # fmt: skip
    one_gate(gk=gk, gv=gv, g=g)
    check_gates(gk=gk, gv=gv, g=g)
    dtype = state_dtype(q, k, v)
    check_state("state", state, dtype)
    if pick_backend(q.device, backend) == "triton" and (backend or "step" in PROVEN):
        from glactl.kernels.triton_step import gla_step_triton

        return gla_step_triton(q, k, v, state, gk=gk, gv=gv, g=g, scale=scale)
    decay = _decay(gk, gv, g, dtype)
    if decay is not None:
        state.mul_(decay)
    state.addcmul_(k.to(dtype)[..., None], v.to(dtype)[..., None, :])  # (1)
    o = q.to(dtype).unflatten(1, (k.shape[1], -1)) @ state
    return o.flatten(1, 2).mul_(q.shape[2] ** -0.5 if scale is None else scale).to(v.dtype)  # (2)


def _decay(
    gk: Tensor | None, gv: Tensor | None, g: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """The factor of S_{t-1} in (1), with axes for K and V; None without a gate."""
    if gk is not None:
        return gk.to(dtype).exp()[..., :, None]
    if gv is not None:
        return gv.to(dtype).exp()[..., None, :]
    return None if g is None else g.to(dtype).exp()[..., None, None]


def _check(
    q: Tensor, k: Tensor, v: Tensor, gk: Tensor | None, gv: Tensor | None, g: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[str | None, int]:  # fmt: skip
    """The name of the gate and the number of sequences."""
    sizes = check_tensors([
        ("q", q, "B T HQ K"), ("k", k, "B T H K"), ("v", v, "B T H V"), ("gk", gk, "B T H K"),
        ("gv", gv, "B T H V"), ("g", g, "H" if g is not None and g.dim() == 1 else "B T H"),
    ])  # fmt: skip
    gate = one_gate(gk=gk, gv=gv, g=g)
    check_gates(gk=gk, gv=gv, g=g)
    N = check_bounds(cu_seqlens, sizes["B"], sizes["T"], q.device)
    check_initial("initial_state", initial_state, (N, *k.shape[2:], v.shape[3]), q.device)
    return gate, N
