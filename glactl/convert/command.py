"""`glactl import` and `glactl export`: checkpoints of other projects, as run folders and back.

An import is a run folder as `glactl train` writes it, with one checkpoint at step 0 and without the
state of an optimizer; its import.json tells where each weight comes from. An export is a folder
with config.json, model.safetensors and the tokenizer, which appears only after it was read back and
its logits were compared with the run's.
"""

import json as jsons
import re
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, cast

import torch
from torch import Tensor

from glactl import checkpoints, console
from glactl.convert.files import Weights, config, copy_tokenizer, find, write_safetensors
from glactl.convert.fla import FLA
from glactl.convert.mamba import MAMBA
from glactl.convert.maps import Understood, describe, understand
from glactl.convert.original import check_repeats, shapes_of, take
from glactl.device import pick_device
from glactl.models.lm import LM, build_lm
from glactl.models.lm_spec import LMSpec
from glactl.run import Position, Run
from glactl.spec import RunSpec, resolved_yaml
from glactl.tasks import Task
from glactl.tasks.text import TextSpec
from glactl.tasks.tokenizer import Tokenizer, load_tokenizer

ROWS, TOKENS = 2, 96  # of the text that logits are compared on; more than a chunk of 64
AGREES = 1e-3  # the largest difference of logits, as a share of the largest logit


class Differs(RuntimeError):
    """An export that was read back gives other logits."""

    exit_code = 1


def import_command(source: str, *, out: Path, json: bool = False) -> None:
    """Run `glactl import`; the arguments are the command's.

    Raises:
        ValueError: the checkpoint is of no known kind, has a setting that is not to be had here, or
            is not whole; or the folder `out` exists.
        FileNotFoundError, DataUnavailable: see convert_files.find.
    """
    _new(out)
    weights = Weights(find(source))
    found = understand(config(weights.folder), weights.shapes, shapes_of)
    check_repeats(found, weights)
    tokenizer = _tokenizer(weights.folder)
    notes = list(found.notes)
    if tokenizer is None:
        notes.append(f"{weights.folder} has no tokenizer.json: the run has no tokenizer")
    elif tokenizer.vocab_size > found.spec.vocab:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {found.spec.vocab}"
        )
    table = _table(found, weights)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=out.parent) as part:
        spec = _run_spec(out.name, found.spec, weights.folder, tokenizer)
        run = Run.create(spec, resolved_yaml(spec), part)
        fingerprint = f"imported {found.family}"
        data = SimpleNamespace(
            fingerprint=fingerprint, vocab_size=found.spec.vocab, n_train=1, tokenizer=tokenizer
        )
        run.begin(spec, cast(Task, data))
        at = Position(spec.seed, 1, fingerprint)
        checkpoints.save_weights(
            run.path / "checkpoints",
            0,
            shapes_of(found.spec),
            lambda name: take(found.origins[name], weights, shapes_of(found.spec)[name]),
            asdict(at) | {"epoch": 0},
        )
        origins = {mine: o._asdict() for mine, o in found.origins.items()}
        about = {"source": source, "family": found.family, "notes": notes, "origins": origins}
        (run.path / "import.json").write_text(jsons.dumps(about, indent=1) + "\n")
        run.event("import", source=source, family=found.family)
        run.path.rename(out)
    for text in notes:
        console.note(text)
    if json:
        console.result({"path": str(out), **about})
    else:
        console.table(["tensor", "shape", "here", "how"], table)
        console.say(f"{found.family} as {_count(found.spec)}: run {out}")


def export_command(
    run: str | None,
    *,
    format: Literal["hf", "fla"],
    out: Path,
    device: str | None = None,
    json: bool = False,
) -> None:
    """Run `glactl export`; the arguments are the command's.

    Raises:
        ValueError: a setting of the model is not to be had in the format; or `out` exists.
        NoRun: no such run.
        Differs: the export, read back, gives other logits.
    """
    _new(out)
    opened = Run.newest() if run is None else Run.open(run)
    if run is None:
        console.note(f"run {opened.path} (the newest)")
    where = pick_device(device)
    lm, tokenizer, spec = opened.load_model(where)
    name = _format(format, lm.spec)
    data, names, notes = describe(name, lm.spec, shapes_of(lm.spec))
    limit = None if notes else AGREES  # a model that is changed gives other logits
    data["max_position_embeddings"] = lm.spec.max_len or spec.data.seq_len
    for token in ("bos", "eos"):
        data[f"{token}_token_id"] = getattr(tokenizer, f"{token}_id", None)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=".new-", dir=out.parent))
    try:
        part.chmod(0o755)  # mkdtemp's folders are its user's alone
        state = lm.state_dict()
        tensors = {theirs: state[mine] for theirs, mine in names.items()}
        write_safetensors(part / "model.safetensors", tensors, torch.float32)
        (part / "config.json").write_text(jsons.dumps(data, indent=1) + "\n")
        if not copy_tokenizer(opened.path, part):
            notes.append("the run has no tokenizer.json: the export has no tokenizer")
        wanted = _logits(lm)
        del lm, state, tensors  # one model at a time
        difference = _difference(wanted, _logits(read_model(part, where)[0]), limit)
        differences = {"read back here": difference}
        if format == "hf" and (theirs := _transformers(part)) is not None:
            differences["transformers"] = _difference(wanted, theirs, limit)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    for text in notes:
        console.note(text)
    if json:
        console.result({"path": str(out), "family": name, "notes": notes, **differences})
        return
    for what, value in differences.items():
        console.say(f"largest difference of logits, {what}: {value:.3g}")
    console.say(f"{name} checkpoint of {_count(opened.spec.model)}: {out}")


def read_model(folder: Path, device: torch.device) -> tuple[LM, Understood]:
    """The model of a checkpoint's folder, in evaluation mode, and how it was understood.

    Raises:
        ValueError, FileNotFoundError: as of `import_command`.
    """
    weights = Weights(folder)
    found = understand(config(folder), weights.shapes, shapes_of)
    check_repeats(found, weights)
    lm = build_lm(found.spec, 0)
    shapes = shapes_of(found.spec)
    with torch.no_grad():
        for name, x in lm.state_dict().items():
            x.copy_(take(found.origins[name], weights, shapes[name]))
    return lm.to(device).eval(), found


def _new(out: Path) -> None:
    if out.exists():
        raise ValueError(f"--out {out} exists; name a folder that does not")


def _tokenizer(folder: Path) -> Tokenizer | None:
    return load_tokenizer(str(folder)) if (folder / "tokenizer.json").is_file() else None


def _run_spec(name: str, model: LMSpec, folder: Path, tokenizer: Tokenizer | None) -> RunSpec:
    """The spec of a run that trains the model on the default text, with its own tokenizer."""
    default = TextSpec().seq_len
    data = {"kind": "text", "seq_len": min(default, model.max_len or default)}
    if tokenizer is not None:
        data["tokenizer"] = str(folder.resolve())
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("._-") or "imported"
    fields = {"name": plain, "model": model.model_dump(mode="json"), "data": data}
    return RunSpec.model_validate(fields)


def _table(found: Understood, weights: Weights) -> list[list[str]]:
    """A row for each tensor, those of all layers in one."""
    rows: dict[tuple[str, ...], list[int]] = {}

    def add(theirs: str, shape: tuple[int, ...], mine: str, how: str) -> None:
        layer = re.search(r"\.(\d+)\.", mine if mine.startswith("blocks.") else theirs)
        texts = (_layers(theirs), " x ".join(map(str, shape)), _layers(mine), how)
        rows.setdefault(texts, []).append(int(layer[1]) if layer else 0)

    for mine, origin in found.origins.items():
        if origin.theirs is None:
            add("-", (), mine, "not there: 1")
        else:
            how = "" if origin.part is None else f"rows, part {origin.part[0] + 1} of 2"
            add(origin.theirs, weights.shapes[origin.theirs], mine, how)
    for name, other in found.same.items():
        add(name, weights.shapes[name], "-", f"equals {other}" if other else "of no use")
    return [list(texts) for texts in rows]


def _layers(name: str) -> str:
    return re.sub(r"^(blocks|(?:model|backbone)\.layers)\.\d+\.", r"\1.*.", name)


def _tokens(vocab: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab, (ROWS, TOKENS), generator=generator)


@torch.no_grad()
def _logits(lm: LM) -> Tensor:
    hidden, _ = lm(_tokens(lm.spec.vocab).to(lm.device))
    return lm.logits(hidden).float().cpu()


def _transformers(folder: Path) -> Tensor | None:
    """The logits of Hugging Face's own model of the folder; None where it is not installed."""
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        return None
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits: Tensor = model.eval()(_tokens(model.config.vocab_size)).logits.float()
    return logits


def _difference(wanted: Tensor, found: Tensor, limit: float | None) -> float:
    """The largest difference of logits. Raises Differs above that share of the largest logit."""
    value = float((wanted - found).abs().max())
    largest = float(wanted.abs().max())
    if limit is not None and not value <= limit * largest:
        raise Differs(
            f"read back, the export gives other logits: they differ by up to {value:.3g}, the "
            f"largest is {largest:.3g}; nothing was written"
        )
    return value


def _format(format: Literal["hf", "fla"], spec: LMSpec) -> str:
    """The kind of checkpoint that a model is in a format. Raises ValueError."""
    mixer = spec.mixers[0]
    if format == "hf" and mixer.kind == "attention":
        return "llama" if mixer.window is None else "mistral"
    if format == "hf" and mixer.kind != "mamba":
        raise ValueError(
            f"format hf has no {mixer.kind} models; allowed: attention and mamba, or fla"
        )
    known = {family.mixer: name for name, family in (FLA | MAMBA).items()}
    if mixer.kind not in known:
        raise ValueError(f"format fla has no {mixer.kind} models; allowed: {', '.join(known)}")
    return known[mixer.kind]


def _count(spec: LMSpec) -> str:
    shapes = shapes_of(spec)
    if spec.tie_embeddings:
        del shapes["head.weight"]
    total = sum(torch.Size(s).numel() for s in shapes.values())
    return f"{spec.n_layers} layers of {spec.mixers[0].kind}, {total:,} parameters"
