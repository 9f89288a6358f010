"""Time the operators on one GPU, with flash-linear-attention and softmax attention beside them.

    python benchmarks/kernels.py [--cases gla-1.3b,gsa-340m] [--seqlens 2048,32768] [--write FILE]

32,768 tokens a call in bf16, log gates included. Times are medians of triton.testing.do_bench in
milliseconds, forward alone without gradients, and forward with backward; memory is the peak above
the inputs in MiB. `floor_ms` bounds forward with backward from below: bytes that must move (each
input read once, each output written once) over 3.02 TB/s, the copy rate of an H100; `floor_share`
is our part of it. A peer that is not installed, or that refuses, is left out. Errors of o, of the
final state and of every gradient are the root mean square of the difference from the recurrence in
fp64 over that of the truth, at 300 tokens. Log gates are log-sigmoid of a normal draw over the
normalizer, or `spread`: the decay over 32 rows is uniform from 0 to e^-90 in every channel.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from glactl.kernels import gla, gla_reference, gsa, gsa_reference
from glactl.manifest import measured_on

TOKENS = 32768
COPY = 3.02e12  # bytes/s
ERROR_T = 300
Op = Callable[..., tuple[Tensor, Any]]  # o and the final state or states


@dataclass(frozen=True)
class Case:
    """kind: gla (key gate), decay (one constant per head), gsa or attention; M slots of GSA."""

    kind: str
    H: int
    K: int
    V: int
    M: int = 0

    def inputs(self, batch: int, T: int, kind: str, dtype: torch.dtype) -> list[Tensor]:
        """q, k, v and what gates the kind, with gradients where they are data."""
        rows = (batch, T, self.H)
        make: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
        q, k = torch.randn(2, *rows, self.K, **make)
        xs = [q, k, torch.randn(*rows, self.V, **make)]
        width = {"gla": self.K, "gsa": self.M}.get(self.kind)
        if width:
            xs.append(log_gates((*rows, width), kind).to(dtype))
        return [x.requires_grad_() for x in xs]

    def floor_ms(self, gate_bytes: int = 2) -> float:
        """Bytes of a forward pass, and of a backward one that reads all of it and do again."""
        gate = {"gla": self.K, "gsa": self.M}.get(self.kind, 0) * gate_bytes
        read, out = 2 * (2 * self.K + self.V) + gate, 2 * self.V
        return TOKENS * self.H * (3 * read + 2 * out) / COPY * 1e3

    def decay(self) -> Tensor:
        """RetNet's log decays, (H,)."""
        return torch.log1p(-torch.exp2(-5 - torch.arange(self.H, device="cuda")))


def log_gates(shape: tuple[int, ...], kind: str) -> Tensor:
    """Log gates (B, T, H, width): `kind` is a normalizer, or "spread"."""
    x = torch.randn(shape, device="cuda")
    if kind != "spread":
        return F.logsigmoid(x) / float(kind)
    B, T, H, W = shape
    groups = -(-T // 32)
    part = torch.rand(B, groups, 32, H, W, device="cuda")
    whole = -90 * torch.rand(B, groups, 1, H, W, device="cuda")
    return (whole * part / part.sum(2, keepdim=True)).flatten(1, 2)[:, :T]


CASES = {
    "gla-1.3b": Case("gla", 4, 256, 512),
    "gla-340m": Case("gla", 4, 128, 256),
    "decay-1.3b": Case("decay", 4, 256, 512),
    "gsa-1.3b": Case("gsa", 4, 512, 512, 64),
    "gsa-340m": Case("gsa", 4, 256, 256, 64),
    "attention-128": Case("attention", 16, 128, 128),
}


def attention(backend: SDPBackend) -> Op:
    """PyTorch's causal attention by one backend."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        with sdpa_kernel(backend):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2), None

    return call


def engines(case: Case, peers: bool = True) -> dict[str, Op]:
    """What runs a case, by name; flash-linear-attention where it is installed, if peers."""
    if case.kind == "attention":
        return {
            "flash": attention(SDPBackend.FLASH_ATTENTION),
            "cudnn": attention(SDPBackend.CUDNN_ATTENTION),
        }
    g = case.decay() if case.kind == "decay" else None
    scale = case.K**-0.5
    ours: dict[str, Op] = {
        "gla": lambda q, k, v, gk, **kw: gla(q, k, v, gk=gk, backend="triton", **kw),
        "decay": lambda q, k, v, **kw: gla(q, k, v, g=g, backend="triton", **kw),
        "gsa": lambda q, k, v, g, **kw: gsa(q, k, v, None, g, scale=scale, backend="triton", **kw),
    }
    found = {"glactl": ours[case.kind]}
    if not peers:
        return found
    try:
        from fla.ops.gla import chunk_gla
        from fla.ops.gsa import chunk_gsa
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError:
        return found
    theirs: dict[str, Op] = {
        "gla": lambda q, k, v, gk, **kw: chunk_gla(q, k, v, gk, **kw),
        "decay": lambda q, k, v, **kw: chunk_simple_gla(q, k, v, g_gamma=g, **kw),
        "gsa": lambda q, k, v, g, **kw: chunk_gsa(
            q, k, v, 1 - g.float().exp().to(g), g, scale=scale, **kw
        ),
    }
    return found | {"fla": theirs[case.kind]}


def reference(case: Case) -> Op:
    """The recurrence."""
    g = case.decay().double() if case.kind == "decay" else None
    ops: dict[str, Op] = {
        "gla": lambda q, k, v, gk, **kw: gla_reference(q, k, v, gk=gk, **kw),
        "decay": lambda q, k, v, **kw: gla_reference(q, k, v, g=g, **kw),
        "gsa": lambda q, k, v, g, **kw: gsa_reference(q, k, v, None, g, scale=case.K**-0.5, **kw),
    }
    return ops[case.kind]


def results(op: Op, xs: Sequence[Tensor], do: Tensor) -> dict[str, list[Tensor]]:
    """The output, the final states and the gradient of every input."""
    leaves = [x.detach().requires_grad_() for x in xs]
    o, final = op(*leaves, output_final_state=True)
    grads = torch.autograd.grad(o, leaves, do)
    state = list(final) if isinstance(final, (tuple, list)) else [final]
    names = ("dq", "dk", "dv", "dg")
    return {"o": [o], "state": state} | {n: [x] for n, x in zip(names, grads, strict=False)}


def errors(
    case: Case, ops: dict[str, Op], kind: str, gates: torch.dtype
) -> dict[str, dict[str, float]]:
    """Relative errors of o, final state and gradients, for each engine."""
    xs = case.inputs(1, ERROR_T, kind, gates)
    do = torch.randn(1, ERROR_T, case.H, case.V, device="cuda", dtype=torch.bfloat16)
    truth = results(reference(case), [x.double() for x in xs], do.double())

    def error(ours: list[Tensor], true: list[Tensor]) -> float:
        wrong = sum((a.double() - t).square().sum().item() for a, t in zip(ours, true, strict=True))
        return float(f"{(wrong / sum(t.square().sum().item() for t in true)) ** 0.5:.2e}")

    return {
        name: {key: error(value, truth[key]) for key, value in results(op, xs, do).items()}
        for name, op in ops.items()
    }


def kernel_times(op: Op, xs: list[Tensor]) -> dict[str, float]:
    """Milliseconds of every kernel in one call forward and backward, largest first."""
    calls = 5
    do = torch.randn_like(op(*xs)[0])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as record:
        for _ in range(calls):
            torch.autograd.grad(op(*xs)[0], xs, do)
        torch.cuda.synchronize()
    times: dict[str, float] = {}
    for event in record.key_averages():
        key = event.key[:50]
        times[key] = times.get(key, 0.0) + event.device_time_total / calls / 1e3
    return {k: round(t, 4) for k, t in sorted(times.items(), key=lambda x: -x[1]) if t > 0}


def measure(op: Op, xs: list[Tensor]) -> dict[str, float]:
    """Times, peak memory and the seconds of the first call."""
    start = time.time()
    do = torch.randn_like(op(*xs)[0])

    def both() -> None:
        for x in xs:
            x.grad = None
        op(*xs)[0].backward(do)

    def forward() -> None:
        with torch.no_grad():
            op(*xs)

    both()
    forward()
    torch.cuda.synchronize()
    first = time.time() - start
    for x in xs:
        x.grad = None
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - base) / 2**20
    fwd, fwdbwd = (
        triton.testing.do_bench(f, warmup=25, rep=100, return_mode="median")
        for f in (forward, both)
    )
    return {
        "fwd_ms": round(fwd, 4),
        "fwdbwd_ms": round(fwdbwd, 4),
        "peak_mib": round(peak),
        "first_call_s": round(first, 1),
    }


def run(
    case: Case, ops: dict[str, Op], T: int, kind: str, gates: torch.dtype, kernels: bool
) -> dict[str, Any]:
    """One row: every engine at one length."""
    row: dict[str, Any] = {"floor_ms": round(case.floor_ms(gates.itemsize), 3)}
    for name, op in ops.items():
        try:
            row[name] = measure(op, case.inputs(TOKENS // T, T, kind, gates))
        except Exception as error:
            row[name] = {"error": f"{type(error).__name__}: {error}"[:200]}
    ours = row.get("glactl", {})
    if "fwdbwd_ms" in ours:
        row["floor_share"] = round(row["floor_ms"] / ours["fwdbwd_ms"], 2)
        if "fwdbwd_ms" in row.get("fla", {}):
            row["speedup"] = round(row["fla"]["fwdbwd_ms"] / ours["fwdbwd_ms"], 2)
        if kernels:
            xs = case.inputs(TOKENS // T, T, kind, gates)
            row["glactl_kernels_ms"] = kernel_times(ops["glactl"], xs)
    return row


def main() -> None:
    """Measure the cases asked for and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--seqlens", default="2048,8192,32768")
    parser.add_argument("--normalizers", default="16", help="numbers, and `spread`")
    parser.add_argument("--gates", default="bfloat16", help="dtype of the log gates")
    parser.add_argument("--errors", action="store_true", help="also against the recurrence in fp64")
    parser.add_argument(
        "--kernels", action="store_true", help="also the time of each kernel of ours"
    )
    parser.add_argument("--no-fla", action="store_true", help="leave flash-linear-attention out")
    parser.add_argument("--commit", help="of the source, where it is no git checkout")
    parser.add_argument("--write", metavar="FILE", help="write the results as JSON")
    args = parser.parse_args()
    torch.manual_seed(0)
    about: dict[str, Any] = {
        **measured_on(torch.device("cuda"), args.commit),
        "results": [],
    }
    gates = getattr(torch, args.gates)
    for name in args.cases.split(","):
        case = CASES[name]
        ops = engines(case, not args.no_fla)
        for normalizer in args.normalizers.split(","):
            for T in map(int, filter(None, args.seqlens.split(","))):
                row = {"case": name, "seqlen": T, "normalizer": normalizer, "gates": args.gates}
                about["results"].append(row | run(case, ops, T, normalizer, gates, args.kernels))
                print(json.dumps(about["results"][-1]), flush=True)
            if args.errors and case.kind != "attention":
                found = errors(case, ops, normalizer, gates)
                row = {"case": name, "normalizer": normalizer, "gates": args.gates}
                row["errors"] = found
                about["results"].append(row)
                print(json.dumps(row), flush=True)
            if args.write:
                with open(args.write, "w") as file:
                    json.dump(about, file, indent=1)


if __name__ == "__main__":
    main()
