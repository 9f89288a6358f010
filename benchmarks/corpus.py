"""Train GLA, GSA, RetNet and attention at one size on one corpus; held-out bits per byte by tokens.

    python benchmarks/corpus.py --out RUNS [--mixers gla,gsa] [--lrs 5e-4,1e-3] [--seeds 0,1]
                                [--gpus 4] [--data DIR] [--set train.steps=20] [--collect-only]
                                [--write FILE.json] [--plot FILE.svg]

A run is `glactl train specs/corpus_MIXER.yaml --set optim.lr=LR --set seed=SEED`, one at a time on
each GPU. A second call, also after Ctrl-C, SIGTERM or a kill, leaves runs that have ended alone,
goes on with begun ones from their newest checkpoint, and trains what is missing. What runs print is
in RUNS/logs. The spec says where the prepared data is, docs/reproduce.md how it is made.

The results are of all runs in RUNS that have ended, which must have read the same data for as many
steps; --collect-only trains nothing, and needs no checkpoints. `curve` has, at each validation, the
tokens read, the bits per byte of all of the held-out text, and the mean loss (nats) of the steps
since the last one; tokens_per_s is that of the median step, mfu at that rate; first_s of the first
step, with all compilation; seconds of all, with validation; not_captured says why steps were no
CUDA graph; floors are of compressors on that text. The figure has the best rate of each mixer.
"""

import argparse
import fcntl
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np

from glactl.profile.report import COLOURS
from glactl.run import Run
from glactl.spec import load, spec_hash

ROOT = Path(__file__).resolve().parents[1]
MIXERS = ("gla", "gsa", "retnet", "attention")
Runs = list[dict[str, Any]]


@dataclass(frozen=True)
class Job:
    """One run: its name, its spec and the changes to it, and the folders that it may have."""

    name: str
    spec: Path
    sets: tuple[str, ...]
    out: Path

    @property
    def folders(self) -> list[Path]:
        """Those of this very spec, the newest last."""
        stem = f"{self.name}-{spec_hash(load(self.spec, sets=list(self.sets)))[:6]}"
        return sorted(self.out.glob(f"{stem}*"), key=lambda p: p.stat().st_mtime)

    @property
    def log(self) -> Path:
        """What it prints."""
        return self.out / "logs" / f"{self.name}.log"

    @property
    def command(self) -> list[str]:
        """Begin it, or go on with it."""
        call = [sys.executable, "-m", "glactl.cli", "train", "--quiet", "--json"]
        begun = [p for p in self.folders if any(p.glob("checkpoints/step-*/COMMITTED"))]
        if begun:
            return [*call, str(begun[-1]), "--resume"]
        sets = [part for change in self.sets for part in ("--set", change)]
        return [*call, str(self.spec), *sets, "--out", str(self.out)]


def lines(path: Path) -> Runs:
    """The objects of a JSON lines file; a last line that was not finished is left out."""
    found = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in found if line.endswith("\n")]


def ended(folder: Path) -> bool:
    """Whether a run has been validated after its last step."""
    steps = lines(folder / "metrics.jsonl")
    return bool(steps) and steps[-1]["step"] == steps[-1]["steps"] and bool(steps[-1]["valid"])


def jobs(args: argparse.Namespace) -> list[Job]:
    """All runs that are asked for, a learning rate of all mixers before the next one."""
    found = []
    every = product(args.seeds.split(","), map(float, args.lrs.split(",")), args.mixers.split(","))
    for seed, lr, mixer in every:
        name = f"{mixer}-lr{lr:g}-seed{seed}"
        sets = [f"name={name}", f"optim.lr={lr!r}", f"seed={seed}"]
        sets += [f"data.path={args.data}"] * (args.data is not None) + args.set
        found.append(Job(name, ROOT / "specs" / f"corpus_{mixer}.yaml", tuple(sets), args.out))
    return found


def train(wanted: list[Job], devices: list[str]) -> int:
    """Run them, one on each device at a time; returns how many failed.

    Ctrl-C and SIGTERM have those that run saved before this ends; the script's exit code is 6.
    """
    waiting = [job for job in wanted if not any(map(ended, job.folders))]
    print(f"{len(wanted)} runs, {len(wanted) - len(waiting)} of them have ended", flush=True)
    running: dict[str, tuple[Job, subprocess.Popen[bytes], float]] = {}
    failed = 0
    old = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while waiting or running:
            for device in devices:
                if waiting and device not in running:
                    job = waiting.pop(0)
                    running[device] = (job, start(job, device), time.monotonic())
            time.sleep(0.2)
            for device, (job, process, began) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[device]
                code, told = process.returncode, f"{time.monotonic() - began:.0f} s"
                if code:
                    told += f", exit code {code}: {job.log.read_text().splitlines()[-1][:300]}"
                failed += code != 0
                print(f"{job.name}: {told}", flush=True)
    finally:
        for _, process, _ in running.values():
            process.terminate()
        for _, process, _ in running.values():
            process.wait()
        signal.signal(signal.SIGTERM, old)
    return failed


def start(job: Job, device: str) -> "subprocess.Popen[bytes]":
    """The process of a run, out of reach of the terminal's Ctrl-C: it is told to stop once.

    It holds a lock on its log. Raises SystemExit where another process has it.
    """
    env = os.environ | {"CUDA_VISIBLE_DEVICES": device}
    with job.log.open("ab") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SystemExit(f"{job.name} is being trained by another process") from None
        return subprocess.Popen(job.command, env=env, stdout=log, stderr=log, process_group=0)


def devices_of(args: argparse.Namespace) -> list[str]:
    """The GPUs to train on, as CUDA_VISIBLE_DEVICES names them; [""] without any.

    RUNS keeps their kind and the commit. Raises SystemExit where its runs are of others.
    """
    import torch

    devices, kind = [""], f"CPU, {platform.machine()}"
    if torch.cuda.is_available():
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = named.split(",") if named else list(map(str, range(torch.cuda.device_count())))
        kind = torch.cuda.get_device_name()
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    found = {"device": kind, "commit": args.commit or head.stdout.strip() or None}
    path = args.out / "machine.json"
    (args.out / "logs").mkdir(parents=True, exist_ok=True)
    then = json.loads(path.read_text()) if path.exists() else found
    if then != found:
        raise SystemExit(f"{args.out} has runs of {then}, this is {found}; use another --out")
    path.write_text(json.dumps(found) + "\n")
    return devices[: args.gpus]


def record(folder: Path) -> dict[str, Any]:
    """The numbers of a run that has ended."""
    from glactl.models.cost import lm_cost

    run = Run.open(folder)
    spec, manifest, steps = run.spec, run.manifest, lines(folder / "metrics.jsonl")
    events, last = lines(folder / "events.jsonl"), steps[-1]
    resumed = {e["step"] for e in events if e["event"] == "resume"}  # `seconds` begins anew there
    rates, seconds = [], steps[0]["seconds"]
    for a, b in pairwise(steps):
        since = 0.0 if a["step"] in resumed else a["seconds"]
        seconds += b["seconds"] - since
        if a["step"] not in resumed:
            rates.append((b["tokens"] - a["tokens"]) / (b["seconds"] - since))
    rate = statistics.median(rates)
    memory = max(s["memory"] or 0 for s in steps)
    return {
        "mixer": spec.model.mixers[0].kind,
        "lr": spec.optim.lr,
        "seed": spec.seed,
        "params": lm_cost(spec.model, spec.data.seq_len).params,
        "steps": last["steps"],
        "tokens": last["tokens"],
        "bpb": round(last["valid"]["bpb"], 4),
        "tokens_per_s": round(rate),
        "mfu": last["mfu"] and round(last["mfu"] / last["tokens_per_s"] * rate, 4),
        "peak_gib": round(memory / 2**30, 2) or None,
        "first_s": round(steps[0]["seconds"], 1),
        "seconds": round(seconds, 1),
        "skipped": sum(s["skipped"] for s in steps),
        "resumed": len(resumed),
        "not_captured": next((e["reason"] for e in events if e["event"] == "capture"), None),
        "spec_hash": spec_hash(spec),
        "data": manifest["data"]["fingerprint"],
        **{name: manifest["packages"].get(name) for name in ("torch", "triton")},
        "python": manifest["python"],
        "curve": curve(steps),
        "valid": {name: round(x, 4) for name, x in last["valid"].items()},
    }


def curve(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A point a validation; see above."""
    points, losses = [], []
    for step in steps:
        losses += [] if step["skipped"] else [step["loss"]]
        if step["valid"]:
            point = {"tokens": step["tokens"], "bpb": round(step["valid"]["bpb"], 4)}
            points.append(point | {"loss": round(statistics.mean(losses), 4) if losses else None})
            losses = []
    return points


def collect(out: Path) -> dict[str, Any]:
    """The results of all runs in `out` that have ended. Raises SystemExit, see above."""
    folders = sorted(p.parent for p in out.glob("*/spec.resolved.yaml"))
    done = [folder for folder in folders if ended(folder)]
    for folder in sorted(set(folders) - set(done)):
        print(f"{folder} has not ended, and is left out", file=sys.stderr)
    if not done:
        raise SystemExit(f"no run in {out} has ended")
    runs = sorted(map(record, done), key=lambda r: (r["mixer"], r["lr"], r["seed"]))
    for name in ("data", "steps", "tokens"):
        if len(values := {r[name] for r in runs}) > 1:
            raise SystemExit(f"the runs in {out} differ in {name}: {sorted(values)}")
    machine = json.loads((out / "machine.json").read_text())
    data = Run.open(done[0]).spec.data
    return machine | {"floors": floors_of(Path(getattr(data, "path", ""))), "runs": runs}


def floors_of(folder: Path) -> dict[str, float]:
    """See tasks/floors.py; {} where the data is not here, or its tokens are not bytes."""
    from glactl.tasks.floors import floors
    from glactl.tasks.shards import Prepared, Split
    from glactl.tasks.tokenizer import ByteTokenizer

    data = Prepared(folder) if folder.is_dir() else None
    if data is None or data.manifest["recipe"]["tokenizer"] != "byte":
        return {}

    def text(split: Split) -> bytes:
        tokens = split.read(0, split.length)
        tokens = tokens[tokens != ByteTokenizer.bos_id]
        return np.where(tokens == ByteTokenizer.eos_id, 0, tokens).astype(np.uint8).tobytes()

    return {name: round(x, 4) for name, x in floors(text(data.train), text(data.valid)).items()}


def mean(runs: Runs, name: str) -> float:
    """Of one number."""
    return statistics.mean(run[name] for run in runs)


def by_rate(runs: Runs) -> dict[str, list[Runs]]:
    """Of each mixer and rate its runs, a seed each; the best rates and the best mixer first."""
    rates: dict[tuple[str, float], Runs] = {}
    for run in runs:
        rates.setdefault((run["mixer"], run["lr"]), []).append(run)
    found: dict[str, list[Runs]] = {}
    for seeds in sorted(rates.values(), key=lambda seeds: mean(seeds, "bpb")):
        found.setdefault(seeds[0]["mixer"], []).append(seeds)
    return found


def table(found: dict[str, Any]) -> str:
    """Markdown: a row a mixer, the best first, with its other rates; then the floors."""
    rows = [
        "| | parameters | bits per byte | learning rate | other rates | tokens/s | MFU | GiB | s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for mixer, (runs, *others) in by_rate(found["runs"]).items():
        tried = ", ".join(f"{r[0]['lr']:g}: {mean(r, 'bpb'):.3f}" for r in others)
        gpu = runs[0]["peak_gib"] is not None and runs[0]["mfu"] is not None
        last = f"{mean(runs, 'mfu'):.1%} | {mean(runs, 'peak_gib'):.1f}" if gpu else "|"
        rows.append(
            f"| {mixer} | {runs[0]['params'] / 1e6:.1f} M | {mean(runs, 'bpb'):.3f} "
            f"| {runs[0]['lr']:g} | {tried} | {mean(runs, 'tokens_per_s'):,.0f} | {last} "
            f"| {mean(runs, 'seconds'):.0f} |"
        )
    rows += [f"| {name} | | {x:.3f} | | | | | | |" for name, x in found["floors"].items()]
    return "\n".join(rows)


def plot(found: dict[str, Any], path: Path) -> None:
    """Held-out bits per byte against tokens, a line a seed."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    colours = COLOURS | {"retnet": COLOURS["decay"]}
    for mixer, (runs, *_) in by_rate(found["runs"]).items():
        label = f"{mixer}, {runs[0]['lr']:g}: {mean(runs, 'bpb'):.3f}"
        for i, run in enumerate(runs):
            x, y = zip(*((p["tokens"] / 1e6, p["bpb"]) for p in run["curve"]), strict=True)
            axes.plot(x, y, ".-", color=colours.get(mixer), label=None if i else label)
    for name, x in found["floors"].items():
        if name.startswith("order"):
            axes.axhline(x, color="#888888", linestyle=":", linewidth=1, label=f"{name}: {x:.3f}")
    axes.set(xlabel="tokens read, millions", ylabel="bits per byte of held-out text")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, title="learning rate: where it ends", fontsize=9)
    with rc_context({"svg.hashsalt": "glactl", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    """Train what is missing, then collect, print, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="RUNS")
    parser.add_argument("--mixers", default=",".join(MIXERS))
    parser.add_argument("--lrs", default="5e-4,1e-3,2e-3")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--gpus", type=int, metavar="N", help="by default all")
    parser.add_argument("--data", metavar="DIR", help="prepared data, in place of the spec's")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="of all specs")
    parser.add_argument("--commit", help="of the source, where it is no git checkout")
    parser.add_argument("--collect-only", action="store_true")
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    args = parser.parse_args()
    failed = 0
    if not args.collect_only:
        try:
            failed = train(jobs(args), devices_of(args))
        except KeyboardInterrupt:
            sys.exit(6)
    found = collect(args.out)
    print(table(found))
    if args.write:
        args.write.write_text(json.dumps(found, indent=1) + "\n")
    if args.plot:
        plot(found, args.plot)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
