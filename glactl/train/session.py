"""`glactl train` around the loop: the plan, the run folder, progress, and the report at the end."""

import re
import shlex
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from glactl import console
from glactl.convert.original import find_original
from glactl.device import precision_on
from glactl.init import agree, fill
from glactl.measure import rates
from glactl.run import Run
from glactl.spec import RunSpec, SpecError, load, read, with_vocab
from glactl.tasks import Task, load_task
from glactl.tasks.tokenizer import Tokenizer, load_tokenizer
from glactl.train.distributed import Group, choose, device_memory, joined
from glactl.train.loop import Step, train
from glactl.train.plan import plan_lines, plan_numbers
from glactl.train.plan_fit import state_bytes
from glactl.train.positions import without_positions

COMMON = (2, 5, 6)  # exit codes of what befalls all processes of a run alike


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

    Of several processes, as torchrun starts them, the first one prints and writes. What is wrong
    for all of them, it alone tells.

    Raises what spec.read, load_task, Run and train raise.
    """
    with joined(device) as (group, where):
        try:
            _train(
                path,
                preset=preset,
                sets=sets,
                resume=resume,
                plan=plan,
                out=out,
                json=json and group.lead,
                quiet=quiet or not group.lead,
                group=group,
                where=where,
            )
        except Exception as error:
            code = console.exit_code(error)
            if group.lead or code not in COMMON:
                raise
            raise SystemExit(code) from None


def _train(
    path: Path | None,
    *,
    preset: str | None,
    sets: list[str],
    resume: bool,
    plan: bool,
    out: Path,
    json: bool,
    quiet: bool,
    group: Group,
    where: torch.device,
) -> None:
    run, text = None, ""
    if resume:
        if preset is not None:
            raise SpecError(f"--preset {preset} and --resume exclude each other")
        run = Run.newest(out) if path is None else Run.open(path)
        run = Run.open(group.told(run.path))
        spec = load(run.path / "spec.resolved.yaml", sets=sets)
    else:
        text, spec = read(path, preset, sets, fill=partial(fill, plan=plan))
        if spec.init is not None and (found := find_original(spec.init.source, download=not plan)):
            agree(spec, found)
    if plan:
        if not group.lead:
            return
        numbers = plan_numbers(spec, rates(where, torch.float32).matmul, where, group.world)
        if json:
            console.result(numbers)
        else:
            for line in plan_lines(spec, numbers):
                console.say(line)
        return
    task = load_task(spec.data, spec.seed, None if run is None else _kept_tokenizer(run))
    if run is None:
        made = Run.create(spec, text, out).path if group.lead else None
        run = Run.open(group.told(made))
    digits = precision_on(where, spec.train.precision)
    begun = f"run {run.path} on {where} in {digits}; data {task.fingerprint[:12]}"
    if group.lead:
        console.note(f"{begun}; Ctrl-C saves and stops")
        for line in _shared(spec, task, run if resume else None, where, group.world):
            console.note(line)
    if json:
        console.result({"event": "run", "path": str(run.path), "fingerprint": task.fingerprint})
    last = None
    done = int(run.newest_checkpoint().name[5:]) if resume else 0
    with console.progress(spec.steps, "step", done, quiet) as advance:
        steps = train(
            spec, device=where, run=run, resume=resume, task=task, signals=True, group=group
        )
        for step in steps:
            last = step
            if step.step == 0:
                if group.lead:
                    _show_start(run, step, json)
                continue
            advance(**_numbers(step))
            if step.valid:
                _show_validation(step, json, quiet)
    if last is not None and group.lead:
        _report(spec, task, run, last, json)


def _shared(
    spec: RunSpec, task: Task, resumed: Run | None, where: torch.device, world: int
) -> list[str]:
    """How processes share the model, and which batches a resumed run goes on with."""
    lines = []
    if world > 1:
        state = state_bytes(with_vocab(spec, task.vocab_size))
        mode, why = choose(spec.train.parallel, world, state, device_memory(where))
        lines.append(f"{mode} on {world} processes: {why}")
    if resumed is not None and (at := resumed.newest_position()).ahead is not None:
        lines.append(f"resume after step {at.step}; next global batches {at.ahead[:16]}")
    return lines


def _kept_tokenizer(run: Run) -> Tokenizer | None:
    """The run's own copy, where its spec names that of a checkpoint that is not there any more."""
    data, kept = run.spec.data, run.path / "tokenizer"
    if run.spec.init is None or data.kind != "text" or not kept.is_dir():
        return None
    gone = Path(data.tokenizer).is_absolute() and not Path(data.tokenizer).exists()
    return load_tokenizer(str(kept)) if gone else None


def _show_start(run: Run, step: Step, json: bool) -> None:
    """The table of weights, those of equal layers in one row, and the loss they begin with."""
    start = run.start()
    assert start is not None
    assert step.valid is not None
    if json:
        console.result({"event": "init", **start})
        return
    for note in start["notes"]:
        console.note(note)
    rows: dict[tuple[str, ...], list[int]] = {}
    for row in start["rows"]:
        layer = re.match(r"blocks\.(\d+)\.", row["tensor"])
        names = (re.sub(r"\b\d+\b", "*", row[n], count=1) for n in ("tensor", "origin"))
        shape = " x ".join(map(str, row["shape"]))
        rows.setdefault((*names, shape, row["action"]), []).append(int(layer[1]) if layer else -1)
    table = [[_layers(layers), *texts] for texts, layers in rows.items()]
    console.table(["layers", "tensor", "from", "shape", "action"], table)
    shown = _line(step.valid)
    console.say(f"before any training: {shown}")


def _layers(found: list[int]) -> str:
    """[0, 1, 2, 4] as "0-2, 4"; "" of what is in no layer."""
    parts: list[list[int]] = []
    for layer in found:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        elif layer >= 0:
            parts.append([layer])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def _numbers(step: Step) -> dict[str, float]:
    return {"loss": step.loss, "tokens/s": float(round(step.tokens_per_s))}


def _line(valid: dict[str, float]) -> str:
    """The numbers of a validation, but for those by position, which are in metrics.jsonl."""
    return "  ".join(f"{k} {v:.4f}" for k, v in without_positions(valid).items())


def _show_validation(step: Step, json: bool, quiet: bool) -> None:
    assert step.valid is not None
    if json:
        console.result({"event": "valid", **asdict(step)})
    elif not quiet:
        shown = _line(step.valid)
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
    shown = _line(valid)
    console.say(f"{shown}  steps {last.step}  tokens {last.tokens}  seconds {last.seconds:.1f}")
    console.say(f"run {run.path}")
    if task.tokenizer is not None:
        console.note(
            f'sample from it: glactl generate {shlex.quote(str(run.path))} --prompt "The "'
        )
