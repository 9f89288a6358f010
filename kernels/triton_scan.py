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

Counted in the machine code (sm_90, triton 3.7.1), a warp's instructions for a row of its 32
channels of 16 entries and, in brackets, for a channel, entry and token:

    kernel           "16 rows"       "8 rows"        "lanes", fp32      predicted, ms
    outputs          142 (8.9)       146 (9.1)       139 (8.7)          0.36, 0.36, 0.36
    gradients        465 (29.1)      484 (30.3)      726 (45.4)         1.05, 1.10, 1.64
    local_states     102 (6.4) and, backwards, 111 (7.0)                0.33 and 0.36

Predicted, not measured: at one instruction a clock of each of 528 schedulers, 1.755e9 clocks a
second, or, where that is longer, eight clocks for each of exp2 and 1/x: 20 a row in `outputs`, with
the softplus and the gate. Of the 29 of `gradients`, 13 are (1) to (5) and one the exp2; 8 are sums
over channels, copies and reads of an entry, 7 the rows' softplus, gates, reads and writes. No loop
over rows in `outputs` and none over entries in `gradients` spills; round the latter "16 rows" keeps
460 bytes. A warp a program and at most 255 registers: 8 fit a multiprocessor, 1,024 programs
are one wave, two warps a scheduler. What they wait for is on its way early: a block's rows all at
once, an entry's numbers an entry ahead, B and C of `outputs` some 130 instructions ahead. At two
thirds of the rate 0.55 and 1.6 ms, 2.3 with `gather`.

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
        rows: BT, the rows of a block, all of a thread; a divisor of 128.
        forward, back: channels of a program and its warps, 32 channels a warp.
        sum: how sums over channels are taken, see triton_scan_backward.py; "dot" wants 8 rows and
            16 channels or more.
        programs: programs wanted; where sequences times tiles give fewer, sequences are cut.
    """

    rows: int
    forward: tuple[int, int]
    back: tuple[int, int]
    sum: Literal["lanes", "dot"]
    programs: int = 1024


DESIGNS = {
    "16 rows": Design(16, (32, 1), (32, 1), "dot"),
    "8 rows": Design(8, (32, 1), (32, 1), "dot"),
    "lanes": Design(8, (32, 1), (32, 1), "lanes"),
}


def design(M: int, dtype: torch.dtype) -> Design:
    """The rule: a product's operands have tf32's digits, enough for 16-bit inputs."""
    return DESIGNS["lanes" if dtype == torch.float32 else "16 rows"]


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
    tiles = triton.cdiv(width, chosen.forward[0])
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
        width, W=width, BT=p.design.rows, BD=wide, REVERSE=back, num_warps=warps,
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
    y, final, states = torch.empty_like(p.u), None, None
    if want_final:  # a sequence without rows ends where it starts
        zero = torch.zeros if initial is None else torch.empty
        final = zero(len(p.layout.bounds), M, width, device=y.device, dtype=torch.float32)
        if initial is not None:
            final.copy_(initial)
    if want_states:
        states = torch.empty(p.blocks, M, width, device=y.device, dtype=kept)
    b, c = _tiles(p, B, C, columns=False)
    start = _starts(p, None, b, initial) if p.layout.split else initial
    wide, warps = p.design.forward
    forward_kernels.outputs[_grid(p, wide)](
        p.u, p.dt, p.z, p.bias, p.rates, p.D, b, c, p.layout.segments, start, y, states, final,
        width, W=width, BT=p.design.rows, BD=wide, CUT=p.layout.split, num_warps=warps,
        num_stages=1, **p.sizes,
    )  # fmt: skip
    return y, final, states


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
        W=width, BT=p.design.rows, BD=wide, CUT=p.layout.split, SUM=p.design.sum, num_warps=warps,
        num_stages=1, **p.sizes,
    )  # fmt: skip
    dB, dC = torch.empty_like(B), torch.empty_like(C)
    backward_kernels.gather[(p.blocks,)](
        shares, p.layout.blocks, dB, dC, p.blocks, tiles, BT=p.design.rows, num_warps=4, **p.sizes
    )
    return du, ddt, dz, dA.sum(0), dB, dC, dD.sum(0), dbias.sum(0), dinitial
