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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

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

    def bound(self, moved: float, flops: float) -> str:
        """The larger term of (1): "memory" or "compute"."""
        return "memory" if moved / self.copy >= flops / self.matmul else "compute"


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


def timing(
    call: Callable[[], object], device: torch.device, budget: float, most: int = 100
) -> Timing:
    """Repeat a call for about `budget` seconds, 3 to `most` times after a first run and a second.

    A call of LONG seconds or more is run twice in all: what a first run adds does not show there,
    unless it is half of it, as where kernels are compiled.
    """
    first, second = once(call, device), once(call, device)
    if first >= LONG and second >= first / 2:
        times = [first, second]
    else:
        repeats = max(3, min(most, int(budget / max(second, 1e-6))))
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


def enqueued(call: Callable[[], object], device: torch.device) -> float:
    """Seconds until the host has given a call to an idle device: the least of three."""
    times = []
    for _ in range(3):
        wait(device)
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def saved_bytes(call: Callable[[], object], weights: Iterable[Tensor] = ()) -> int:
    """What autograd keeps for the backward pass of what is done in a call, each storage once.

    `weights` are left out: they are there anyway. What the call returns is kept until the end, so
    that no storage takes the place of another.
    """
    left_out = {p.untyped_storage().data_ptr() for p in weights}
    found: dict[int, int] = {}
    kept: list[object] = []

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in left_out:
            found[storage.data_ptr()] = storage.nbytes()
            kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        kept.append(call())
    return sum(found.values())


def rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure what `device` reaches; about a second.

    The copy is of a tensor larger than the caches, the product of two square matrices of `dtype`;
    on a CPU, many of which are slower in half precision, of fp32 too, and the faster one counts.
    """
    gpu = device.type == "cuda"
    source = torch.ones(2**28 if gpu else 2**25, device=device)  # 1 GiB, 128 MiB
    target, nbytes = torch.empty_like(source), source.nbytes
    copied = _best(lambda: target.copy_(source), device, 10 if gpu else 5)
    multiplied = [_products(dtype, device)]
    if not gpu and dtype.itemsize < 4:
        multiplied.append(_products(torch.float32, device))
    return Rates(2 * nbytes / copied, max(multiplied), str(dtype).removeprefix("torch."))


def _products(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a product of two square matrices."""
    gpu = device.type == "cuda"
    n = 8192 if gpu else 512 if dtype.itemsize < 4 else 1024
    a = torch.ones(n, n, device=device, dtype=dtype)
    product = torch.empty_like(a)
    return 2 * n**3 / _best(lambda: torch.mm(a, a, out=product), device, 10 if gpu else 5)


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
