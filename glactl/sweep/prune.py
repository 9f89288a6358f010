"""Learning rates that are given up early, in `glactl mqar --prune FRACTION,MARGIN`.

With S the steps of a trial, its rung is the first validation at or after FRACTION S steps. Every
rate of a cell (mixer, width, seed) is first brought to its rung; the best there goes on first. At a
validation at step s, at or after the rung, with a the accuracy there and b the latest accuracy up
to s of another rate of the cell, the trial is given up where

    b - a > MARGIN                                                                      (1)

for the best of the others. Its state is not kept: a sweep without --prune takes it from the start
to the end.

Source: the rungs of successive halving (Jamieson and Talwalkar, 2016, arXiv:1502.07943), with a
margin in the place of a share that is kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from glactl.spec import RunSpec
from glactl.sweep.results import Curve

ALLOWED = "a share of the steps and a margin of accuracy, both above 0 and below 1: 0.25,0.1"


@dataclass(frozen=True)
class Prune:
    """When a trial is given up."""

    fraction: float
    margin: float

    def rung(self, spec: RunSpec) -> int:
        """The step of the first validation that counts; the last step where there is none."""
        plan = spec.train
        validations = -(-self.fraction * plan.steps // plan.valid_every)
        return min(int(validations) * plan.valid_every, plan.steps)

    def reason(self, spec: RunSpec, curve: Curve, others: Mapping[float, Curve]) -> str | None:
        """Why the trial with this curve is given up after its last validation; None: it is not.

        others: the curves of the other rates.
        """
        if not curve or curve[-1][0] < self.rung(spec):
            return None
        step, accuracy = curve[-1]
        latest = {lr: [a for s, a in other if s <= step] for lr, other in others.items()}
        best = max(((seen[-1], lr) for lr, seen in latest.items() if seen), default=None)
        if best is None or best[0] - accuracy <= self.margin:  # (1)
            return None
        return f"{best[0] - accuracy:.3f} behind lr {best[1]:g} at step {step}"


def parse_prune(text: str | None) -> Prune | None:
    """The option's "0.25,0.1". Raises ValueError."""
    if text is None:
        return None
    try:
        fraction, margin = (float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--prune is {text!r}; allowed: {ALLOWED}") from None
    if not (0 < fraction < 1 and 0 < margin < 1):
        raise ValueError(f"--prune is {text!r}; allowed: {ALLOWED}")
    return Prune(fraction, margin)
