"""The measured calls of `glactl profile`, and where softmax attention falls behind.

Every length is measured with the same number of tokens in a call, so shorter sequences come in
larger batches and the times of one mixer are those of the same work.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from glactl.measure import Rates, peak_bytes, timing
from glactl.models.cost import lm_cost
from glactl.models.lm import LMSpec, build_lm, token_losses
from glactl.operators import ERROR_T, Operator, Shape, error

SECONDS = 0.5  # spent on repeating one measurement


@dataclass(frozen=True)
class Measured:
    """One measured call; times in seconds, memory and moved in bytes."""

    part: str  # operator or model
    name: str
    work: str  # forward or forward+backward
    T: int
    batch: int
    median: float
    p10: float
    p90: float
    repeats: int
    tokens_per_s: float
    flops: float
    moved: float
    floor: float
    of_floor: float  # floor / median, 1 is the best possible
    peak: int | None = None
    error: float | None = None
    error_T: int | None = None


def crossover(rows: Sequence[Measured]) -> dict[str, dict[str, Any]]:
    """For each linear mixer: the length at which softmax attention's time passes its own.

    Of forward and backward together; the length is interpolated between the two measured ones
    around it, both times taken as powers of the length. `length` is None where one of the two is
    faster at every length measured, and `faster` says which is at the longest, `ratio` how much.
    """
    times: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.work == "forward+backward":
            times.setdefault(row.name, {})[row.T] = row.median / (row.batch * row.T)
    attention = times.pop("attention", {})
    found: dict[str, dict[str, Any]] = {}
    for name, own in times.items():
        lengths = sorted(attention.keys() & own.keys())
        if not lengths:
            continue
        # log of attention's time over the mixer's, per length; positive: the mixer is faster
        ratio = {T: math.log(attention[T] / own[T]) for T in lengths}
        length = None
        for a, b in pairwise(lengths):
            if ratio[a] < 0 <= ratio[b]:
                share = ratio[a] / (ratio[a] - ratio[b])
                length = round(a * (b / a) ** share)
        last = ratio[lengths[-1]]
        found[name] = {
            "length": length,
            "faster": name if last >= 0 else "attention",
            "ratio": math.exp(abs(last)),
            "from": lengths[0],
            "to": lengths[-1],
        }
    return found


def measure_operator(
    operator: Operator,
    shape: Shape,
    device: torch.device,
    reached: Rates,
    advance: Callable[..., None],
    scan: bool = False,
) -> list[Measured]:
    """One operator at one length: forward, and forward with backward.

    With `scan` only the latter, quickly, without memory and error.
    """
    inputs = operator.inputs(shape, device, 0)
    worst, at = (None, None) if scan else error(operator, shape, device, 0)
    leaves = [x.detach().requires_grad_() for x in inputs]
    do = torch.ones_like(inputs[2])

    def forward() -> None:
        with torch.no_grad():
            operator.call(*inputs)

    def both() -> None:
        torch.autograd.grad(operator.call(*leaves), leaves, do)

    rows = []
    for work, call in (("forward", forward), ("forward+backward", both)):
        if scan and work == "forward":
            continue
        moved = operator.moved(shape, work != "forward")
        flops = operator.flops(shape, work != "forward")
        row = _measure(
            ("operator", operator.name, work), call, shape, flops, moved, device, reached, scan
        )
        rows.append(replace(row, error=worst, error_T=at))
        advance(1)
    return rows


def measure_model(
    name: str,
    spec: LMSpec,
    shape: Shape,
    device: torch.device,
    reached: Rates,
    advance: Callable[..., None],
) -> list[Measured]:
    """One model at one length: its loss on random tokens, and that with every gradient.

    The error is that of its hidden states against the same weights in fp64.
    """
    lm = build_lm(spec, 0, device=device, dtype=shape.dtype).eval()
    assert spec.vocab_size is not None
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(spec.vocab_size, (shape.batch, shape.T + 1), generator=generator)
    tokens, targets = drawn[:, :-1].to(device), drawn[:, 1:]
    parameters = [p for p in lm.parameters() if p.requires_grad]

    def loss() -> torch.Tensor:
        hidden, _ = lm(tokens)
        return token_losses(lm, hidden, targets).mean()

    def forward() -> None:
        with torch.no_grad():
            loss()

    def both() -> None:
        torch.autograd.grad(loss(), parameters)

    at = min(shape.T, ERROR_T)
    with torch.no_grad():
        ours = lm(tokens[:1, :at])[0].double()
        truth = build_lm(spec, 0, device=device, dtype=torch.float64)
        truth.load_state_dict(lm.state_dict())
        exact = truth.eval()(tokens[:1, :at])[0]
        worst = ((ours - exact).norm() / exact.norm()).item()
    cost = lm_cost(spec, shape.T)
    rows = []
    for work, call in (("forward", forward), ("forward+backward", both)):
        flops = (cost.flops_token if work == "forward" else cost.flops_token_train) * shape.tokens
        moved = cost.bytes_token * (1 if work == "forward" else 3) * shape.tokens
        row = _measure(("model", name, work), call, shape, flops, moved, device, reached)
        rows.append(replace(row, error=worst, error_T=at))
        advance(1)
    return rows


def _measure(
    what: tuple[str, str, str],
    call: Callable[[], None],
    shape: Shape,
    flops: float,
    moved: float,
    device: torch.device,
    reached: Rates,
    scan: bool = False,
) -> Measured:
    peak = None if scan else peak_bytes(call, device)
    took = timing(call, device, SECONDS / 4 if scan else SECONDS)
    floor = reached.floor(moved, flops)
    return Measured(
        *what,
        T=shape.T,
        batch=shape.batch,
        **asdict(took),
        tokens_per_s=shape.tokens / took.median,
        flops=flops,
        moved=moved,
        floor=floor,
        of_floor=floor / took.median,
        peak=peak,
    )


def scan_operators(
    operators: Sequence[Operator],
    base: Shape,
    lengths: Sequence[int],
    tokens: int,
    device: torch.device,
    reached: Rates,
    advance: Callable[..., None],
) -> list[Measured]:
    """Forward and backward of the operators at more lengths, for the crossover."""
    rows = []
    for T in lengths:
        shape = replace(base, T=T, batch=max(1, tokens // T))
        for operator in operators:
            rows += measure_operator(operator, shape, device, reached, advance, scan=True)
    return rows
