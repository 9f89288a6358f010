"""`glactl train` around the loop: the plan, the run folder, progress, and the report at the end."""

import shlex
from dataclasses import asdict
from pathlib import Path

from glactl import console
from glactl.device import pick_device
from glactl.plan import plan_lines, plan_numbers
from glactl.run import Run
from glactl.spec import RunSpec, SpecError, load, read
from glactl.tasks import Task, load_task
from glactl.train import Step, train


def train_command(
    path: Path | None,
    *,
    preset: str | None,
    sets: list[str],
    resume: bool,
    plan: bool,
    out: Path,
    device: str | None,
    json: bool,
    quiet: bool,
) -> None:
    """Run `glactl train`; the arguments are the command's options.

    Raises what spec.read, load_task, Run and train raise.
    """
    run, text = None, ""
    if resume:
        if preset is not None:
            raise SpecError(f"--preset {preset} and --resume exclude each other")
        run = Run.newest(out) if path is None else Run.open(path)
        spec = load(run.path / "spec.resolved.yaml", sets=sets)
    else:
        text, spec = read(path, preset, sets)
    if plan:
        numbers = plan_numbers(spec)
        if json:
            console.result(numbers)
        else:
            for line in plan_lines(spec, numbers):
                console.say(line)
        return
    where = pick_device(device)
    task = load_task(spec.data, spec.seed)
    if run is None:
        run = Run.create(spec, text, out)
    console.note(f"run {run.path} on {where}; data {task.fingerprint[:12]}; Ctrl-C saves and stops")
    if json:
        console.result({"event": "run", "path": str(run.path), "fingerprint": task.fingerprint})
    last = None
    done = int(run.newest_checkpoint().name[5:]) if resume else 0
    with console.progress(spec.train.steps, "step", done, quiet) as advance:
        for step in train(spec, device=where, run=run, resume=resume, task=task, signals=True):
            last = step
            advance(**_numbers(step))
            if step.valid:
                _show_validation(step, json, quiet)
    if last is not None:
        _report(spec, task, run, last, json)


def _numbers(step: Step) -> dict[str, float]:
    return {"loss": step.loss, "tokens/s": float(round(step.tokens_per_s))}


def _show_validation(step: Step, json: bool, quiet: bool) -> None:
    assert step.valid is not None
    if json:
        console.result({"event": "valid", **asdict(step)})
    elif not quiet:
        shown = "  ".join(f"{name} {value:.4f}" for name, value in step.valid.items())
        console.note(f"validation after step {step.step}: {shown}")


def _report(spec: RunSpec, task: Task, run: Run, last: Step, json: bool) -> None:
    valid = last.valid or {}
    floors = task.floors()
    run.event("end", step=last.step, valid=valid, floors=floors)
    if json:
        end = {"event": "end", "path": str(run.path), **asdict(last), "floors": floors}
        console.result(end)
        return
    if "bpb" in valid:
        rows = [(spec.name, valid["bpb"]), *floors.items()]
        console.table(["held-out text", "bits per byte"], rows)
    shown = "  ".join(f"{name} {value:.4f}" for name, value in valid.items())
    console.say(f"{shown}  steps {last.step}  tokens {last.tokens}  seconds {last.seconds:.1f}")
    console.say(f"run {run.path}")
    if task.tokenizer is not None:
        console.note(
            f'sample from it: glactl generate {shlex.quote(str(run.path))} --prompt "The "'
        )
