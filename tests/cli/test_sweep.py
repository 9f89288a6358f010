import csv
import json
import multiprocessing
import os
import re
import signal
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from glactl import console
from glactl.cli import app
from glactl.models.cost import lm_cost
from glactl.models.mixers import KINDS
from glactl.spec import spec_hash
from glactl.sweep_grid import make_grid, presets
from glactl.sweep_report import edge_warnings, summarise
from glactl.sweep_results import Outcome, Result, Results, pending
from glactl.train import Step, Stopped, train, with_vocab

NAMES = ", ".join(KINDS)
TINY = {
    "dims": [16],
    "lrs": [1e-2, 1e-3, 1e-1],
    "seeds": [0],
    "mixers": {
        "attention": {"model": {"mixer": {"kind": "attention", "heads": 1}}},
        "gla": {"model": {"mixer": {"kind": "gla", "heads": 2}}},
    },
    "run": {
        "model": {"n_layers": 1, "ffn": "none", "short_conv": 3, "positions": "none"},
        "data": {
            "kind": "mqar",
            "vocab_size": 32,
            "seq_len": 8,
            "pairs": 2,
            "n_train": 64,
            "n_valid": 16,
        },
        "optim": {"warmup_steps": 1},
        "train": {"steps": 4, "batch_size": 8, "valid_every": 2, "stop_accuracy": 0.99},
    },
    "lengths": {8: {"data": {"pairs": 2}}, 16: {"data": {"pairs": 4}, "train": {"steps": 5}}},
}


@pytest.fixture
def glactl(tmp_path, monkeypatch):
    """Run the command line in an empty folder; the preset is TINY."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("glactl.sweep_grid.read_preset", lambda name: json_copy(TINY))
    return lambda *args: CliRunner().invoke(app, ["mqar", *map(str, args), "--device", "cpu"])


def json_copy(data):
    return yaml.safe_load(yaml.safe_dump(data))


@pytest.fixture
def trained(monkeypatch):
    """Replace training: a trial's accuracy is what `accuracies` has for its rate, or it raises."""
    calls, accuracies = [], {}

    def fake(spec, **_):
        calls.append((spec.model.d_model, spec.model.mixer.kind, spec.optim.lr, spec.seed))
        found = accuracies.get(spec.optim.lr, 0.5)
        yield step(1, None)
        if isinstance(found, BaseException):
            raise found
        yield step(2, {"loss": 1.0, "accuracy": found})

    def step(n, valid):
        return Step(n, 4, 64 * n, 1.5, 0.1, 1.0, 100.0, 1.0, valid=valid)

    monkeypatch.setattr("glactl.sweep.train", fake)
    fake.calls, fake.accuracies = calls, accuracies
    return fake


def table(result):
    """The cells of the table on stdout, columns parted by two spaces or more."""
    head, *rows = (re.split(r"\s{2,}", line) for line in result.stdout.splitlines())
    return [dict(zip(head, row, strict=True)) for row in rows]


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
    files = {"results.jsonl", "table.csv", "accuracy.svg", "accuracy.png", "sweep.yaml"}
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

    monkeypatch.setattr("glactl.sweep.train", lambda *_, **__: pytest.fail("trained again"))
    before = {name: (folder / name).read_bytes() for name in files}
    again = glactl("--dims", "16,32", "--lrs", "1e-2")
    assert again.stdout == done.stdout
    assert "at most 0 to run" in again.stderr
    assert {name: (folder / name).read_bytes() for name in files} == before


def test_state_bytes_are_the_cost_models(glactl):
    for trial in make_grid(dims="16,32").trials:
        cost = lm_cost(with_vocab(trial.spec, 32).model, 8)
        assert (trial.state_bytes, trial.params) == (cost.state_bytes, cost.params)
        assert trial.key == spec_hash(trial.spec)


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


def test_seeds_are_averaged_and_their_spread_is_shown(glactl, trained, monkeypatch):
    values = iter([0.5, 0.75])
    monkeypatch.setattr(trained, "accuracies", trained.accuracies)
    done = None
    for seed in (0, 1):
        trained.accuracies[1e-2] = next(values)
        done = glactl("--mixers", "gla", "--lrs", "1e-2", "--seeds", ",".join("01"[: seed + 1]))
    assert len(trained.calls) == 2
    (row,) = table(done)
    assert (row["accuracy"], row["min–max"]) == ("0.625", "0.500–0.750")


@pytest.mark.parametrize(
    ("lrs", "best", "beyond"), [("1e-3,1e-2", 1e-2, "0.03"), ("1e-2,1e-3", 1e-3, "0.0003")]
)
def test_a_best_rate_at_the_edge_is_a_warning(lrs, best, beyond, glactl, trained):
    trained.accuracies[best] = 0.6
    done = glactl("--mixers", "gla", "--lrs", lrs)
    expected = (
        f"warning: gla d 16: the best rate, {best:g}, is at the edge of the grid; "
        f"try --lrs with {beyond} too"
    )
    assert expected in done.stderr


@pytest.mark.parametrize("lrs", ["1e-3", "1e-3,1e-2,1e-1"])
def test_one_rate_or_a_middle_one_is_no_warning(lrs, glactl, trained):
    trained.accuracies[1e-2] = 0.6
    assert "warning" not in glactl("--mixers", "gla", "--lrs", lrs).stderr


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
        for step in train(*args, **kwargs):
            yield step
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("glactl.sweep.train", cut)
    stopped = glactl("--mixers", "gla")
    assert stopped.exit_code == 6
    assert "inside gla d 16 lr 0.01 seed 0 (stopped after step 1)" in stopped.stderr
    assert not Path("sweeps/quick/results.jsonl").exists()


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


ERRORS = [
    (["--dims", ""], "--dims is ''; allowed: whole numbers of 1 or more, 64,128"),
    (["--dims", "64,,128"], "--dims is '64,,128'; allowed: whole numbers of 1 or more, 64,128"),
    (["--dims", "64,x"], "--dims has 'x'; allowed: whole numbers of 1 or more, 64,128"),
    (["--dims", "0"], "--dims has '0'; allowed: whole numbers of 1 or more, 64,128"),
    (["--seeds", "-1"], "--seeds has '-1'; allowed: whole numbers of 0 or more, 64,128"),
    (["--lrs", "1e-3,"], "--lrs is '1e-3,'; allowed: numbers above 0, 1e-3,3e-3"),
    (["--lrs", "0"], "--lrs has '0'; allowed: numbers above 0, 1e-3,3e-3"),
    (["--lrs", "nan"], "--lrs has 'nan'; allowed: numbers above 0, 1e-3,3e-3"),
    (["--lrs", "fast"], "--lrs has 'fast'; allowed: numbers above 0, 1e-3,3e-3"),
    (["--mixers", ","], "--mixers is ','; allowed: names, attention,gla"),
    (
        ["--mixers", "gsaa"],
        f"--mixers gsaa: model.mixer.kind is 'gsaa'; allowed: {NAMES}; did you mean gsa?",
    ),
    (["--dims", "15"], r"--mixers gla --dims 15: model: mixer gla: .*d_model 15.*"),
    (["--dims", "18"], r"--mixers gla --dims 18: model: mixer gla: .*heads 2 .*9.*"),
    (["--pairs", "3"], r"--pairs 3: data: .*pairs.*"),
    (["--pairs", "0"], r"--pairs 0: .*pairs.*"),
    (["--seqlen", "20", "--pairs", "100"], r"--seqlen 20 --pairs 100: data: .*pairs.*"),
    (["--pairs", "17", "--seqlen", "68"], r"--seqlen 68 --pairs 17: data: .*"),  # vocabulary 32
    (["--device", "gpu"], "device 'gpu' is not known; allowed: cpu, cuda, .*"),
]


@pytest.mark.parametrize(("args", "message"), ERRORS, ids=[" ".join(a) for a, _ in ERRORS])
def test_bad_input_is_one_line_before_anything_starts(args, message, glactl, trained, tmp_path):
    bad = CliRunner().invoke(app, ["mqar", *args])
    assert bad.exit_code == 2, bad.output
    assert bad.stdout == ""
    assert bad.stderr.count("\n") == 1
    line = bad.stderr.removeprefix("error: ").rstrip("\n")
    assert line == message or re.fullmatch(message, line), bad.stderr
    assert trained.calls == []
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_preset_and_a_file_as_folder(tmp_path):
    bad = CliRunner().invoke(app, ["mqar", "--preset", "zoo"])
    assert bad.exit_code == 2
    assert bad.stderr.startswith("error: --preset is 'zoo'; allowed: quick, zoology")
    (tmp_path / "f").write_text("")
    bad = CliRunner().invoke(app, ["mqar", "--out", str(tmp_path / "f")])
    assert bad.exit_code == 2
    assert "is a file; allowed: a folder" in bad.stderr


def test_the_length_brings_its_settings_and_pairs_win(glactl):
    (cell,) = make_grid(mixers="gla", lrs="1e-3", seqlen=16).cells
    data, plan = cell[0].spec.data, cell[0].spec.train
    assert (data.seq_len, data.pairs, plan.steps) == (16, 4, 5)
    (cell,) = make_grid(mixers="gla", lrs="1e-3", seqlen=16, pairs=1).cells
    assert cell[0].spec.data.pairs == 1


@pytest.mark.parametrize("name", presets())
def test_the_presets_are_valid(name):
    grid = make_grid(name)
    assert len({t.key for t in grid.trials}) == len(grid.trials)
    assert {"attention", "gla", "gsa"} == set(grid.mixers)
    assert all(t.spec.train.stop_accuracy == 0.99 for t in grid.trials)


@pytest.mark.parametrize(
    ("length", "pairs", "batch", "steps"),
    [(64, 4, 512, 12544), (128, 8, 512, 12544), (256, 16, 256, 25024), (512, 64, 128, 50048)],
)
def test_zoologys_figure_2(length, pairs, batch, steps):
    """64 epochs of 100,000 rows: 64 * ceil(100,000 / batch) steps, validated after each epoch."""
    grid = make_grid("zoology", seqlen=length)
    assert (grid.dims, grid.lrs) == ([64, 128, 256, 512], [1e-4, 4.64e-4, 2.15e-3, 1e-2])
    for trial in grid.trials:
        data, plan = trial.spec.data, trial.spec.train
        assert (data.seq_len, data.pairs, data.n_train, data.n_valid) == (
            length,
            pairs,
            10**5,
            3000,
        )
        assert (plan.batch_size, plan.steps) == (batch, steps)
        assert plan.steps == 64 * plan.valid_every == 64 * -(-data.n_train // batch)
        assert trial.spec.model.positions == ("learned" if trial.mixer == "attention" else "none")


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
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=_add_many, args=(path, name)) for name in "ab"]
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


def test_a_row_that_lacks_a_seed_is_not_solved(glactl):
    cells = make_grid(mixers="gla", lrs="1e-2", seeds="0,1").cells
    first, second = (cell[0] for cell in cells)
    good = Result(first.key, "done", 1.0, 0.1, 3, 2.0)
    bad = Result(second.key, "failed", None, None, 0, 0.0, "x")
    outcomes = [Outcome(first, "done", good), Outcome(second, "failed", bad)]
    (row,) = summarise(outcomes)
    assert (row.status, row.accuracy, row.errors) == ("unsolved", 1.0, 1)
    assert edge_warnings([row], [1e-2]) == []


def test_exit_code_of_a_stop_is_consoles():
    from glactl.sweep import SweepFailed, SweepStopped

    assert console.exit_code(SweepStopped()) == 6
    assert console.exit_code(SweepFailed()) == 1
