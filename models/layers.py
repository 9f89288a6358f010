"""Parts that every model is made of: norms, rotation, short convolution, channel mixers.

    RMSNorm    y = w * x / sqrt(mean(x^2) + eps)                                       (1)
    LayerNorm  y = w * (x - mean(x)) / sqrt(var(x) + eps) + b                          (2)
    rotary     (a, b) -> (a cos pf - b sin pf, a sin pf + b cos pf),
               f_i = theta^(-2i/d), a and b the two halves of the width d,
               p the token's place in its sequence                                     (3)
    ShortConv  y_t = x_t + sum_{j < width} w_j * x_{t-j}, x = 0 before a sequence      (4)
    GLU        y = W_down (act(W_gate x) * W_up x), act = silu (swiglu) or sigmoid     (5)
    log gate   log a = log sigmoid(x) / normalizer                                     (6)
    read-out   y = w * n(x) * silu(gate) or w * n(silu(x)), n(x) = x / sqrt(mean(x^2) + eps)  (7)

(1), (3), (6), (7) and the product of swiglu in (5) are one function each: torch.compile fuses such
a function into one kernel each way, and outside of a compiled region on a CUDA device that kernel
is in `glactl.kernels.triton_edges` or, of (3), `triton_rotary`. (1), (6) and (7) are computed in
fp32 at least, whatever the inputs and whatever autocast says.

No function here waits for a GPU: values are looked at where they are on the CPU.

Sources: (1) Zhang and Sennrich 2019, arXiv:1910.07467; (3) Su et al. 2021, arXiv:2104.09864, in
the two-halves order of LLaMA; (5) Shazeer 2020, arXiv:2002.05202.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glactl.kernels.attention import rotate_reference
from glactl.kernels.backend import launches
from glactl.kernels.rows import product_rows
from glactl.models.joined import whole

State = dict[str, Tensor]  # of one layer; the sequences come first in every tensor

FP32 = 4  # bytes an element: states and traffic are counted in fp32


@dataclass(frozen=True)
class Cost:
    """What one part of a model costs, per token unless it says otherwise.

    params is a count. flops counts the operations of matrix products, 2 m n p for (m, n) by
    (n, p), in a forward pass. moved is the elements of activations read and written if every
    product and every mixing along time reads its inputs and writes its outputs once and what is
    element-wise is fused into them; weights are not in it, as a batch reads them once. state is
    the bytes that one sequence needs to go on.
    """

    params: int = 0
    flops: float = 0.0
    moved: float = 0.0
    state: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.params + other.params,
            self.flops + other.flops,
            self.moved + other.moved,
            self.state + other.state,
        )


def linear_cost(read: int, written: int, bias: bool = False) -> Cost:
    """A product with a matrix (read, written)."""
    return Cost(read * written + bias * written, 2.0 * read * written, float(read + written))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type that sums over values of `dtype` are taken in: fp32 at least."""
    return torch.promote_types(dtype, torch.float32)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x on `device`; a copy from the CPU to a GPU goes by pinned memory, and nothing waits for it.

    Not for use in the capture of a CUDA graph, whose copies come from where x was then.
    """
    if device.type == "cuda" and x.device.type == "cpu" and x.numel():
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def readable(x: Tensor) -> bool:
    """Whether the values of x may be looked at: on the CPU, and not while a graph is traced."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


@dataclass(frozen=True)
class Layout:
    """Where each token of a (B, T) input belongs; all int64.

    sequence and place (B * T,): the token's sequence and its number in it, from 0. start and
    length (N,): of each sequence, start counted over all B * T tokens.
    """

    sequence: Tensor
    place: Tensor
    start: Tensor
    length: Tensor


def layout(B: int, T: int, cu_seqlens: Tensor | None, device: torch.device) -> Layout:
    """The layout of B sequences of T tokens or, with cu_seqlens (N + 1,), of N in one row."""
    token = torch.arange(B * T, device=device)
    if cu_seqlens is None:
        bounds = torch.arange(B + 1, device=device) * T
        sequence = token // max(T, 1)
    else:
        bounds = cu_seqlens.to(device, torch.int64)
        sequence = torch.searchsorted(bounds[1:], token, right=True)
    return Layout(sequence, token - bounds[sequence], bounds[:-1], bounds.diff())


def end_to_end(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Rows of token ids laid end to end, (T,), and their bounds, (N + 1,); int64, on the CPU."""
    # torch.tensor takes 200 ns for every integer of a list, this 20
    tokens = np.fromiter(chain.from_iterable(rows), np.int64)
    return torch.from_numpy(tokens), torch.tensor([0, *map(len, rows)]).cumsum(0)


def check_layout(tokens: Tensor, states: int | None, cu_seqlens: Tensor | None) -> int:
    """Check that tokens (B, T), cu_seqlens and so many states fit together.

    Returns:
        the most tokens that a sequence is given; where cu_seqlens is on a GPU, whose values are
        not looked at, the bound T.

    Raises:
        ValueError: they do not. The values of cu_seqlens are checked on the CPU only.
    """
    if tokens.ndim != 2:
        raise ValueError(f"tokens are {tuple(tokens.shape)}; allowed: two axes, (B, T)")
    N, T = tokens.shape
    longest = T
    if cu_seqlens is not None:
        if N != 1 or cu_seqlens.ndim != 1 or len(cu_seqlens) == 0:
            raise ValueError(
                f"cu_seqlens is {tuple(cu_seqlens.shape)} with tokens {tuple(tokens.shape)}; "
                "allowed: (N + 1,) with tokens (1, T)"
            )
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"cu_seqlens is of {cu_seqlens.dtype}; allowed: int32 or int64")
        N = len(cu_seqlens) - 1
        if readable(cu_seqlens):
            bounds = cu_seqlens.tolist()
            if bounds[0] != 0 or bounds[-1] != T or bounds != sorted(bounds):
                raise ValueError(f"cu_seqlens is {bounds}; allowed: from 0 to {T}, never falling")
            longest = max((b - a for a, b in pairwise(bounds)), default=0)
    if states not in (None, N):
        raise ValueError(f"state is of {states} sequences; allowed: {N}, as many as are read")
    return longest


def log_gate(x: Tensor, normalizer: float) -> Tensor:
    """(6) of logits x, in fp32 or wider; in [-inf, 0]."""
    if launches(x):
        from glactl.kernels.triton_edges import log_gate_triton

        return log_gate_triton(x, normalizer)
    return F.logsigmoid(x.to(wide(x.dtype))) / normalizer  # (6)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, gate: Tensor | None = None, swish: bool = False
) -> Tensor:
    """(1), or (7) with a gate or with swish.

    Args:
        x: (..., d).
        weight: (d,).
        eps: added to the mean square, more than 0.
        gate: of x's shape, whose silu multiplies the result; None: 1.
        swish: whether silu(x) stands in the place of x.

    Returns:
        y like x, computed in fp32 or wider and rounded once.
    """
    if launches(x):
        from glactl.kernels.triton_edges import WIDEST, rms_norm_triton

        if x.shape[-1] <= WIDEST:
            return rms_norm_triton(x, weight, eps, gate, swish)
    dtype = wide(x.dtype)
    s = F.silu(x.to(dtype)) if swish else x.to(dtype)
    y = F.rms_norm(s, weight.shape, weight.to(dtype), eps)  # (1)
    return (y if gate is None else y * F.silu(gate.to(dtype))).to(x.dtype)  # (7)


class RMSNorm(nn.Module):
    """(1) over the last axis, in fp32 or wider; weight (d,) starts at 1."""

    def __init__(self, d: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.eps = eps

    def forward(self, x: Tensor, gate: Tensor | None = None, swish: bool = False) -> Tensor:
        """(..., d) -> (..., d), in x's dtype; gate and swish as of `rms_norm`."""
        return rms_norm(x, self.weight, self.eps, gate, swish)


class LayerNorm(nn.Module):
    """(2) over the last axis, in fp32 or wider; weight (d,) starts at 1, bias (d,) at 0."""

    def __init__(self, d: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.bias = nn.Parameter(torch.zeros(d))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d), in x's dtype."""
        w, b = (p.to(wide(x.dtype)) for p in (self.weight, self.bias))
        return F.layer_norm(x.to(w.dtype), w.shape, w, b, self.eps).to(x.dtype)  # (2)


def rotate(x: Tensor, place: Tensor, theta: float) -> Tensor:
    """Turn queries or keys by their place in the sequence.

    Args:
        x: (..., H, d), d even.
        place: (...), int64, 0 or more.
        theta: base of the frequencies, more than 0.

    Returns:
        (3), in x's dtype; the angles are computed in fp32 or wider.
    """
    if launches(x):
        from glactl.kernels.triton_rotary import rotate_triton

        return rotate_triton(x, place, theta)
    return rotate_reference(x, place, theta)  # (3)


class ShortConv(nn.Module):
    """A causal convolution of each channel along time, added to its input: (4).

    The weights (width, d) are drawn from N(0, 1 / width): the tokens before come in as strongly as
    the present one, and differently in every channel, so that a mixer behind can look them up from
    the start. Drawn close to 0, attention of d_model 256 at a rate of 5e-3 stays at an accuracy of
    0.25 on recall; drawn with 0.5, it reaches 0.99 after 550 steps (one seed).

    State: "conv" (N, width - 1, d), the last inputs, 0 at the start.
    """

    def __init__(self, d: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, d))

    def initial_state(self, N: int, device: torch.device) -> State:
        """The state of N sequences that have not begun."""
        width, d = self.weight.shape
        return {"conv": torch.zeros(N, width - 1, d, device=device, dtype=self.weight.dtype)}

    def forward(
        self, x: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        """(B, T, d) -> (B, T, d) and, where a state went in, the state after."""
        B, T, d = x.shape
        at = layout(B, T, cu_seqlens, x.device)
        flat, past = x.flatten(0, 1), None if state is None else state["conv"]
        y = flat
        for j, w in enumerate(self.weight):
            y = y + w * (_back(flat, j, past, at) if j else flat)  # (4)
        after = None if past is None else {"conv": _last(flat, past, at)}
        return y.view(B, T, d), after

    def step(self, x: Tensor, state: State) -> Tensor:
        """One token a sequence, (N, d) -> (N, d); `state` is updated in place."""
        last = torch.cat([state["conv"], x[:, None]], 1)
        y = x
        for j, w in enumerate(self.weight):
            y = y + w * last[:, -1 - j]  # (4)
        state["conv"].copy_(last[:, 1:])
        return y

    @staticmethod
    def cost(d: int, width: int) -> Cost:
        """Of a convolution over d channels."""
        return Cost(width * d, 2.0 * width * d, 2.0 * d, FP32 * (width - 1) * d)


def _back(x: Tensor, j: int, past: Tensor | None, at: Layout) -> Tensor:
    """x_{t-j} of tokens end to end, (M, d), that of `past` (N, rows, d) or 0 before a sequence.

    A shift and a mask, no look-up, whose gradient is written by additions to a table of zeros.
    """
    shifted = F.pad(x, (0, 0, j, 0))[: len(x)]
    if past is None:
        return shifted.masked_fill((at.place < j)[:, None], 0)
    # at the start of a sequence; elsewhere a row that is not taken
    old = past[at.sequence, (at.place - j).clamp(max=-1) + past.shape[1]]
    return torch.where((at.place < j)[:, None], old, shifted)


def _last(x: Tensor, past: Tensor, at: Layout) -> Tensor:
    """The last rows of `past` and a sequence's tokens, as many as `past` has."""
    N, before, _ = past.shape
    index = at.length[:, None] + torch.arange(before, device=x.device)  # in past and tokens
    of = torch.arange(N, device=x.device)[:, None] * before + index
    new = at.start[:, None] + index + (N - 1) * before
    return torch.cat([past.flatten(0, 1), x])[torch.where(index < before, of, new)]


def product_onto(h: Tensor, x: Tensor, layer: nn.Linear) -> Tensor:
    """h + W x of a layer without a bias, h (..., d); without gradients.

    One launch, in which h is written over, where all are of one type.
    """
    same = h.dtype == x.dtype == layer.weight.dtype and h.is_contiguous()
    if not same or torch.is_autocast_enabled(h.device.type):
        return h + layer(x)
    h.view(-1, h.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), layer.weight.T)
    return h


class GLU(nn.Module):
    """The channel mixer (5), without biases."""

    def __init__(self, d: int, hidden: int, kind: str) -> None:
        super().__init__()
        self.gate = nn.Linear(d, hidden, bias=False)
        self.up = nn.Linear(d, hidden, bias=False)
        self.down = nn.Linear(hidden, d, bias=False)
        self.act = F.silu if kind == "swiglu" else torch.sigmoid

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        y: Tensor = self.down(self._inner(x))  # (5)
        return y

    def onto(self, h: Tensor, x: Tensor) -> Tensor:
        """h + (5) of x, as of `product_onto`."""
        return product_onto(h, self._inner(x), self.down)

    def _inner(self, x: Tensor) -> Tensor:
        gate, up = self.gate(x), self.up(x)
        if self.act is F.silu and launches(gate):
            from glactl.kernels.triton_edges import glu_triton

            return glu_triton(gate, up)
        inner: Tensor = self.act(gate) * up
        return inner

    def together(self) -> list[nn.Linear]:
        """Products of the same input; see `glactl.models.joined`."""
        return [self.gate, self.up] if self.act is F.silu else []

    def joined_step(self, h: Tensor, norm: RMSNorm) -> Tensor | None:
        """h + (5) of the norm of h (N, d), in two launches; None where nothing is joined."""
        matrix = whole(self.gate)
        if matrix is None:
            return None
        inner = product_rows(h, matrix, norm=norm.weight, eps=norm.eps, pair=True)
        return product_rows(inner, self.down.weight, residual=h)

    @staticmethod
    def cost(d: int, hidden: int) -> Cost:
        """Of a mixer with an inner width of `hidden`; its input is read once."""
        return linear_cost(d, 2 * hidden) + linear_cost(hidden, d)


def glu_hidden(d: int) -> int:
    """The inner width that gives a GLU about 8 d^2 parameters, as a plain one of width 4 d has.

    (8/3) d up to a multiple of 256 as in LLaMA; below d = 1024, where that would add up to half as
    much again, to the nearest multiple of 32.
    """
    if d >= 1024:
        return 256 * -(-8 * d // (3 * 256))
    return max(32, 32 * round(8 * d / (3 * 32)))
