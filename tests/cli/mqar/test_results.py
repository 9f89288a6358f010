"""What is kept of trials: whole lines, errors, several sweeps and kills."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from glactl.spec import spec_hash
from glactl.sweep import run as sweep_run
from glactl.sweep.claims import Claims
from glactl.sweep.grid import make_grid
from glactl.sweep.results import Result, Results, pending
from glactl.sweep.run import standing_errors
from glactl.sweep.trial import Record

RECORDED = Path(__file__).parents[2] / "tasks" / "golden" / "mqar-before-mixtures.jsonl"
CPU, FORK = torch.device("cpu"), multiprocessing.get_context("fork")


def test_a_half_written_line_is_ignored_and_the_next_stands_alone(tmp_path):
    results = Results(tmp_path / "a" / "results.jsonl")
    one, two = (Result(key, "done", 0.5, 1.0, 3, 2.0) for key in ("one", "two"))
    assert results.load() == {}
    results.add(one, {"dim": 16})
    whole = results.path.read_bytes()
    for cut in range(len(whole) - 1):  # whole but for its line break, a line counts
        results.path.write_bytes(whole + whole[:cut].replace(b'"one"', b'"cut"'))
        assert results.load() == {"one": one}
        results.add(two, {})
        assert results.load() == {"one": one, "two": two}


def test_an_error_never_hides_a_result(tmp_path):
    results = Results(tmp_path / "results.jsonl")
    done, failed = (
        Result("k", "done", 0.5, 1.0, 3, 2.0),
        Result("k", "failed", None, None, 0, 0, "x"),
    )
    results.add(failed, {})
    assert results.load() == {"k": failed}
    results.add(done, {})
    results.add(failed, {})
    assert results.load() == {"k": done}


def _add_many(path, name):
    for i in range(50):
        Results(path).add(Result(f"{name}{i}", "done", 0.5, 1.0, i, 2.0), {"pad": "x" * 9000})


def test_two_sweeps_may_write_at_once(tmp_path):
    path = tmp_path / "results.jsonl"
    writers = [FORK.Process(target=_add_many, args=(path, name)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert path.read_bytes().count(b"\n") == len(Results(path).load()) == 100


def test_pending(glactl):
    (cell,) = make_grid(mixers="gla").cells
    a, b, c = cell
    failed = Result(a.key, "failed", None, None, 0, 0.0, "x")
    assert pending(cell, {}) == cell
    assert pending(cell, {a.key: failed}) == [b, c]
    assert pending(cell, {a.key: failed}, retry_failed=True) == cell
    assert pending(cell, {b.key: Result(b.key, "done", 0.99, 1.0, 3, 2.0)}) == [a, c]
    assert pending(cell, {b.key: Result(b.key, "done", 0.991, 1.0, 3, 2.0)}) == []


def test_lines_written_before_there_were_slices_count():
    lines = RECORDED.read_text().splitlines()
    assert "slices" not in json.loads(lines[0])
    assert len(Results(RECORDED).load()) == len(lines)


def test_a_claim_is_held_by_one_and_gone_afterwards(tmp_path):
    claims, other = Claims(tmp_path), Claims(tmp_path)
    with claims.hold("a") as first, other.hold("a") as second, other.hold("b") as third:
        assert (first, second, third) == (True, False, True)
    with other.hold("a") as now:
        assert now
    assert list(tmp_path.iterdir()) == []


def _sweep(folder, path, take, accuracies, **options):
    """Run the grid with training that notes its trials in a file beside the results."""

    def fake(spec, **_):
        with open(folder / "trained", "a") as f:
            f.write(f"{os.getpid()} {spec_hash(spec)}\n")
        time.sleep(take)
        accuracy = accuracies.get(spec.optim.lr, 0.5)
        if accuracy is None:
            raise RuntimeError("broken")
        valid = {"loss": 1.0, "accuracy": accuracy}
        yield Record(1, 1.0, 1.5, curve=((1, accuracy),), valid=valid, done=True)

    def after_both(results):
        """The errors that stand before either sweep has run anything."""
        found = standing_errors(results)
        (folder / f"begun-{os.getpid()}").touch()
        while len(list(folder.glob("begun-*"))) < 2:
            time.sleep(0.005)
        return found

    sweep_run.run_trial, sweep_run.POLL = fake, 0.01
    sweep_run.standing_errors = after_both
    found = list(
        sweep_run.run_sweep(
            make_grid(**options.pop("grid", {})), Results(path), CPU, quiet=True, **options
        )
    )
    (folder / f"outcomes-{os.getpid()}").write_text(json.dumps([o.status for o in found]))


def _start(*args, **kwargs):
    process = FORK.Process(target=_sweep, args=args, kwargs=kwargs, daemon=True)
    process.start()
    return process


def _trained(folder):
    lines = (folder / "trained").read_text().splitlines() if (folder / "trained").exists() else []
    return [line.split() for line in lines]


@pytest.mark.parametrize("grid", [{"seeds": "0,1,2"}, {"mixers": "gla"}], ids=["cells", "one cell"])
def test_two_sweeps_at_once_share_the_trials(grid, preset, tmp_path):
    path = tmp_path / "results.jsonl"
    both = [_start(tmp_path, path, 0.15, {}, grid=grid) for _ in range(2)]
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    keys = [key for _, key in _trained(tmp_path)]
    assert sorted(keys) == sorted(t.key for t in make_grid(**grid).trials)  # each once
    assert {pid for pid, _ in _trained(tmp_path)} == {str(p.pid) for p in both}
    for process in both:  # both know all of them
        statuses = json.loads((tmp_path / f"outcomes-{process.pid}").read_text())
        assert statuses == ["done"] * len(keys)
    assert not (tmp_path / ".claims").exists()


def test_a_cell_that_another_sweep_solves_is_not_run(preset, tmp_path):
    """With both rates of its one cell in other hands the sweep waits, and finds it solved."""
    path, grid = tmp_path / "results.jsonl", {"mixers": "gla", "lrs": "1e-2,1e-3"}
    trial = make_grid(**grid).trials[1]
    solved = Result(trial.key, "done", 1.0, 0.1, 1, 1.0)
    with Claims(tmp_path).hold(make_grid(**grid).trials[0].key):
        with Claims(tmp_path).hold(trial.key):
            process = _start(tmp_path, path, 0.0, {}, grid=grid)
            time.sleep(0.2)
            assert _trained(tmp_path) == []
            Results(path).add(solved, {})
        process.join(60)
    assert process.exitcode == 0
    assert _trained(tmp_path) == []
    assert json.loads((tmp_path / f"outcomes-{process.pid}").read_text()) == ["skipped", "done"]


def test_what_others_run_is_waited_for_after_all_else(preset, tmp_path):
    """The first rate of the one cell is in other hands: the two behind it are run meanwhile."""
    path, grid = tmp_path / "results.jsonl", {"mixers": "gla"}
    first, *others = make_grid(**grid).trials
    with Claims(tmp_path).hold(first.key):
        process = _start(tmp_path, path, 0.0, {}, grid=grid)
        until = time.monotonic() + 60
        while len(Results(path).load()) < 2:
            assert time.monotonic() < until
            time.sleep(0.005)
        time.sleep(0.05)
        assert process.is_alive()
        assert list(Results(path).load()) == [t.key for t in others]
        Results(path).add(Result(first.key, "done", 0.5, 1.0, 3, 2.0), {})
    process.join(60)
    assert process.exitcode == 0
    assert [key for _, key in _trained(tmp_path)] == [t.key for t in others]


def test_a_folder_of_claims_that_goes_while_it_is_made_is_made_again(tmp_path, monkeypatch):
    calls, mkdir = [], Path.mkdir

    def gone(self, *args, **options):
        calls.append(self)
        if len(calls) == 1:  # what pathlib says where another process removes it meanwhile
            raise FileExistsError(17, "File exists", str(self))
        mkdir(self, *args, **options)

    monkeypatch.setattr(Path, "mkdir", gone)
    with Claims(tmp_path).hold("key") as mine:
        assert mine
    assert len(calls) == 2


def test_retries_of_two_sweeps_are_one(preset, tmp_path):
    path, grid = tmp_path / "results.jsonl", {"mixers": "gla"}
    for trial in make_grid(**grid).trials:
        Results(path).add(Result(trial.key, "failed", None, None, 0, 0.0, "x"), {})
    both = [
        _start(tmp_path, path, 0.05, {1e-2: None}, grid=grid, retry_failed=True) for _ in range(2)
    ]
    for process in both:
        process.join(60)
    keys = [key for _, key in _trained(tmp_path)]
    assert sorted(keys) == sorted(t.key for t in make_grid(**grid).trials)
    for process in both:  # in the order of their ends
        statuses = json.loads((tmp_path / f"outcomes-{process.pid}").read_text())
        assert sorted(statuses) == ["done", "done", "failed"]


def test_a_killed_sweep_keeps_what_has_ended_and_frees_its_claim(preset, tmp_path):
    """Killed inside its third trial: two results stand, and the next sweep runs the other four."""
    path = tmp_path / "results.jsonl"
    keys = [t.key for t in make_grid().trials]
    killed = _start(tmp_path, path, 0.1, {})
    until = time.monotonic() + 60
    while len(_trained(tmp_path)) < 3:
        assert time.monotonic() < until
        time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    assert list(Results(path).load()) == keys[:2]
    assert [p.name for p in (tmp_path / ".claims").iterdir()] == [keys[2]]
    after = _start(tmp_path, path, 0.0, {})
    after.join(60)
    assert after.exitcode == 0
    assert [key for pid, key in _trained(tmp_path) if pid == str(after.pid)] == keys[2:]
    assert list(Results(path).load()) == keys
    assert path.read_bytes().count(b"\n") == 6
    assert not (tmp_path / ".claims").exists()
