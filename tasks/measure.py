"""Tasks asked of a model: documents of a protocol, or lm-eval's own tasks."""

import io
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import Any

from glactl.tasks import papers
from glactl.tasks.documents import Documents, scores
from glactl.tasks.harness import HarnessLM
from glactl.tasks.outcome import Metric, Outcome, Row, mean, mean_metric
from glactl.tasks.requests import Requests

BOOTSTRAP = 1000  # resamplings for the standard error of a metric that has no formula for it


def measure_documents(requests: Requests, documents: Documents) -> Outcome:
    """Greedy continuations of the prompts of a protocol, scored."""
    asked = [
        (d.prompt, {"until": list(d.stop), "max_gen_toks": d.max_new_tokens}) for d in documents
    ]
    revision = f"{documents.protocol} {documents.version} {documents.data}@{documents.revision}"
    made = requests.generate(asked, [revision] * len(asked))
    rows = [
        Row(d.doc_id, d.prompt, list(d.gold), text, dict(scores(d, text)))
        for d, text in zip(documents, made, strict=True)
    ]
    names = dict.fromkeys(d.metric for d in documents)
    names |= dict.fromkeys(name for row in rows for name in row.scores)
    return Outcome(
        task=documents.task,
        protocol=documents.protocol,
        version=documents.version,
        data=documents.data,
        revision=documents.revision,
        context_length=documents.context_length,
        documents=len(rows),
        of=documents.rows,
        metrics={name: mean_metric([float(row.scores[name]) for row in rows]) for name in names},
        dropped=documents.dropped,
        cut=documents.cut,
        inside=documents.inside,
        rows=rows,
        aggregate=dict.fromkeys(names, mean),
    )


def measure_stock(
    requests: Requests,
    loaded: Mapping[str, Any],
    data: Mapping[str, tuple[str, str | None]],
    limit: int | None = None,
) -> list[Outcome]:
    """lm-eval's tasks by lm_eval.evaluate, set up as by lm_eval.simple_evaluate.

    simple_evaluate itself also imports transformers where it is installed, and runs other programs
    to describe the machine.

    Args:
        requests: of the model.
        loaded: tasks, groups and group_map, as lm_eval.evaluate takes them.
        data: task -> its data and their revision.
        limit: documents of each task; None: all.
    """
    from lm_eval import evaluate
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    tasks = loaded["tasks"]
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    revisions = {name: f"stock {data[name][0]}@{data[name][1]}" for name in tasks}
    with redirect_stdout(io.StringIO()):  # "bootstrapping for stddev: ..." is no result
        found: dict[str, Any] = evaluate(
            lm=HarnessLM(requests, revisions),
            task_dict=dict(loaded),
            limit=limit,
            bootstrap_iters=BOOTSTRAP,
        )
    return [
        _outcome(name, found, tasks.get(name), *data.get(name, ("", None)))
        for name in found["results"]
        if _metrics(name, found)
    ]


def _outcome(name: str, found: Any, task: Any, data: str, revision: str | None) -> Outcome:
    counts = found["n-samples"].get(name, {})
    samples = found["samples"].get(name, [])
    aggregates = {} if task is None else task.aggregation()
    metrics = _metrics(name, found)
    labels = {label: label.partition(" (")[0] for label in metrics}
    return Outcome(
        task=name,
        protocol="stock",
        version=str(found["versions"].get(name)),
        data=data,
        revision=revision,
        context_length=None,
        documents=counts.get("effective", 0),
        of=counts.get("original", 0),
        metrics=metrics,
        rows=_rows(samples),
        aggregate={label: aggregates[m] for label, m in labels.items() if m in aggregates},
    )


def _metrics(name: str, found: Any) -> dict[str, Metric]:
    """The metrics of a task or group, those of the papers first.

    Of a filter that is not lm-eval's default: name (filter).
    """
    results = found["results"][name]
    metrics = {}
    for key, value in results.items():
        metric, _, chosen = key.partition(",")
        if not chosen or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = results.get(f"{metric}_stderr,{chosen}")
        metrics[_label(metric, chosen)] = Metric(
            float(value),
            float(error) if isinstance(error, (int, float)) else None,
            found["higher_is_better"].get(name, {}).get(metric),
        )
    first = [m for m in papers.metrics(name) or () if m in metrics]
    return {m: metrics[m] for m in dict.fromkeys([*first, *metrics])}


def _label(metric: str, chosen: str) -> str:
    return metric if chosen == "none" else f"{metric} ({chosen})"


def _rows(samples: list[Any]) -> list[Row]:
    """Documents in order, each with the metrics of every filter."""
    rows: dict[Any, Row] = {}
    for one in samples:
        scores = {_label(m, one["filter"]): one[m] for m in one["metrics"]}
        if one["doc_id"] in rows:
            rows[one["doc_id"]].scores.update(scores)
            continue
        asked = [a if isinstance(a, (tuple, list)) else (a,) for a in one["arguments"]]
        prompt = str(asked[0][0]) if asked else ""
        output = _output(asked, one["resps"])
        rows[one["doc_id"]] = Row(str(one["doc_id"]), prompt, one["target"], output, scores)
    return list(rows.values())


def _output(asked: list[Any], answers: list[Any]) -> Any:
    """The text that came, or (continuation, nats, is_greedy) of each likelihood."""
    found: list[Any] = []
    for request, answer in zip(asked, (a[0] for a in answers), strict=True):
        if isinstance(answer, str):
            found.append(answer)
        elif isinstance(answer, (tuple, list)):
            found.append([request[1], *answer])
        else:
            found.append(["", answer])  # of a whole text
    return found[0] if len(found) == 1 and isinstance(found[0], str) else found
