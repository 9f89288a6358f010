"""Time gated linear attention on one GPU, with flash-linear-attention beside it where installed.

    python benchmarks/kernels.py [--cases gla-1.3b,gla-340m] [--seqlens 2048,32768] [--write FILE]

32,768 tokens a call in bf16, log gates included. Times are medians of triton.testing.do_bench in
milliseconds, forward alone without gradients, and forward with backward; memory is the peak above
the inputs in MiB. `floor_ms` bounds forward with backward from below: bytes that must move (each
input read once, each output written once) over 3.02 TB/s, the copy rate of an H100.
"""

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from glactl.kernels.triton_gla_op import gla_key

TOKENS = 32768
CASES = {"gla-1.3b": (4, 256, 512), "gla-340m": (4, 128, 256)}  # heads, key and value width


def inputs(case: str, seqlen: int, normalizer: float) -> list[Tensor]:
    """q, k, v and log gates, bf16, with gradients."""
    H, K, V = CASES[case]
    rows = (TOKENS // seqlen, seqlen, H)
    make = {"device": "cuda", "dtype": torch.bfloat16}
    q, k = torch.randn(2, *rows, K, **make)
    g = (F.logsigmoid(torch.randn(*rows, K, device="cuda")) / normalizer).bfloat16()
    return [x.requires_grad_() for x in (q, k, torch.randn(*rows, V, **make), g)]


def floor_ms(case: str) -> float:
    """Bytes of q, k, g and v, o read or written forward, and again with gradients backward."""
    H, K, V = CASES[case]
    forward, backward = 3 * K + 2 * V, 6 * K + 3 * V
    return round(TOKENS * H * 2 * (forward + backward) / 3.02e12 * 1e3, 3)


def measure(op: Callable[..., Tensor], xs: list[Tensor]) -> dict[str, float]:
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


def ours(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """The engine of this project."""
    return gla_key(q, k, v, g)[0]


def peer() -> Callable[..., Tensor] | None:
    """flash-linear-attention's chunk_gla, or None."""
    try:
        from fla.ops.gla import chunk_gla
    except ImportError:
        return None
    return lambda q, k, v, g: chunk_gla(q, k, v, g)[0]


def main() -> None:
    """Measure the cases asked for and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--seqlens", default="2048,8192,32768")
    parser.add_argument("--normalizers", default="16")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--write", metavar="FILE", help="write the results as JSON")
    args = parser.parse_args()
    torch.manual_seed(0)
    engines = {"glactl": ours}
    beside = None if args.no_peer else peer()
    if beside:
        engines["fla"] = beside
    results = []
    for case in args.cases.split(","):
        for normalizer in map(float, args.normalizers.split(",")):
            for seqlen in map(int, args.seqlens.split(",")):
                row = {"case": case, "seqlen": seqlen, "normalizer": normalizer}
                row["floor_ms"] = floor_ms(case)
                for name, op in engines.items():
                    row[name] = measure(op, inputs(case, seqlen, normalizer))
                if beside:
                    row["speedup"] = round(row["fla"]["fwdbwd_ms"] / row["glactl"]["fwdbwd_ms"], 2)
                results.append(row)
                print(json.dumps(row), flush=True)
    if args.write:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
        about = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
            "commit": commit.stdout.strip() if commit.returncode == 0 else None,
        }
        with open(args.write, "w") as file:
            json.dump({**about, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
