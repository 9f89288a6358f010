"""The numbers of `glactl eval`: a summary, tables, and a line a document.

A table holds one protocol and one context length, which its heading names, so that numbers that do
not mean the same never stand in one column.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from glactl import console
from glactl.evaluate.compare import Difference, differences
from glactl.evaluate.html import page
from glactl.evaluate.papers import Shown, paper_tables
from glactl.run import new_folder
from glactl.tasks.outcome import Outcome, Row
from glactl.tasks.positions import TASK as POSITIONS

COLUMNS = ["task", "version", "docs", "metric"]


@dataclass(frozen=True)
class Measured:
    """One model's results: its name, what summary.json says of it, and its tasks."""

    name: str
    facts: dict[str, Any]
    outcomes: list[Outcome]


@dataclass(frozen=True)
class Evaluation:
    """All that one command found.

    about: of the whole, as summary.json has it. models: one or more. apart: for each model after
    the first, task -> metric -> its difference to the first.
    """

    about: dict[str, Any]
    models: list[Measured]
    apart: list[dict[str, dict[str, Difference]]]

    @property
    def papers(self) -> list[Shown]:
        """The papers' tables in which a model has a row."""
        return paper_tables(self.models, self.about["data"] == "sample", self.about["limit"])


def evaluation(about: dict[str, Any], models: list[Measured]) -> Evaluation:
    """What was found, with the differences. Raises ValueError where documents differ.

    Perplexities a token, by position, are compared only where tokens are the same.
    """
    first, apart = models[0], []
    for two in models[1:]:
        alike = first.facts["tokenizer"] == two.facts["tokenizer"]
        pairs = zip(first.outcomes, two.outcomes, strict=True)
        apart.append(
            {a.task: differences(a, b) if alike or a.task != POSITIONS else {} for a, b in pairs}
        )
    return Evaluation(about, models, apart)


def summary(found: Evaluation) -> dict[str, Any]:
    """What summary.json holds."""
    models = [
        {"name": one.name, **one.facts, "tasks": {o.task: o.facts() for o in one.outcomes}}
        for one in found.models
    ]
    told = found.about | {"models": models}
    told["papers"] = [
        {"heading": heading, "columns": columns, "rows": rows}
        for heading, columns, rows in found.papers
    ]
    if found.apart:
        told["differences"] = [
            {
                "model": two.name,
                "from": found.models[0].name,
                "tasks": {
                    task: {metric: asdict(d) for metric, d in by_metric.items()}
                    for task, by_metric in apart.items()
                },
            }
            for two, apart in zip(found.models[1:], found.apart, strict=True)
        ]
    return told


def headings(found: Evaluation) -> list[tuple[str, list[str]]]:
    """(heading, tasks) of every table: one for each protocol and context length."""
    groups: dict[tuple[str, int | None], list[Outcome]] = {}
    for outcome in found.models[0].outcomes:
        groups.setdefault((outcome.protocol, outcome.context_length), []).append(outcome)
    return [
        ("\n".join(_heading(*of, found, group)), [o.task for o in group])
        for of, group in groups.items()
    ]


def _heading(
    protocol: str, length: int | None, found: Evaluation, outcomes: list[Outcome]
) -> list[str]:
    window = "" if length is None else f", context length {length}"
    what = f"protocol {protocol}{window}, lm-eval {found.about['lm_eval']}"
    lines = [f"{what}; {', '.join(_place(one) for one in found.models)}"]
    for how, of in _readings(found.models).items():
        lines.append(f"{how}{of}")
    if len(found.models) > 1:
        lines.append(", ".join(f"{_letter(i)} {one.name}" for i, one in enumerate(found.models)))
    for outcome in outcomes:
        counts = f", {outcome.dropped} dropped" if outcome.dropped else ""
        if outcome.cut is not None:
            counts += f", {outcome.cut} cut, an answer inside {outcome.inside}"
        rows = f"{outcome.documents} of {outcome.of} rows{counts}"
        at = outcome.revision or "unknown"
        lines.append(f"{outcome.task}: {outcome.data}, revision {at}; {rows}")
    if found.about["data"] == "sample" or found.about["limit"] is not None:
        lines.append("NOT comparable with published results: other or fewer documents")
    elif not found.about["comparable"]:
        lines.append("comparable with published results only if these rows are the hub's")
    return lines


def _readings(models: Sequence[Measured]) -> dict[str, str]:
    """How models read -> " of MODEL, ..." where they differ in it, else ""."""
    found: dict[str, list[str]] = {}
    for one in models:
        bos = "BOS first" if one.facts["bos"] else "no BOS"
        most = one.facts["max_length"]
        cut = "" if most is None else f", at most {most} tokens"
        how = f"tokenizer {one.facts['tokenizer']}, {bos}{cut}; {one.facts['precision']}"
        found.setdefault(how, []).append(one.name)
    return {how: f" of {', '.join(of)}" if len(found) > 1 else "" for how, of in found.items()}


def _place(one: Measured) -> str:
    step = one.facts["step"]
    return one.facts["run"] + ("" if step is None else f" at step {step}")


def _letter(i: int) -> str:
    return chr(ord("A") + i)


def table(found: Evaluation, tasks: list[str]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows: value and standard error of each model, and differences to the first."""
    models = found.models
    if len(models) == 1:
        columns = [*COLUMNS, "value", "stderr"]
    else:
        names = [_letter(i) for i in range(len(models))]
        columns = [*COLUMNS, *(c for n in names for c in (n, "stderr"))]
        columns += [c for n in names[1:] for c in (f"{n} - A", "from", "to (95 %)")]
    rows: list[list[Any]] = []
    for n, outcome in enumerate(models[0].outcomes):
        for metric in outcome.metrics if outcome.task in tasks else ():
            row: list[Any] = [outcome.task, outcome.version, outcome.documents, metric]
            for one in models:
                value = one.outcomes[n].metrics[metric]
                row += [value.value, value.stderr]
            for apart in found.apart:
                d = apart[outcome.task].get(metric)
                row += [None] * 3 if d is None else [d.value, d.low, d.high]
            rows.append(row)
    return columns, rows


def show(found: Evaluation) -> None:
    """The tables on stdout."""
    for n, (heading, tasks) in enumerate(headings(found)):
        if n:
            console.say("")
        console.table(*table(found, tasks), heading)
    for heading, columns, rows in found.papers:
        console.say("")
        console.table(columns, rows, heading)


def write(out: Path, found: Evaluation) -> Path:
    """Write summary, samples and page to a new folder of `out`; returns it."""
    folder = new_folder(out / "--".join(one.name for one in found.models))
    by_task = list(zip(*(one.outcomes for one in found.models), strict=True))
    for outcomes in by_task:
        lines = [
            json.dumps(console.finite(sample(rows)), default=str, ensure_ascii=False)
            for rows in zip(*(o.rows for o in outcomes), strict=True)
        ]
        if lines:
            path = folder / f"{outcomes[0].task}.samples.jsonl"
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    told = json.dumps(console.finite(summary(found)), indent=1, default=str)
    (folder / "summary.json").write_text(told + "\n")
    tables = [(heading, *table(found, tasks)) for heading, tasks in headings(found)]
    tables += found.papers
    text = page([one.name for one in found.models], tables, by_task)
    (folder / "report.html").write_text(text, encoding="utf-8")
    return folder


def sample(rows: Sequence[Row]) -> dict[str, Any]:
    """One line of samples.jsonl: a document and what each model made of it."""
    first = rows[0]
    # windows are measured in each model's own tokens
    models = [
        {"output": row.output, **row.scores}
        | ({} if row.prompt == first.prompt else {"prompt": row.prompt})
        for row in rows
    ]
    asked = {"doc_id": first.doc_id, "prompt": first.prompt, "gold": first.gold}
    return asked | {"models": models}
