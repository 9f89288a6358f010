r"""Linear attention by matrix products over chunks: the engine of the CPU and of any other device.

One head, one chunk of C rows; S the state before it, D the gradient of the state behind it, the
scale in do and left out of q. G_t is the sum of the chunk's log gates through row t, Ge = G_C.

Key gate, with f_t the weight of q_t, r_t that of k_t, and factors a, b of the chunk:

    q' = f q      k' = r k      A = tril(q' k'^T)                                            (1)
    o = A v + q' S~          S+ = b S~ + a k'^T v          S~ = a S                          (2)
    dA = tril(do v^T)        dv = A^T do + k' D~           D~ = a D                          (3)
    dq = f (dA k' + do S~^T)          dk = r (dA^T q' + v D~^T)                              (4)
    dS = b D~ + a q'^T do                                                                    (5)
    dg_t = (b/a) rowsum(S~ D~) + sum_{i>=t} [q' (dA k' + do S~^T) - k' (dA^T q')]_i
           + sum_{j<t} [k' (v D~^T)]_j                                                       (6)

The weights and factors are, in a chunk that decays by no more than e^SAFE a row in every channel,

    f = e^{G - Ge/2}     r = 1/f     a = b = e^{Ge/2}                                        (7)

and otherwise, with no exponent above 0,

    f = e^G     r = e^{Ge - G}     a = 1     b = e^{Ge}                                      (8)

where A comes from `halving.scores`, and the terms of dA in (4) and (6) from `halving.gradients`;
what is left of (6) are then sums over pairs across t. In (7) terms of one side of t cancel, as
exactly as fp32 rounds numbers of their size: within a chunk, and of a decay of e^SAFE a row.

Value gate: f weighs o and do, r weighs v, and a, b stand on the columns of the states:

    v' = r v      do' = f do      A = tril(q k^T)      o = f (A v' + q S~)                   (9)
    dA = tril(do' v'^T)      dq = dA k + do' S~^T      dk = dA^T q + v' D~^T                 (10)
    dv = r (A^T do' + k D~)
    dg_t = (b/a) colsum(S~ D~) + sum_{i>=t} [do' (A v' + q S~) - v' (A^T do')]_i
           + sum_{j<t} [v' (k D~)]_j                                                         (11)

Scalar decay, L_ij = e^{G_i - G_j} for i >= j, f = e^G, r = e^{Ge - G}, a = 1, b = e^{Ge}:

    A = (q k^T) L      dA = (do v^T) L      and (2) to (5) with dA k, dA^T q without f, r    (12)
    dg_t = b <S, D> + sum_{i>=t} q'_i do_i S^T + sum_{j<t} k'_j v_j D^T
           + sum_{j<t<=i} A_ij (do_i v_j)                                                    (13)

Source: chunks and (6) from arXiv:2312.06635v6, Sec. 4 and App. C, with the terms of the final
state; (7) as one product instead of a second level of chunks.
Shapes: Z chunks and heads, C rows, R query heads of a state, K key width, V value width.
Cost: O(B T H (C (K + V) + K V)) time; kept for the backward: the weighted inputs and the state of
every chunk.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from glactl.kernels import halving
from glactl.kernels.backend import full_precision
from glactl.kernels.checks import state_dtype
from glactl.kernels.layout import Chunks

ROWS = 32  # of a chunk: 16 and 64 are slower at widths 64, and 64 leaves the range of (7) sooner
SAFE = 60 / 32  # a row, so weights of (7) reach e^30, their products 1e27; fp32 ends at 3e38
CLOSED = -1000.0  # in the place of -inf, so that sums stay finite: its exponential is 0 as well


class _Weights:
    """f, r (Z, C, D) and a, b (Z, D) of a gate g, whose memory they take, and the chunks of (8)."""

    def __init__(self, g: Tensor, filled: Tensor) -> None:
        G = g.cumsum(1)
        safe = -SAFE * filled.to(G).repeat_interleave(len(g) // len(filled))
        self.exact = (G[:, -1] < safe[:, None]).any(-1).nonzero().squeeze(-1)
        G[self.exact] = 0  # exp is many times slower where it leaves the range
        end = G[:, -1]
        self.a = (end / 2).exp()
        self.b = self.a.clone()
        self.gates = halving.cut(g[self.exact].exp_())
        self.f = G.sub_(end[:, None] / 2).exp_()  # (7)
        self.r = torch.reciprocal(self.f, out=g)
        if len(self.exact):
            f, r = halving.ends(self.gates)  # (8)
            self.f[self.exact], self.r[self.exact] = f, r
            self.a[self.exact], self.b[self.exact] = 1.0, f[:, -1]

    def tensors(self) -> tuple[Tensor, ...]:
        return self.f, self.r, self.a, self.b, self.exact, self.gates


def _triangle(rows: int, like: Tensor) -> Tensor:
    return torch.ones(rows, rows, dtype=like.dtype, device=like.device).tril_()


def _lower(A: Tensor, C: int) -> Tensor:
    """A (Z, R C, C) with zeros above the diagonals, in place."""
    A.view(len(A), -1, C, C).tril_()
    return A


def _heads(x: Tensor, C: int) -> Tensor:
    """(Z, R C, D) -> (Z, R, C, D)."""
    return x.view(len(x), -1, C, x.shape[-1])


def _weigh(x: Tensor, weight: Tensor) -> Tensor:
    """x (Z, R C, D) times weight (Z, C, D), in place."""
    _heads(x, weight.shape[1]).mul_(weight[:, None])
    return x


def _gate_gradient(within: Tensor, early: Tensor, states: Tensor) -> Tensor:
    """sum_{i>=t} within_i + sum_{j<t} early_j + states, of (6), (11) and (13).

    within and early (Z, C, D), states (Z, D). A product with a triangle is a sum without the
    differences of running totals, which would leave nothing of the small terms of (8).
    """
    lower = _triangle(early.shape[1], early)
    to_t, before_t = (x.expand(len(early), -1, -1) for x in (lower.mT, lower.tril(-1)))
    return (to_t @ within).baddbmm_(before_t, early).add_(states[:, None])


def _within(late: Tensor, other: Tensor, y: Tensor, dy: Tensor) -> Tensor:
    """late times other, summed over the query heads of a state, less y times dy; (Z, C, D)."""
    product = late * other
    if product.shape[1] > y.shape[1]:
        product = _heads(product, y.shape[1]).sum(1)
    return product.addcmul_(y, dy, value=-1)


def _keep(ctx: Any, chunks: Chunks, scale: float, size: torch.Size, *inputs: Tensor | None) -> None:
    """For the backward: size of the state; heads and type of q, k, v, g and the initial state."""
    ctx.chunks, ctx.scale, ctx.size = chunks, scale, size
    ctx.inputs = [None if x is None else (x.shape[2], x.dtype) for x in inputs]


def _out(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of q, k, v, g and the initial state, as those came in; None of the rest."""
    *rows, dstate = grads
    *inputs, state = ctx.inputs
    found = [
        None if x is None else ctx.chunks.unfold(x, *like)
        for x, like in zip(rows, inputs, strict=True)
    ]
    dstate = None if state is None else ctx.chunks.unsort(dstate).to(state[1])
    return *found, dstate, None, None, None


class _KeyGate(torch.autograd.Function):
    """Equations (1) to (8)."""

    @staticmethod
    @full_precision
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None,
        scale: float, chunks: Chunks, dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        H, C = k.shape[2], chunks.rows
        qc, kc, vc, gc = (chunks.fold(x, H, dtype) for x in (q, k, v, g))
        w = _Weights(gc.clamp_(min=CLOSED), chunks.filled)
        qe, ke = _heads(qc, C)[w.exact], kc[w.exact]
        qx, kx = _weigh(qc, w.f), kc.mul_(w.r)
        A = _lower(qx @ kx.mT, C)  # (1)
        if len(w.exact):
            A[w.exact] = halving.scores(qe, ke, w.gates).flatten(1, 2)
        S = chunks.sort(state, kx, (chunks.N, H, k.shape[3], v.shape[3]))
        S, final = chunks.walk(kx.mT @ vc, w.a[..., None], w.b[..., None], S)
        o = (A @ vc).baddbmm_(qx, S)  # (2)
        ctx.save_for_backward(qx, kx, vc, A, S, qe, ke, *w.tensors())
        _keep(ctx, chunks, scale, final.shape, q, k, v, g, state)
        return chunks.unfold(o.mul_(scale), q.shape[2], v.dtype), chunks.unsort(final)

    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx: Any, do: Tensor, dfinal: Tensor) -> tuple[Any, ...]:
        qx, kx, v, A, S, qe, ke, f, r, a, b, exact, gates = ctx.saved_tensors
        chunks, H, C = ctx.chunks, ctx.size[1], ctx.chunks.rows
        do = chunks.fold(do, H, qx.dtype).mul_(ctx.scale)
        D, dstate = chunks.walk(
            qx.mT @ do, a[..., None], b[..., None], chunks.sort(dfinal, do, ctx.size), back=True
        )  # (5)
        dA = _lower(do @ v.mT, C)
        if len(exact):
            pairs = halving.gradients(_heads(dA, C)[exact], qe, ke, gates)
            dA[exact] = 0
        dq = (dA @ kx).baddbmm_(do, S.mT)
        dk, outer = dA.mT @ qx, v @ D.mT
        dv = (A.mT @ do).baddbmm_(kx, D)  # (3)
        states = D.mul_(S).sum(-1) * (b / a)
        within = _within(qx, dq, kx, dk)
        dq, dk = _weigh(dq, f), dk.add_(outer).mul_(r)  # (4)
        dg = _gate_gradient(within, outer.mul_(kx), states)  # (6)
        if len(exact):
            _heads(dq, C)[exact] += pairs[0]
            dk[exact] += pairs[1]
            dg[exact] += pairs[2]
        return _out(ctx, dq, dk, dv, dg, dstate)


class _ValueGate(torch.autograd.Function):
    """Equations (9) to (11), with the weights (7) and (8)."""

    @staticmethod
    @full_precision
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None,
        scale: float, chunks: Chunks, dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        H, C = k.shape[2], chunks.rows
        qc, kc, vc, gc = (chunks.fold(x, H, dtype) for x in (q, k, v, g))
        w = _Weights(gc.clamp_(min=CLOSED), chunks.filled)
        A = _lower(qc @ kc.mT, C)
        Ae, ve = _heads(A, C)[w.exact], vc[w.exact]
        vx = vc.mul_(w.r)
        if len(w.exact):
            A[w.exact] = 0
        S = chunks.sort(state, vx, (chunks.N, H, k.shape[3], v.shape[3]))
        S, final = chunks.walk(kc.mT @ vx, w.a[:, None], w.b[:, None], S)
        ox = (A @ vx).baddbmm_(qc, S)
        o = _weigh(ox.clone(), w.f)  # (9)
        if len(w.exact):
            _heads(o, C)[w.exact] += halving.mix(Ae, ve, w.gates)
        ctx.save_for_backward(qc, kc, vx, A, S, ox, Ae, ve, *w.tensors())
        _keep(ctx, chunks, scale, final.shape, q, k, v, g, state)
        return chunks.unfold(o.mul_(scale), q.shape[2], v.dtype), chunks.unsort(final)

    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx: Any, do: Tensor, dfinal: Tensor) -> tuple[Any, ...]:
        q, k, vx, A, S, ox, Ae, ve, f, r, a, b, exact, gates = ctx.saved_tensors
        chunks, H, C = ctx.chunks, ctx.size[1], ctx.chunks.rows
        do = chunks.fold(do, H, q.dtype).mul_(ctx.scale)
        doe = _heads(do, C)[exact]
        dox = _weigh(do, f)
        D, dstate = chunks.walk(
            q.mT @ dox, a[:, None], b[:, None], chunks.sort(dfinal, q, ctx.size), back=True
        )
        dA = _lower(dox @ vx.mT, C)
        if len(exact):
            dA[exact] = halving.scores(doe, ve, gates).flatten(1, 2)
            _, dve, dge = halving.gradients(Ae, doe, ve, gates)
        dq = (dA @ k).baddbmm_(dox, S.mT)
        dk = (dA.mT @ q).baddbmm_(vx, D.mT)  # (10)
        dv, outer = A.mT @ dox, k @ D
        states = D.mul_(S).sum(-2) * (b / a)
        within = _within(dox, ox, vx, dv)
        dv = dv.add_(outer).mul_(r)
        dg = _gate_gradient(within, outer.mul_(vx), states)  # (11)
        if len(exact):
            dv[exact] += dve
            dg[exact] += dge
        return _out(ctx, dq, dk, dv, dg, dstate)


class _Scalar(torch.autograd.Function):
    """Equations (12) and (13)."""

    @staticmethod
    @full_precision
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None,
        scale: float, chunks: Chunks, dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        H, C = k.shape[2], chunks.rows
        qc, kc, vc = (chunks.fold(x, H, dtype) for x in (q, k, v))
        # Differences of sums lose digits where gates are strong, hence fp64: C numbers a chunk.
        G = chunks.fold(g, H, torch.float64).clamp_(min=CLOSED).cumsum(1)
        later = torch.ones(C, C, dtype=torch.bool, device=q.device).triu_(1)
        L = (G - G.mT).to(dtype).masked_fill_(later, -torch.inf).exp_()
        f, r = G.exp().to(dtype), L[:, -1, :, None]
        b = f[:, -1:]
        a = torch.ones_like(b)
        A = _weigh(qc @ kc.mT, L)  # (12)
        S = chunks.sort(state, kc, (chunks.N, H, k.shape[3], v.shape[3]))
        S, final = chunks.walk((kc * r).mT @ vc, a, b, S)
        o = _weigh(qc @ S, f).baddbmm_(A, vc)
        ctx.save_for_backward(qc, kc, vc, A, S, L, f, a)
        _keep(ctx, chunks, scale, final.shape, q, k, v, g, state)
        return chunks.unfold(o.mul_(scale), q.shape[2], v.dtype), chunks.unsort(final)

    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx: Any, do: Tensor, dfinal: Tensor) -> tuple[Any, ...]:
        q, k, v, A, S, L, f, a = ctx.saved_tensors
        chunks, H, C = ctx.chunks, ctx.size[1], ctx.chunks.rows
        b, r = f[:, -1:], L[:, -1, :, None]
        do = chunks.fold(do, H, q.dtype).mul_(ctx.scale)
        D, dstate = chunks.walk(
            q.mT @ _weigh(do.clone(), f), a, b, chunks.sort(dfinal, do, ctx.size), back=True
        )
        dA = do @ v.mT
        dq, dk = _weigh(do @ S.mT, f), (v @ D.mT).mul_(r)  # the parts of the states
        dv = (k @ D).mul_(r).baddbmm_(A.mT, do)
        dg = None
        if ctx.needs_input_grad[3]:
            before_t = _triangle(C, do).tril_(-1)
            pairs = _heads(dA * A, C).sum(1) @ before_t.mT
            late = _heads((q * dq).sum(-1, keepdim=True), C).sum(1)
            early = (k * dk).sum(-1, keepdim=True)
            states = D.mul_(S).sum((1, 2))[:, None] * b[:, 0]
            dg = _gate_gradient(late, early, states)  # (13)
            dg += pairs.tril_().sum(1)[..., None]
        dA = _weigh(dA, L)  # (12)
        dq.baddbmm_(dA, k)
        dk.baddbmm_(dA.mT, q)
        return _out(ctx, dq, dk, dv, dg, dstate)


def chunked(
    q: Tensor, k: Tensor, v: Tensor, gate: str | None, g: Tensor | None, scale: float,
    initial_state: Tensor | None, N: int, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Linear attention of checked inputs: as `gla`, with g the gate named "gk", "gv" or "g".

    g (B, T, H) also for one decay a head; N sequences. Returns o in v's dtype and the final state.
    """
    B, T, H, K = k.shape
    dtype = state_dtype(q, k, v)
    if B * T == 0:
        size = (N, H, K, v.shape[3])
        state = k.new_zeros(size, dtype=dtype) if initial_state is None else initial_state.to(dtype)
        return v.new_zeros(B, T, q.shape[2], v.shape[3]), state
    chunks = Chunks(B, T, None if cu_seqlens is None else cu_seqlens.tolist(), ROWS)
    if gate == "gk":
        return _KeyGate.apply(q, k, v, g, initial_state, scale, chunks, dtype)
    if gate == "gv":
        return _ValueGate.apply(q, k, v, g, initial_state, scale, chunks, dtype)
    g = k.new_zeros(()).expand(B, T, H) if g is None else g
    return _Scalar.apply(q, k, v, g[..., None], initial_state, scale, chunks, dtype)
