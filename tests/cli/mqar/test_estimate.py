"""The time that a sweep says it will take."""

import re

import pytest
import torch

from glactl.sweep import estimate as sweep_estimate
from glactl.sweep.estimate import STEPS, Clock, seconds_per_operation
from glactl.sweep.grid import make_grid

CPU = torch.device("cpu")


@pytest.fixture
def rates(monkeypatch):
    """Seconds an operation by mixer, in the place of those measured; None: its steps fail."""
    found = {"attention": 1e-6, "gla": 2e-6}
    monkeypatch.setattr(sweep_estimate, "seconds_per_operation", lambda t, _: found[t.mixer])
    return found


def test_each_mixer_takes_its_rate_and_what_ran_scales_the_rest(glactl, rates):
    a, *_, g = make_grid(lrs="1e-2,1e-3").trials
    clock = Clock()
    assert clock.seconds([a, g]) is None
    clock.measure([a, g], CPU)
    assert clock.seconds([a, a, g]) == pytest.approx(2e-6 * a.work + 2e-6 * g.work)
    clock.add(a, 3e-6 * a.work)  # three times what was expected
    assert clock.seconds([g]) == pytest.approx(6e-6 * g.work)


def test_what_cannot_be_measured_counts_as_the_slowest(glactl, rates):
    a, *_, g = make_grid().trials
    rates["attention"] = None
    clock = Clock()
    clock.measure([a, g], CPU)
    assert clock.seconds([a]) == pytest.approx(2e-6 * a.work)
    rates["gla"] = None
    clock = Clock()
    clock.measure([a, g], CPU)
    assert clock.seconds([a, g]) is None
    clock.add(a, 8.0)  # then operations alone are the measure
    assert clock.seconds([g]) == pytest.approx(8.0 * g.work / a.work)


def test_the_rate_is_that_of_steps_after_the_first(glactl, monkeypatch):
    """5 s of start, then steps of 0.5 and 0.25 s, the faster of which counts; on as many rows."""
    asked, at = [], iter([5.0, 5.5, 5.75])

    def fake(spec, **_):
        asked.append(spec)
        for seconds in at:
            yield type("S", (), {"seconds": seconds})

    monkeypatch.setattr(sweep_estimate, "train", fake)
    trial = make_grid().trials[0]
    rate = seconds_per_operation(trial, CPU)
    (spec,) = asked
    assert (spec.model, spec.data.seq_len, spec.train.batch_size) == (trial.spec.model, 8, 8)
    assert spec.train.valid_every > STEPS  # nothing is validated within
    # of the trial 4 steps of 8 rows, and 2 validations of 16, at a third of a training row's work
    assert rate * trial.work == pytest.approx(0.25 * (4 + 2 * 2 / 3))


def test_steps_that_fail_tell_nothing(glactl, monkeypatch):
    def broken(spec, **_):
        raise RuntimeError("broken")

    monkeypatch.setattr(sweep_estimate, "train", broken)
    assert seconds_per_operation(make_grid().trials[0], CPU) is None


def test_the_estimate_comes_before_the_first_trial(glactl):
    """Measured in earnest; and once nothing is left to run there is none."""
    args = ("--mixers", "gla,retnet", "--lrs", "1e-2", "--dims", "16")
    lines = glactl(*args).stderr.splitlines()
    assert re.fullmatch(
        rf"estimate, from {STEPS} steps of each mixer and width: at most about \d+:\d\d, if no "
        "trial ends early",
        lines[1],
    )
    assert lines[0].startswith("preset quick: 2 trials")
    assert not any(line.startswith("estimate") for line in lines[2:])
    assert "estimate" not in glactl(*args).stderr


def test_a_mixture_is_measured_on_its_first_segment(glactl):
    trial = make_grid().trials[0]
    parts = [{"seq_len": 16, "pairs": 2, "rows": 30}, {"seq_len": 32, "pairs": 2, "rows": 30}]
    data = type(trial.data).model_validate({"vocab_size": 64, "train": parts, "valid": parts})
    spec = trial.spec.model_copy(update={"data": data})
    mixed = type(trial)(**(vars(trial) | {"spec": spec}))
    assert seconds_per_operation(mixed, CPU) > 0
