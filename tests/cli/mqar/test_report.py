"""What the sweep shows of its results."""

import csv
import re

import pytest
from sweeping import table

from glactl.models.mixers import KINDS
from glactl.profile.report import COLOURS
from glactl.sweep import plot as sweep_plot
from glactl.sweep.grid import make_grid
from glactl.sweep.results import Outcome, Result, Results
from glactl.sweep.rows import edge_warnings, summarise


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


def test_a_row_that_lacks_a_seed_is_not_solved(glactl):
    cells = make_grid(mixers="gla", lrs="1e-2", seeds="0,1").cells
    first, second = (cell[0] for cell in cells)
    good = Result(first.key, "done", 1.0, 0.1, 3, 2.0)
    bad = Result(second.key, "failed", None, None, 0, 0.0, "x")
    outcomes = [Outcome(first, "done", good), Outcome(second, "failed", bad)]
    (row,) = summarise(outcomes)
    assert (row.status, row.accuracy, row.errors) == ("unsolved", 1.0, 1)
    assert edge_warnings([row], [1e-2]) == []


@pytest.mark.parametrize(
    ("ended", "expected"),
    [(None, ("not run", None)), (0.4, ("unsolved", 0.4)), ("failed", ("unsolved", 0.3))],
)
def test_a_pruned_trial_counts_once_those_ahead_of_it_have_ended(ended, expected, glactl):
    behind, ahead = make_grid(mixers="gla", lrs="1e-3,1e-2").cells[0]
    pruned = Result(behind.key, "pruned", 0.3, 1.0, 2, 2.0, pruned="0.1 behind lr 0.01 at step 2")
    other = Outcome(ahead, "missing")
    if ended == "failed":
        other = Outcome(ahead, "failed", Result(ahead.key, "failed", None, None, 0, 0.0, "x"))
    elif ended is not None:
        other = Outcome(ahead, "done", Result(ahead.key, "done", ended, 1.0, 3, 3.0))
    (row,) = summarise([Outcome(behind, "pruned", pruned), other])
    assert (row.status, row.accuracy) == expected


def test_every_file_names_its_sweep_and_the_report_needs_no_other(glactl, trained, tmp_path):
    trained.accuracies[1e-2] = 0.6
    glactl("--lrs", "1e-3,1e-2", "--seeds", "0,1", "--quiet")
    grid = make_grid(lrs="1e-3,1e-2", seeds="0,1")
    folder = tmp_path / "sweeps" / "quick"
    for path in folder.iterdir():
        if path.name != "results.jsonl":  # it keeps the trials of many sweeps
            assert grid.key.encode() in path.read_bytes(), path.name
    for name in ("accuracy", "dims"):
        assert f"sweep {grid.key[:12]}" in (folder / f"{name}.svg").read_text()
    html = (folder / "report.html").read_text()
    best = [t for t in grid.trials if t.lr == 1e-2]
    assert all(t.key in html for t in best)
    with open(folder / "table.csv") as f:
        keys = [row["keys"].split() for row in csv.DictReader(f)]
    assert keys == [[t.key for t in best if t.mixer == mixer] for mixer in grid.mixers]
    assert html.count("<svg") == 2
    assert html.count("the best rate, 0.01, is at the edge of the grid") == 2
    # nothing is fetched: the one kind of address is the name of an XML namespace
    assert set(re.findall(r'(\S+?)="https?:', html)) <= {"xmlns", "xmlns:xlink"}
    assert not re.search(r"<(script|link|img|iframe)|@import|\bsrc=|url\((?!#)", html)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    used = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', html)
    assert {a or b for a, b in used} <= set(ids)


def test_every_mixer_has_a_colour_of_its_own(glactl):
    outcomes = [Outcome(t, "missing") for t in make_grid(mixers="all", lrs="1e-2").trials]
    colours = sweep_plot._colours(summarise(outcomes))
    assert len(colours) == len(set(colours.values())) == len(KINDS) - 1  # all but conv
    assert colours["gsa"] == COLOURS["gsa"]


def test_another_sweep_has_another_key(glactl):
    keys = [make_grid(lrs=lrs).key for lrs in ("1e-2", "1e-3", "1e-3,1e-2", "1e-2,1e-3")]
    assert len(set(keys)) == 3
    assert keys[2] == keys[3]  # of the trials, in whatever order


MIXED = [("8/1", 1.0, 0.5), ("16/4", 0.5, 0.25)]


def test_slices_over_the_seeds_in_every_form(glactl, preset, tmp_path):
    """Two seeds of one mixer: mean and extremes, in the table, the file, the figure, the report."""
    parts = [{"seq_len": 8, "pairs": 1, "rows": 4}, {"seq_len": 16, "pairs": 4, "rows": 4}]
    preset["run"]["data"] = {"kind": "mqar", "vocab_size": 64, "train": parts, "valid": parts}
    preset["lengths"] = {}
    args = ("--mixers", "gla", "--lrs", "1e-2", "--seeds", "0,1")
    results = Results(tmp_path / "sweeps" / "quick" / "results.jsonl")
    for i, trial in enumerate(make_grid(mixers="gla", lrs="1e-2", seeds="0,1").trials):
        slices = {name: values[i] for name, *values in MIXED}
        results.add(Result(trial.key, "done", 0.5, 1.0, 3, 2.0, None, slices), {})
    shown = glactl(*args, "--plot-only")
    assert shown.exit_code == 0, shown.output
    line = shown.stdout.splitlines()[-1]
    assert re.split(r"\s{2,}", line) == [
        "gla",
        "16",
        "0.750 (0.500–1.000)",
        "0.375 (0.250–0.500)",
    ]
    with open(results.path.with_name("slices.csv")) as f:
        rows = [
            [r[name] for name in ("seq_len", "pairs", "accuracy", "lowest")]
            for r in csv.DictReader(f)
        ]
    assert rows == [["8", "1", "0.75", "0.5"], ["16", "4", "0.375", "0.25"]]
    assert "16/4" in results.path.with_name("slices.svg").read_text()
    html = results.path.with_name("report.html").read_text()
    assert "<td>0.3750 (0.250 to 0.500)</td>" in html
    assert html.count("<svg") == 3
