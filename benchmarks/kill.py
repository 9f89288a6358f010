"""Kill a run again and again, at random moments and inside of saves, and compare its end.

    python benchmarks/kill.py [--kills 50] [--seed 0] [--steps 1500] [--write FILE]

A small model is trained on a CPU, a checkpoint every tenth step. One run is left alone. The other
is killed (SIGKILL, so that nothing of the program runs any more) and started again with --resume
until it has died --kills times, and then runs to its end. A kill waits for a step drawn at random,
up to 50 after the newest checkpoint, and every second one then for a save to be under way, a folder
.tmp-step-* being there. All strike up to 30 ms later; one in ten does before anything is done. A
start that has not yet committed anything is made anew in the same folder of runs.

What must hold: the loss of every step and every weight are those of the run that was left alone,
bit for bit; after every kill the newest committed checkpoint verifies, none is older than the one
before, and at most the steps since it are lost. Printed: one JSON line.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from glactl import checkpoints
from glactl.run import Run

SAVE_EVERY = 10
SPEC = """
name: killed
model: {d_model: 16, n_layers: 2, mixer: {kind: gla, heads: 2}, dropout: 0.1}
data: {kind: text, source: corpus.txt, seq_len: 16}
optim: {lr: 1e-2, warmup_steps: 2}
train: {steps: %d, batch_size: 4, accumulate: 2, valid_every: 50, save_every: %d, keep_last: 2}
"""
WORDS = ("red", "green", "blue", "one", "two", "three", "four")


def start(folder: Path, resume: Path | None) -> subprocess.Popen[bytes]:
    """`glactl train`, in a process of its own, with one thread."""
    what = ["spec.yaml"] if resume is None else ["--resume", str(resume)]
    command = [sys.executable, "-m", "glactl.cli", "train", *what, "--device", "cpu", "--quiet"]
    with open(folder / "stderr.txt", "ab") as log:
        return subprocess.Popen(
            command, cwd=folder, stdout=subprocess.DEVNULL, stderr=log, env=_environment()
        )


def _environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[1])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}


def lay_out(folder: Path, steps: int) -> None:
    """The spec and a small corpus."""
    folder.mkdir(parents=True)
    (folder / "spec.yaml").write_text(SPEC % (steps, SAVE_EVERY))
    draw = random.Random(0)
    lines = (" ".join(draw.choice(WORDS) for _ in range(40)) for _ in range(60))
    (folder / "corpus.txt").write_text("\n\n".join(lines) + "\n")


def run_of(folder: Path) -> Path | None:
    """The run that has committed something."""
    marks = sorted(folder.glob("runs/*/checkpoints/step-*/COMMITTED"))
    return marks[0].parents[2] if marks else None


def wait_for(true: Callable[[], bool], process: subprocess.Popen[bytes], limit: float) -> bool:
    """Wait until `true()`, the process has ended, or seconds have passed; whether it is true."""
    end = time.monotonic() + limit
    while time.monotonic() < end and process.poll() is None:
        if true():
            return True
        time.sleep(0.001)
    return true()


def strike(folder: Path, resume: Path | None, draw: random.Random, inside: bool) -> str | None:
    """Start, and kill at some moment: where it struck; None where the run came to its end first."""
    begun, left = _begun(folder), _halves(folder)
    goal = (_last_saved(resume) if resume else 0) + draw.randint(1, 5 * SAVE_EVERY)
    process = start(folder, resume)
    if draw.random() < 0.9:  # else before anything is done
        wait_for(lambda: _begun(folder) > begun, process, 60)
        wait_for(lambda: any(_last_step(r) >= goal for r in _newest(folder)), process, 60)
        if inside:
            before = _halves(folder)
            wait_for(lambda: bool(_halves(folder) - before), process, 20)
    time.sleep(draw.uniform(0, 0.03))
    process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        return None
    return "save" if _halves(folder) - left else "step"


def _begun(folder: Path) -> int:
    """How often a run was begun or resumed."""
    texts = (path.read_text() for path in folder.glob("runs/*/events.jsonl"))
    return sum(text.count('"start"') + text.count('"resume"') for text in texts)


def _newest(folder: Path) -> list[Path]:
    """The run that wrote last, if any."""
    found = folder.glob("runs/*/metrics.jsonl")
    return [max(found, key=lambda path: path.stat().st_mtime_ns, default=folder / "-").parent]


def _last_saved(run: Path) -> int:
    return int(checkpoints.committed(run / "checkpoints")[-1].name[5:])


def _halves(folder: Path) -> set[tuple[str, int]]:
    """The checkpoints that are half written, those that the dead left among them."""
    found = set()
    for path in folder.glob("runs/*/checkpoints/.tmp-*"):
        with contextlib.suppress(FileNotFoundError):  # it is whole now
            found.add((str(path), path.stat().st_ino))
    return found


def finish(folder: Path, resume: Path | None) -> Path:
    """Run to the end."""
    code = start(folder, resume).wait()
    path = run_of(folder)
    if code or path is None:
        raise SystemExit(f"the run ended with {code}: {(folder / 'stderr.txt').read_text()[-500:]}")
    return path


def losses(run: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of every line of metrics."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(r["step"], r["loss"], r["grad_norm"]) for r in rows]


def compare(whole: Path, killed: Path) -> dict[str, bool]:
    """Whether two runs are the same bit for bit."""
    ours, theirs = (Run.open(p).load_model()[0].state_dict() for p in (killed, whole))
    equal = all(torch.equal(ours[name], theirs[name]) for name in theirs)
    return {"losses_equal": losses(whole) == losses(killed), "weights_equal": equal}


def kill_test(folder: Path, kills: int, steps: int, seed: int) -> dict[str, Any]:
    """Both runs, the kills, and what came of them."""
    draw = random.Random(seed)
    whole, other = folder / "whole", folder / "killed"
    lay_out(whole, steps)
    lay_out(other, steps)
    left = finish(whole, None)
    struck: dict[str, int] = {"save": 0, "step": 0}
    newest, most_lost, ended = 0, 0, 0
    while sum(struck.values()) < kills and not ended:
        done = sum(struck.values())
        where = strike(other, run_of(other), draw, done % 2 == 0)
        ended += where is None
        if where is not None:
            struck[where] += 1
        run = run_of(other)
        if run is None:
            continue
        checkpoints.verify(checkpoints.committed(run / "checkpoints")[-1])
        step = _last_saved(run)
        if step < newest:
            raise SystemExit(f"step {newest} was committed, and {step} is the newest now")
        newest = step
        most_lost = max(most_lost, _last_step(run) - step)
    killed = left if run_of(other) is None else finish_if(other, ended)
    return {
        "kills": sum(struck.values()),
        "inside_saves": struck["save"],
        "steps": steps,
        "save_every": SAVE_EVERY,
        "most_steps_lost": most_lost,
        **compare(left, killed),
    }


def finish_if(folder: Path, ended: int) -> Path:
    """The killed run at its end, to which it may have come by itself."""
    path = run_of(folder)
    return finish(folder, path) if not ended or path is None else path


def _last_step(run: Path) -> int:
    """The last step whose line of metrics is whole, 0 where there is none."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [json.loads(line)["step"] for line in lines if line.endswith("\n")]
    return max(whole, default=0)


def main() -> None:
    """Run it and print what came of it; 1 where something was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--write", type=Path, metavar="FILE")
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = kill_test(Path(folder), args.kills, args.steps, args.seed)
    found |= {"torch": torch.__version__, "seconds": round(time.monotonic() - began)}
    print(json.dumps(found))
    if args.write:
        args.write.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(not (found["losses_equal"] and found["weights_equal"]))


if __name__ == "__main__":
    main()
