"""What the papers report: their tables, the suites that repeat them, and the metrics they take.

Everything is in papers.yaml, with its source. A number measured here stands beside one of a paper
only where task, metric, protocol and context length are the same (`Table.beside`).
"""

from functools import cache
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, model_validator

from glactl.tasks.names import unknown

FILE = Path(__file__).parent / "papers.yaml"
PERPLEXITIES = ("word_perplexity", "perplexity")
LIKE = 1.3  # models whose parameters are within this factor have the same size in a table


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Group(_Strict):
    """The models of one size. models: name -> a number for each column of the table."""

    size: str
    tokens: str
    models: dict[str, tuple[float, ...]]
    notes: dict[str, str] = {}

    @property
    def parameters(self) -> float:
        """The size as a number: 340M is 3.4e8."""
        return float(self.size[:-1]) * {"M": 1e6, "B": 1e9}[self.size[-1]]


class Table(_Strict):
    """A table of a paper.

    Attributes:
        columns: heading -> (task, metric), or "average", which is that of the columns before it
            without perplexities. All but perplexities are in percent.
        protocol: one of protocols.PROTOCOLS. context_length: tokens; None without a limit.
        tokenizer: that of the models, as its publisher calls it; None: not stated.
        rows: the models by size.
    """

    title: str
    source: str
    protocol: str
    context_length: int | None = None
    tokenizer: str | None = None
    columns: dict[str, tuple[str, str] | Literal["average"]]
    rows: tuple[Group, ...]

    @model_validator(mode="after")
    def _has_a_number_for_each_column(self) -> "Table":
        for group in self.rows:
            for model, values in group.models.items():
                if len(values) != len(self.columns):
                    raise ValueError(f"{model} {group.size} has {len(values)} numbers")
        return self

    @property
    def tasks(self) -> list[str]:
        """The tasks of its columns, each once."""
        return list(dict.fromkeys(c[0] for c in self.columns.values() if c != "average"))

    def beside(self, parameters: float) -> list[Group]:
        """The models whose number of parameters is within a factor LIKE of this one."""
        return [g for g in self.rows if 1 / LIKE <= parameters / g.parameters <= LIKE]


class Suite(_Strict):
    """What `--suite` runs. protocol, context_length: of the recall tasks among its tasks."""

    name: str
    tasks: tuple[str, ...]
    protocol: str
    context_length: int | None
    tables: tuple[Table, ...]


class _File(_Strict):
    metrics: dict[str, tuple[str, ...]]
    suites: dict[str, tuple[str, ...]]
    tables: dict[str, Table]


def suite(name: str) -> Suite:
    """The suite of this name. Raises ValueError that names the nearest one."""
    file = _read()
    if name not in file.suites:
        raise ValueError(unknown("suite", name, list(file.suites)))
    tables = tuple(file.tables[t] for t in file.suites[name])
    return Suite(
        name=name,
        tasks=tuple(tables[0].tasks),
        protocol=tables[0].protocol,
        context_length=tables[0].context_length,
        tables=tables,
    )


def suites() -> list[str]:
    """The names of the suites."""
    return list(_read().suites)


def tables(protocol: str, context_length: int | None) -> list[Table]:
    """The tables whose numbers were got under this protocol at this context length."""
    return [
        t
        for t in _read().tables.values()
        if (t.protocol, t.context_length) == (protocol, context_length)
    ]


def metrics(task: str) -> tuple[str, ...] | None:
    """The metrics that the papers take from lm-eval's task; None: no paper reports it."""
    return _read().metrics.get(task)


@cache
def _read() -> _File:
    return _File.model_validate(yaml.safe_load(FILE.read_text(encoding="utf-8")))
