import json
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from glactl import data_command
from glactl.cli.main import app
from glactl.run import Run
from glactl.tasks import batch_hash, load_task
from glactl.tasks.prepare_shard import Recipe


@pytest.fixture
def glactl(tmp_path, monkeypatch):
    """Run a command in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def glactl(*args):
        return CliRunner().invoke(app, [str(a) for a in args], prog_name="glactl")

    return glactl


@pytest.fixture
def corpus(tmp_path):
    """A file of 200 different documents, 13 KB."""
    path = tmp_path / "corpus.jsonl"
    texts = (f"{i} is {i * i} when it is squared, and {i**3} when cubed" for i in range(200))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def prepare(glactl, corpus):
    def prepare(*args):
        return glactl("data", "prepare", corpus, "--jobs", 1, "--shard-mib", 0.004, *args)

    return prepare


def fails(result, code, message):
    """The command ended with `code` and this one line on stderr, and nothing on stdout."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert re.fullmatch(f"error: {message}\n", result.stderr), result.stderr


def spec(tiny_data, **data):
    tiny_data["data"] = {"kind": "shards", "seq_len": 12, **data}
    Path("spec.yaml").write_text(json.dumps(tiny_data))
    return "spec.yaml"


def test_prepare_tells_what_it_made(prepare, glactl):
    result = prepare("--out", "made")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert re.fullmatch(r"split +documents +tokens +bytes of text", lines[0])
    assert [line.split()[0] for line in lines[1:3]] == ["train", "valid"]
    assert re.fullmatch("data made  fingerprint [0-9a-f]{12}", lines[3])
    assert "glactl train --set data='{kind: shards, path: made}'" in result.stderr
    again = json.loads(prepare("--out", "made", "--json", "--quiet").stdout)
    assert again["kept"] > 1
    assert again["fingerprint"].startswith(lines[3][-12:])
    assert again["train"]["documents"] + again["valid"]["documents"] == 200
    checked = glactl("data", "check", "made", "--json")
    assert json.loads(checked.stdout)["fingerprint"] == again["fingerprint"]
    assert glactl("data", "check", "made").stdout.endswith(f"fingerprint {again['fingerprint']}\n")


def test_a_run_on_prepared_data_is_planned_trained_and_resumed(prepare, glactl, tiny_data):
    assert prepare("--out", "one").exit_code == 0
    shutil.copytree("one", "two")
    sources = [{"path": "one", "weight": 2}, {"path": "two"}]
    path = spec(tiny_data, sources=sources)
    plan = json.loads(glactl("train", path, "--plan", "--json").stdout)
    assert plan["tokens_step"] == 4 * 12
    result = glactl("train", path, "--json", "--device", "cpu")
    assert result.exit_code == 0, result.output
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert 0 < events[-1]["valid"]["bpb"] < 20
    run = Run.newest()
    task = load_task(run.spec.data, run.spec.seed)
    assert run.manifest["data"]["fingerprint"] == events[0]["fingerprint"] == task.fingerprint
    assert batch_hash([task.train_batch(0, 4)]) == batch_hash(
        [load_task(run.spec.data, run.spec.seed).train_batch(m, 2) for m in range(2)]
    )
    shutil.copyfile("one/shards/train-00000.tokens", "one/shards/train-00001.tokens")
    result = glactl("train", path, "--device", "cpu", "--quiet")
    assert result.exit_code == 3
    assert re.search(r"error: one/shards/train-00001.tokens (has|is damaged)", result.stderr)
    assert "Traceback" not in result.output


def test_bad_specs_are_one_line(glactl, tiny_data):
    fails(glactl("train", spec(tiny_data)), 2, ".*data of kind shards needs either a path or .*")
    fails(glactl("train", spec(tiny_data, path="no")), 2, "no prepared data at no; make it: .*")
    fails(glactl("train", spec(tiny_data, pth="a")), 2, ".*pth is not a field of .*mean path?.*")
    sources = [{"path": "a", "wieght": 2}]
    message = ".*data.sources.0.wieght is not a field of SourceSpec; did you mean weight.*"
    fails(glactl("train", spec(tiny_data, sources=sources)), 2, message)


def test_bad_options_are_one_line(prepare, glactl, corpus):
    fails(
        glactl("data", "prepare", "--quiet"), 2, "name a SOURCE, or a --preset: fineweb_edu, sl.*"
    )
    fails(prepare("--preset", "slimpajama"), 2, "both a source .* and --preset slimpajama; give .*")
    message = "--preset is 'fineweb'; allowed: fineweb_edu, slimpajama; did you mean fineweb_edu.*"
    fails(glactl("data", "prepare", "--preset", "fineweb"), 2, message)
    fails(prepare("--quiet", "--valid", 1), 2, "valid is 1.0; allowed: a share from 0 to below 1")
    fails(prepare("--quiet", "--valid", "1e-9"), 2, "of 200 documents none is for valid at .*")
    fails(glactl("data", "check", "none"), 2, "no prepared data at none; make it: .*")
    fails(glactl("data", "chek"), 2, "No such command 'chek'. Did you mean 'check'.*")


@pytest.mark.parametrize("preset", data_command.presets())
def test_a_preset_of_the_hub_without_a_network(preset, glactl, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    made = data_command._recipe(None, preset, {"limit": 10})
    assert isinstance(made, Recipe)
    assert made.limit == 10
    message = f"data set {made.source} is no file here, nor on the hub: the hub does not answer.*"
    args = ("data", "prepare", "--preset", preset, "--tokenizer", "byte", "--out", "out")
    fails(glactl(*args, "--quiet"), 3, message)
    fails(glactl(*args[:4], "--quiet"), 3, "tokenizer 'mistralai/Mistral-7B-v0.1' is no file .*")
    assert not Path("out").exists()


def test_a_signal_ends_with_code_6_and_what_is_made_is_kept(prepare, monkeypatch):
    import os
    import signal

    from glactl.tasks import prepare_shard

    real, made = prepare_shard.make, []

    def make(job, *args):
        if len(made) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        made.append(job)
        return real(job, *args)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr("glactl.tasks.prepare.make", make)
        result = prepare("--out", "made", "--quiet")
    assert signal.getsignal(signal.SIGTERM) == before
    assert result.exit_code == 6, result.output
    assert re.fullmatch(
        "stopped; made keeps 2 finished shards, and the same command goes on\n", result.stderr
    )
    again = prepare("--out", "made", "--json", "--quiet")
    assert json.loads(again.stdout)["kept"] == 2
