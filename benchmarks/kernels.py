"""Time the operators on one GPU, with flash-linear-attention and softmax attention beside them.

    python benchmarks/kernels.py [--cases gla-1.3b,gsa-340m] [--seqlens 2048,32768] [--write FILE]

32,768 tokens a call in bf16, log gates included. Times are medians of triton.testing.do_bench in
milliseconds, forward alone without gradients, and forward with backward; memory is the peak above
the inputs in MiB. `floor_ms` bounds forward with backward from below: bytes that must move (each
input read once, each output written once) over 3.02 TB/s, the copy rate of an H100. A peer that is
not installed, or that refuses, is left out. Errors of o and of every gradient are the root mean
square of the difference from the recurrence in fp64 over that of the truth, at 300 tokens.
"""

import argparse
import json
import platform
import subprocess
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

TOKENS = 32768
COPY = 3.02e12  # bytes/s
ERROR_T = 300
Op = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """kind: gla (key gate), decay (one constant per head), gsa or attention; M slots of GSA."""

    kind: str
    H: int
    K: int
    V: int
    M: int = 0

    def inputs(self, batch: int, T: int, normalizer: float, gates: torch.dtype) -> list[Tensor]:
        """q, k, v and what gates the kind, with gradients where they are data."""
        rows = (batch, T, self.H)
        make: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
        q, k = torch.randn(2, *rows, self.K, **make)
        xs = [q, k, torch.randn(*rows, self.V, **make)]
        width = {"gla": self.K, "gsa": self.M}.get(self.kind)
        if width:
            x = torch.randn(*rows, width, device="cuda")
            xs.append((F.logsigmoid(x) / normalizer).to(gates))
        return [x.requires_grad_() for x in xs]

    def floor_ms(self, gate_bytes: int = 2) -> float:
        """Bytes of a forward pass, and of a backward one that reads all of it and do again."""
        gate = {"gla": self.K, "gsa": self.M}.get(self.kind, 0) * gate_bytes
        read, out = 2 * (2 * self.K + self.V) + gate, 2 * self.V
        return TOKENS * self.H * (3 * read + 2 * out) / COPY * 1e3

    def decay(self) -> Tensor:
        """RetNet's log decays, (H,)."""
        return torch.log1p(-torch.exp2(-5 - torch.arange(self.H, device="cuda")))


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

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return call


def engines(case: Case) -> dict[str, Op]:
    """What runs a case, by name."""
    if case.kind == "attention":
        return {
            "flash": attention(SDPBackend.FLASH_ATTENTION),
            "cudnn": attention(SDPBackend.CUDNN_ATTENTION),
        }
    g = case.decay() if case.kind == "decay" else None
    ours: dict[str, Op] = {
        "gla": lambda q, k, v, gk: gla(q, k, v, gk=gk)[0],
        "decay": lambda q, k, v: gla(q, k, v, g=g)[0],
        "gsa": lambda q, k, v, g: gsa(q, k, v, None, g)[0],
    }
    found = {"glactl": ours[case.kind]}
    try:
        from fla.ops.gla import chunk_gla
        from fla.ops.gsa import chunk_gsa
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError:
        return found
    theirs: dict[str, Op] = {
        "gla": lambda q, k, v, gk: chunk_gla(q, k, v, gk)[0],
        "decay": lambda q, k, v: chunk_simple_gla(q, k, v, g_gamma=g)[0],
        "gsa": lambda q, k, v, g: chunk_gsa(q, k, v, 1 - g.float().exp().to(g), g)[0],
    }
    return found | {"fla": theirs[case.kind]}


def reference(case: Case) -> Op:
    """The recurrence."""
    g = case.decay().double() if case.kind == "decay" else None
    return {
        "gla": lambda q, k, v, gk: gla_reference(q, k, v, gk=gk)[0],
        "decay": lambda q, k, v: gla_reference(q, k, v, g=g)[0],
        "gsa": lambda q, k, v, g: gsa_reference(q, k, v, None, g, scale=1.0)[0],
    }[case.kind]


def gradients(op: Op, xs: Sequence[Tensor], do: Tensor) -> list[Tensor]:
    """The output and the gradient of every input."""
    leaves = [x.detach().requires_grad_() for x in xs]
    o = op(*leaves)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


def errors(case: Case, ops: dict[str, Op], normalizer: float) -> dict[str, list[float]]:
    """Relative errors of o and of the gradients, for each engine."""
    xs = case.inputs(1, ERROR_T, normalizer, torch.bfloat16)
    do = torch.randn(1, ERROR_T, case.H, case.V, device="cuda", dtype=torch.bfloat16)
    truth = gradients(reference(case), [x.double() for x in xs], do.double())
    found = {}
    for name, op in ops.items():
        ours = gradients(op, xs, do)
        pairs = zip(ours, truth, strict=True)
        found[name] = [
            float(f"{((a.double() - t).norm() / t.norm()).item():.2e}") for a, t in pairs
        ]
    return found


def measure(op: Op, xs: list[Tensor]) -> dict[str, float]:
    """Times, peak memory and the seconds of the first call."""
    start = time.time()
    do = torch.randn_like(op(*xs))

    def both() -> None:
        for x in xs:
            x.grad = None
        op(*xs).backward(do)

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


def run(case: Case, T: int, normalizer: float, gates: torch.dtype) -> dict[str, Any]:
    """One row: every engine at one length."""
    row: dict[str, Any] = {"floor_ms": round(case.floor_ms(gates.itemsize), 3)}
    ops = engines(case)
    for name, op in ops.items():
        try:
            row[name] = measure(op, case.inputs(TOKENS // T, T, normalizer, gates))
        except Exception as error:
            row[name] = {"error": f"{type(error).__name__}: {error}"[:200]}
    if "fwdbwd_ms" in row.get("fla", {}) and "fwdbwd_ms" in row["glactl"]:
        row["speedup"] = round(row["fla"]["fwdbwd_ms"] / row["glactl"]["fwdbwd_ms"], 2)
    return row


def main() -> None:
    """Measure the cases asked for and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--seqlens", default="2048,8192,32768")
    parser.add_argument("--normalizers", default="16")
    parser.add_argument("--gates", default="bfloat16", help="dtype of the log gates")
    parser.add_argument("--errors", action="store_true", help="also against the recurrence in fp64")
    parser.add_argument("--write", metavar="FILE", help="write the results as JSON")
    args = parser.parse_args()
    torch.manual_seed(0)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    about: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() if commit.returncode == 0 else None,
        "results": [],
    }
    gates = getattr(torch, args.gates)
    for name in args.cases.split(","):
        case = CASES[name]
        for normalizer in map(float, args.normalizers.split(",")):
            for T in map(int, args.seqlens.split(",")):
                row = {"case": name, "seqlen": T, "normalizer": normalizer, "gates": args.gates}
                about["results"].append(row | run(case, T, normalizer, gates))
                print(json.dumps(about["results"][-1]), flush=True)
            if args.errors and case.kind != "attention":
                found = errors(case, engines(case), normalizer)
                row = {"case": name, "normalizer": normalizer, "errors": found}
                about["results"].append(row)
                print(json.dumps(row), flush=True)
            if args.write:
                with open(args.write, "w") as file:
                    json.dump(about, file, indent=1)


if __name__ == "__main__":
    main()
