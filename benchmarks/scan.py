"""Time the selective scan on one GPU: every design, its kernels, beside the floors.

    python benchmarks/scan.py [--designs '8 rows;lanes'] [--channels 4096] [--write FILE]

16,384 tokens in bf16, 16 entries a channel, with D, z and dt_bias, as 8 sequences of 2,048 and one
of 16,384. Times are medians of triton.testing.do_bench in milliseconds: forward without gradients,
and forward with backward. floor_ms is the larger of bytes over 3.02 TB/s (u, dt, z, y once forward;
u, dt, z, dy, du, ddt, dz once backward) and of one exp2 a channel, entry and token over 3.7e12 a
second, added up over the two passes. Errors are relative root mean squares against the chunked
engine in fp64 at 300 tokens and 256 channels. mamba_ssm's scan is timed where it is installed.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from glactl.kernels import scan, triton_scan
from glactl.manifest import measured_on

TOKENS, M = 16384, 16
COPY, EXP2 = 3.02e12, 132 * 16 * 1.755e9  # bytes and exponentials a second
NAMES = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")


def inputs(batch: int, T: int, D: int) -> list[Tensor]:
    """Of NAMES, at rates and steps as a model starts with."""
    make: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    u, z = torch.randn(2, batch, T, D, **make)
    B, C = torch.randn(2, batch, T, M, **make)
    A = -torch.arange(1, M + 1, device="cuda").float().repeat(D, 1)
    dt = torch.randn(batch, T, D, **make)
    D_, bias = torch.ones(D, device="cuda"), torch.full((D,), -4.0, device="cuda")
    return [x.requires_grad_() for x in (u, dt, A, B, C, D_, z, bias)]


def ours(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *more: Tensor) -> Tensor:
    """The operator, on the engine the design of which is chosen."""
    D, z, bias = more
    backend = "triton" if u.dtype == torch.bfloat16 else "chunked"
    return scan(u, dt, A, B, C, D, z=z, dt_bias=bias, backend=backend)[0]


def peer() -> Callable[..., Tensor] | None:
    """mamba_ssm's scan, whose tensors have time last; None where it is not installed."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return None

    def call(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *more: Tensor) -> Tensor:
        D, z, bias = more
        last = [x.transpose(1, 2) for x in (u, dt, B, C, z)]
        y: Tensor = selective_scan_fn(
            last[0], last[1], A, last[2], last[3], D, last[4], bias, delta_softplus=True
        )
        return y.transpose(1, 2)

    return call


def floors(D: int) -> dict[str, float]:
    """Milliseconds of bytes and exponentials, and the floor of forward and backward."""
    row, exps = 2 * TOKENS * D / COPY * 1e3, TOKENS * D * M / EXP2 * 1e3
    parts = {"bytes_fwd": 4 * row, "bytes_bwd": 7 * row, "exp2_pass": exps}
    parts["floor_ms"] = max(4 * row, exps) + max(7 * row, exps)
    return {name: round(value, 3) for name, value in parts.items()}


def errors(op: Callable[..., Tensor]) -> dict[str, float]:
    """Relative errors of y and of every gradient."""
    torch.manual_seed(1)
    xs = inputs(1, 300, 256)
    dy = torch.randn_like(xs[0])

    def results(xs: list[Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in xs]
        y = op(*leaves)
        return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

    pairs = zip(("y", *NAMES), results(xs), results([x.double() for x in xs]), strict=True)
    return {n: float(f"{(a - b).norm() / b.norm():.2e}") for n, a, b in pairs}


def kernel_times(op: Callable[..., Tensor], xs: list[Tensor]) -> dict[str, float]:
    """Milliseconds of every kernel in one call forward and backward, largest first."""
    calls, dy = 5, torch.randn_like(xs[0])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as record:
        for _ in range(calls):
            torch.autograd.grad(op(*xs), xs, dy)
        torch.cuda.synchronize()
    times = {e.key[:40]: e.device_time_total / calls / 1e3 for e in record.key_averages()}
    return {k: round(t, 4) for k, t in sorted(times.items(), key=lambda x: -x[1]) if t > 0.002}


def measure(op: Callable[..., Tensor], batch: int, D: int) -> dict[str, Any]:
    """Times and the peak memory above the inputs in MiB."""
    xs = inputs(batch, TOKENS // batch, D)
    dy = torch.randn_like(xs[0])

    def both() -> None:
        torch.autograd.grad(op(*xs), xs, dy)

    def forward() -> None:
        with torch.no_grad():
            op(*xs)

    both()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    peak = (torch.cuda.max_memory_allocated() - base) / 2**20
    fwd, total = (triton.testing.do_bench(f, return_mode="median") for f in (forward, both))
    found = {"fwd_ms": round(fwd, 4), "fwdbwd_ms": round(total, 4), "peak_mib": round(peak)}
    return found | {"kernels_ms": kernel_times(op, xs)}


def main() -> None:
    """Measure the designs asked for and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--designs", default=";".join(triton_scan.DESIGNS), help="parted by ;")
    parser.add_argument("--channels", type=int, default=4096)
    parser.add_argument("--commit", help="of the source")
    parser.add_argument("--write", metavar="FILE", help="write the results as JSON")
    args = parser.parse_args()
    torch.manual_seed(0)
    about: dict[str, Any] = {
        **measured_on(torch.device("cuda"), args.commit),
        "floors": floors(args.channels),
        "results": [],
    }
    print(json.dumps(about["floors"]))
    ops: dict[str, Callable[..., Tensor]] = dict.fromkeys(args.designs.split(";"), ours)
    if (theirs := peer()) is not None:
        ops["mamba_ssm"] = theirs
    for name, op in ops.items():
        if name in triton_scan.DESIGNS:
            chosen = triton_scan.DESIGNS[name]
            triton_scan.design = lambda *_, chosen=chosen: chosen  # type: ignore[assignment]
        row: dict[str, Any] = {"design": name}
        try:
            row |= {"errors": errors(op)} if op is ours else {}
            for batch in (8, 1):
                row[f"{batch} x {TOKENS // batch}"] = measure(op, batch, args.channels)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"[:300]
        about["results"].append(row)
        print(json.dumps(row), flush=True)
        if args.write:
            with open(args.write, "w") as file:
                json.dump(about, file, indent=1)


if __name__ == "__main__":
    main()
