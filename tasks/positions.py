"""Perplexity by position: what a model makes of tokens far from the beginning of a text.

For texts d of tokens x_{d,1} .. x_{d,n_d} after the token that begins a text, and positions from
b_k to b_{k+1}, counted from 0,

    ppl_k = exp(sum_{d, t} -log p(x_{d,t} | x_{d,<t}) / number of such (d, t))          (1)

each token having read all of its text that stands before it. A model that was trained on shorter
texts and holds up has a falling or level curve (arXiv:2312.06635, Fig. 5). Later parts are of fewer
and longer texts: compare models in a column of one part, not parts of one model.

Texts are the rows of DIR/positions/test.jsonl, field text, or else the pages of lm-eval's wikitext.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glactl.tasks import stock
from glactl.tasks.outcome import Metric, Outcome, Row
from glactl.tasks.pins import Pins
from glactl.tasks.requests import Requests
from glactl.tasks.stock_tasks import data_revision, load_tasks

TASK = "positions"
VERSION = "1"
BOUNDS = (0, 256, 512, *(1024 * 2**k for k in range(8)))  # the last part begins at 131,072


@dataclass(frozen=True)
class Texts:
    """texts, where they come from, and their revision; rows: before a limit."""

    texts: list[str]
    data: str
    revision: str | None
    rows: int


def load_texts(
    data_dir: Path | None,
    sample: bool,
    revision: str | None,
    pins: Pins | None,
    limit: int | None,
) -> Texts:
    """The texts; the arguments are those of protocols.load_protocol, which says what is raised."""
    file = None if data_dir is None else data_dir / TASK / "test.jsonl"
    if file is not None and file.is_file():
        texts = [_text(row, f"{file}: row {n}") for n, row in enumerate(stock.read_jsonl(file), 1)]
        sha = f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}"
        return Texts(texts[:limit], str(data_dir), sha, len(texts))
    folder = stock.SAMPLE if sample else data_dir
    asked = None if revision is None else {"wikitext": revision}
    task = load_tasks(["wikitext"], folder, asked, pins)["tasks"]["wikitext"]
    texts = [str(row["page"]) for row in task.eval_docs]
    data = "sample" if sample else str(data_dir or stock.hub_name("wikitext"))
    found = data_revision("wikitext", task, folder)
    return Texts(texts[:limit], data, found, len(texts))


def measure_positions(requests: Requests, texts: Texts) -> Outcome:
    """(1) of every part that some text reaches."""
    of = [f"{TASK} {VERSION} {texts.data}@{texts.revision}"] * len(texts.texts)
    found = requests.by_position(texts.texts, BOUNDS, of)
    names = [f"perplexity from {b}" for b in BOUNDS[: max(map(len, found), default=0)]]
    rows = [
        Row(str(n), text[:1000], "", "", dict(zip(names, map(tuple, parts), strict=False)))
        for n, (text, parts) in enumerate(zip(texts.texts, found, strict=True))
    ]
    metrics = {}
    for name in names:
        parts = [row.scores[name] for row in rows if name in row.scores]
        metrics[name] = Metric(perplexity(parts), _error(parts), False)
    for row in rows:  # a text that ends before a part has no tokens in it
        row.scores.update({name: (0.0, 0) for name in names if name not in row.scores})
    return Outcome(
        task=TASK,
        protocol=TASK,
        version=VERSION,
        data=texts.data,
        revision=texts.revision,
        context_length=None,
        documents=len(rows),
        of=texts.rows,
        metrics=metrics,
        rows=rows,
        aggregate=dict.fromkeys(names, perplexity),
    )


def perplexity(parts: Sequence[tuple[float, float]]) -> float:
    """(1) of (nats, tokens) of several texts; nan without a token."""
    tokens = sum(n for _, n in parts)
    return math.exp(min(sum(nats for nats, _ in parts) / tokens, 700.0)) if tokens else math.nan


def _error(parts: Sequence[tuple[float, float]]) -> float | None:
    """The standard error of (1) over texts; None of fewer than two.

    With D texts of s_d nats in n_d tokens and r = sum s / sum n, that of r as a ratio is
    sqrt(D / (D - 1) sum (s_d - r n_d)^2) / sum n, and that of exp(r) is exp(r) times it.
    """
    if len(parts) < 2:
        return None
    n = sum(tokens for _, tokens in parts)
    r = sum(nats for nats, _ in parts) / n
    spread = math.sqrt(sum((nats - r * tokens) ** 2 for nats, tokens in parts))
    return perplexity(parts) * spread / n * math.sqrt(len(parts) / (len(parts) - 1))


def _text(row: dict[str, Any], where: str) -> str:
    if not isinstance(row.get("text"), str):
        raise ValueError(f"{where} lacks the field text")
    return str(row["text"])
