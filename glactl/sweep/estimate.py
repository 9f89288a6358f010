"""How long the trials of a sweep will take: measured on a few steps of each mixer and width.

A trial takes about its floating point operations times the seconds that one of them took in the
steps measured; what trials took since then scales what is left. It is a bound where a trial passes
its goal early, or makes others of its cell needless.
"""

from collections.abc import Iterable
from itertools import pairwise

import torch

from glactl.models.cost import lm_cost
from glactl.spec import with_vocab
from glactl.sweep.grid import Trial
from glactl.train.loop import train

STEPS = 3  # the first of which is not counted
TOKENS = 4096  # of a step, or one row


class Clock:
    """Seconds of trials, before any has run and better after each."""

    def __init__(self) -> None:
        self._rates: dict[tuple[str, int], float] = {}  # seconds an operation
        self._expected = self._seconds = 0.0

    def measure(self, trials: Iterable[Trial], device: torch.device) -> None:
        """Take steps of every mixer and width among the trials; one that fails tells nothing.

        Cost: STEPS steps of at most TOKENS tokens for each.
        """
        for trial in {(t.mixer, t.dim): t for t in trials}.values():
            rate = seconds_per_operation(trial, device)
            if rate is not None:
                self._rates[trial.mixer, trial.dim] = rate

    def add(self, trial: Trial, seconds: float) -> None:
        """A trial has ended after `seconds`."""
        self._expected += self._of(trial)
        self._seconds += seconds

    def seconds(self, trials: Iterable[Trial]) -> float | None:
        """Of these trials, if all run to the end; None where nothing was measured yet."""
        if self._expected:
            factor = self._seconds / self._expected
        elif self._rates:
            factor = 1.0
        else:
            return None
        return factor * sum(map(self._of, trials))

    def _of(self, trial: Trial) -> float:
        slowest = max(self._rates.values(), default=1.0)
        return self._rates.get((trial.mixer, trial.dim), slowest) * trial.work


def seconds_per_operation(trial: Trial, device: torch.device) -> float | None:
    """Measured on rows of the first segment; None where the steps fail."""
    part = trial.data.segments("train")[0]
    rows = max(1, min(trial.spec.train.batch_size, TOKENS // part.seq_len))
    alone = {"train": None, "valid": None, "seq_len": part.seq_len, "pairs": part.pairs}
    data = trial.data.model_copy(update=alone | {"n_train": part.rows, "n_valid": 1})
    steps = {"steps": STEPS + 1, "valid_every": STEPS + 1, "batch_size": rows, "accumulate": 1}
    plan = trial.spec.train.model_copy(update=steps)
    spec = trial.spec.model_copy(update={"data": data, "train": plan})
    at = []
    try:
        for step in train(spec, device=device):
            at.append(step.seconds)
            if len(at) == STEPS:
                break
    except Exception:  # the trial itself will say what is wrong with it
        return None
    fastest = min((b - a for a, b in pairwise(at)), default=0.0)
    cost = lm_cost(with_vocab(spec, data.vocab_size).model, part.seq_len)
    work = rows * part.seq_len * cost.flops_token_train
    return fastest / work if fastest > 0 else None
