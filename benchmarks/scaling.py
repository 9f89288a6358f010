"""Two devices against one: training throughput, and a run that changes the number of its devices.

    python benchmarks/scaling.py [--world 2] [--spec gla_340m] [--write FILE] [--device cpu --tiny]

Throughput: the model of specs/SPEC.yaml at 2,048 tokens a row and 32,768 tokens a device and step,
bf16 products, tokens drawn at random, on one device, then by ddp and by fsdp on --world of them,
each under torchrun. tokens_per_s is of all devices, the median over --steps steps after --warm,
each timed to its end on the first device; efficiency is tokens_per_s over --world times that of
one device, which holds as many rows as each of the others does.

Elastic: a small run takes 4 steps on one device, 4 on --world, 4 on one again, through committed
checkpoints, and is compared with one that was left alone: the hashes of the global batches ahead,
as each checkpoint has noted them, must be the same, and the losses to rounding; printed are the
largest relative differences of losses, in fp32 and as trained.

A line of JSON for each as it is done.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from glactl import checkpoints
from glactl.manifest import measured_on
from glactl.run import Run
from glactl.spec import RunSpec, load
from glactl.tasks import Batch
from glactl.train.distributed import joined
from glactl.train.loop import train

SPECS = Path(__file__).resolve().parents[1] / "specs"
T, DEVICE_TOKENS = 2048, 32_768
SMALL = {"n_layers": 4}  # of the elastic run
PART = 4  # steps of the elastic run on each number of devices


class Drawn:
    """Rows of random tokens, each a function of its number alone."""

    tokenizer, n_train, fingerprint = None, 10**6, "drawn"

    def __init__(self, vocab_size: int, T: int) -> None:
        self.vocab_size, self.T = vocab_size, T

    def train_batch(self, index: int, batch_size: int) -> Batch:
        """Rows index * batch_size and following."""
        rows = []
        for row in range(index * batch_size, (index + 1) * batch_size):
            generator = torch.Generator().manual_seed(row)
            rows.append(torch.randint(self.vocab_size, (self.T + 1,), generator=generator))
        drawn = torch.stack(rows)
        return Batch(drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous())

    def valid_batches(self, batch_size: int) -> Any:
        """One batch."""
        yield self.train_batch(10**5, batch_size)

    def floors(self) -> dict[str, float]:
        """None: it is no text."""
        return {}


def spec_of(args: argparse.Namespace, world: int, **options: Any) -> RunSpec:
    """The run; rows grow with the devices, micro-batches are one for each."""
    model = load(SPECS / f"{args.spec}.yaml").model.model_dump(mode="json")
    length, tokens = T, DEVICE_TOKENS
    if args.tiny:
        model |= {"d_model": 32, "n_layers": 2, "vocab_size": 100}
        length, tokens = 32, 128
    rows = {"batch_tokens": tokens * world, "accumulate": world}
    plan = {"steps": 3 * PART, "precision": "bf16", "compile": args.compile}
    plan |= {"valid_every": 10**6, "capture": False}
    return RunSpec.model_validate(
        {
            "name": "scaling",
            "model": model,
            "data": {"kind": "text", "seq_len": length},
            "optim": {"lr": 3e-4, "warmup_steps": 2},
            "train": plan | rows | options,
        }
    )


def rate(args: argparse.Namespace) -> None:
    """One process of a measurement; the first one prints."""
    with joined(args.device) as (group, device):
        count = args.warm + args.steps + 1
        options = {"parallel": args.rate, "steps": count + 1}
        spec = spec_of(args, group.world, **options)
        task = Drawn(spec.model.vocab, spec.data.seq_len)
        times, going = [], train(spec, device=device, task=task, group=group)
        began = time.perf_counter()
        for _ in range(count):
            start = time.perf_counter()
            step = next(going)  # its loss is read, so the device is done
            times.append(time.perf_counter() - start)
        going.close()
        seconds = statistics.median(times[1 + args.warm :])
        gpu = device.type == "cuda"
        if group.lead:
            found = {
                "parallel": args.rate if group.world > 1 else "none",
                "devices": group.world,
                "tokens_per_s": round(spec.rows * spec.data.seq_len / seconds),
                "step_ms": round(1e3 * seconds, 2),
                "first_s": round(times[0], 1),
                "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if gpu else None,
                "loss": step.loss,
                "seconds": round(time.perf_counter() - began, 1),
            }
            print(json.dumps(found), flush=True)


def part(args: argparse.Namespace) -> None:
    """One process of a part of the elastic run."""
    with joined(args.device) as (group, device):
        run = Run.open(args.part)
        resume = any((run.path / "checkpoints").iterdir())
        spec = run.spec
        task = Drawn(spec.model.vocab, spec.data.seq_len)
        going = train(spec, device=device, run=run, resume=resume, task=task, group=group)
        for _ in range(3 * PART if args.whole else PART):
            next(going)
        going.close()


def launch(args: argparse.Namespace, world: int, *more: str) -> dict[str, Any]:
    """This file in `world` processes; what it printed."""
    head = [sys.executable]
    if world > 1:
        head += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    command = [*head, __file__, "--spec", args.spec, "--device", args.device, *more]
    command += ["--steps", str(args.steps), "--warm", str(args.warm)]
    command += [*["--tiny"] * args.tiny, *["--compile"] * args.compile]
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        told = [line for line in done.stderr.splitlines() if "Error" in line]
        return {"error": (told or [f"exit {done.returncode}"])[0][:300]}
    found: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    return found


def elastic(args: argparse.Namespace, mode: str, precision: str) -> dict[str, Any]:
    """The run of changing devices beside the one that was left alone."""
    options = {"parallel": mode, "precision": precision, "save_every": PART, "keep_last": 9}
    spec = spec_of(args, args.world, **options)
    spec = spec.model_copy(update={"model": spec.model.model_copy(update=SMALL)})
    with tempfile.TemporaryDirectory() as folder:
        whole, cut = (Run.create(spec, "", folder) for _ in range(2))
        told = [launch(args, 1, "--part", str(whole.path), "--whole")]
        for world in (1, args.world, 1):
            told.append(launch(args, world, "--part", str(cut.path)))
        errors = [t["error"] for t in told if "error" in t]
        if errors:
            return {"elastic": mode, "precision": precision, "error": errors[0]}
        losses = [[row["loss"] for row in _lines(run)] for run in (whole, cut)]
        gaps = [abs(a - b) / b for b, a in zip(*losses, strict=True)]
        ahead = [_ahead(run) for run in (whole, cut)]
    return {
        "elastic": f"1 -> {args.world} -> 1, {mode}",
        "precision": precision,
        "hashes": {name: h[:16] for name, h in ahead[1].items()},
        "hashes_equal": ahead[0] == ahead[1],
        "largest_relative_difference": max(gaps),
        "last_loss": losses[1][-1],
    }


def _lines(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def _ahead(run: Run) -> dict[str, str]:
    found = checkpoints.committed(run.path / "checkpoints")
    return {p.name: checkpoints.read_position(p)["ahead"] for p in found}


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All of it, as it is done."""
    alone = launch(args, 1, "--rate", "auto")
    yield alone
    for mode in ("ddp", "fsdp"):
        found = launch(args, args.world, "--rate", mode)
        if "error" not in found and "error" not in alone:
            ideal = args.world * alone["tokens_per_s"]
            found["efficiency"] = round(found["tokens_per_s"] / ideal, 4)
        yield {"parallel": mode} | found
    for precision in filter(None, args.elastic.split(",")):
        for mode in ("ddp", "fsdp"):
            yield elastic(args, mode, precision)


def main() -> None:
    """Measure, or be one process of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--spec", default="gla_340m")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--warm", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="layers through torch.compile")
    parser.add_argument("--elastic", default="fp32,bf16", help="its precisions; empty for none")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try it")
    parser.add_argument("--rate", choices=("auto", "ddp", "fsdp"), help="one process of a rate")
    parser.add_argument("--part", type=Path, metavar="RUN", help="one process of an elastic run")
    parser.add_argument("--whole", action="store_true", help="with --part: all steps")
    parser.add_argument("--commit", help="of the source, where it is no git checkout")
    parser.add_argument("--write", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.rate or args.part:
        (rate if args.rate else part)(args)
        return
    gpu = args.device != "cpu" and torch.cuda.is_available()
    head = {
        **measured_on(torch.device("cuda" if gpu else "cpu"), args.commit),
        "spec": args.spec,
        "compile": args.compile,
    }
    print(json.dumps(head), flush=True)
    results = []
    for found in measure(args):
        results.append(found)
        print(json.dumps(found), flush=True)
        if args.write:
            args.write.write_text(json.dumps(head | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
