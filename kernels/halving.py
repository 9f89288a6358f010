r"""Products of gated pairs inside a chunk, for any gate: no exponent above 0, nothing divided.

Rows i >= j of a chunk meet through the decay between them, channel by channel of width D:

    E_ij = prod_{j < t <= i} a_t,   a_t = exp g_t in [0, 1]                                  (1)
    scores   A_ij = sum_d x_id E_ijd y_jd                                                    (2)
    mix      M_i = sum_j P_ij E_ij y_j        N_j = sum_i P_ij E_ij x_i                      (3)
    crossing c_t = sum_{j < t <= i} P_ij x_i E_ij y_j                                        (4)

(3) are the gradients of x and y, and (4) that of g_t, where P is the gradient of A.

A chunk is halved: between the rows I of the later and J of the earlier half,

    E_ij = f_i r_j,   f_i = prod_{s <= t <= i} a_t,   r_j = prod_{j < t < s} a_t             (5)

with s the first row of I, so that (2) to (4) are matrix products of x f and y r, and the halves
are halved again down to single rows, where E_ii = 1. f and r are products of gates, not
exponentials of differences: a gate of 0 makes exact zeros, and the relative error is that of at
most C multiplications. In (4) only pairs across t are added up, so that a small gradient is not a
difference of large ones.

Source: arXiv:2312.06635v6, Sec. 4.3 (two levels of chunks), with the second level recursive.
Shapes: n chunks, R rows of heads that share y, C a power of two, D width.
Cost: 2 R C^2 D / 4 multiply-adds a product and level, log2 C levels.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


def ends(a: Tensor) -> tuple[Tensor, Tensor]:
    """Decay (n, C, D) from the start of the chunk through row t, and from behind t to the end."""
    later = torch.cat((a[:, 1:], torch.ones_like(a[:, :1])), 1)
    return cut(a.cumprod(1)), cut(later.flip(1).cumprod(1).flip(1))


def cut(decay: Tensor) -> Tensor:
    """decay with 0 for what is below the square root of the least number, in place.

    The product of two such factors is then 0 or a normal number. Arithmetic on denormal ones is
    slower by an order of magnitude on Intel's processors: strong gates took 7 times as long as
    mild ones there, and 3 times without. In fp32 this ends at 1e-19, a gate of -43.7.
    """
    return torch.threshold_(decay, torch.finfo(decay.dtype).tiny ** 0.5, 0.0)


def _levels(a: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For halves of b = 1, 2, 4 .. rows: b, f of the later and r of the earlier ones (5).

    f and r hold until the next level is asked for.
    """
    f, r, b = a.clone(), torch.ones_like(a), 1
    while b < a.shape[1]:
        (early, late), (r_early, _) = _halves(f, b), _halves(r, b)
        yield b, late.flatten(-3, -2), r_early.flatten(-3, -2)
        cut(r_early.mul_(late[..., -1:, :]))
        cut(late.mul_(early[..., -1:, :]))
        b *= 2


def _halves(x: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Views of the earlier and the later halves of blocks of 2 b rows, each (.., C / 2b, b, D)."""
    early, late = x.unflatten(-2, (-1, 2, b)).unbind(-3)
    return early, late


def _cells(A: Tensor, b: int) -> Tensor:
    """The view (n, R, C / 2b, b, C / 2b, b) of A (n, R, C, C): rows I, columns J."""
    return A.unflatten(-1, (-1, 2, b)).unflatten(-4, (-1, 2, b))[:, :, :, 1, :, :, 0]


def _same_block(rows: int, b: int, like: Tensor) -> Tensor:
    block = torch.arange(rows, device=like.device) // b
    return (block[:, None] == block).to(like.dtype)


def scores(x: Tensor, y: Tensor, a: Tensor) -> Tensor:
    """A of (2), (n, R, C, C), zero above the diagonal; x (n, R, C, D), y and a (n, C, D)."""
    n, R, C, _ = x.shape
    A = x.new_zeros(n, R, C, C)
    A.diagonal(dim1=-2, dim2=-1).copy_((x * y[:, None]).sum(-1))
    for b, f, r in _levels(a):
        late = _halves(x, b)[1].flatten(-3, -2) * f[:, None]
        early = _halves(y, b)[0].flatten(-3, -2) * r
        product = (late.flatten(1, 2) @ early.mT).view(n, R, C // 2, C // 2)  # (2)
        cells = _cells(A, b)
        # Zeros go to cells of different blocks: those are of a larger b, and are written later.
        cells.copy_((product * _same_block(C // 2, b, x)).view(cells.shape))
    return A


def mix(P: Tensor, y: Tensor, a: Tensor) -> Tensor:
    """M of (3), (n, R, C, D); P (n, R, C, C), y and a (n, C, D)."""
    M = P.diagonal(dim1=-2, dim2=-1)[..., None] * y[:, None]
    for b, f, r in _levels(a):
        p = _lower(P, b)
        m = (p.flatten(1, 2) @ (_halves(y, b)[0].flatten(-3, -2) * r)).view(*p.shape[:-1], -1)
        _add(_halves(M, b)[1], m * f[:, None])  # (3)
    return M


def gradients(P: Tensor, x: Tensor, y: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """M (n, R, C, D) and N (n, C, D) of (3) and the crossing sums (4), (n, C, D)."""
    half = P.shape[-1] // 2
    diagonal = P.diagonal(dim1=-2, dim2=-1)[..., None]
    M, N = diagonal * y[:, None], (diagonal * x).sum(1)
    crossing = torch.zeros_like(y)
    for b, f, r in _levels(a):
        late = _halves(x, b)[1].flatten(-3, -2) * f[:, None]
        early = _halves(y, b)[0].flatten(-3, -2) * r
        p, same = _lower(P, b), _same_block(half, b, x)
        m = (p.flatten(1, 2) @ early).view_as(late)
        n = p.flatten(1, 2).mT @ late.flatten(1, 2)
        _add(_halves(M, b)[1], m * f[:, None])  # (3)
        _add(_halves(N, b)[0], n * r)
        _add(_halves(crossing, b)[1], same.triu() @ (late * m).sum(1))  # (4), t in I
        _add(_halves(crossing, b)[0], same.tril(-1) @ (early * n))  # (4), t in J
    return M, N, crossing


def _lower(P: Tensor, b: int) -> Tensor:
    """P between I and J as a matrix (n, R, C / 2, C / 2), zero between different blocks."""
    n, R, C, _ = P.shape
    return _cells(P, b).reshape(n, R, C // 2, C // 2) * _same_block(C // 2, b, P)


def _add(view: Tensor, x: Tensor) -> None:
    view.add_(x.view(view.shape))
