"""Train the README's three models on text: every mixer, learning rate and seed, beside floors.

    python benchmarks/text_mixers.py [--lrs 2e-3,4e-3,8e-3] [--seeds 0,1] --write FILE

Each trial is `glactl train specs/text_MIXER.yaml --set optim.lr=LR --set seed=SEED` on one thread,
two at a time. Results in FILE are kept: a second call trains only what is missing.
"""

import argparse
import json
import multiprocessing
import platform
import statistics
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

SPECS = Path(__file__).parent.parent / "specs"
MIXERS = ("attention", "gla", "gsa")


def trial(mixer: str, lr: float, seed: int) -> dict[str, Any]:
    """One run without a folder; bits per byte of the held-out text."""
    import torch

    from glactl.models.cost import lm_cost
    from glactl.spec import load, spec_hash
    from glactl.tasks import load_task
    from glactl.train.loop import train, with_vocab

    torch.set_num_threads(1)
    spec = load(SPECS / f"text_{mixer}.yaml", sets=[f"optim.lr={lr}", f"seed={seed}"])
    task = load_task(spec.data, spec.seed)
    began = time.monotonic()
    *_, last = train(spec, device="cpu", task=task)
    assert last.valid is not None
    cost = lm_cost(with_vocab(spec, task.vocab_size).model, spec.data.seq_len)
    return {
        "mixer": mixer,
        "lr": lr,
        "seed": seed,
        "bpb": last.valid["bpb"],
        "params": cost.params,
        "state_bytes": cost.state_bytes,
        "tokens": last.tokens,
        "seconds": round(time.monotonic() - began, 1),
        "spec": spec_hash(spec),
        "data": task.fingerprint,
        "skipped": last.skipped,
    }


def floors() -> dict[str, float]:
    """Bits per byte of what a language model must beat on the same held-out text."""
    from glactl.spec import load
    from glactl.tasks import load_task

    spec = load(SPECS / "text_gla.yaml")
    return load_task(spec.data, spec.seed).floors()


def main() -> None:
    """Train what is missing, then print the best rate of each mixer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lrs", default="2e-3,4e-3,8e-3")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--write", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    found: dict[str, Any] = {"results": []}
    if args.write.exists():
        found = json.loads(args.write.read_text())
    have = {(r["mixer"], r["lr"], r["seed"]) for r in found["results"]}
    wanted = [
        (mixer, lr, seed)
        for seed in map(int, args.seeds.split(","))
        for lr in map(float, args.lrs.split(","))
        for mixer in MIXERS
        if (mixer, lr, seed) not in have
    ]
    import torch

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    found |= {
        "device": f"CPU, {platform.machine()}, one thread a run",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or None,
    }
    if "floors" not in found:
        found["floors"] = floors()
    spawn = multiprocessing.get_context("spawn")  # a fork of a process that runs torch may hang
    with ProcessPoolExecutor(args.workers, mp_context=spawn) as pool:
        for done in as_completed([pool.submit(trial, *one) for one in wanted]):
            found["results"].append(done.result())
            args.write.write_text(json.dumps(found, indent=1) + "\n")
            print(json.dumps(found["results"][-1]), flush=True)
    for mixer in MIXERS:
        rates: dict[float, list[float]] = {}
        for r in found["results"]:
            if r["mixer"] == mixer:
                rates.setdefault(r["lr"], []).append(r["bpb"])
        means = {lr: statistics.mean(scores) for lr, scores in rates.items()}
        best = min(means, key=lambda lr: means[lr])
        seeds = ", ".join(f"{s:.3f}" for s in sorted(rates[best]))
        print(f"{mixer}: {means[best]:.3f} bits per byte at lr {best:g} (seeds: {seeds})")
        print("  all rates: " + ", ".join(f"{lr:g} {m:.3f}" for lr, m in sorted(means.items())))


if __name__ == "__main__":
    main()
