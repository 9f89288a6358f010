r"""Mamba's selective scan: a diagonal recurrence whose step and whose in- and outputs are data.

For a sequence and a channel c with a state of M entries n, from h_0 = 0 or a state handed in:

    d_t[c] = softplus(dt_t[c] + bias[c])                                                     (1)
    h_t[c,n] = exp(d_t[c] A[c,n]) h_{t-1}[c,n] + d_t[c] u_t[c] B_t[n]                        (2)
    y_t[c] = (sum_n C_t[n] h_t[c,n] + D[c] u_t[c]) silu(z_t[c])                              (3)

bias, D and z may be left out: 0, 0, and no factor silu(z). Backwards, with p_t the gradient of the
bracket of (3) and g_t that of h_t, which ends with that of the final state, g_{T+1}, taken whole:

    p_t = dy_t silu(z_t)          g_t = p_t C_t + exp(d_{t+1} A) g_{t+1}                     (4)
    w_t = g_t exp(d_t A) h_{t-1}          s_t[c] = sum_n g_t[c,n] B_t[n]                     (5)
    dB_t[n] = sum_c g_t d_t u_t           dC_t[n] = sum_c p_t h_t                            (6)
    du_t = d_t s_t + D p_t                dd_t = u_t s_t + sum_n A w_t                       (7)
    ddt_t = dd_t sigmoid(dt_t + bias)     dz_t = dy_t (bracket of (3)) silu'(z_t)            (8)
    dA = sum_t d_t w_t     dD = sum_t p_t u_t     dbias = sum_t ddt_t     dh_0 = exp(d_1 A) g_1 (9)

(1) and the gate of (3) are in the operator for the memory they would move on a GPU: d is fp32 where
dt is bf16, so (1) alone would write and read 8 bytes a channel and token, and the gate 4 more, to
the 8 bytes of u, dt, z and y.

`scan_reference` is the definition and `scan_step` one token of it; `scan_chunked` and the Triton
kernels compute the same with h kept once in some rows. As a call of `gla`, (2) has a head for every
channel, K = M, V = 1, q = C, k = B, v = d u and gk = d A: that is an oracle, not an engine.

Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023,
arXiv:2312.00752, Sec. 3; B is taken times d, as in the released code, not by the exact integral.
Shapes: B batch, T time, D channels, M entries of a channel's state, N sequences.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from glactl.kernels.backend import PROVEN, full_precision, pick_backend
from glactl.kernels.checks import (
    check_bounds,
    check_initial,
    check_state,
    check_tensors,
    state_dtype,
)
from glactl.kernels.scan_chunked import scan_chunked

Output = tuple[Tensor, Tensor | None]
TRITON_WIDEST_STATE = 32
LINEAR = 40.0  # above it softplus x is x: the difference is e^-40, less than fp64 shows


def scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, *,
    z: Tensor | None = None, dt_bias: Tensor | None = None, initial_state: Tensor | None = None,
    output_final_state: bool = False, cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Output:  # fmt: skip
    """Selective scan over whole sequences, differentiable in every tensor.

    Args:
        u: inputs, (B, T, D).
        dt: steps before the softplus and without the bias, (B, T, D).
        A: rates, (D, M), finite and at most 0: a state keeps exp(d A) of itself, in [0, 1].
        B: weights of the write, (B, T, M).
        C: weights of the read, (B, T, M).
        D: weights of the input in the output, (D,); 0 if None.
        z: gates, (B, T, D), whose silu multiplies the output; 1 if None.
        dt_bias: added to dt, (D,); 0 if None.
        initial_state: h_0, (N, D, M); zero if None.
        output_final_state: whether to return h_T.
        cu_seqlens: (N + 1,) int32 or int64 on u's device, from 0 to T: sequence n is the rows
            cu_seqlens[n] to cu_seqlens[n + 1], which may be none. B is then 1, N otherwise B.
        backend: see `pick_backend`. "triton" has kernels for fp32, bf16 and fp16 with M at most
            32; all else runs chunked.

    Returns:
        y: (B, T, D) in u's dtype, and the final state (N, D, M), fp32 or, where u, dt, B or C is
        fp64, fp64; None if not wanted.

    Raises:
        ValueError: shapes, types or devices do not fit, a rate above 0 or -inf, or bounds that do
            not go up from 0 to T (the last two are checked on the CPU only).

    Sums are fp32 (fp64) whatever the inputs and whatever autocast says. Gradients are of first
    order. "chunked" with cu_seqlens on a GPU reads them on the host, and waits for the device.
    Source: arXiv:2312.00752; `scan_reference` in this file is the definition.
    Cost: O(B T D M) time; for the backward, the state of every 16th row (fp32: every 8th).
    """
    N = _check(u, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens)
    picked = pick_backend(u.device, backend)
    if picked == "reference":
        return scan_reference(
            u, dt, A, B, C, D, z=z, dt_bias=dt_bias, initial_state=initial_state,
            output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    fits = state_dtype(u, dt, B, C) == torch.float32 and A.shape[1] <= TRITON_WIDEST_STATE
    wanted = backend is not None or "scan" in PROVEN
    if picked == "triton" and wanted and fits and u.numel() > 0 and A.numel() > 0:
        from glactl.kernels.triton_scan_op import scan_triton

        return scan_triton(
            u, dt, A, B, C, D, z, dt_bias, initial_state=initial_state,
            output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    return _chunked(u, dt, A, B, C, D, z, dt_bias, initial_state, output_final_state, N, cu_seqlens)


@full_precision
def _chunked(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    bias: Tensor | None, state: Tensor | None, want_final: bool, N: int, cu: Tensor | None,
) -> Output:  # fmt: skip
    dtype = state_dtype(u, dt, B, C)
    d = _step(dt, bias, dtype)
    y, final = scan_chunked(u, d, A, B, C, state, N, cu, dtype)  # (2)
    return _read(y, u, D, z), final if want_final else None


def _step(dt: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """d of (1)."""
    x = dt.to(dtype)
    return F.softplus(x if bias is None else x + bias.to(dtype), threshold=LINEAR)  # (1)


def _read(y: Tensor, u: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """(3) of the sums over n."""
    if D is not None:
        y = y + D.to(y.dtype) * u.to(y.dtype)
    return (y if z is None else y * F.silu(z.to(y.dtype))).to(u.dtype)  # (3)


@full_precision
def scan_reference(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, *,
    z: Tensor | None = None, dt_bias: Tensor | None = None, initial_state: Tensor | None = None,
    output_final_state: bool = False, cu_seqlens: Tensor | None = None,
) -> Output:  # fmt: skip
    """Equations (1) to (3), token after token; arguments and results as of `scan`.

    Cost: T steps of O(B D M), and as much memory a step where gradients are wanted.
    """
    N = _check(u, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens)
    dtype = state_dtype(u, dt, B, C)
    d, x = _step(dt, dt_bias, dtype), u.to(dtype)
    h_0 = u.new_zeros(N, *A.shape, dtype=dtype) if initial_state is None else initial_state
    rows = [(0, u.shape[1])] if cu_seqlens is None else list(pairwise(cu_seqlens.tolist()))
    states = h_0.to(dtype)[None] if cu_seqlens is None else h_0.to(dtype)[:, None]
    A, b, c = (x.to(dtype) for x in (A, B, C))
    y, finals = [x[:, :0]], []
    for (start, stop), h in zip(rows, states, strict=True):
        for t in range(start, stop):
            write = (d[:, t] * x[:, t])[..., None] * b[:, t, None]
            h = (d[:, t, :, None] * A).exp() * h + write  # (2)
            y.append((h * c[:, t, None]).sum(-1)[:, None])
        finals.append(h)
    return _read(torch.cat(y, 1), u, D, z), torch.cat(finals) if output_final_state else None


@full_precision
@torch.no_grad()
def scan_step(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor,
    D: Tensor | None = None, *, z: Tensor | None = None, dt_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One token of each of N sequences: equations (1) to (3) without gradients.

    Args:
        u: inputs, (N, D).
        dt: steps before the softplus and without the bias, (N, D).
        A: rates, (D, M), finite and at most 0.
        B: weights of the write, (N, M).
        C: weights of the read, (N, M).
        state: h, (N, D, M), fp32, or fp64 where u, dt, B or C is; updated in place.
        D: weights of the input in the output, (D,); 0 if None.
        z: gates, (N, D); no factor if None.
        dt_bias: added to dt, (D,); 0 if None.

    Returns:
        y: (N, D) in u's dtype.

    Raises:
        ValueError: as `scan`; the state is then as it was.
    Cost: O(N D M), the state read three times and written twice.
    """
    check_tensors([
        ("u", u, "N D"), ("dt", dt, "N D"), ("A", A, "D M"), ("B", B, "N M"), ("C", C, "N M"),
        ("D", D, "D"), ("z", z, "N D"), ("dt_bias", dt_bias, "D"), ("state", state, "N D M"),
    ])  # fmt: skip
    _check_rates(A)
    dtype = state_dtype(u, dt, B, C)
    check_state("state", state, dtype)
    d = _step(dt, dt_bias, dtype)
    state.mul_((d[..., None] * A.to(dtype)).exp_())
    state.addcmul_((d * u.to(dtype))[..., None], B.to(dtype)[:, None])  # (2)
    return _read((state @ C.to(dtype)[..., None]).squeeze(-1), u, D, z)


def _check_rates(A: Tensor) -> None:
    if A.device.type != "cpu" or not A.numel():
        return
    top, low = A.max().item(), A.min().item()
    if top > 0 or low == -torch.inf:
        wrong = top if top > 0 else low
        raise ValueError(f"A has a value of {wrong:.6g}; allowed: finite rates of at most 0")


def _check(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> int:  # fmt: skip
    """The number of sequences."""
    sizes = check_tensors([
        ("u", u, "B T D"), ("dt", dt, "B T D"), ("A", A, "D M"), ("B", B, "B T M"),
        ("C", C, "B T M"), ("D", D, "D"), ("z", z, "B T D"), ("dt_bias", dt_bias, "D"),
    ])  # fmt: skip
    _check_rates(A)
    N = check_bounds(cu_seqlens, sizes["B"], sizes["T"], u.device, "u")
    check_initial("initial_state", initial_state, (N, *A.shape), u.device, "u")
    return N
