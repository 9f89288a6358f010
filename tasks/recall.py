"""The recall tasks of the JRT and Based papers: a row of their data to a prompt.

A row of fda and swde has key (what is asked), value (the answer, verbatim in the text) and text,
which ends in "key:"; swde's text names other attributes before it, behind SUMMARY. One of squad has
text, a passage with the beginning of a sentence, value, and for jrt-twice context and question. One
of nq, triviaqa and drop has context, question (a statement that lacks its last words), answers, and
for jrt-twice orig_question (the question as it was asked). A row of nq may have tok_pos, its
answer's place in tokens, and any row alt_answers.

With Key for the key with a capital first letter, and the final "key:" of a text taken off, the
prompts are, "(...)" being a passage that ends in exactly one full stop:

    task            jrt                      jrt-twice
    fda             (text) Key:              Information about Key. (text)\\n(text) Key:
    swde            as fda, the text ending before SUMMARY
    squad           text                     question context\\ntext
    nq, drop        (context) question       orig_question (context)\\n(context) question
    triviaqa        as nq, without the marks [PAR], [DOC], [TLE]

jrt-twice of squad cuts text alone, and takes context up to "Question:". The window is centred on
the earlier of key and value (fda, swde), value (squad), the first of answers (nq); that of triviaqa
and drop begins with the context. Rows where such a string has fewer than two characters are left
out. based takes the text as it is, and no row is left out.

Whether spaces or full stops are taken off first differs from task to task in the published code and
is kept: it decides what stands between passage and question.

Source: HazyResearch/prefix-linear-attention at 7490f22, HazyResearch/based-evaluation-harness at
22c0856.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from glactl.tasks.windows import Passage, find

Row = dict[str, Any]

SUMMARY = "Summary of information above..."
NQ_LENGTHS = (512, 1024, 2048)  # the hub's versions of nq: contexts of so many tokens


@dataclass(frozen=True)
class Recall:
    """One task.

    Attributes:
        hub: its data set, with {length} in the name for one of NQ_LENGTHS.
        field: what is cut. anchors: the fields that the window is centred on.
        once, twice: the prompt of a row whose passage was cut. twice_needs: what twice also reads.
    """

    hub: str
    field: str
    anchors: tuple[str, ...]
    once: Callable[[Row], str]
    twice: Callable[[Row], str]
    twice_needs: tuple[str, ...] = ()

    def hub_set(self, context_length: int) -> str:
        """The data set: of nq the shortest whose contexts reach the context length, or 2048."""
        fits = (n for n in NQ_LENGTHS if n >= context_length)
        return self.hub.format(length=next(fits, NQ_LENGTHS[-1]))

    def needs(self, protocol: str) -> tuple[str, ...]:
        """The fields that a row must have."""
        if protocol == "based":
            return ("text", "value")
        asked = ("question", "answers") if self.field == "context" else ("value",)
        return tuple(
            dict.fromkeys(
                (self.field, *asked, *self.anchors)
                + (self.twice_needs if protocol == "jrt-twice" else ())
            )
        )


def golds(task: Recall, row: Row) -> tuple[str, ...]:
    """The answers of a row, any of which will do."""
    return tuple(row["answers"]) if task.field == "context" else (row["value"],)


def passage(task: Recall, row: Row) -> Passage | None:
    """What is cut of a row, and where; None: the row is left out, for an answer or key too short.

    Also left out is a row without an answer, of which the definition does not say anything.
    """
    values = [row[field] for field in task.anchors]
    strings = [(v[0] if v else "") if isinstance(v, list) else v for v in values]
    if any(len(s) < 2 for s in strings) or not golds(task, row):
        return None
    text = row[task.field].strip()
    anchor = find(text, strings) if task.anchors else 0
    if anchor is None:
        # the first of them that is found at all, which need not be the earliest
        tried = (find(text, [other]) for other in row.get("alt_answers") or ())
        anchor = next((at for at in tried if at is not None), None)
    return Passage(text, anchor, row.get("tok_pos"))


def _heading(row: Row) -> str:
    key = row["key"]
    return f"{key[0].upper()}{key[1:]}:"


def _without_end(text: str, end: str) -> str:
    """`text` without `end`, in any case and however often, at its end."""
    while end and text.lower().endswith(end.lower()):
        text = text[: -len(end)]
    return text


def _stopped(text: str) -> str:
    return text if text.endswith(".") else text + "."


def _fda(row: Row) -> str:
    return _stopped(_without_end(row["text"], row["key"] + ":").strip("\n").strip("."))


def _page(row: Row) -> str:
    return _without_end(row["text"].partition(SUMMARY)[0], row["key"] + ":")


def _keyed_twice(row: Row, body: str) -> str:
    heading = _heading(row)
    return f"Information about {heading.strip(':')}. {body}\n{body} {heading}"


def _fda_once(row: Row) -> str:
    return f"{_fda(row)} {_heading(row)}"


def _fda_twice(row: Row) -> str:
    return _keyed_twice(row, _fda(row))


def _swde_once(row: Row) -> str:
    return f"{_page(row).strip().strip('.')}. {_heading(row)}"


def _swde_twice(row: Row) -> str:
    return _keyed_twice(row, _stopped(_page(row).strip("\n").strip(".").strip()))


def _squad_once(row: Row) -> str:
    return str(row["text"].strip())


def _squad_twice(row: Row) -> str:
    context = row["context"].partition("Question:")[0]
    return f"{row['question']} {context}\n{row['text'].strip()}"


def _asked_once(row: Row) -> str:
    question = row["question"].strip()
    context = _without_end(row["context"].strip(), question)
    return f"{context.strip().strip('.')}. {question}"


def _nq_once(row: Row) -> str:
    # unlike the other tasks: the question is taken off once, and in its own case only
    question = row["question"].strip()
    context = row["context"].strip().removesuffix(question)
    return f"{context.strip().strip('.')}. {question}"


def _body_twice(row: Row) -> str:
    question = row["question"].strip()
    context = _without_end(row["context"].strip(), question)
    body = context.strip().strip(".").strip() + "."
    return f"{body}\n{body} {question}"


def _asked_twice(row: Row) -> str:
    return f"{row['orig_question'].strip(':')} {_body_twice(row)}"


def _unmarked(row: Row) -> Row:
    return row | {"context": re.sub(r"\[(?:PAR|DOC|TLE)\]", "", row["context"].strip())}


def _triviaqa_once(row: Row) -> str:
    return _asked_once(_unmarked(row))


def _triviaqa_twice(row: Row) -> str:
    return f"{row['orig_question']} {_body_twice(_unmarked(row))}"


_OWNER = "hazyresearch"
_ORIGINAL = ("orig_question",)
TASKS = {
    "swde": Recall(f"{_OWNER}/based-swde-v2", "text", ("key", "value"), _swde_once, _swde_twice),
    "fda": Recall(f"{_OWNER}/based-fda", "text", ("key", "value"), _fda_once, _fda_twice),
    "squad": Recall(
        f"{_OWNER}/based-squad",
        "text",
        ("value",),
        _squad_once,
        _squad_twice,
        ("context", "question"),
    ),
    "nq": Recall(
        f"{_OWNER}/based_nq_{{length}}", "context", ("answers",), _nq_once, _asked_twice, _ORIGINAL
    ),
    "triviaqa": Recall(
        f"{_OWNER}/based_triviaqa", "context", (), _triviaqa_once, _triviaqa_twice, _ORIGINAL
    ),
    "drop": Recall(f"{_OWNER}/based_drop", "context", (), _asked_once, _asked_twice, _ORIGINAL),
}
BASED = ("swde", "fda", "squad")  # the tasks that the Based protocol has
