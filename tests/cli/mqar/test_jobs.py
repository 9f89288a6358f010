"""Several trials at once, in processes; what is left when one dies or the time is over."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sweeping import TINY

from glactl.sweep import jobs as sweep_jobs
from glactl.sweep.grid import make_grid
from glactl.sweep.jobs import Jobs, Orders, default_jobs, devices_of
from glactl.sweep.results import Outcome, Result, Results
from glactl.sweep.run import Sweep, SweepStopped, run_sweep, standing_errors
from glactl.sweep.stop import Stop
from glactl.sweep.trial import Record, run_trial
from glactl.train.loop import train

CPU = torch.device("cpu")
ENDLESS = {"steps": 10**6, "valid_every": 10**5}


@pytest.fixture
def grid(preset):
    return make_grid(mixers="gla", lrs="1e-2,1e-3", seeds="0,1")


def by_key(results):
    return {k: (r.status, r.accuracy, r.curve) for k, r in results.load().items()}


@pytest.mark.slow
def test_workers_find_what_one_process_finds(grid, tmp_path):
    """In processes of their own, which import this project anew."""
    alone, together = (Results(tmp_path / name / "results.jsonl") for name in ("a", "b"))
    list(run_sweep(grid, alone, CPU, quiet=True))
    outcomes = list(Jobs(grid, together, CPU, 2, quiet=True).run())
    assert by_key(together) == by_key(alone)
    assert sorted(o.trial.key for o in outcomes) == sorted(t.key for t in grid.trials)
    assert not any(o.cached for o in outcomes)
    assert [p.name for p in together.path.parent.iterdir()] == ["results.jsonl"]
    again = list(Jobs(grid, together, CPU, 2, quiet=True).run())
    assert [o.cached for o in again] == [True] * 4


@pytest.fixture
def forked(monkeypatch):
    """Workers that are copies of this process, with what it has replaced."""
    monkeypatch.setattr(sweep_jobs, "CONTEXT", multiprocessing.get_context("fork"))
    monkeypatch.setattr(sweep_jobs, "TELL_EVERY", 0.01)


def pretend(monkeypatch, folder, act):
    """Training in the place of the real one: notes who trains what, then does `act(spec, n)`."""

    def fake(spec, *, kept, stop, **_):
        with open(folder / "trained", "a") as f:
            f.write(f"{spec.optim.lr} {spec.seed}\n")
        n = (folder / "trained").read_text().splitlines().count(f"{spec.optim.lr} {spec.seed}")
        yield Record(1, 0.1, 1.5)
        act(spec, n)
        yield Record(4, 1.0, 1.5, ((4, 0.5),), {"loss": 1.0, "accuracy": 0.5}, done=True)

    monkeypatch.setattr("glactl.sweep.run.run_trial", fake)


def kill_at(lr, seed, times):
    def act(spec, n):
        if (spec.optim.lr, spec.seed) == (lr, seed) and n <= times:
            os.kill(os.getpid(), signal.SIGKILL)

    return act


def test_a_worker_that_dies_is_replaced_and_its_trial_taken_up(grid, forked, monkeypatch, tmp_path):
    pretend(monkeypatch, tmp_path, kill_at(1e-2, 1, 1))
    results = Results(tmp_path / "s" / "results.jsonl")
    outcomes = list(Jobs(grid, results, CPU, 2, quiet=True).run())
    assert {o.status for o in outcomes} == {"done"}
    trained = (tmp_path / "trained").read_text().splitlines()
    assert trained.count("0.01 1") == 2
    assert len(trained) == 5


def test_a_trial_that_kills_two_workers_has_failed(grid, forked, monkeypatch, tmp_path):
    pretend(monkeypatch, tmp_path, kill_at(1e-2, 1, 99))
    results = Results(tmp_path / "s" / "results.jsonl")
    outcomes = list(Jobs(grid, results, CPU, 2, quiet=True).run())
    failed = [o for o in outcomes if o.status == "failed"]
    assert [(o.trial.lr, o.trial.seed) for o in failed] == [(1e-2, 1)]
    assert failed[0].result.error == "the process ended with signal 9, 2 times"
    assert results.load()[failed[0].trial.key] == failed[0].result
    assert sum(o.status == "done" for o in outcomes) == 3


def test_workers_that_never_begin_are_an_error(grid, forked, monkeypatch, tmp_path):
    monkeypatch.setattr(sweep_jobs, "work", lambda *_: os._exit(9))
    with pytest.raises(RuntimeError, match="exit code 9, 2 times, before any trial"):
        list(Jobs(grid, Results(tmp_path / "results.jsonl"), CPU, 1, quiet=True).run())


def test_errors_are_retried_once_by_all_workers(grid, forked, monkeypatch, tmp_path):
    def broken(spec, n):
        if spec.optim.lr == 1e-2:
            raise RuntimeError("broken")

    pretend(monkeypatch, tmp_path, broken)
    results = Results(tmp_path / "s" / "results.jsonl")
    list(Jobs(grid, results, CPU, 2, quiet=True).run())
    assert sorted(r.status for r in results.load().values()) == ["done", "done", "failed", "failed"]
    again = standing_errors(results)
    assert len(again) == 2
    outcomes = list(Jobs(grid, results, CPU, 2, again=again, quiet=True).run())
    assert sorted(o.status for o in outcomes if not o.cached) == ["failed", "failed"]
    assert len((tmp_path / "trained").read_text().splitlines()) == 6


def test_the_deadline_stops_workers_with_their_states_kept(preset, forked, tmp_path):
    preset["run"]["train"] |= ENDLESS
    grid = make_grid(mixers="gla", lrs="1e-2,1e-3")
    results = Results(tmp_path / "results.jsonl")
    with pytest.raises(SweepStopped, match="the time is over, states of what ran are kept"):
        list(Jobs(grid, results, CPU, 2, stop=Stop(time.time() + 1.0), quiet=True).run())
    assert results.load() == {}
    kept = {p.name for p in (tmp_path / ".progress").iterdir()}
    assert kept <= {f"{t.key}.{end}" for t in grid.trials for end in ("json", "pt")}
    assert len({name[:64] for name in kept}) * 2 == len(kept) > 0
    assert not (tmp_path / ".claims").exists()


def test_minutes_end_the_command_with_its_tables(glactl, preset, monkeypatch):
    """After the third step of the first trial, by the clock; then the same command goes on."""
    clock = SimpleNamespace(time=time.time)
    monkeypatch.setattr("glactl.sweep.stop.time", clock)

    def late(*args, **kwargs):
        for record in run_trial(*args, **kwargs):
            yield record
            if record.step == 3:
                clock.time = lambda: time.time() + 60

    monkeypatch.setattr("glactl.sweep.run.run_trial", late)
    stopped = glactl("--mixers", "gla", "--lrs", "1e-2", "--minutes", "1")
    assert stopped.exit_code == 6, stopped.output
    assert stopped.stdout.splitlines()[1].endswith("not run")
    assert Path("sweeps/quick/report.html").exists()
    last = stopped.stderr.splitlines()[-1]
    assert last.startswith(
        "stopped inside gla d 16 lr 0.01 seed 0 (stopped after step 3), its state"
    )
    assert last.endswith("the same command goes on from there")
    done = glactl("--mixers", "gla", "--lrs", "1e-2", "--json")
    assert done.exit_code == 0
    (*_, last) = train(make_grid(mixers="gla", lrs="1e-2").trials[0].spec, device="cpu")
    assert json.loads(done.stdout.splitlines()[0])["accuracy"] == last.valid["accuracy"]


@pytest.mark.slow
def test_workers_end_when_their_sweep_is_killed(preset, tmp_path):
    """The sweep itself, with SIGKILL: its workers keep their states and free their claims."""
    code = (
        "import sys, yaml, glactl.sweep.grid as g\n"
        "from glactl.sweep.command import mqar_command\n"
        "data = yaml.safe_load(sys.argv[1])\n"
        "g.read_preset = lambda name: yaml.safe_load(sys.argv[1])\n"
        "if __name__ == '__main__':\n"
        "    mqar_command(mixers='gla', lrs='1e-2,1e-3', device='cpu', jobs=2)\n"
    )
    endless = ENDLESS | {"valid_every": 10}  # after which a record tells that a trial has begun
    data = TINY | {"run": TINY["run"] | {"train": TINY["run"]["train"] | endless}}
    (tmp_path / "sweep.py").write_text(code)
    command = [sys.executable, "sweep.py", json.dumps(data)]
    root = str(Path(sweep_jobs.__file__).parents[2])
    env = os.environ | {"PYTHONPATH": root}
    with subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.DEVNULL) as sweep:
        claims, kept = (tmp_path / "sweeps" / "quick" / name for name in (".claims", ".progress"))
        until = time.monotonic() + 90
        while len(list(kept.glob("*.json"))) < 2:
            assert time.monotonic() < until
            assert sweep.poll() is None
            time.sleep(0.05)
        assert len(list(claims.glob("*"))) >= 2
        os.kill(sweep.pid, signal.SIGKILL)
    while claims.exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    assert len(list(kept.glob("*.pt"))) == 2


def test_what_is_shown_meanwhile(grid):
    """A row for each worker in a trial; of the work what is left, at the speed so far."""
    trials = {t.key: t for t in grid.trials}
    view = sweep_jobs._View(grid.trials)
    assert view(trials, [], grid.trials) == ([], "4 to go, eta at most -")
    workers = [sweep_jobs._Worker("cuda:0", None, None, key) for key in [*trials][:2]]
    workers[0].record = Record(2, 9.0, 1.5, ((2, 0.25),))
    idle = sweep_jobs._Worker("cuda:0", None, None)
    view._start -= 10.0  # seconds for half a trial of four: 70 more
    rows, line = view(trials, [*workers, idle], grid.trials)
    assert rows[0] == ["gla", 16, 0.01, 0, "cuda:0", "50%", 1.5, 0.25]
    assert (rows[1][2], rows[1][5], rows[1][7]) == (0.001, "0%", None)
    assert line == ("4 to go, eta at most 1:10; gla d 16 lr 0.01 50% 0.250; gla d 16 lr 0.001 0%")


class Lost(Sweep):
    """A GPU on which the first trial ends in an error."""

    def run(self):
        failed = Result(self.grid.trials[0].key, "failed", None, None, 0, 0.0, "illegal access")
        self.results.add(failed, {})
        yield Outcome(self.grid.trials[0], "failed", failed)
        raise AssertionError("it went on")


def test_a_worker_ends_after_an_error_on_a_gpu(grid, monkeypatch, tmp_path):
    monkeypatch.setattr(sweep_jobs, "Sweep", Lost)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    orders = Orders(grid, tmp_path / "results.jsonl", {}, None, None, 1, os.getppid())
    here, there = multiprocessing.Pipe(duplex=False)
    with pytest.raises(SystemExit) as end:
        sweep_jobs.work(orders, "cuda:0", there)
    assert end.value.code == sweep_jobs.AGAIN
    assert here.recv()[1].error == "illegal access"


def test_where_workers_go(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices_of(torch.device("cuda")) == ["cuda:0", "cuda:1"]
    assert devices_of(torch.device("cuda:1")) == ["cuda:1"]
    assert [default_jobs(torch.device(d)) for d in ("cpu", "cuda", "cuda:1")] == [1, 2, 1]
