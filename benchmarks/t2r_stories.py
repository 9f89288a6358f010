"""Collect the runs of stories260K made into gated slot attention: losses by tokens, and a curve.

    glactl import stories260k/hf --out runs/stories
    glactl generate runs/stories --samples 6000 --temperature 1 -n 512 --json > stories.jsonl
    glactl train specs/t2r_stories.yaml
    glactl train specs/t2r_stories.yaml --set init.match=null --set optim.lr=3e-3 --steps 650
    python benchmarks/t2r_stories.py runs/stories RUN RUN --write FILE.json --plot FILE.svg

Both runs read as many tokens. The original's loss is that of `validate` on the same held-out
stories, each scored from BOS on and cut behind 512 targets.
"""

import argparse
import json
import platform
from pathlib import Path
from typing import Any


def curve(path: Path) -> dict[str, Any]:
    """A run: its settings, where it began, and its held-out losses by tokens read."""
    from glactl.run import Run
    from glactl.spec import spec_hash

    run = Run.open(path)
    lines = [json.loads(x) for x in (path / "metrics.jsonl").read_text().splitlines()]
    spec = run.spec.model_dump(mode="json")
    spec["data"]["tokenizer"] = spec["init"]["from"]  # without where it was on that machine
    seen = [x for x in lines if x["valid"]]
    return {
        "matched": run.spec.init is not None and run.spec.init.match is not None,
        "spec": spec,
        "spec_hash": spec_hash(run.spec),
        "seed": run.spec.seed,
        "checkpoint": run.manifest["init"]["fingerprint"],
        "data": run.manifest["data"]["fingerprint"],
        "torch": run.manifest["packages"]["torch"],
        "python": run.manifest["python"],
        "commit": (run.manifest["git"] or {}).get("commit"),
        "seconds": round(lines[-1]["seconds"], 1),
        "curve": [
            {n: x[n] for n in ("step", "stage", "tokens")} | {"loss": x["valid"]["loss"]}
            for x in seen
        ],
    }


def original(path: Path, like: Path) -> float:
    """The held-out loss of the run at `path` on the data of that at `like`."""
    import torch

    from glactl.run import Run
    from glactl.tasks import load_task
    from glactl.train.loop import validate

    lm, _, _ = Run.open(path).load_model()
    spec = Run.open(like).spec
    found = validate(lm, load_task(spec.data, spec.seed), 8, torch.device("cpu"))
    assert found is not None
    return found["loss"]


def plot(found: dict[str, Any], path: Path) -> None:
    """Held-out loss by tokens."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "t2r"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for run in found["runs"]:
        label = "layers matched first" if run["matched"] else "trained at once"
        points = run["curve"]
        axes.plot(
            [p["tokens"] / 1e6 for p in points], [p["loss"] for p in points], ".-", label=label
        )
    axes.axhline(found["original"], color="black", linestyle="--", label="stories260K itself")
    axes.set(xlabel="tokens read, millions", ylabel="held-out loss, nats a token")
    axes.legend()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    """Collect, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("original", type=Path, help="the run that the checkpoint was imported to")
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    args = parser.parse_args()
    runs = [curve(path) for path in args.runs]
    base = original(args.original, args.runs[0])
    device = f"CPU, {platform.machine()}, one thread a run, two at a time"
    found = {"device": device, "original": base, "runs": runs}
    for run in runs:
        last = run["curve"][-1]
        run["above_original"] = last["loss"] / base - 1
        kind = "matched" if run["matched"] else "plain"
        print(
            f"{kind}: {run['curve'][0]['loss']:.4f} -> {last['loss']:.4f} nats after "
            f"{last['tokens']:,} tokens; the original {base:.4f}, {run['above_original']:+.1%}"
        )
    if args.write:
        args.write.write_text(json.dumps(found, indent=1) + "\n")
    if args.plot:
        plot(found, args.plot)


if __name__ == "__main__":
    main()
