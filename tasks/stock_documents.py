"""lm-eval's own recall tasks as documents: its prompts, answers, filters and metrics.

nq and triviaqa are closed-book here (nq_open, triviaqa), drop a passage with a question; they have
only the names of the papers' tasks. The metric named first in a task's file is the one that counts.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

from lm_eval.api.instance import Instance
from lm_eval.models.utils import normalize_gen_kwargs

from glactl.tasks import stock
from glactl.tasks.documents import Document, Documents, contains, tokenizer_name
from glactl.tasks.recall_rows import Source
from glactl.tasks.stock_tasks import data_revision, load_tasks
from glactl.tasks.windows import Window, left_cuts

if TYPE_CHECKING:
    from glactl.tasks.tokenizer import Tokenizer

DEFAULT_NEW_TOKENS = 256  # of a task that names no limit, as in lm-eval


def load_stock(
    task: str,
    tokenizer: "Tokenizer",
    context_length: int | None,
    source: Source,
    limit: int | None = None,
) -> Documents:
    """The documents of lm-eval's task; the arguments are those of protocols.load_protocol."""
    (name,) = stock.resolve(task)
    asked = None if source.revision is None else {name: source.revision}
    loaded = load_tasks([name], source.folder, asked, source.pins)
    inner = loaded["tasks"][name]
    inner.set_config(key="num_fewshot", value=0)
    rows = list(inner.eval_docs)
    version = f"{inner.VERSION} of lm-eval {stock.lm_eval_version()}"
    made = tuple(
        _document(task, inner, version, n, row, tokenizer, context_length)
        for n, row in enumerate(rows[:limit])
    )
    return Documents(
        task=task,
        protocol=stock.PROTOCOL,
        version=version,
        context_length=context_length,
        tokenizer=tokenizer_name(tokenizer),
        data=source.name(stock.hub_name(name)),
        revision=data_revision(name, inner, source.folder),
        rows=len(rows),
        dropped=0,
        documents=made,
    )


def _document(
    task: str,
    inner: Any,
    version: str,
    n: int,
    row: dict[str, Any],
    tokenizer: "Tokenizer",
    context_length: int | None,
) -> Document:
    context = inner.fewshot_context(row, num_fewshot=0)
    request = inner.construct_requests(row, context, metadata=(task, n, 1))
    text, settings = (request[0] if isinstance(request, list) else request).args
    known = normalize_gen_kwargs(settings, DEFAULT_NEW_TOKENS)
    new = int(known["max_gen_toks"])
    prompt = Window(text, cut=False)
    if context_length is not None:
        (prompt,) = left_cuts([text], tokenizer, context_length, new)
    gold = _gold(task, inner, row)
    return Document(
        task=task,
        protocol=stock.PROTOCOL,
        version=version,
        doc_id=str(n),
        prompt=prompt.text,
        gold=gold,
        metric=next(iter(inner.aggregation())),
        max_new_tokens=new,
        stop=tuple(known["until"]),
        cut=prompt.cut,
        inside=contains(prompt.text, gold),
        judge=partial(_judge, inner, row),
    )


def _gold(task: str, inner: Any, row: dict[str, Any]) -> tuple[str, ...]:
    if task == "drop":  # its file's target is not what its metrics compare with
        return tuple(" ".join(spans) for spans in row["answers"])
    target = inner.doc_to_target(row)
    return tuple(target) if isinstance(target, list) else (target,)


def _judge(inner: Any, row: dict[str, Any], generation: str) -> dict[str, float]:
    instance = Instance("generate_until", row, (), 0, resps=[generation])
    (chosen,) = inner._filters
    chosen.apply([instance])
    found = inner.process_results(row, [instance.filtered_resps[chosen.name]])
    return {name: float(value) for name, value in found.items()}
