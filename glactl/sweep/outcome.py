"""What is kept and said of a trial that has ended."""

from datetime import UTC, datetime
from typing import Any

import torch

from glactl import __version__
from glactl.device import precision_on
from glactl.sweep.grid import Trial
from glactl.sweep.results import Ended, Outcome, Result, Status
from glactl.sweep.trial import Record
from glactl.train.slices import of_slices


def details(
    trial: Trial, fingerprint: str | None, device: torch.device, record: Record
) -> dict[str, Any]:
    """What stands in a result's line beside it."""
    cuda = device.type == "cuda"
    return {
        "mixer": trial.mixer,
        "dim": trial.dim,
        "lr": trial.lr,
        "seed": trial.seed,
        "params": trial.params,
        "state_bytes": trial.state_bytes,
        "device": torch.cuda.get_device_name(device) if cuda else str(device),
        "precision": precision_on(device, trial.spec.train.precision),
        "captured": record.captured,
        "threads": None if cuda else torch.get_num_threads(),
        "fingerprint": fingerprint,
        "glactl": __version__,
        "torch": torch.__version__,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "spec": trial.spec.model_dump(mode="json"),
    }


def sentence(trial: Trial, result: Result) -> str:
    """How a trial ended, for people."""
    if result.error is not None:
        return f"{trial.label}: {result.status} after step {result.steps}: {result.error}"
    took = f"{result.steps} steps, {result.seconds:.0f} s"
    given_up = "" if result.pruned is None else f", pruned: {result.pruned}"
    return f"{trial.label}: accuracy {result.accuracy:.4f}, {took}{given_up}"


def result_of(trial: Trial, status: Ended, record: Record) -> Result:
    """The result of a trial of which this has come."""
    valid = record.valid
    return Result(
        trial.key,
        status,
        valid.get("accuracy"),
        valid.get("loss"),
        record.step,
        round(record.seconds, 2),
        slices=of_slices(valid) or None,
        curve=record.curve or None,
    )


def standing(trial: Trial, before: Result | None, otherwise: Status) -> Outcome:
    """The outcome of a trial that is not run now."""
    return Outcome(trial, before.status if before else otherwise, before, cached=True)
