"""One candidate of `glactl profile --tune`, held against fp64 and timed: a process of its own.

An illegal memory access ends a process's use of the device, so each candidate has a process. It
reads a `Work` as JSON from stdin, finds the candidate's tiles in the table at $GLACTL_TILES, where
every process looks for them, and prints a `Trial` as JSON.

Verified are the output, the final state and every gradient, the initial state's among them, at 300
rows, three blocks of which the last is ragged, for gates of each case, twice: for two sequences,
which are cut into segments, and for as many copies of them as the launches of a full device take.
Uninitialised memory holds NaN meanwhile.

Timed is a forward with its backward, as a CUDA graph: the launches of a small call would take the
host longer than the device.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glactl.kernels import gla, gla_reference, gsa, gsa_reference
from glactl.kernels.tuned import used
from glactl.measure import timing

T_VERIFIED = 300
SEQUENCES = 2  # that are verified one by one
HEADS = 2  # at most, of keys, in verification: the reference keeps a state a row
FULL = 1056  # blocks times heads from which no launch cuts sequences or splits its tiles
SECONDS = 0.3  # spent on repeating one measurement
# Gates by engine and case; the first is the one that matters, "strong" takes the exact path. The
# number divides log sigmoid; None is no gate, and 0 a decay of each head that does not change.
CASES: dict[str, dict[str, float | None]] = {
    "key": {"mild": 16.0, "strong": 0.25},
    "scalar": {"mild": 16.0, "fixed": 0.0, "none": None},
    "slots": {"mild": 8.0, "strong": 0.25},
}


@dataclass(frozen=True)
class Work:
    """What is tuned: an engine at widths of a head, heads of queries and of keys, one dtype."""

    engine: str
    K: int
    V: int
    M: int
    heads: int
    groups: int
    dtype: str
    seqlen: int
    batch: int
    device: str

    @property
    def cases(self) -> list[str]:
        """The gates that are verified; the first are those that times are compared for."""
        return list(CASES[self.engine])


@dataclass(frozen=True)
class Trial:
    """What became of a candidate.

    Attributes:
        key: (K, V, M, R) of the kernels, after padding.
        errors: case and tensor -> root mean square of the error and of the truth, and the number
            of numbers that the first is of.
        seconds: case -> a forward with its backward.
        refused: why there are no errors and seconds.
    """

    key: list[int] = field(default_factory=list)
    errors: dict[str, list[float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    refused: str | None = None


def inputs(
    work: Work, case: str, B: int, T: int, G: int, device: torch.device
) -> tuple[list[str], list[Tensor]]:
    """Names and values of q, k, v, the gate and the initial states, for G heads of keys."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    dtype = getattr(torch, work.dtype)
    R = work.heads // work.groups
    names = ["q", "k", "v"]
    xs = [draw(B, T, H, D).to(dtype) for H, D in ((G * R, work.K), (G, work.K), (G, work.V))]
    divisor = CASES[work.engine][case]
    width = {"key": [work.K], "scalar": [], "slots": [work.M]}[work.engine]
    if divisor is not None:
        names.append("g")
        fixed = torch.log1p(-torch.exp2(-5 - torch.arange(G, dtype=torch.float32)))
        xs.append(F.logsigmoid(draw(B, T, G, *width)) / divisor if divisor else fixed)
    if work.engine == "slots":
        names += ["Sk", "Sv"]
        xs += [draw(B, G, work.K, work.M), draw(B, G, work.M, work.V)]
    else:
        names.append("S")
        xs.append(draw(B, G, work.K, work.V))
    return names, [x.to(device) for x in xs]


def operator(
    work: Work, reference: bool, states: bool = True
) -> Callable[[list[str], list[Tensor]], list[Tensor]]:
    """The engine or the definition, of `inputs`: o, and with `states` from the initial to the final
    ones."""
    run: Any = gsa_reference if work.engine == "slots" else gla_reference
    options: dict[str, Any] = {"output_final_state": states}
    if not reference:
        run = gsa if work.engine == "slots" else gla
        options["backend"] = "triton"

    def call(names: list[str], xs: list[Tensor]) -> list[Tensor]:
        x = dict(zip(names, xs, strict=True))
        q, k, v, g = x["q"], x["k"], x["v"], x.get("g")
        if work.engine == "slots":
            initial = (x["Sk"], x["Sv"]) if states else None
            # logits of about the size that they have in a model
            o, final = run(q, k, v, None, g, scale=work.K**-0.5, initial_state=initial, **options)
            return [o, *(final or ())]
        gate = {"gk" if work.engine == "key" else "g": g}
        o, final = run(q, k, v, **gate, initial_state=x["S"] if states else None, **options)
        return [o] if final is None else [o, final]

    return call


def with_gradients(
    call: Callable[[list[str], list[Tensor]], list[Tensor]],
    names: list[str],
    xs: list[Tensor],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The results and the gradient of every input, for a loss that weighs each result.

    The weights of o are numbers of `dtype`, whatever the type that is computed in.
    """
    leaves = [x.detach().requires_grad_() for x in xs]
    out = call(names, leaves)
    weights = []
    for n, x in enumerate(out):
        # drawn for SEQUENCES sequences, as `inputs` are: copies of them have the same
        generator = torch.Generator().manual_seed(n + 1)
        w = torch.randn((SEQUENCES, *x.shape[1:]), generator=generator)
        w = (w.to(dtype) if n == 0 else w).to(x.device, x.dtype)
        weights.append(w.repeat(len(x) // SEQUENCES, *[1] * (x.dim() - 1)))
    grads = torch.autograd.grad(out, leaves, weights)
    found = {("o", "final", "final v")[n]: x.detach() for n, x in enumerate(out)}
    return found | {f"d{name}": x for name, x in zip(names, grads, strict=True)}


def rms(x: Tensor) -> float:
    """The root mean square."""
    return x.double().square().mean().sqrt().item()


def verify(work: Work, device: torch.device) -> dict[str, list[float]]:
    """The errors of every case and tensor, against the definition in fp64."""
    G = min(work.groups, HEADS)
    blocks = -(-T_VERIFIED // 128)
    full = -(-FULL // (blocks * SEQUENCES * G))
    errors, dtype = {}, getattr(torch, work.dtype)
    for case in work.cases:
        names, xs = inputs(work, case, SEQUENCES, T_VERIFIED, G, device)
        truth = with_gradients(operator(work, True), names, [x.double() for x in xs], dtype)
        for copies in (1, full):
            # a decay of the heads (H,) is one for all sequences
            ys = [x if x.dim() == 1 else x.repeat(copies, *[1] * (x.dim() - 1)) for x in xs]
            ours = with_gradients(operator(work, False), names, ys, dtype)
            for name, t in truth.items():
                if t.dim() == 1:
                    error = rms(ours[name].double() / copies - t)
                else:
                    error = rms(ours[name].double().view(copies, *t.shape) - t)
                numbers = t.numel() * (1 if t.dim() == 1 else copies)
                errors[f"{case} {name} x{copies}"] = [error, rms(t), numbers]
    return errors


def time_case(work: Work, case: str, device: torch.device) -> float:
    """Seconds of a forward with its backward, as a replay of a CUDA graph."""
    names, xs = inputs(work, case, work.batch, work.seqlen, work.groups, device)
    leaves = [x.requires_grad_() for n, x in zip(names, xs, strict=True) if n in "qkvg"]
    do = leaves[0].new_ones(*leaves[0].shape[:3], work.V)
    call = operator(work, False, states=False)

    def both() -> None:
        torch.autograd.grad(call(names[: len(leaves)], leaves), leaves, do)

    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # compiles, and fills the caches of the layouts
        both()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        both()
    return timing(graph.replay, device, SECONDS).median


def run(work: Work) -> Trial:
    """Verify and time what this process finds in its table; a failure is the trial's result."""
    device = torch.device(work.device)
    try:
        torch.cuda.set_device(device)
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills what is uninitialised
        errors = verify(work, device)
        torch.use_deterministic_algorithms(False)
        keys = {key for _, key in used}
        if len(keys) != 1:
            return Trial(refused=f"the Triton engine does not take these inputs ({len(keys)} keys)")
        (key,) = keys
        seconds = {case: time_case(work, case, device) for case in work.cases}
    except Exception as error:  # whatever a compiler, a driver or a launch raises
        first = (str(error).strip() or "no message").splitlines()[0]
        return Trial(refused=f"{type(error).__name__}: {first}")
    return Trial([key.K, key.V, key.M, key.R], errors, seconds)


def parse(text: str) -> Trial:
    """The trial that a process printed as its last line."""
    found = json.loads(text.splitlines()[-1])
    return Trial(**{f.name: found[f.name] for f in fields(Trial)})


def main() -> None:
    """The process: a Work from stdin, a Trial to stdout."""
    sys.stdout.write(json.dumps(asdict(run(Work(**json.load(sys.stdin))))) + "\n")
    sys.stdout.flush()  # a broken context may end the process where it is taken down


if __name__ == "__main__":
    main()
