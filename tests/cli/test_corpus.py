"""The specs of the runs on a corpus, and benchmarks/corpus.py, which trains and collects them."""

import argparse
import fcntl
import importlib.util
import json
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import pytest

from glactl.models.cost import lm_cost
from glactl.run import Run
from glactl.spec import load
from glactl.tasks.floors import floors
from glactl.tasks.prepare import prepare
from glactl.tasks.prepare_shard import Recipe

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "corpus.py"
MIXERS = ("gla", "gsa", "retnet", "attention")
TINY = (
    *("model.d_model=16", "model.n_layers=1", "model.ffn_hidden=16", "model.mixer.heads=2"),
    *("train.steps=200", "train.batch_tokens=128", "train.valid_every=100", "train.save_every=2"),
    *("train.precision=fp32", "train.compile=false", "data.seq_len=32"),
)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("corpus", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["corpus"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A prepared corpus, with a quarter of its texts held out."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = [f"The {n}th address speaks of {n * n} things. " * 20 for n in range(40)]
    source = folder / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    list(prepare(Recipe(str(source), valid=0.25), folder / "data", 1))
    return folder / "data"


def test_specs_differ_in_the_mixer_alone():
    first = load(ROOT / "specs" / "corpus_gla.yaml")
    for mixer in MIXERS:
        spec = load(ROOT / "specs" / f"corpus_{mixer}.yaml")
        assert spec.model.mixers[0].kind == mixer
        other = {"mixer": first.model.mixer, "ffn_hidden": first.model.ffn_hidden}
        model = spec.model.model_copy(update=other)
        assert spec.model_copy(update={"name": first.name, "model": model}) == first


def test_specs_have_about_85_million_parameters():
    specs = [load(ROOT / "specs" / f"corpus_{mixer}.yaml") for mixer in MIXERS]
    params = [lm_cost(spec.model, spec.data.seq_len).params for spec in specs]
    assert all(85e6 < n < 87e6 for n in params)


def test_heads_are_those_of_the_340m_models():
    """In width: K and V of GLA and RetNet, the slots too of GSA; retnet's paper has K = 256."""
    for mixer, K in (("gla", 128), ("gsa", 256), ("retnet", 256), ("attention", 64)):
        model = load(ROOT / "specs" / f"corpus_{mixer}.yaml").model
        paper = load(ROOT / "specs" / f"{mixer}_340m.yaml").model
        assert model.d_model * paper.mixer.heads == paper.d_model * model.mixer.heads
        share = getattr(model.mixer, "expand_k", 1.0)
        assert share * model.d_model / model.mixer.heads == K
        same = {"heads": paper.mixer.heads}
        assert model.mixer.model_copy(update=same) == paper.mixer


def written(root, name, sets, data="d" * 64, losses=(4.0, 2.0, 3.0, 1.0), bpb=(3.0, 2.0)):
    """The folder of a run of four steps, resumed after the second and validated at both halves.

    Steps take 1 s, but for those with a compilation or a validation, and read 100 tokens.
    """
    own = [f"name={name}", "train.steps=4", "data.path=absent", *TINY[:4], *sets]
    spec = load(ROOT / "specs" / "corpus_gla.yaml", sets=own)
    run = Run.create(spec, "", root)
    manifest = run.manifest | {"data": {"fingerprint": data}}
    (run.path / "manifest.json").write_text(json.dumps(manifest))
    seconds = (11.0, 13.0, 21.0, 22.0)  # the second process begins anew after step 2
    for i, loss in enumerate(losses):
        valid = {"bpb": bpb[i // 2], "loss": 1.0} if i % 2 else None
        run.log(
            {"step": i + 1, "steps": 4, "tokens": 100 * (i + 1), "loss": loss, "valid": valid}
            | {"seconds": seconds[i], "skipped": loss == 3.0, "memory": 2**30 * i}
            | {"mfu": 0.2, "tokens_per_s": 50.0}
        )
    run.event("resume", step=2)
    return run.path


def test_a_run_is_collected(script, tmp_path):
    path = written(tmp_path, "one", ["optim.lr=2e-3", "seed=3"])
    found = script.record(path)
    assert (found["mixer"], found["lr"], found["seed"]) == ("gla", 2e-3, 3)
    assert found["seconds"] == 13 + 22  # of both processes
    assert found["first_s"] == 11
    assert found["tokens_per_s"] == 75  # the median of 100 tokens in 2 s and in 1 s
    assert found["mfu"] == pytest.approx(0.2 / 50 * 75)
    assert found["peak_gib"] == 3
    assert (found["skipped"], found["resumed"], found["bpb"]) == (1, 1, 2.0)
    assert found["curve"] == [
        {"tokens": 200, "bpb": 3.0, "loss": 3.0},
        {"tokens": 400, "bpb": 2.0, "loss": 1.0},  # the step that was skipped does not count
    ]


def test_what_has_not_ended_is_left_out(script, tmp_path, capsys):
    (tmp_path / "machine.json").write_text('{"device": "x", "commit": null}')
    written(tmp_path, "whole", [])
    begun = written(tmp_path, "begun", ["seed=1"])
    lines = (begun / "metrics.jsonl").read_text().splitlines(keepends=True)
    (begun / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    found = script.collect(tmp_path)
    assert [run["seed"] for run in found["runs"]] == [0]
    assert found["device"] == "x"
    assert f"{begun} has not ended" in capsys.readouterr().err


def test_runs_on_other_data_are_not_put_side_by_side(script, tmp_path):
    (tmp_path / "machine.json").write_text("{}")
    written(tmp_path, "one", [])
    written(tmp_path, "two", ["seed=1"], data="e" * 64)
    with pytest.raises(SystemExit, match="differ in data"):
        script.collect(tmp_path)
    with pytest.raises(SystemExit, match="has ended"):
        script.collect(tmp_path / "empty")


def test_the_best_rate_is_that_of_the_mean_over_seeds(script, tmp_path):
    (tmp_path / "machine.json").write_text("{}")
    for lr, ends in ((1e-3, (1.0, 2.0)), (2e-3, (1.4, 1.4))):
        for seed, end in enumerate(ends):
            written(tmp_path, "one", [f"seed={seed}", f"optim.lr={lr}"], bpb=(3.0, end))
    found = script.collect(tmp_path)
    row = script.table(found).splitlines()[2].split(" | ")
    assert row[2:5] == ["1.400", "0.002", "0.001: 1.500"]


def test_runs_of_two_machines_are_not_mixed(script, tmp_path):
    args = argparse.Namespace(out=tmp_path, commit="a", gpus=1)
    assert len(script.devices_of(args)) == 1
    script.devices_of(args)
    args.commit = "b"
    with pytest.raises(SystemExit, match="use another --out"):
        script.devices_of(args)


def job(script, out, *sets):
    (out / "logs").mkdir()
    return script.Job("one", ROOT / "specs" / "corpus_gla.yaml", ("name=one", *sets), out)


def saved(path):
    (path / "checkpoints" / "step-2").mkdir()
    (path / "checkpoints" / "step-2" / "COMMITTED").touch()


def test_a_run_begins_or_goes_on_where_its_folder_is(script, tmp_path):
    wanted = job(script, tmp_path, "data.path=absent", "train.steps=4", *TINY[:4], "seed=1")
    saved(written(tmp_path, "one", []))  # of another seed
    assert "--resume" not in wanted.command
    path = written(tmp_path, "one", ["seed=1"])
    assert "--resume" not in wanted.command  # there is no checkpoint to go on from
    saved(path)
    assert wanted.command[-2:] == [str(path), "--resume"]


def test_a_run_that_fails_is_told(script, tmp_path, capsys):
    assert script.train([job(script, tmp_path, "data.path=absent")], [""]) == 1
    assert "exit code 2: error: no prepared data at absent" in capsys.readouterr().out


def test_a_run_is_trained_by_one_process(script, tmp_path):
    wanted = job(script, tmp_path)
    with wanted.log.open("ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match="another process"):
            script.start(wanted, "")


def test_floors_are_those_of_the_text(script, corpus):
    rows = (corpus.parent / "texts.jsonl").read_text().splitlines()
    texts = [json.loads(row)["text"].encode() + b"\0" for row in rows]
    held = [t for t in texts if sha256(t[:-1]).digest()[0] < 64]
    train = [t for t in texts if t not in held]
    assert held
    expected = floors(b"".join(train), b"".join(held))
    assert script.floors_of(corpus) == {name: round(x, 4) for name, x in expected.items()}
    assert script.floors_of(corpus / "absent") == {}


@pytest.mark.slow
def test_a_sweep_is_broken_off_and_goes_on(corpus, tmp_path):
    call = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "runs"), "--data", str(corpus)]
    call += ["--mixers", "gla,attention", "--lrs", "8e-3"]
    call += [part for change in TINY for part in ("--set", change)]
    call += ["--write", str(tmp_path / "all.json"), "--plot", str(tmp_path / "all.svg")]
    first = subprocess.Popen(call, cwd=ROOT)
    while not list(tmp_path.glob("runs/attention*/checkpoints/step-*/COMMITTED")):
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 6
    assert not (tmp_path / "all.json").exists()
    begun = {p.name for p in tmp_path.glob("runs/*-lr*")}
    assert len(begun) == 2

    again = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "2 runs, 1 of them have ended" in again.stdout
    assert begun == {p.name for p in tmp_path.glob("runs/*-lr*")}  # none was begun twice
    found = json.loads((tmp_path / "all.json").read_text())
    assert [(r["mixer"], r["resumed"]) for r in found["runs"]] == [("attention", 1), ("gla", 0)]
    assert all([p["tokens"] for p in r["curve"]] == [12800, 25600] for r in found["runs"])
    assert "attention, 0.008" in (tmp_path / "all.svg").read_text()

    third = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "2 runs, 2 of them have ended" in third.stdout
    assert json.loads((tmp_path / "all.json").read_text()) == found
