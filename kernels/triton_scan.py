r"""The selective scan on a CUDA device: tile shapes, designs and launches.

The mathematics is in triton_scan_forward.py and triton_scan_backward.py, the cut into blocks and
segments in triton_layout.py, the differentiable operator in triton_scan_op.py. Two launches forward
(tiles, outputs) and two backward (gradients, gather), two more each where sequences are cut, since
there are too few of them to fill the chip.

Floors of an H100: bytes over 3.02 TB/s, each of u, dt, z, y read or written once forward, and of
u, dt, z, dy, du, ddt, dz backward; and one exp2 a channel, entry and token each way, 16 a clock and
multiprocessor, 3.7e12 a second. At 4,096 channels of 16 entries, 16,384 tokens, bf16: 0.18 and 0.29
ms forward, 0.31 and 0.29 backward, so 0.60 in all. Beyond these the states of every 16th row are
134 MB (0.04 each way), and the shares of dB and dC 268 MB at 32 channels a program (0.09 each way).
Cut sequences take the exponentials a second time, each way: a floor of 1.16 ms.

Measured (H100, Triton 3.6, bf16, the shape above as 8 sequences): `outputs` 0.67 ms, `gradients`
2.01, `gather` 0.11, in all 2.83; as one sequence, cut, 3.91. benchmarks/LOG.md has the designs
before this one and what each measured. What counts is to have reads on their way: a warp a program,
8 on a multiprocessor, two a scheduler. `outputs` takes 9 instructions a channel, entry and token,
`gradients` 30, of which 13 are (1) to (5) of triton_scan_backward.py and one the exp2. B and C come
from caches, a line of 128 bytes every second row; until each kernel asked for the block after the
next (`fetch`), each such line cost a warp a wait for the L2 cache, and `outputs` took 1.5 ms.

Precision: everything is fp32 in registers; states are kept in bf16 for bf16 inputs, else in fp32.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import triton
from torch import Tensor

from glactl.kernels import triton_scan_backward as backward_kernels
from glactl.kernels import triton_scan_forward as forward_kernels
from glactl.kernels.triton_layout import BLOCK, Layout, block_count, cut

LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Design:
    """How the kernels cut their work.

    Attributes:
        rows: BT of the gradients, all of a thread, and so from one kept state to the next; a
            divisor of `walk`.
        walk: BT of the other kernels; a divisor of 128.
        forward, back: channels of a program and its warps, 32 channels a warp.
        sum: how sums over channels are taken, see triton_scan_backward.py; "dot" wants 8 rows and
            16 channels or more.
        programs: warps wanted; where sequences times tiles give fewer, sequences are cut.
    """

    rows: int
    walk: int
    forward: tuple[int, int]
    back: tuple[int, int]
    sum: Literal["lanes", "dot"]
    programs: int = 1024


DESIGNS = {
    "16 rows": Design(16, 16, (32, 1), (32, 1), "dot"),
    "8 rows": Design(8, 16, (32, 1), (32, 1), "dot"),
    "4 warps": Design(8, 16, (128, 4), (32, 1), "dot"),
    "lanes": Design(8, 16, (32, 1), (32, 1), "lanes"),
}


def design(M: int, dtype: torch.dtype) -> Design:
    """The rule: a product's operands have tf32's digits, enough for 16-bit inputs."""
    return DESIGNS["lanes" if dtype == torch.float32 else "8 rows"]


@dataclass(frozen=True)
class Plan:
    """Everything the launches of one call share; rates is A log2 e, (M, D)."""

    u: Tensor
    dt: Tensor
    z: Tensor | None
    bias: Tensor | None
    rates: Tensor
    D: Tensor | None
    layout: Layout
    design: Design

    @property
    def sizes(self) -> dict[str, int]:
        """The constants of all kernels."""
        M = len(self.rates)
        return {"M": M, "MP": triton.next_power_of_2(M)}

    @property
    def fetch(self) -> bool:
        """Whether kernels ask for the next block's memory; Triton's interpreter cannot."""
        return self.u.device.type == "cuda"

    @property
    def blocks(self) -> int:
        """Blocks of `rows` rows."""
        return len(self.layout.blocks) * (BLOCK // self.design.rows)


def plan(
    u: Tensor, dt: Tensor, A: Tensor, D: Tensor | None, z: Tensor | None, bias: Tensor | None,
    cu_seqlens: Tensor | None, chosen: Design | None = None,
) -> Plan:  # fmt: skip
    """The plan of one call on contiguous u (B, T, D); arguments otherwise as of `scan`."""
    B, T, width = u.shape
    chosen = chosen or design(A.shape[1], u.dtype)
    tiles = triton.cdiv(width, chosen.forward[0] // chosen.forward[1])  # warps
    layout = cut(B, T, cu_seqlens, tiles, chosen.programs, u.device)
    rates = (A.float().T * LOG2E).contiguous()
    return Plan(u, dt, z, bias, rates, D, layout, chosen)


def states_shape(
    B: int, T: int, packed: int | None, D: int, M: int, dtype: torch.dtype
) -> tuple[tuple[int, int, int], torch.dtype]:
    """Shape and dtype of the states that the forward pass keeps."""
    rows = design(M, dtype).rows
    kept = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    return (block_count(B, T, packed) * (BLOCK // rows), M, D), kept


def _grid(p: Plan, wide: int) -> tuple[int]:
    return (len(p.layout.segments) * triton.cdiv(p.u.shape[2], wide),)


def _tiles(p: Plan, B: Tensor, C: Tensor, columns: bool) -> tuple[Tensor, Tensor]:
    """B and C as the kernels read them, (blocks, rows, MP) or, columns, (blocks, MP, rows)."""
    size = (p.blocks, p.sizes["MP"], p.design.rows)
    b, c = (torch.empty(size, device=B.device, dtype=torch.float32) for _ in range(2))
    forward_kernels.tiles[(p.blocks,)](
        B, C, p.layout.blocks, b, c, BT=p.design.rows, COLUMNS=columns, num_warps=1, **p.sizes
    )
    return b, c


def _starts(p: Plan, dy: Tensor | None, w: Tensor, initial: Tensor | None) -> Tensor:
    """What each segment starts from, (segments, M, D): states or, with dy, their gradients."""
    M, width = p.rates.shape
    n, back = len(p.layout.segments), dy is not None
    local, start = (torch.empty(n, M, width, device=w.device) for _ in range(2))
    total = torch.empty(n, width, device=w.device)
    wide, warps = p.design.forward
    forward_kernels.local_states[_grid(p, wide)](
        p.u, p.dt, dy, p.z if back else None, p.bias, p.rates, w, p.layout.segments, local, total,
        width, W=width, BT=p.design.walk, BD=wide, REVERSE=back, FETCH=p.fetch, num_warps=warps,
        num_stages=1, **p.sizes,
    )  # fmt: skip
    forward_kernels.carry[(len(p.layout.bounds) * triton.cdiv(width, 32),)](
        local, total, initial, p.rates, p.layout.bounds, start, width,
        BD=32, REVERSE=back, num_warps=1, **p.sizes,
    )  # fmt: skip
    return start


def forward(
    p: Plan, B: Tensor, C: Tensor, initial: Tensor | None, want_final: bool, want_states: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y, the final states (N, M, D), and the state before each block; None where not wanted.

    initial: (N, M, D), fp32.
    """
    M, width = p.rates.shape
    kept = torch.bfloat16 if p.u.dtype == torch.bfloat16 else torch.float32
    y, final = torch.empty_like(p.u), None
    if want_final:  # a sequence without rows ends where it starts
        zero = torch.zeros if initial is None else torch.empty
        final = zero(len(p.layout.bounds), M, width, device=y.device, dtype=torch.float32)
        if initial is not None:
            final.copy_(initial)
    states = torch.empty((p.blocks, M, width) if want_states else (1,), device=y.device, dtype=kept)
    b, c = _tiles(p, B, C, columns=False)
    start = _starts(p, None, b, initial) if p.layout.split else initial
    wide, warps = p.design.forward
    forward_kernels.outputs[_grid(p, wide)](
        p.u, p.dt, p.z, p.bias, p.rates, p.D, b, c, p.layout.segments, start, y, states, final,
        width, int(want_states), W=width, BT=p.design.walk, BD=wide, CUT=p.layout.split,
        KEEP=p.design.rows, FETCH=p.fetch, num_warps=warps, num_stages=1, **p.sizes,
    )  # fmt: skip
    return y, final, states if want_states else None


def backward(
    p: Plan, B: Tensor, C: Tensor, dy: Tensor, dfinal: Tensor | None, states: Tensor,
    want_initial: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of u, dt, z (as u where there is none), A (M, D), B, C, D, bias, and of the
    initial state (N, M, D) or None; dfinal (N, M, D), fp32, or None."""
    M, width = p.rates.shape
    n, device = len(p.layout.segments), dy.device
    b, c = _tiles(p, B, C, columns=True)
    start = dfinal
    if p.layout.split:
        start = _starts(p, dy, _tiles(p, B, C, columns=False)[1], dfinal)
    wide, warps = p.design.back
    tiles = triton.cdiv(width, wide)
    new = lambda *size: torch.empty(*size, device=device, dtype=torch.float32)  # noqa: E731
    du, ddt = torch.empty_like(p.u), torch.empty_like(p.dt)
    dz = du if p.z is None else torch.empty_like(p.z)
    shares = new(tiles, p.blocks, 2, M, p.design.rows)
    dA, dD, dbias = new(n, M, width), new(n, width), new(n, width)
    dinitial = None
    if want_initial:
        dinitial = new(len(p.layout.bounds), M, width).zero_()
        if dfinal is not None:
            dinitial.copy_(dfinal)
    backward_kernels.gradients[_grid(p, wide)](
        p.u, p.dt, p.z, p.bias, p.rates, p.D, b, c, dy, p.layout.segments, start, states,
        du, ddt, dz, shares, torch.empty_like(dA), dA, dD, dbias, dinitial, p.blocks, width,
        W=width, BT=p.design.rows, BD=wide, CUT=p.layout.split, SUM=p.design.sum,
        FETCH=p.fetch, num_warps=warps, num_stages=1, **p.sizes,
    )  # fmt: skip
    dB, dC = torch.empty_like(B), torch.empty_like(C)
    backward_kernels.gather[(p.blocks,)](
        shares, p.layout.blocks, dB, dC, p.blocks, tiles, BT=p.design.rows, num_warps=4, **p.sizes
    )
    return du, ddt, dz, dA.sum(0), dB, dC, dD.sum(0), dbias.sum(0), dinitial
