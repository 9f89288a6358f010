import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from glactl.cli.main import app
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
    place = f"{byte_run.path.relative_to(tmp_path)} at step 3"
    recall, stocked = done.stdout.split("\n\n")
    lines = recall.splitlines()
    version = stock.lm_eval_version()
    assert lines[0] == f"protocol jrt, context length 2000, lm-eval {version}; {place}"
    assert lines[1] == "tokenizer byte, no BOS; fp32"
    assert re.fullmatch(
        r"swde: sample, revision sha256:\w{16}; 4 of 4 rows, 0 cut, an answer inside 4", lines[2]
    )
    assert lines[3].startswith("NOT comparable")
    assert lines[4].split() == ["task", "version", "docs", "metric", "value", "stderr"]
    assert lines[5].split()[0] == "swde"
    lines = stocked.splitlines()
    assert lines[0] == f"protocol stock, lm-eval {version}; {place}"
    measured = {tuple(line.split()[:4]) for line in lines[7:]}
    assert ("arc_challenge", "1.0", "4", "acc_norm") in measured
    assert ("wikitext", "2.0", "2", "bits_per_byte") in measured
    assert f"run {byte_run.path.relative_to(tmp_path)} (the newest)" in done.stderr
    folder = tmp_path / "evals" / f"{byte_run.path.name}@3"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["data"], summary["comparable"]) == ("sample", False)
    (model,) = summary["models"]
    assert model["tokenizer"] == "byte"
    assert model["tasks"]["swde"]["documents"] == 4
    contains = model["tasks"]["swde"]["metrics"]["contains"]
    assert contains == {"value": 0.0, "stderr": 0.0, "higher_is_better": True}
    samples = (folder / "swde.samples.jsonl").read_text().splitlines()
    first = json.loads(samples[0])
    assert (len(samples), first["gold"]) == (4, ["Gannet House"])
    assert first["models"][0].keys() == {"output", "contains"}
    page = (folder / "report.html").read_text()
    assert "<mark>Gannet House</mark>" in page
    assert "http" not in page.split("<h2>")[0]


def test_an_earlier_result_is_never_overwritten(glactl, byte_run, tmp_path):
    for _ in range(2):
        done = glactl("eval", byte_run.path, "--tasks", "nq", "--sample", "--limit", 1, "--json")
        assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    task = result["models"][0]["tasks"]["nq"]
    assert (task["documents"], task["of"]) == (1, 4)
    assert result["path"] == f"evals/{byte_run.path.name}@3-2"
    names = {path.name for path in (tmp_path / "evals").iterdir()}
    assert names == {f"{byte_run.path.name}@3", f"{byte_run.path.name}@3-2", "cache"}
    # the second time nothing was asked
    assert result["models"][0]["cached"] == 1


def test_a_data_folder_end_to_end(glactl, byte_run, tmp_path):
    folder = tmp_path / "data" / "lambada"
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text('{"text": "a heron is a bird"}\n')
    done = glactl("eval", "--tasks", "lambada", "--data-dir", "data", "--json", "--quiet")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["data"] == "data"
    task = result["models"][0]["tasks"]["lambada_openai"]
    assert (task["protocol"], task["data"]) == ("stock", "data")
    assert task["revision"].startswith("sha256:")
    assert task["metrics"]["acc"]["value"] == 0.0
    # one document: perplexity is exp(-loglikelihood), from an untrained model over 100
    assert task["metrics"]["perplexity"]["value"] > 100


def test_a_cut_context_is_noted_the_second_time_too(glactl, byte_run):
    args = ["--tasks", "lm-eval:swde", "--sample", "--quiet", "--max-length", 100]
    for _ in range(2):
        done = glactl("eval", *args)
        assert "4 contexts were cut from the left to the model's 100 positions" in done.stderr


def test_a_stopped_evaluation_goes_on(glactl, byte_run, monkeypatch):
    """What was answered is not asked again, and the numbers are those of an undisturbed run."""
    from glactl.tasks.engine_lm import LMEngine

    whole = LMEngine._continue
    asked = []

    def stopped(self, asks, again):
        asked.append(len(asks))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return whole(self, asks, again)

    args = ["eval", "--tasks", "swde,fda", "--sample", "--json", "--quiet"]
    expected = json.loads(glactl(*args, "--no-cache").stdout)
    monkeypatch.setattr("glactl.tasks.engine_lm.ROWS", 1)
    monkeypatch.setattr(LMEngine, "_continue", stopped)
    done = glactl(*args)
    assert done.exit_code == 6
    assert "stopped; the same line goes on from what was answered" in done.stderr
    done = glactl(*args)
    result = json.loads(done.stdout)
    assert result["models"][0]["cached"] == 2
    assert sum(asked) == 1 + 8  # the one that was stopped, and each document once
    tasks = [found["models"][0]["tasks"] for found in (expected, result)]
    assert tasks[0] == tasks[1]


def test_two_models_are_compared(glactl, byte_run, tmp_path):
    other = tmp_path / "runs" / "other"
    shutil.copytree(byte_run.path, other)
    args = ["--tasks", "arc_easy", "--sample", "--quiet"]
    done = glactl("eval", byte_run.path, other, *args)
    assert done.exit_code == 0, done.output
    head, *rows = done.stdout.splitlines()[-3:]
    names = ["A", "stderr", "B", "stderr", "B", "-", "A", "from", "to", "(95", "%)"]
    assert head.split()[4:] == names
    # one and the same model: no difference, in no draw
    assert [row.split()[-3:] for row in rows] == [["0", "0", "0"]] * 2
    folder = tmp_path / "evals" / f"{byte_run.path.name}@3--other@3"
    (difference,) = json.loads((folder / "summary.json").read_text())["differences"]
    assert difference["from"] == f"{byte_run.path.name}@3"
    assert difference["tasks"]["arc_easy"]["acc"]["documents"] == 4
    line = json.loads((folder / "arc_easy.samples.jsonl").read_text().splitlines()[0])
    assert len(line["models"]) == 2


def test_a_suite_names_tasks_protocol_and_length(glactl, byte_run):
    done = glactl("eval", "--suite", "gla-table3", "--sample", "--json", "--quiet")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    tasks = result["models"][0]["tasks"]
    assert list(tasks) == ["fda", "swde", "squad"]
    kinds = {(t["protocol"], t["version"], t["context_length"]) for t in tasks.values()}
    assert kinds == {("based", "0", 2048)}
    assert (result["suite"], result["papers"]) == ("gla-table3", [])  # other rows than the paper's


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--tasks", "swed"], 2, "task 'swed' is not known to lm-eval"),
        (["--tasks", ","], 2, "tasks is empty"),
        (["--sample", "--data-dir", "x"], 2, "--sample and --data-dir x exclude each other"),
        (["nowhere"], 2, "nowhere is not a run folder"),
        (["--data-dir", "x"], 2, "--data-dir x is not a folder"),
        (["--suite", "gla-tabel3"], 2, "suite 'gla-tabel3' is not known; did you mean gla-table3?"),
        (["--suite", "gla-table3", "--tasks", "fda"], 2, "says what --tasks would: leave one"),
        (["--protocol", "jtr"], 2, "protocol 'jtr' is not known; did you mean jrt?"),
        (["--sample", "--protocol", "based", "--tasks", "nq"], 2, "protocol based has no task nq"),
        (["--sample", "--max-length", "100"], 2, "a context of 2000 tokens is longer than the"),
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
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    done = glactl("eval", "--tasks", "squad", "--quiet")
    assert done.exit_code == 3
    assert "error: data set hazyresearch/based-squad of task squad: " in done.stderr


def test_without_transformers_the_exit_code_is_3(glactl, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    done = glactl("eval", "hf:x", "--sample")
    assert done.exit_code == 3
    line = "error: hf:x needs the package transformers; pip install 'glactl[hf]'"
    assert done.stderr.splitlines() == [line]


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


@pytest.mark.slow
def test_processes_of_torchrun_share_the_work(byte_run, tmp_path):
    args = ["eval", byte_run.path, "--tasks", "swde,arc_easy,wikitext", "--sample", "--json"]
    command = [sys.executable, "-m", "glactl.cli", *map(str, args), "--quiet", "--device", "cpu"]
    ranks = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29653"]
    together = [sys.executable, *ranks, *command[1:]]
    found = []
    for line, out in ((command, "one"), (together, "two")):
        done = subprocess.run(
            [*line, "--out", str(tmp_path / out)], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        (result,) = done.stdout.splitlines()  # rank 0 alone speaks
        found.append(json.loads(result)["models"][0]["tasks"])
    assert found[0] == found[1]
    # no request was answered by both
    lines = [file.read_text().splitlines() for file in tmp_path.glob("*/cache/*.jsonl")]
    assert len(lines[0]) == len(lines[1]) == len({json.loads(x)["key"] for x in lines[1]})


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is not here")
def test_the_shared_data(glactl, byte_run):
    done = glactl(
        "eval", "--tasks", "squad,arc", "--data-dir", SHARED, "--limit", 3, "--json", "--quiet"
    )
    assert done.exit_code == 0, done.output
    (model,) = json.loads(done.stdout)["models"]
    assert model["tasks"].keys() == {"squad", "arc_easy", "arc_challenge"}
    assert model["tasks"]["squad"]["protocol"] == "jrt"
