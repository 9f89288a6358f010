"""Time the operators on the CPU beside softmax attention and the recurrence.

    python benchmarks/operators_cpu.py [--threads 2] [--seconds 2] [--write FILE]

Forward and backward, fp32, 4 heads, key and value width 64, 64 slots; 4,096 tokens a call as 8
sequences of 512, and 8,192 tokens as one sequence. Gates are log-sigmoid / 16 of normal numbers,
"strong" ones / 0.05, which no chunk can take as one product. Times are medians in milliseconds,
the operators taken in turns so that what else the machine does falls on all of them.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from glactl.kernels import gla, gla_reference, gsa

HEADS, WIDTH = 4, 64
Call = Callable[[], object]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention of PyTorch, on (B, T, H, K)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def calls(B: int, T: int) -> dict[str, Call]:
    """Forward and backward of every operator, by name."""
    generator = torch.Generator().manual_seed(0)

    def randn(*last: int) -> Tensor:
        return torch.randn(B, T, HEADS, *last, generator=generator)

    qkv, do = [randn(WIDTH) for _ in range(3)], randn(WIDTH)
    mild, strong = F.logsigmoid(randn(WIDTH)) / 16, F.logsigmoid(randn(WIDTH)) / 0.05
    scalar = F.logsigmoid(randn()) / 16

    def both(op: Callable[..., Tensor], *gate: Tensor) -> Call:
        leaves = [x.clone().requires_grad_() for x in (*qkv, *gate)]
        return lambda: torch.autograd.grad(op(*leaves), leaves, do)

    found = {
        "attention": both(attention),
        "gla, key gate": both(lambda q, k, v, g: gla(q, k, v, gk=g)[0], mild),
        "gla, key gate, strong": both(lambda q, k, v, g: gla(q, k, v, gk=g)[0], strong),
        "gla, value gate": both(lambda q, k, v, g: gla(q, k, v, gv=g)[0], mild),
        "gla, scalar decay": both(lambda q, k, v, g: gla(q, k, v, g=g)[0], scalar),
        "gsa": both(lambda q, k, v, g: gsa(q, k, v, None, g)[0], mild),
        "gsa, strong": both(lambda q, k, v, g: gsa(q, k, v, None, g)[0], strong),
    }
    if T <= 512:  # the recurrence keeps a state for every token
        found["recurrence, key gate"] = both(
            lambda q, k, v, g: gla_reference(q, k, v, gk=g)[0], mild
        )
    return found


def medians(todo: dict[str, Call], seconds: float) -> dict[str, float]:
    """Median milliseconds of each, all called once a round for at least `seconds` and 5 rounds."""
    took: dict[str, list[float]] = {name: [] for name in todo}
    for call in todo.values():
        call()
    start, rounds = time.perf_counter(), 0
    while rounds < 5 or time.perf_counter() - start < seconds * len(todo):
        for name, call in todo.items():
            before = time.perf_counter()
            call()
            took[name].append(1e3 * (time.perf_counter() - before))
        rounds += 1
    return {name: round(statistics.median(times), 2) for name, times in took.items()}


def processor() -> str:
    """The name of the processor, as Linux has it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    """Measure, print a line for each operator, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2, help="for each operator and length")
    parser.add_argument("--write", metavar="FILE", help="write the results as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load = os.getloadavg()[0]
    print(f"{args.threads} threads, load average {load:.2f} before; ms, forward and backward")
    results = []
    for B, T in ((8, 512), (1, 8192)):
        times = medians(calls(B, T), args.seconds)
        for name, took in times.items():
            ratio = times["attention"] / took
            results.append({"B": B, "T": T, "name": name, "ms": took, "of_attention": ratio})
            print(f"B {B} T {T:5} {name:22} {took:9.2f}  attention takes {ratio:6.2f} x", end="")
            if "recurrence, key gate" in times:
                print(f", the recurrence {times['recurrence, key gate'] / took:6.2f} x", end="")
            print(flush=True)
        strong = times["gla, key gate, strong"] / times["gla, key gate"]
        print(f"B {B} T {T:5} strong gates take {strong:.2f} x the time of mild ones")
    if args.write:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
        about = {
            "device": processor(),
            "threads": args.threads,
            "load": load,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "commit": commit.stdout.strip() if commit.returncode == 0 else None,
        }
        with open(args.write, "w") as file:
            json.dump({**about, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
