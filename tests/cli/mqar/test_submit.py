"""Sweeps as jobs: processes on this machine, as submitit starts them where there is no SLURM."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("submitit")
from glactl.sweep.submit import submit, work

GRID = """
preset: quick
dims: [16]
mixers: [gla, attention]
lrs: [1e-2]
run:
  train: {steps: 4, valid_every: 2}
  data: {vocab_size: 64, seq_len: 16, pairs: 2, n_train: 64, n_valid: 16}
"""


@pytest.fixture
def grid(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "g.yaml").write_text(GRID)
    return tmp_path / "g.yaml"


def test_two_jobs_share_the_trials_of_a_sweep(grid, tmp_path, monkeypatch, capsys):
    import submitit

    started, make = [], submitit.AutoExecutor.submit
    monkeypatch.setattr(
        submitit.AutoExecutor,
        "submit",
        lambda self, *args: started.append(make(self, *args)) or started[-1],
    )
    numbers = submit({"file": Path(grid.name), "device": "cpu"}, 2, ["partition=gpu"])
    assert len(set(numbers)) == 2
    told = capsys.readouterr().err
    assert f"2 trials in 2 job(s) of local: {', '.join(numbers)}; logs in " in told
    os.chdir("/")  # where a job runs is not where the command was typed
    assert [job.result() for job in started] == ["done", "done"]
    lines = (tmp_path / "sweeps" / "g" / "results.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["mixer"] for line in lines) == ["attention", "gla"]


def test_a_job_whose_time_is_over_says_so(grid):
    found = work({"file": grid, "device": "cpu", "minutes": 0, "quiet": True})
    assert "the time is over" in found


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--nodes", "2", "--slurm", "partition"), "--slurm 'partition'; allowed: KEY=VALUE"),
        (("--slurm", "partition=gpu"), "--slurm is of jobs; allowed with --nodes"),
        (("--nodes", "2", "--mixers", "glaa"), "glaa"),
        (("--nodes", "2", "--prune", "half"), "half"),
    ],
)
def test_faults_are_told_before_anything_is_handed_over(args, message, glactl, tmp_path):
    done = glactl(*args)
    assert done.exit_code == 2
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_there_is_a_word(glactl, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    done = glactl("--nodes", "2")
    assert done.exit_code == 3
    assert "pip install 'glactl[slurm]'" in done.stderr


def test_the_command_comes_back_at_once(glactl, monkeypatch):
    monkeypatch.setattr("glactl.sweep.submit.submit", lambda options, nodes, slurm: ["7", "8"])
    began = time.monotonic()
    done = glactl("--nodes", "2", "--slurm", "gpus_per_node=8", "--json")
    assert json.loads(done.stdout) == {"event": "submitted", "jobs": ["7", "8"]}
    assert time.monotonic() - began < 5
