"""The rows of a case, measured in a process of its own.

What ends a process, as a lack of memory or a fault of a kernel does, costs the row that it was at:
the rows after it have a new process. Processes are forked from one that has imported torch and has
touched no device, which takes a tenth of a second in the place of several.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from glactl import console
from glactl.measure import enqueued, peak_bytes, saved_bytes, timing, wait
from glactl.profile.calls import Call, make_call
from glactl.profile.cases import Case, Failed, Measured, allowed_error

LIMIT = 600.0  # seconds for one row
SIDE_BY_SIDE = 8  # processes that compile at a time
HOST = 0.9  # of the time, from which the host is what bounds a call
KERNELS = 12  # of a row, that are told; the others are one line

# imported once for all processes; the last one is what torch itself imports at a first backward
PRELOAD = ["glactl.cli.main", "glactl.profile.process", "torch._dynamo"]

Row = Measured | Failed


def run(case: Case, limit: float = LIMIT) -> Iterator[Row]:
    """The rows of the case, in order."""
    left = list(case.items)
    while left:
        for row in _attempt(replace(case, items=tuple(left)), limit):
            yield row
            del left[0]


def warm(cases: list[Case], advance: Callable[..., None]) -> None:
    """Have every kernel of the cases compiled, side by side; failures are left to the rows."""

    def one(case: Case) -> None:
        list(run(replace(case, warm=True)))
        advance(1)

    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        list(pool.map(one, cases))


def _attempt(case: Case, limit: float) -> Iterator[Row]:
    """Rows until the process ends; a row that it failed at is the last."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler is quiet in the processes
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, case))
    process.start()
    theirs.close()
    try:
        for work, T in case.items:
            row = None
            if not ours.poll(limit):
                row = _failed(case, work, T, f"no result after {limit:.0f} s")
            else:
                try:
                    row = ours.recv()
                except EOFError:
                    process.join()
                    row = _failed(case, work, T, _ended(process.exitcode))
            yield row
            if isinstance(row, Failed):
                return
    finally:
        process.kill()
        process.join()
        ours.close()


def _ended(code: int | None) -> str:
    if code == -9:
        return "out of memory: the system killed the process"
    return f"the process ended with exit code {code}"


def _child(connection: Connection, case: Case) -> None:
    """Send a row for every item, up to the first that fails."""
    for work, T in case.items:
        row: Row
        try:
            row = measure(case, work, T)
        except KeyboardInterrupt:
            return
        except Exception as error:  # whatever a compiler, a driver or a library raises
            first = (str(error).strip() or "no message").splitlines()[0]
            short = console.exit_code(error) == 4
            reason = "out of memory" if short else f"{type(error).__name__}: {first[:200]}"
            row = _failed(case, work, T, reason)
        connection.send(row)
        if isinstance(row, Failed):
            return


def _failed(case: Case, work: str, T: int, reason: str) -> Failed:
    return Failed(case.part, case.name, work, T, case.at(T).batch, reason)


def measure(case: Case, work: str, T: int) -> Measured:
    """One row, in this process."""
    device, shape = torch.device(case.device), case.at(T)
    call = make_call(case, work, T)
    if case.warm:
        call.run()
        wait(device)
        return _row(case, work, T, call, {"median": 1.0, "p10": 1.0, "p90": 1.0, "repeats": 1})
    found: dict[str, Any] = {}
    if not case.scan:
        if call.forward is not None:
            found["saved"] = saved_bytes(call.forward, call.weights)
        found["peak"] = peak_bytes(call.run, device)
        worst, at = call.error()
        layers = case.spec.n_layers if case.spec is not None and case.part == "model" else 1
        allowed = allowed_error(shape.dtype, layers)
        found |= {"error": worst, "error_T": at, "allowed": allowed}
    took = asdict(timing(call.run, device, case.seconds, call.most))
    for name in ("median", "p10", "p90"):
        took[name] /= call.turns
    if device.type == "cuda" and call.turns == 1:
        host = enqueued(call.run, device)
        found |= {"bound": "host"} if host >= HOST * took["median"] else {}
    if case.kernels:
        found["kernels"] = kernels(call, device)
    return _row(case, work, T, call, took | found)


def _row(case: Case, work: str, T: int, call: Call, found: dict[str, Any]) -> Measured:
    floor = case.rates.floor(call.moved, call.flops)
    work_of: dict[str, Any] = {
        "tokens_per_s": call.tokens / found["median"],
        "flops": call.flops,
        "moved": call.moved,
        "floor": floor,
        "of_floor": floor / found["median"],
        "bound": case.rates.bound(call.moved, call.flops),
    }
    return Measured(case.part, case.name, work, T, case.at(T).batch, **work_of | found)


def kernels(call: Call, device: torch.device) -> list[dict[str, Any]]:
    """name, calls and seconds of the kernels of one run (on a CPU: of torch's operators).

    By time, the largest first; those after KERNELS are one entry, "others".
    """
    kind = torch.profiler.ProfilerActivity
    gpu = device.type == "cuda"
    call.run()
    wait(device)
    with torch.profiler.profile(activities=[kind.CPU, *([kind.CUDA] if gpu else [])]) as record:
        call.run()
        wait(device)
    times: dict[str, list[float]] = {}
    for event in record.key_averages():
        # on a GPU the operators that launch are listed too, with the times of their kernels
        if gpu and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        spent = event.self_device_time_total if gpu else event.self_cpu_time_total
        if spent > 0:
            entry = times.setdefault(str(event.key)[:80], [0, 0.0])
            entry[0] += event.count
            entry[1] += spent / 1e6
    ordered = sorted(times.items(), key=lambda item: -item[1][1])
    if len(ordered) > KERNELS:
        rest = [sum(entry[i] for _, entry in ordered[KERNELS:]) for i in (0, 1)]
        ordered = [*ordered[:KERNELS], (f"{len(ordered) - KERNELS} others", rest)]
    return [{"name": name, "calls": int(n), "seconds": s} for name, (n, s) in ordered]
