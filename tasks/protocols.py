"""The recall tasks swde, fda, squad, nq, triviaqa and drop under a named protocol.

One name stands for different tasks in different papers, so a document always says by which
protocol it was made:

    jrt        the GSA paper's: the passage stands in the prompt, cut to a window round the answer
    jrt-twice  the same with the question first and the passage twice
    based      the GLA paper's: fda, swde, squad as in version 0 of lm-eval's tasks of those names
    stock      lm-eval's own tasks, as the installed version has them

    documents = load_protocol("jrt", "swde", tokenizer=tokenizer, data_dir=Path("data"))
    for document in documents:
        text = generate(document.prompt, document.max_new_tokens, document.stop)  # greedy
        score(document, text)

`documents` is a sequence that also has what a table's heading must name: protocol, version,
context length, tokenizer, data and its revision, and how many documents were dropped and cut.

Source: arXiv:2407.05483 (JRT) and HazyResearch/prefix-linear-attention at 7490f22 for jrt and
jrt-twice; HazyResearch/based-evaluation-harness at 22c0856 for based. The GSA paper (2409.07146)
takes jrt at 2,000 tokens, the JRT paper at 1,000, twice as well.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from glactl.tasks import recall, recall_rows
from glactl.tasks.documents import Document, Documents, contains, score, scores, tokenizer_name
from glactl.tasks.names import unknown
from glactl.tasks.pins import Pins
from glactl.tasks.windows import left_cuts, windows

if TYPE_CHECKING:
    from glactl.tasks.tokenizer import Tokenizer

__all__ = ["Document", "Documents", "load_protocol", "score", "scores"]

PROTOCOLS = ("jrt", "jrt-twice", "based", "stock")
RECALL_TASKS = ("swde", "fda", "squad", "nq", "triviaqa", "drop")
DEFAULT_PROTOCOL = "jrt"
# Tokens; of jrt-twice the window, which the prompt holds two times. None: no limit.
CONTEXT_LENGTHS: dict[str, int | None] = {
    "jrt": 2000,
    "jrt-twice": 1000,
    "based": 2048,
    "stock": None,
}
# Of the definitions: the commit of JRT's harness, the VERSION of Based's tasks.
VERSIONS = {"jrt": "7490f22", "jrt-twice": "7490f22", "based": "0"}
MAX_NEW_TOKENS = 48

Numbered = tuple[int, recall.Row]  # a row and its number in the data


def load_protocol(
    name: str,
    task: str,
    *,
    tokenizer: "Tokenizer",
    context_length: int | None = None,
    data_dir: Path | None = None,
    sample: bool = False,
    revision: str | None = None,
    pins: Pins | None = None,
    limit: int | None = None,
) -> Documents:
    """The documents of a recall task under a protocol.

    Args:
        name: one of PROTOCOLS. task: one of RECALL_TASKS.
        tokenizer: the model's own; it measures context_length.
        context_length: tokens of the window (jrt, jrt-twice), or of prompt and continuation
            together, the prompt being cut from the left (based, stock); None: CONTEXT_LENGTHS.
        data_dir: DIR/<task>/validation.jsonl, or, but for stock, DIR/<task>_jrt/validation.jsonl
            where there is one. sample: the few rows of our own. Neither: the hub.
        revision: of the hub's data set; None: the one in `pins`, which keeps what was read first;
            without it, the newest, or what its cache has.
        limit: the first so many rows only.

    Raises:
        ValueError: an unknown name or task, a task that the protocol lacks, a context_length too
            short for it, rows without a field that is needed; one line each.
        FileNotFoundError: no such folder or file.
        DataUnavailable: the hub has no such data set or revision, or does not answer.
    """
    _check(name, task)
    length = CONTEXT_LENGTHS[name] if context_length is None else context_length
    source = recall_rows.Source(data_dir, sample, revision, pins)
    if name == "stock":
        from glactl.tasks.stock_documents import load_stock  # lm-eval is read only where it is used

        return load_stock(task, tokenizer, length, source, limit)
    assert length is not None
    kind = recall.TASKS[task]
    rows = recall_rows.read(task, kind.hub_set(length), source)
    recall_rows.check(rows, kind.needs(name), f"protocol {name}")
    taken = list(enumerate(rows.rows[:limit]))
    make = _based if name == "based" else _jrt
    kept = make(name, task, taken, tokenizer, length)
    return Documents(
        task=task,
        protocol=name,
        version=VERSIONS[name],
        context_length=length,
        tokenizer=tokenizer_name(tokenizer),
        data=rows.data,
        revision=rows.revision,
        rows=len(rows.rows),
        dropped=len(taken) - len(kept),
        documents=tuple(kept),
    )


def _check(name: str, task: str) -> None:
    if name not in PROTOCOLS:
        raise ValueError(unknown("protocol", name, PROTOCOLS))
    known = recall.BASED if name == "based" else RECALL_TASKS
    if task not in RECALL_TASKS:
        raise ValueError(unknown("recall task", task, RECALL_TASKS))
    if task not in known:
        raise ValueError(f"protocol {name} has no task {task}; it has: {', '.join(known)}")


def _based(
    name: str, task: str, rows: list[Numbered], tokenizer: "Tokenizer", length: int
) -> list[Document]:
    texts = [row["text"] for _, row in rows]
    seen = left_cuts(texts, tokenizer, length, MAX_NEW_TOKENS)
    return [
        _document(name, task, *row, one.text, one.cut) for row, one in zip(rows, seen, strict=True)
    ]


def _jrt(
    name: str, task: str, rows: list[Numbered], tokenizer: "Tokenizer", length: int
) -> list[Document]:
    """The documents under jrt or jrt-twice, without those of rows that these leave out."""
    kind = recall.TASKS[task]
    prompt = kind.twice if name == "jrt-twice" else kind.once
    pairs = [(row, recall.passage(kind, row[1])) for row in rows]
    kept = [(row, passage) for row, passage in pairs if passage is not None]
    seen = windows([passage for _, passage in kept], tokenizer, length)
    return [
        _document(name, task, n, row, prompt(row | {kind.field: one.text}), one.cut)
        for ((n, row), _), one in zip(kept, seen, strict=True)
    ]


def _document(name: str, task: str, n: int, row: recall.Row, prompt: str, cut: bool) -> Document:
    gold = recall.golds(recall.TASKS[task], row)
    return Document(
        task=task,
        protocol=name,
        version=VERSIONS[name],
        doc_id=f"{n}:{row['doc_id']}" if "doc_id" in row else str(n),
        prompt=prompt,
        gold=gold,
        metric="contains",
        max_new_tokens=MAX_NEW_TOKENS,
        stop=("\n",),
        cut=cut,
        inside=contains(prompt, gold),
    )
