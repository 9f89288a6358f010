"""The command: order, what is skipped, errors, signals."""

import csv
import json
import os
import signal
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import yaml
from sweeping import table

from glactl import console
from glactl.sweep.grid import make_grid
from glactl.sweep.trial import Kept, run_trial
from glactl.train.loop import Stopped, train


def test_the_command_end_to_end_and_again(glactl, tmp_path, monkeypatch):
    done = glactl("--dims", "16,32", "--lrs", "1e-2")
    assert done.exit_code == 0, done.output
    rows = table(done)
    assert [(r["mixer"], r["dim"]) for r in rows] == [
        ("attention", "16"),
        ("attention", "32"),
        ("gla", "16"),
        ("gla", "32"),
    ]
    folder = tmp_path / "sweeps" / "quick"
    trials = make_grid(dims="16,32", lrs="1e-2").trials
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert {r["key"] for r in records} == {t.key for t in trials}
    for record, trial in zip(records, trials, strict=True):
        assert record["spec"] == trial.spec.model_dump(mode="json")
        (*_, last) = train(trial.spec, device="cpu")
        assert (record["accuracy"], record["steps"]) == (last.valid["accuracy"], 4)
    assert "gla d 32 lr 0.01 seed 0: accuracy 0." in done.stderr
    figures = {f"{name}.{end}" for name in ("accuracy", "dims") for end in ("svg", "png")}
    files = {"results.jsonl", "table.csv", "slices.csv", "report.html", "sweep.yaml"} | figures
    assert {p.name for p in folder.iterdir()} == files
    assert (folder / "accuracy.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert ET.parse(folder / "accuracy.svg").getroot().tag.endswith("svg")
    with open(folder / "table.csv") as f:
        assert [r["state_bytes"] for r in csv.DictReader(f)] == [
            r["state bytes"].replace(",", "") for r in rows
        ]
    assert set(yaml.safe_load((folder / "sweep.yaml").read_text())["trials"]) == {
        t.key for t in trials
    }

    monkeypatch.setattr("glactl.sweep.run.run_trial", lambda *_, **__: pytest.fail("ran again"))
    before = {name: (folder / name).read_bytes() for name in files}
    again = glactl("--dims", "16,32", "--lrs", "1e-2")
    assert again.stdout == done.stdout
    assert "at most 0 to run" in again.stderr
    assert {name: (folder / name).read_bytes() for name in files} == before
    assert "nothing new" in again.stderr
    (folder / "accuracy.png").unlink()
    glactl("--dims", "16,32", "--lrs", "1e-2", "--plot-only")
    glactl("--dims", "16", "--lrs", "1e-2")  # another grid in the same folder
    assert (folder / "accuracy.png").read_bytes() != before["accuracy.png"]
    assert len((folder / "table.csv").read_text().splitlines()) == 3


def test_rates_are_tried_in_turn_until_one_passes(glactl, trained):
    trained.accuracies |= {1e-2: 0.4, 1e-3: 0.995}
    done = glactl("--mixers", "gla")
    assert done.exit_code == 0, done.output
    assert [rate for *_, rate, _ in trained.calls] == [1e-2, 1e-3]
    (row,) = table(done)
    assert row["best lr"] == "0.001"
    assert row["accuracy"] == "0.995"
    assert row["status"] == "solved, 1 skipped"
    assert "warning" not in done.stderr


def test_a_longer_grid_runs_only_what_is_new(glactl, trained):
    glactl("--mixers", "gla", "--lrs", "1e-2")
    assert len(trained.calls) == 1
    done = glactl("--mixers", "gla,attention", "--lrs", "1e-3,1e-2", "--json")
    assert trained.calls[1:] == [
        (16, "gla", 1e-3, 0),
        (16, "attention", 1e-3, 0),
        (16, "attention", 1e-2, 0),
    ]
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [e["event"] for e in events] == ["trial"] * 4 + ["best"] * 2 + ["end"]
    assert [e["cached"] for e in events[:4]] == [False, True, False, False]
    assert events[-1]["path"] == "sweeps/quick"


def test_an_error_is_kept_shown_and_retried_only_when_asked(glactl, trained):
    trained.accuracies |= {1e-2: FloatingPointError("the loss\nis nan"), 1e-3: 0.7}
    args = ("--mixers", "gla", "--lrs", "1e-2,1e-3")
    line = "diverged: gla d 16 lr 0.01 seed 0: FloatingPointError: the loss is nan"
    first = glactl(*args)
    assert first.exit_code == 0, first.output
    assert line in first.stderr.splitlines()
    assert table(first)[0]["status"] == "unsolved, 1 failed"
    again = glactl(*args)
    assert line in again.stderr.splitlines()
    assert len(trained.calls) == 2
    trained.accuracies[1e-2] = 0.8
    retried = glactl(*args, "--retry-failed")
    assert len(trained.calls) == 3
    assert table(retried)[0]["accuracy"] == "0.8"
    assert line not in retried.stderr


def test_a_cell_with_nothing_but_errors_is_exit_code_1(glactl, trained):
    trained.accuracies |= {1e-2: RuntimeError("broken")}
    done = glactl("--lrs", "1e-2", "--json")
    assert done.exit_code == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: no trial of attention d 16, gla d 16 ended")
    trial = json.loads(done.stdout.splitlines()[0])
    assert (trial["status"], trial["error"]) == ("failed", "RuntimeError: broken")
    assert Path("sweeps/quick/accuracy.png").exists()


@pytest.mark.parametrize("stop", [Stopped(1, None), KeyboardInterrupt()], ids=["inside", "between"])
def test_a_signal_keeps_what_has_ended(stop, glactl, trained):
    trained.accuracies[1e-3] = stop
    stopped = glactl("--mixers", "gla")
    assert stopped.exit_code == 6
    last = stopped.stderr.splitlines()[-1]
    assert last.startswith("stopped")
    assert "sweeps/quick/results.jsonl: the same command goes on" in last
    trained.accuracies[1e-3] = 0.5
    assert glactl("--mixers", "gla").exit_code == 0
    assert [rate for *_, rate, _ in trained.calls] == [1e-2, 1e-3, 1e-3, 1e-1]


def test_a_real_signal_while_a_trial_trains(glactl, monkeypatch):
    def cut(*args, **kwargs):
        for record in run_trial(*args, **kwargs):
            yield record
            if record.step == 3:
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("glactl.sweep.run.run_trial", cut)
    stopped = glactl("--mixers", "gla")
    assert stopped.exit_code == 6
    assert "inside gla d 16 lr 0.01 seed 0 (stopped after step 3)" in stopped.stderr
    assert not Path("sweeps/quick/results.jsonl").exists()
    monkeypatch.setattr("glactl.sweep.run.run_trial", run_trial)
    (trial, *_) = make_grid(mixers="gla").trials
    kept = Kept.of(Path("sweeps/quick"), trial.key)
    assert kept.read().step == 3
    after = glactl("--mixers", "gla", "--json")
    assert after.exit_code == 0, after.output
    (*_, last) = train(trial.spec, device="cpu")
    first = json.loads(after.stdout.splitlines()[0])
    assert (first["accuracy"], first["steps"]) == (last.valid["accuracy"], 4)
    assert not Path("sweeps/quick/.progress").exists()


def test_plot_only_trains_nothing(glactl, trained):
    glactl("--mixers", "gla", "--lrs", "1e-2")
    shown = glactl("--plot-only")
    assert len(trained.calls) == 1
    assert {r["mixer"]: r["status"] for r in table(shown)} == {
        "attention": "not run",
        "gla": "unsolved",
    }


def test_quiet_has_no_progress(glactl, trained):
    lines = glactl("--mixers", "gla", "--lrs", "1e-2", "--quiet").stderr.splitlines()
    assert [line.split()[0] for line in lines] == ["preset", "wrote"]


def test_exit_code_of_a_stop_is_consoles():
    from glactl.sweep.command import SweepFailed
    from glactl.sweep.run import SweepStopped

    assert console.exit_code(SweepStopped()) == 6
    assert console.exit_code(SweepFailed()) == 1
