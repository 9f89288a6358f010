"""How long a call takes, how much memory it needs at its peak, and what the machine can do.

The floor of a call that must move `b` bytes and do `f` floating-point operations, on a machine that
copies `c` bytes a second and multiplies matrices at `m` operations a second, is

    t >= max(b / c, f / m)                                                                 (1)
"""

import ctypes
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

LONG = 1.0  # seconds; so long a call is repeated once and its first run counts as well


@dataclass(frozen=True)
class Timing:
    """Seconds of a call: the median, the 10th and 90th percentile, and the number of repeats."""

    median: float
    p10: float
    p90: float
    repeats: int


@dataclass(frozen=True)
class Rates:
    """What a machine reaches: copy in bytes/s (read and written), matmul in FLOP/s, in `dtype`."""

    copy: float
    matmul: float
    dtype: str

    def floor(self, moved: float, flops: float) -> float:
        """Equation (1), in seconds."""
        return max(moved / self.copy, flops / self.matmul)


def wait(device: torch.device) -> None:
    """Wait until `device` has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def once(call: Callable[[], object], device: torch.device) -> float:
    """The seconds of one call."""
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def timing(call: Callable[[], object], device: torch.device, budget: float) -> Timing:
    """Repeat a call for about `budget` seconds, at least three times after a first run.

    A call of LONG seconds or more is run twice in all: what a first run adds does not show there.
    """
    first = once(call, device)
    if first >= LONG:
        times = [first, once(call, device)]
    else:
        repeats = max(3, min(100, int(budget / max(once(call, device), 1e-6))))
        times = [once(call, device) for _ in range(repeats)]
    return Timing(statistics.median(times), quantile(times, 0.1), quantile(times, 0.9), len(times))


def quantile(values: list[float], q: float) -> float:
    """The q-quantile of `values`, linear between neighbours."""
    ranked = sorted(values)
    at = q * (len(ranked) - 1)
    below = int(at)
    above = min(below + 1, len(ranked) - 1)
    return ranked[below] + (at - below) * (ranked[above] - ranked[below])


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """The memory that a call needs at its peak, beyond what is held before it.

    On CUDA torch's own counter, exact. On Linux the growth of the resident set, to a page and
    without what the allocator reuses; None where the kernel cannot reset its peak.
    """
    if device.type == "cuda":
        wait(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    _give_back()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from now
    except OSError:
        call()
        return None
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure what `device` reaches; about a second.

    The copy is of a tensor larger than the caches, the product of two square matrices of `dtype`.
    """
    gpu = device.type == "cuda"
    source = torch.ones(2**28 if gpu else 2**25, device=device)  # 1 GiB, 128 MiB
    target = torch.empty_like(source)
    copied = _best(lambda: target.copy_(source), device, 10 if gpu else 5)
    n = 8192 if gpu else 1024
    a = torch.ones(n, n, device=device, dtype=dtype)
    product = torch.empty_like(a)
    multiplied = _best(lambda: torch.mm(a, a, out=product), device, 10 if gpu else 5)
    return Rates(
        copy=2 * source.nbytes / copied,
        matmul=2 * n**3 / multiplied,
        dtype=str(dtype).removeprefix("torch."),
    )


def _best(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    once(call, device)
    return min(once(call, device) for _ in range(repeats))


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _give_back() -> None:
    """Have the allocator return what is free to the system, or the peak hides behind it."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
