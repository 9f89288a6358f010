"""A model as lm-eval's evaluator sees it: its requests, with the revision of each one's task.

Every rank knows and returns all answers (glactl.tasks.ranks), so lm-eval is told of one process.
"""

from collections.abc import Mapping

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from glactl.tasks.requests import Requests


class HarnessLM(LM):
    """For lm_eval.evaluate(lm=...) and lm_eval.simple_evaluate(model=...).

    Args:
        requests: of the model.
        revisions: task -> revision of its definition and data, a part of the cache's keys.
    """

    def __init__(self, requests: Requests, revisions: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.asked, self.revisions = requests, revisions or {}

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, is_greedy) of every (context, continuation)."""
        return self.asked.loglikelihood([r.args for r in requests], self._of(requests))

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """The log-likelihood in nats of every whole string."""
        return self.asked.rolling([r.args[0] for r in requests], self._of(requests))

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The continuation of every context, up to its first stop string."""
        return self.asked.generate([r.args for r in requests], self._of(requests))

    def _of(self, requests: list[Instance]) -> list[str]:
        return [self.revisions.get(r.task_name or "", "") for r in requests]
