"""lm-eval's three cloze recall tasks, made to read their settings from the task file.

The stock classes drop the file's settings, the data set among them. Prompt, gold answer and metric
(does the continuation contain the gold) stay lm-eval's own; the mean is lm-eval's too in place of
numpy's, since it has a standard error.
"""

from collections.abc import Callable
from typing import Any

from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks.fda.task import FDA as StockFDA
from lm_eval.tasks.squad_completion.task import SQUADCompletion as StockSQUAD
from lm_eval.tasks.swde.task import SWDE as StockSWDE


class _Cloze:
    VERSION: int

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        given = {k: v for k, v in (config or {}).items() if k != "class"}
        given["metadata"] = {**(given.get("metadata") or {}), "version": self.VERSION}
        ConfigurableTask.__init__(self, config=given)

    def aggregation(self) -> dict[str, Callable[..., float]]:
        return {"contains": mean}


class SWDE(_Cloze, StockSWDE):
    """Attributes of web pages; the sought value stands in the page."""


class FDA(_Cloze, StockFDA):
    """Fields of FDA decision summaries; the sought value stands in the summary."""


class SQUADCompletion(_Cloze, StockSQUAD):
    """A sentence about a passage, cut before its last words, which stand in the passage."""
