"""Time training steps of a recall trial: captured, eager, and as plain PyTorch has them.

    python benchmarks/mqar.py [--mixers gla,gsa] [--jobs 1,2,4,8] [--write FILE]

A trial is one of the preset `gsa`: d 128, rows of 512 tokens with 64 pairs, 128 rows a step, a
vocabulary of 8,192. Each way takes the same steps of the same model:

- captured: what `glactl mqar` does on a GPU: rows made there, logits where something is asked, one
  CUDA graph a step
- eager: the same without the graph
- loop: `glactl train`'s loop, rows made on the CPU
- plain: rows made before and held in a torch DataLoader, shuffled; logits at every place, with
  ignore_index; AdamW and the cosine as torch has them; a look at the loss in every step; the mixer
  and the norms of PyTorch operations, without Triton
- plain, kernels: the same with our kernels in the mixer

steps_per_s is of the median block of steps; `times` what the captured way is faster. Then so many
trials at once, each a process with a graph of its own: the sum of their steps a second, and `times`
that of one. A line of JSON each, as they come; memory is the peak of the process in MiB.
"""

import argparse
import gc
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from glactl.device import products
from glactl.manifest import measured_on
from glactl.models.lm import build_lm
from glactl.spec import RunSpec, with_vocab
from glactl.sweep.grid import make_grid
from glactl.sweep.trial_steps import BLOCK, TrialSteps
from glactl.tasks.mqar import MQARTask
from glactl.train.loop import train

WAYS = ("captured", "eager", "loop", "plain", "plain, kernels")
TINY = {"model": {"d_model": 16, "max_len": 16}, "train": {"batch_size": 4}}
TINY_DATA = {"vocab_size": 64, "seq_len": 16, "pairs": 2, "n_train": 64, "n_valid": 4}


def spec_of(mixer: str, dim: int, precision: str, tiny: bool) -> RunSpec:
    """The trial at the rate 2.15e-3, never validated."""
    (trial,) = make_grid("gsa", mixers=mixer, dims=str(dim), lrs="2.15e-3").trials
    data = trial.spec.model_dump(mode="json")
    data["train"] |= {"valid_every": 10**9, "stop_accuracy": None, "precision": precision}
    if tiny:
        data["model"] |= TINY["model"]
        data["train"] |= TINY["train"]
        data["data"] |= TINY_DATA
    return with_vocab(RunSpec.model_validate(data), data["data"]["vocab_size"])


def wait(device: torch.device) -> float:
    """The time when the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def rate(take: Callable[[int], object], device: torch.device, block: int, seconds: float) -> float:
    """Steps a second of the median block of `block` steps; a block and some go before."""
    take(block)
    spent: list[float] = []
    end = time.perf_counter() + seconds
    while not spent or time.perf_counter() < end:
        start = wait(device)
        take(block)
        spent.append(wait(device) - start)
    return block / statistics.median(spent)


def from_loop(spec: RunSpec, task: MQARTask, device: torch.device) -> Callable[[int], None]:
    """Steps of the plain loop."""
    steps = train(spec, device=device, task=task)

    def take(count: int) -> None:
        for _ in range(count):
            next(steps)

    return take


def plainly(spec: RunSpec, task: MQARTask, device: torch.device) -> Callable[[int], None]:
    """Steps as a script of PyTorch has them; see above."""
    rows = min(task.n_train, 50 * spec.rows)  # more would only be made for longer
    batch = task.train_batch(0, rows)
    data = TensorDataset(batch.tokens, batch.targets)
    pinned = device.type == "cuda"
    loader = DataLoader(data, spec.rows, shuffle=True, drop_last=True, pin_memory=pinned)
    model = build_lm(spec.model, spec.seed, device=device)
    optim = torch.optim.AdamW(
        model.parameters(), spec.optim.lr, spec.optim.betas, weight_decay=spec.optim.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optim, spec.train.steps)
    losses = []

    def epochs() -> Iterator[list[torch.Tensor]]:
        while True:
            yield from loader

    batches = epochs()

    def take(count: int) -> None:
        model.train()
        for _ in range(count):
            tokens, targets = (x.to(device, non_blocking=True) for x in next(batches))
            with products(device, spec.train.precision):
                logits = model.logits(model(tokens)[0])
                loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
            loss.backward()
            optim.step()
            optim.zero_grad()
            schedule.step()
            losses.append(loss.item())

    return take


@contextmanager
def without_triton() -> Iterator[None]:
    """Within, everything is made of PyTorch's operations."""
    modules = [m for name, m in sys.modules.items() if name.startswith("glactl")]
    had = [m for m in modules if getattr(m, "HAS_TRITON", False)]
    for module in had:
        module.HAS_TRITON = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in had:
            module.HAS_TRITON = True  # type: ignore[attr-defined]


def one(spec: RunSpec, way: str, device: torch.device, seconds: float) -> dict[str, Any]:
    """Steps of one trial, this way."""
    gc.collect()
    cuda, more = device.type == "cuda", {}
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    task = MQARTask(spec.data, spec.seed)  # type: ignore[arg-type]
    if way in ("captured", "eager"):
        steps = TrialSteps(spec, task, device, capture=way == "captured")
        found = rate(steps.take, device, BLOCK if cuda else 2, seconds)
        more = {"graph": steps.captured}
    elif way == "loop":
        found = rate(from_loop(spec, task, device), device, 8 if cuda else 2, seconds)
    elif way == "plain, kernels":
        found = rate(plainly(spec, task, device), device, 8 if cuda else 2, seconds)
    else:
        with without_triton():
            found = rate(plainly(spec, task, device), device, 4 if cuda else 2, seconds)
    peak = round(torch.cuda.max_memory_allocated(device) / 2**20) if cuda else None
    return {"steps_per_s": round(found, 3), "ms": round(1e3 / found, 3), "peak_mib": peak, **more}


def worker(spec: RunSpec, device: str, seconds: float, ready: Any, pipe: Any) -> None:
    """Steps of one of several trials: how many, and in what time, once all are ready."""
    torch.set_num_threads(1)
    where = torch.device(device)
    steps = TrialSteps(spec, MQARTask(spec.data, spec.seed), where)  # type: ignore[arg-type]
    block = BLOCK if where.type == "cuda" else 2
    steps.take(block)
    ready.wait()
    first, start = steps.step, wait(where)
    while time.perf_counter() - start < seconds:
        steps.take(block)
    pipe.send((steps.step - first, wait(where) - start))
    pipe.close()


def several(spec: RunSpec, n: int, device: torch.device, seconds: float) -> dict[str, Any]:
    """The steps a second of n trials at once."""
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(n)
    pipes, processes = [], []
    for i in range(n):
        here, there = context.Pipe(duplex=False)
        trial = spec.model_copy(update={"seed": i})
        arguments = (trial, str(device), seconds, ready, there)
        processes.append(context.Process(target=worker, args=arguments, daemon=True))
        processes[-1].start()
        there.close()
        pipes.append(here)
    try:
        rates = [steps / spent for steps, spent in (pipe.recv() for pipe in pipes)]
    finally:
        for process in processes:  # one that died leaves the others waiting for it
            process.terminate()
            process.join()
    return {"steps_per_s": round(sum(rates), 3), "each": [round(x, 3) for x in rates]}


def main() -> None:
    """Measure what was asked for and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mixers", default="gla,gsa")
    parser.add_argument("--dims", default="128")
    parser.add_argument("--precisions", default="bf16,fp32")
    parser.add_argument("--ways", default=";".join(WAYS), help="separated by semicolons")
    parser.add_argument("--jobs", default="1,2,4,8", help="trials at once; empty for none")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small trials, to try the script")
    parser.add_argument("--commit", help="of the source, where it is no git checkout")
    parser.add_argument("--write", metavar="FILE", help="write the results as JSON")
    args = parser.parse_args()
    device = torch.device(args.device)
    about: dict[str, Any] = {
        **measured_on(device, args.commit),
        "tiny": args.tiny,
        "results": [],
    }

    def keep(row: dict[str, Any]) -> None:
        about["results"].append(row)
        print(json.dumps(row), flush=True)
        if args.write:
            Path(args.write).write_text(json.dumps(about, indent=1) + "\n")

    cases = [
        (mixer, int(dim), precision)
        for precision in args.precisions.split(",")
        for mixer in args.mixers.split(",")
        for dim in args.dims.split(",")
    ]
    for mixer, dim, precision in cases:
        spec = spec_of(mixer, dim, precision, args.tiny)
        what = {"mixer": mixer, "dim": spec.model.d_model, "precision": precision}
        ours = None
        for way in (way.strip() for way in args.ways.split(";")):
            try:
                row = one(spec, way, device, args.seconds)
            except Exception as error:  # the other ways are still of interest
                keep(what | {"way": way, "error": f"{type(error).__name__}: {error}"[:300]})
                continue
            ours = row["steps_per_s"] if way == "captured" else ours
            times = {} if ours is None else {"times": round(ours / row["steps_per_s"], 2)}
            keep(what | {"way": way, "tokens": spec.rows * spec.data.seq_len} | row | times)
        alone = None
        for n in (int(part) for part in args.jobs.split(",") if part):
            try:
                row = several(spec, n, device, args.seconds)
            except EOFError:
                keep(what | {"trials": n, "error": "a process died"})
                continue
            alone = row["steps_per_s"] if n == 1 else alone
            times = {} if alone is None else {"times": round(row["steps_per_s"] / alone, 3)}
            keep(what | {"trials": n} | row | times)


if __name__ == "__main__":
    main()
