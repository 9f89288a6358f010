"""Documents of recall tasks: a prompt, its answers, and the score of what a model writes.

contains, the metric of the papers' recall tables, is 1 where an answer stands anywhere in the
continuation, in any case, and else 0; nothing is normalised. Source: the code of the tasks of
arXiv:2402.18668 and arXiv:2407.05483 (see protocols.py).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

from glactl.tasks.tokenizer import ByteTokenizer, tokenizer_hash
from glactl.tasks.windows import find

if TYPE_CHECKING:
    from glactl.tasks.tokenizer import Tokenizer


@dataclass(frozen=True)
class Document:
    """One prompt of a recall task and what is asked of its greedy continuation.

    Attributes:
        task, protocol, version: of which this is a document; see Documents.
        doc_id: the data's own name of the row, or its number; unique within a task.
        prompt: all that the model reads.
        gold: the answers, any of which will do; at least one.
        metric: the name of what `score` gives: contains, or the one of lm-eval's task.
        max_new_tokens: the continuation ends after so many tokens ...
        stop: ... or before the first of these strings.
        cut: the prompt has less than the whole passage.
        inside: an answer stands in the prompt.
        judge: every metric of a continuation; None: `contains`.
    """

    task: str
    protocol: str
    version: str
    doc_id: str
    prompt: str
    gold: tuple[str, ...]
    metric: str
    max_new_tokens: int
    stop: tuple[str, ...]
    cut: bool
    inside: bool
    judge: Callable[[str], dict[str, float]] | None = None


@dataclass(frozen=True)
class Documents(Sequence[Document]):
    """The documents of a task under a protocol, and what a result of them must name.

    Attributes:
        version: of the task's definition, e.g. "0".
        context_length: tokens; None where the protocol has no limit.
        tokenizer: which one measured it.
        data: the hub's data set, a folder, or "sample".
        revision: the commit of the hub's data set, "sha256:..." of local rows, or None where the
            hub could not be asked and its cache does not tell.
        rows: of the data, before `limit`. dropped: rows that the protocol leaves out.
    """

    task: str
    protocol: str
    version: str
    context_length: int | None
    tokenizer: str
    data: str
    revision: str | None
    rows: int
    dropped: int
    documents: tuple[Document, ...]

    def __len__(self) -> int:
        return len(self.documents)

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Document, ...]: ...
    def __getitem__(self, index: int | slice) -> Document | tuple[Document, ...]:
        return self.documents[index]

    @property
    def cut(self) -> int:
        """Documents whose prompt has less than the whole passage."""
        return sum(d.cut for d in self.documents)

    @property
    def inside(self) -> int:
        """Documents whose prompt has an answer in it."""
        return sum(d.inside for d in self.documents)


def score(document: Document, generation: str) -> float:
    """document.metric of a continuation, from 0 to 1."""
    return scores(document, generation)[document.metric]


def scores(document: Document, generation: str) -> dict[str, float]:
    """Every metric of a continuation (lm-eval's drop has two: em and f1)."""
    if document.judge is not None:
        return document.judge(generation)
    return {"contains": float(contains(generation, document.gold))}


def contains(text: str, answers: Iterable[str]) -> bool:
    """Whether any of the answers stands in `text`, in any case."""
    return find(text, answers) is not None


def tokenizer_name(tokenizer: "Tokenizer") -> str:
    """What a result says of its tokenizer: "byte", or its size and the sha256 of its saved form."""
    if isinstance(tokenizer, ByteTokenizer):
        return "byte"
    return f"{tokenizer.vocab_size} tokens, sha256:{tokenizer_hash(tokenizer)[:16]}"
