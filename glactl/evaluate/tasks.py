"""The tasks of `glactl eval` by name, and how each is asked of a model.

swde, fda, squad, nq, triviaqa, drop    documents of a protocol (glactl.tasks.protocols)
arc, lambada, hellaswag, ...            lm-eval's own tasks (glactl.tasks.stock)
lm-eval:NAME                            the same for a name that both have
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glactl import console
from glactl.tasks import positions, stock
from glactl.tasks.measure import measure_documents, measure_stock
from glactl.tasks.outcome import Outcome
from glactl.tasks.pins import Pins
from glactl.tasks.protocols import RECALL_TASKS, load_protocol
from glactl.tasks.requests import Requests
from glactl.tasks.stock_tasks import data_revision, load_tasks

STOCK = "lm-eval:"


@dataclass(frozen=True)
class Asked:
    """What was asked for.

    recall: tasks of the protocol. stock: lm-eval's. positions: perplexity by position too.
    protocol, context_length: of the first; None: the protocol's own. data_dir, sample, revision:
    where rows come from; none of them: the hub. limit: documents of each task; None: all. pins: the
    hub's revisions that were read before.
    """

    recall: list[str]
    stock: list[str]
    positions: bool
    protocol: str
    context_length: int | None = None
    data_dir: Path | None = None
    sample: bool = False
    revision: str | None = None
    limit: int | None = None
    pins: Pins | None = None

    @property
    def data(self) -> str:
        """Where rows come from: sample, hub, or the folder."""
        return "sample" if self.sample else "hub" if self.data_dir is None else str(self.data_dir)

    @property
    def folder(self) -> Path | None:
        """The folder of local rows."""
        return stock.SAMPLE if self.sample else self.data_dir


def resolve(names: str) -> tuple[list[str], list[str], bool]:
    """The recall tasks and lm-eval's tasks in a list such as "swde,arc,lm-eval:drop", and whether
    perplexity by position is among them.

    Raises:
        ValueError: an empty list, or a name that is no task.
    """
    wanted = list(dict.fromkeys(n.strip() for n in names.split(",") if n.strip()))
    recall = [name for name in wanted if name in RECALL_TASKS]
    own = (*RECALL_TASKS, positions.TASK)
    rest = [name.removeprefix(STOCK) for name in wanted if name not in own]
    if rest or not wanted:
        return recall, stock.resolve(",".join(rest)), positions.TASK in wanted
    return recall, [], positions.TASK in wanted


def load_stock_tasks(asked: Asked) -> dict[str, Any] | None:
    """lm-eval's tasks among those asked for, with their data; None without any."""
    if not asked.stock:
        return None
    if any(map(stock.is_group, asked.stock)):
        console.note("a group of tasks is named: indexing all of lm-eval's tasks (about 6 s)")
    revision = asked.revision
    pinned = None if revision is None else dict.fromkeys(asked.stock, revision)
    return load_tasks(asked.stock, asked.folder, pinned, asked.pins)


def measure(requests: Requests, asked: Asked, loaded: dict[str, Any] | None) -> list[Outcome]:
    """Every task asked of one model.

    Args:
        requests: of the model.
        asked: what.
        loaded: from load_stock_tasks.

    Raises what load_protocol raises; ValueError: a context longer than the model.
    """
    outcomes = []
    for name in asked.recall:
        documents = load_protocol(
            asked.protocol,
            name,
            tokenizer=requests.engine.tokenizer,
            context_length=asked.context_length,
            data_dir=asked.data_dir,
            sample=asked.sample,
            revision=asked.revision,
            pins=asked.pins,
            limit=asked.limit,
        )
        _check_length(requests, documents.context_length)
        outcomes.append(measure_documents(requests, documents))
    if asked.positions:
        texts = positions.load_texts(
            asked.data_dir, asked.sample, asked.revision, asked.pins, asked.limit
        )
        outcomes.append(positions.measure_positions(requests, texts))
    if loaded is not None:
        data = {
            name: (
                str(stock.hub_name(name)) if asked.data == "hub" else asked.data,
                data_revision(name, task, asked.folder),
            )
            for name, task in loaded["tasks"].items()
        }
        outcomes += measure_stock(requests, loaded, data, asked.limit)
    return outcomes


def _check_length(requests: Requests, context_length: int | None) -> None:
    most = requests.engine.max_length
    if most is not None and context_length is not None and context_length > most:
        raise ValueError(
            f"a context of {context_length} tokens is longer than the model's {most} positions; "
            f"give --context-length {most} or less, and name it beside the numbers"
        )
