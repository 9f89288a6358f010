"""The page of a run: how it went, what it reached, and all that it was made with."""

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from glactl import page
from glactl.run import Run

POINTS = 1000  # of a curve; more would show no more


def html(run: Run) -> str:
    """The page as text, of what the run has written so far."""
    steps = list(_lines(run.path / "metrics.jsonl"))
    events = list(_lines(run.path / "events.jsonl"))
    manifest = run.manifest
    parts = [page.paragraph(line) for line in _head(run, steps, events)]
    if steps:
        parts.append(page.inline(_figure(steps), "curves"))
    valid = [step for step in steps if step.get("valid")]
    if valid:
        names = list(valid[-1]["valid"])
        rows = [[step["step"], *(step["valid"].get(n) for n in names)] for step in valid]
        parts += [page.heading("Validation"), page.table(["step", *names], rows)]
    floors: dict[str, float] = next(
        (event["floors"] for event in reversed(events) if event.get("floors")), {}
    )
    if floors:
        parts.append(page.heading("Bits per byte without a model"))
        parts.append(page.table(["", "bpb"], list(floors.items())))
    parts += [
        page.heading("Events"),
        page.table(["time", "event", ""], list(_events(events)), code=True),
    ]
    parts += [page.heading("Spec, as it was written"), page.block(_text(run.path / "spec.yaml"))]
    full = _text(run.path / "spec.resolved.yaml")
    parts += [page.heading("Spec, with every default"), page.block(full)]
    shown = {name: value for name, value in manifest.items() if name != "spec"}
    parts += [page.heading("Manifest"), page.block(json.dumps(shown, indent=1))]
    return page.document(f"Run {run.path.resolve().name}", parts)


def _head(run: Run, steps: Sequence[dict[str, Any]], events: Sequence[dict[str, Any]]) -> list[str]:
    spec = run.spec
    mixers = ", ".join(dict.fromkeys(mixer.kind for mixer in spec.model.mixers))
    lines = [f"{spec.model.n_layers} layers of {mixers}, width {spec.model.d_model}"]
    if not steps:
        return [*lines, "No step has been taken yet."]
    last = steps[-1]
    ended = any(event["event"] == "end" for event in events)
    lines.append(
        f"{last['step']:,} of {last['steps']:,} steps, {last['tokens']:,} tokens in "
        f"{last['seconds']:,.0f} s; the last loss is {last['loss']:.4f} nats a token"
        + ("." if ended else "; it has not ended.")
    )
    return lines


def _events(events: Sequence[dict[str, Any]]) -> Iterator[list[object]]:
    for event in events:
        rest = {k: v for k, v in event.items() if k not in ("time", "event", "floors")}
        yield [event["time"], event["event"], json.dumps(rest) if rest else ""]


def _figure(steps: Sequence[dict[str, Any]]) -> str:
    """Loss, tokens a second, learning rate and norm of the gradient against the step, as SVG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    thin = steps[:: max(1, len(steps) // POINTS)]
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    panels = figure.subplots(2, 2).flat
    names = {"loss": "loss, nats a token", "tokens_per_s": "tokens/s"}
    names |= {"lr": "learning rate", "grad_norm": "norm of the gradient"}
    for axes, (name, title) in zip(panels, names.items(), strict=True):
        for stage in dict.fromkeys(step.get("stage", "train") for step in thin):
            mine = [s for s in thin if s.get("stage", "train") == stage and s.get(name) is not None]
            axes.plot([s["step"] for s in mine], [s[name] for s in mine], linewidth=1, label=stage)
        valid = [s for s in steps if name == "loss" and (s.get("valid") or {}).get("loss")]
        if valid:
            at = [s["valid"]["loss"] for s in valid]
            axes.plot([s["step"] for s in valid], at, "o", color="#d62728", label="held out")
        if name == "loss":
            axes.legend(frameon=False, fontsize=8)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    found = io.StringIO()
    with rc_context({"svg.hashsalt": "glactl", "svg.fonttype": "none"}):
        figure.savefig(found, format="svg", metadata={"Date": None})
    return found.getvalue()


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON lines file; one that is being written is left out."""
    for line in _text(path).splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""
