"""Learning rates that are given up early: the rule, the order of turns, what is kept."""

import json
import re

import pytest
from sweeping import table

from glactl.sweep.grid import make_grid
from glactl.sweep.prune import Prune, parse_prune
from glactl.sweep.results import Results
from glactl.sweep.trial import Record
from glactl.train.loop import Stopped


@pytest.mark.parametrize(
    ("text", "fraction", "margin"), [("0.25,0.1", 0.25, 0.1), (" 0.5 , 0.02", 0.5, 0.02)]
)
def test_a_rule_is_read(text, fraction, margin):
    assert parse_prune(text) == Prune(fraction, margin)
    assert parse_prune(None) is None


@pytest.mark.parametrize("text", ["", "0.25", "0.25,0.1,3", "x,0.1", "0,0.1", "1,0.1", "0.2,0"])
def test_what_is_no_rule_is_one_line(text, glactl, trained):
    bad = glactl("--prune", text)
    assert bad.exit_code == 2
    assert bad.stderr.startswith(f"error: --prune is {text!r}; allowed: a share of the steps and")
    assert bad.stderr.count("\n") == 1
    assert trained.calls == []


@pytest.mark.parametrize(
    ("fraction", "rung"), [(0.01, 2), (0.5, 2), (0.51, 4), (0.99, 4)]
)  # 4 steps, validated after 2 and 4
def test_the_rung_is_a_validation(preset, fraction, rung):
    assert Prune(fraction, 0.1).rung(make_grid().trials[0].spec) == rung


def test_the_rule(preset):
    """Against the latest of each other rate up to the same step; only by more than the margin."""
    spec, rule = make_grid().trials[0].spec, Prune(0.5, 0.1)
    others = {1e-3: ((2, 0.5), (4, 0.95)), 1e-1: ((1, 0.6), (2, 0.3)), 1.0: ()}
    assert rule.reason(spec, (), others) is None
    assert rule.reason(spec, ((1, 0.0),), others) is None  # before the rung
    assert rule.reason(spec, ((2, 0.4),), others) is None  # 0.1 behind, no more
    assert rule.reason(spec, ((2, 0.375),), others) == "0.125 behind lr 0.001 at step 2"
    assert rule.reason(spec, ((2, 0.4), (4, 0.8)), others) == "0.150 behind lr 0.001 at step 4"
    assert rule.reason(spec, ((2, 0.0),), {}) is None


@pytest.fixture
def curves(monkeypatch, preset, tmp_path):
    """Training that follows a curve, rate -> accuracies at steps 2 and 4, with a state kept."""
    calls, found = [], {}

    def fake(spec, *, kept, stop, pause=None, **_):
        record = kept.read()
        while not record.done:
            if stop():
                raise Stopped(record.step, None)
            if record.step == pause:
                return
            step = record.step + 2
            accuracy = found[spec.optim.lr][step // 2 - 1]
            calls.append((spec.optim.lr, step))
            done = step == 4 or accuracy > 0.99
            valid = {"loss": 1.0, "accuracy": accuracy}
            curve = (*record.curve, (step, accuracy))
            record = Record(step, 1.0 * step, 1.5, curve, valid, done=done)
            kept.note(record)
            yield record

    monkeypatch.setattr("glactl.sweep.run.run_trial", fake)
    monkeypatch.setattr("glactl.sweep.estimate.train", lambda *_, **__: iter(()))
    return calls, found


def test_rates_reach_the_rung_and_then_the_best_goes_on(glactl, curves):
    calls, found = curves
    found |= {1e-2: (0.1, 0.2), 1e-3: (0.3, 0.4), 1e-1: (0.25, 0.38)}
    done = glactl("--mixers", "gla", "--prune", "0.5,0.1")
    assert done.exit_code == 0, done.output
    assert calls == [(1e-2, 2), (1e-3, 2), (1e-1, 2), (1e-3, 4), (1e-1, 4)]
    assert table(done)[0]["status"] == "unsolved, 1 pruned"
    assert table(done)[0]["best lr"] == "0.001"
    line = "gla d 16 lr 0.01 seed 0: accuracy 0.1000, 2 steps, 2 s, pruned: "
    assert line + "0.300 behind lr 0.001 at step 2" not in done.stderr  # the rung's is compared
    assert line + "0.200 behind lr 0.001 at step 2" in done.stderr


def test_one_that_falls_behind_later_is_given_up_then(glactl, curves):
    calls, found = curves
    found |= {1e-2: (0.3, 0.8), 1e-3: (0.25, 0.4)}
    done = glactl("--mixers", "gla", "--lrs", "1e-2,1e-3", "--prune", "0.3,0.1")
    assert calls == [(1e-2, 2), (1e-3, 2), (1e-2, 4), (1e-3, 4)]
    assert table(done)[0]["status"] == "unsolved"  # at its last step a trial is done, not given up


def test_a_rate_that_passes_before_the_rung_ends_the_cell(glactl, curves):
    calls, found = curves
    found |= {1e-2: (0.995,), 1e-3: (0.1, 0.2), 1e-1: (0.1, 0.2)}
    done = glactl("--mixers", "gla", "--prune", "0.5,0.1")
    assert calls == [(1e-2, 2)]
    assert table(done)[0]["status"] == "solved, 2 skipped"


def test_without_the_option_a_pruned_rate_is_taken_to_the_end(glactl, curves, tmp_path):
    calls, found = curves
    found |= {1e-2: (0.1, 0.2), 1e-3: (0.3, 0.4)}
    args = ("--mixers", "gla", "--lrs", "1e-2,1e-3")
    first = glactl(*args, "--prune", "0.5,0.1", "--json")
    events = [json.loads(line) for line in first.stdout.splitlines()]
    assert [e["status"] for e in events if e["event"] == "trial"] == ["done", "pruned"]
    results = Results(tmp_path / "sweeps" / "quick" / "results.jsonl")
    key = make_grid(mixers="gla", lrs="1e-2").trials[0].key
    assert results.load()[key].status == "pruned"
    assert re.fullmatch(r"0\.200 behind lr 0\.001 at step 2", results.load()[key].pruned)
    assert results.load()[key].curve == ((2, 0.1),)
    assert not (results.path.parent / ".progress").exists()
    calls.clear()
    assert glactl(*args, "--prune", "0.5,0.1").exit_code == 0
    assert calls == []
    assert table(glactl(*args))[0]["status"] == "unsolved"
    assert calls == [(1e-2, 2), (1e-2, 4)]
    assert results.load()[key].status == "done"
    assert not (results.path.parent / ".progress").exists()
