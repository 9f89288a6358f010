import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from glactl.cli import app
from glactl.tasks import stock

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture
def glactl(tmp_path, monkeypatch):
    """Run the command line in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *args: CliRunner().invoke(app, [str(a) for a in args])


def test_the_sample_end_to_end(glactl, byte_run, tmp_path):
    done = glactl("eval", "--tasks", "swde,arc,wikitext", "--sample", "--batch-tokens", 500)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0] == (
        f"protocol stock, lm-eval {stock.lm_eval_version()}, our sample rows; "
        f"{byte_run.path.relative_to(tmp_path)} at step 3"
    )
    assert lines[1].startswith("NOT comparable")
    assert lines[2].split() == ["task", "version", "docs", "metric", "value", "stderr"]
    measured = {tuple(line.split()[:4]) for line in lines[3:]}
    assert ("swde", "1", "4", "contains") in measured
    assert ("arc_challenge", "1.0", "4", "acc_norm") in measured
    assert ("wikitext", "2.0", "2", "bits_per_byte") in measured
    assert f"run {byte_run.path.relative_to(tmp_path)} (the newest)" in done.stderr
    folder = tmp_path / "evals" / f"{byte_run.path.name}@3"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["data"] == "sample"
    assert not summary["comparable"]
    assert summary["tasks"]["swde"]["documents"] == 4
    contains = summary["tasks"]["swde"]["metrics"]["contains"]
    assert contains == {"value": 0.0, "stderr": 0.0, "higher_is_better": True}
    samples = (folder / "swde.samples.jsonl").read_text().splitlines()
    first = json.loads(samples[0])
    assert (len(samples), first["target"], len(first["outputs"])) == (4, "Gannet House", 1)


def test_an_earlier_result_is_never_overwritten(glactl, byte_run, tmp_path):
    for _ in range(2):
        done = glactl("eval", byte_run.path, "--tasks", "nq", "--sample", "--limit", 1, "--json")
        assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["tasks"]["nq_open"]["documents"] == 1
    assert result["tasks"]["nq_open"]["of"] == 4
    assert result["path"] == f"evals/{byte_run.path.name}@3-2"
    assert len(list((tmp_path / "evals").iterdir())) == 2


def test_a_data_folder_end_to_end(glactl, byte_run, tmp_path):
    folder = tmp_path / "data" / "lambada"
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text('{"text": "a heron is a bird"}\n')
    done = glactl("eval", "--tasks", "lambada", "--data-dir", "data", "--json", "--quiet")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["data"] == "data"
    metrics = result["tasks"]["lambada_openai"]["metrics"]
    assert metrics["acc"]["value"] == 0.0
    # one document: perplexity is exp(-loglikelihood), from an untrained model over 100
    assert metrics["perplexity"]["value"] > 100


def test_a_cut_context_is_noted(glactl, byte_run, monkeypatch):
    from glactl.tasks.harness import HarnessLM

    init = HarnessLM.__init__

    def short(self, *args):
        init(self, *args)
        self.max_length = 100

    monkeypatch.setattr(HarnessLM, "__init__", short)
    done = glactl("eval", "--tasks", "swde", "--sample", "--quiet")
    assert "4 contexts were cut from the left to the model's 100 positions" in done.stderr


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--tasks", "swed"], 2, "task 'swed' is not known to lm-eval"),
        (["--tasks", ","], 2, "tasks is empty"),
        (["--sample", "--data-dir", "x"], 2, "--sample and --data-dir x exclude each other"),
        (["nowhere"], 2, "nowhere is not a run folder"),
        (["--data-dir", "x"], 2, "--data-dir x is not a folder"),
        (["--sample", "--device", "tpu"], 2, "device 'tpu' is not known"),
        (["--limit", "0"], 2, "Invalid value for '--limit'"),
        (["--batch-tokens", "0"], 2, "Invalid value for '--batch-tokens'"),
    ],
)
def test_errors_are_one_line(glactl, byte_run, args, code, message):
    done = glactl("eval", *args)
    assert done.exit_code == code
    assert message in done.stderr
    assert done.stdout == ""
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1


def test_without_any_run(glactl):
    done = glactl("eval", "--sample")
    assert done.exit_code == 2
    assert "error: no run with a checkpoint in runs; make one: glactl train" in done.stderr


def test_a_run_without_a_tokenizer(glactl, byte_run):
    (byte_run.path / "tokenizer").rename(byte_run.path / "gone")
    done = glactl("eval", "--sample")
    assert done.exit_code == 2
    assert "has no tokenizer, its data is not text; eval needs text" in done.stderr


def test_without_the_hub_the_exit_code_is_3(glactl, byte_run, monkeypatch):
    def offline(names, data):
        raise stock.unavailable(ConnectionError("no route"), names[0])

    monkeypatch.setattr("glactl.evaluate.load_tasks", offline)
    done = glactl("eval", "--tasks", "squad")
    assert done.exit_code == 3
    assert "error: data set hazyresearch/based-squad of task squad_completion: " in done.stderr


def test_transformers_is_not_imported_where_it_is_installed(byte_run, tmp_path):
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("raise SystemExit('imported')\n")
    args = [byte_run.path, "--tasks", "squad,lambada", "--sample", "--limit", "1", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-m", "glactl.cli", "eval", *args, "--out", tmp_path / "evals"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "it/s" not in done.stderr  # lm-eval's bars


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is not here")
def test_the_shared_data(glactl, byte_run):
    done = glactl(
        "eval", "--tasks", "squad,arc", "--data-dir", SHARED, "--limit", 3, "--json", "--quiet"
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["tasks"].keys() == {
        "squad_completion",
        "arc_easy",
        "arc_challenge",
    }
