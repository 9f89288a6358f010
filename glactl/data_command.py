"""`glactl data`: text to folders of shards, and whether such a folder is as it was written."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from glactl import console
from glactl.models.spec import Spec
from glactl.spec_source import SpecError, preset_names, preset_text
from glactl.tasks.frames import Frame
from glactl.tasks.prepare import Progress, prepare
from glactl.tasks.prepare_shard import Recipe
from glactl.tasks.shards import Prepared
from glactl.train.plan import binary, short


class DataPreset(Spec):
    """A source of the hub by a short name; fields as in Recipe."""

    source: str
    tokenizer: str
    valid: float
    frame: Frame = "both"


def prepare_command(
    source: str | None,
    *,
    out: Path,
    preset: str | None,
    given: dict[str, Any],
    jobs: int | None,
    json: bool,
    quiet: bool,
) -> None:
    """Run `glactl data prepare`.

    Args:
        source, out, preset, jobs, json, quiet: the command's options.
        given: fields of the recipe; None: not given.

    Raises what `prepare` raises, and SpecError where source and preset do not say what to read.
    """
    recipe = _recipe(source, preset, {k: v for k, v in given.items() if v is not None})
    jobs = _cores() if jobs is None else jobs
    began, shown, done = time.monotonic(), time.monotonic(), Progress()
    if not quiet:
        console.note(f"{recipe.source} with {recipe.tokenizer} to {out}, {jobs} processes")
    with _terminated_as_interrupted():
        for done in prepare(recipe, out, jobs):
            now = time.monotonic()
            if not quiet and now - shown >= console.PLAIN_EVERY:
                console.note(_line(done, now - began))
                shown = now
    prepared = Prepared(out)
    splits = prepared.manifest["splits"]
    if json:
        counts = {s: {k: v for k, v in n.items() if k != "shards"} for s, n in splits.items()}
        console.result(
            {"path": str(out), "fingerprint": prepared.fingerprint, "kept": done.kept, **counts}
        )
        return
    rows = [(s, n["documents"], n["tokens"], n["bytes"]) for s, n in splits.items()]
    console.table(["split", "documents", "tokens", "bytes of text"], rows)
    console.say(f"data {out}  fingerprint {prepared.fingerprint[:12]}")
    if not quiet:
        console.note(_line(done, time.monotonic() - began))
        console.note(f"train on it: glactl train --set data='{{kind: shards, path: {out}}}'")


def check_command(folder: Path, *, json: bool) -> None:
    """Run `glactl data check`: every byte of a prepared folder against its hash.

    Raises what `Prepared` raises.
    """
    prepared = Prepared(folder)
    size = prepared.check()
    if json:
        result = {"path": str(folder), "fingerprint": prepared.fingerprint, "bytes": size}
        console.result(result)
    else:
        console.say(f"{folder}: {binary(size)} as written, fingerprint {prepared.fingerprint}")


def presets() -> list[str]:
    """The names of the presets."""
    return preset_names("presets_data")


def _recipe(source: str | None, preset: str | None, given: dict[str, Any]) -> Recipe:
    if preset is None:
        if source is None:
            raise SpecError(f"name a SOURCE, or a --preset: {', '.join(presets())}")
        return Recipe(source, **given)
    if source is not None:
        raise SpecError(f"both a source ({source}) and --preset {preset}; give one of them")
    text = preset_text("presets_data", preset)
    return Recipe(**(DataPreset.model_validate(yaml.safe_load(text)).model_dump() | given))


def _line(done: Progress, seconds: float) -> str:
    kept = f" ({done.kept} kept)" if done.kept else ""
    made = f"{done.shards} shard{'s' * (done.shards != 1)}{kept}  {short(done.documents)} documents"
    return f"{made}  {short(done.tokens)} tokens  {binary(done.bytes / max(seconds, 1e-3))}/s"


def _cores() -> int:
    """Those that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM acts as Ctrl-C within."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)
