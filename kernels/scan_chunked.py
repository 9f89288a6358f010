r"""The selective scan on the CPU and on any other device: element-wise work over chunks of C rows.

Equations (2) and (4) to (7) of scan.py, with d given. A chunk has its decays exp(d A), its states
and their gradients in memory, (C, sequences, D, M) each; the recurrences

    h_t = a_t h_{t-1} + x_t          g_t = p_t C_t + a_{t+1} g_{t+1}

are then one operation a row, and all else is one operation a chunk or a product of matrices. The
forward pass keeps the state before each chunk, the backward pass makes those within it again.

Cost: O(B T D M) time in 2 T / C + T operations each way; memory 3 C + T / C states.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from glactl.kernels.backend import full_precision
from glactl.kernels.layout import Chunks

# Of a chunk. With 8, 16, 32 and 64 rows, both passes over 128 channels of 16 entries took 121, 111,
# 103 and 91 ms for 8 sequences of 512 tokens, 71, 90, 100 and 152 for 64 of 64, on two busy cores.
ROWS = 16


class _Scan(torch.autograd.Function):
    @staticmethod
    @full_precision
    def forward(
        ctx: Any, u: Tensor, d: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None,
        chunks: Chunks, dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        rates = A.to(dtype)
        h = chunks.sort(state, rates, (chunks.N, *A.shape))
        out, starts, done = [], [], []
        for u_n, d_n, B_n, C_n in _places(chunks, dtype, u, d, B, C):
            if h.shape[0] > u_n.shape[1]:  # some sequences have ended
                done.append(h[u_n.shape[1] :])
                h = h[: u_n.shape[1]]
            starts.append(h)
            _, hs = _states(u_n, d_n, rates, B_n, h)
            out.append((hs @ C_n[..., None]).squeeze(-1))
            h = hs[-1].clone()
        final = torch.cat((h, *reversed(done)))
        ctx.save_for_backward(u, d, A, B, C, *starts)
        ctx.chunks, ctx.dtype = chunks, dtype
        ctx.state = None if state is None else state.dtype
        return _rows(chunks, out, dtype), chunks.unsort(final)

    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Any, ...]:
        u, d, A, B, C, *starts = ctx.saved_tensors
        chunks, dtype = ctx.chunks, ctx.dtype
        rates = A.to(dtype)
        last = chunks.sort(dfinal, rates, (chunks.N, *A.shape))
        q, dA = last[:0], torch.zeros_like(rates)
        grads: list[list[Tensor]] = []
        places = list(_places(chunks, dtype, u, d, B, C, dy))
        for (u_n, d_n, B_n, C_n, p), h in zip(reversed(places), reversed(starts), strict=True):
            if q.shape[0] < p.shape[1]:  # the walk comes to the last chunks of some sequences
                q = torch.cat((q, last[q.shape[0] : p.shape[1]]))
            a, hs = _states(u_n, d_n, rates, B_n, h)
            g = p[..., None] * C_n[:, :, None]
            g[-1] += q
            for t in range(len(g) - 2, -1, -1):
                g[t].addcmul_(a[t + 1], g[t + 1])  # (4)
            dC = (p[:, :, None] @ hs).squeeze(-2)
            dB = ((d_n * u_n)[:, :, None] @ g).squeeze(-2)  # (6)
            s = (g @ B_n[..., None]).squeeze(-1)
            w = a.mul_(g)
            q = w[0].clone()  # (9)
            w[1:] *= hs[:-1]
            w[0] *= h  # (5)
            dA += torch.einsum("tmdn,tmd->dn", w, d_n)
            dd = torch.einsum("tmdn,dn->tmd", w, rates).addcmul_(u_n, s)  # (7)
            grads.append([s.mul_(d_n), dd, dB, dC])
        q = torch.cat((q, last[q.shape[0] :]))
        du, dd, dB, dC = (
            _rows(chunks, list(reversed(parts)), like.dtype)
            for parts, like in zip(zip(*grads, strict=True), (u, d, B, C), strict=True)
        )
        dstate = None if ctx.state is None else chunks.unsort(q).to(ctx.state)
        return du, dd, dA.to(A.dtype), dB, dC, dstate, None, None


def _places(chunks: Chunks, dtype: torch.dtype, *xs: Tensor) -> Iterator[list[Tensor]]:
    """The rows (C, sequences, width) of each tensor (B, T, width), chunk number after number."""
    folded = (chunks.fold(x[:, :, None], 1, dtype).split(chunks.counts) for x in xs)
    for parts in zip(*folded, strict=True):
        yield [x.transpose(0, 1) for x in parts]


def _rows(chunks: Chunks, places: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The inverse of `_places`, of one tensor."""
    folded = torch.cat([x.transpose(0, 1) for x in places])
    return chunks.unfold(folded, 1, dtype).squeeze(2)


def _states(u: Tensor, d: Tensor, A: Tensor, B: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """exp(d A) and the states (2) of one chunk, (C, sequences, D, M) each."""
    a = (d[..., None] * A).exp_()
    hs = (d * u)[..., None] * B[:, :, None]
    for t in range(len(hs)):
        h = hs[t].addcmul_(a[t], h)  # (2)
    return a, hs


def scan_chunked(
    u: Tensor, d: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, N: int,
    cu_seqlens: Tensor | None, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Equation (2) of checked inputs, read with C: sum_n C h (B, T, D) and the final state.

    Args as of `scan`, but d (B, T, D) behind the softplus; N sequences, computed in dtype.
    """
    batch, T, width = u.shape
    if batch * T == 0:
        size = (N, *A.shape)
        state = A.new_zeros(size, dtype=dtype) if initial_state is None else initial_state.to(dtype)
        return u.new_zeros(batch, T, width, dtype=dtype), state
    chunks = Chunks(batch, T, None if cu_seqlens is None else cu_seqlens.tolist(), ROWS)
    return _Scan.apply(u, d, A, B, C, initial_state, chunks, dtype)
