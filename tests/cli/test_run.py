import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import CheckpointException

from glactl import checkpoints
from glactl.manifest import measured_on
from glactl.run import NoRun, Position, Run
from glactl.spec import load, resolved_yaml
from glactl.tasks import load_task
from glactl.tasks.packing import batch_hash
from glactl.train.loop import train

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def spec(tiny_data, corpus, tmp_path):
    """A tiny spec on a file of text, so that there is a tokenizer."""
    tiny_data["data"] |= {"source": str(corpus)}
    path = tmp_path / "spec.yaml"
    path.write_text(json.dumps(tiny_data))
    return load(path)


@pytest.fixture
def trained(spec, tmp_path):
    run = Run.create(spec, "the user's text\r\n", tmp_path / "runs")
    steps = list(train(spec, device="cpu", run=run))
    return run, steps


def test_what_a_run_folder_holds(trained, spec):
    run, steps = trained
    assert (run.path / "spec.yaml").read_bytes() == b"the user's text\r\n"
    task = load_task(spec.data, spec.seed)
    resolved = load(run.path / "spec.resolved.yaml")
    assert resolved.model.vocab_size == task.vocab_size
    assert resolved.optim == spec.optim
    manifest = run.manifest
    assert manifest["seed"] == spec.seed
    assert manifest["packages"]["torch"] == torch.__version__
    assert manifest["data"]["fingerprint"] == task.fingerprint
    assert len(manifest["data"]["tokenizer"]) == 64
    metrics = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [m["loss"] for m in metrics] == [s.loss for s in steps]
    events = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events] == ["start", "save", "save"]
    found = sorted(p.name for p in (run.path / "checkpoints").iterdir())
    assert found == ["step-000004", "step-000008"]
    position = checkpoints.read_position(run.newest_checkpoint())
    assert position.pop("ahead") == batch_hash([])  # nothing is left to read
    assert position == {
        "seed": 0,
        "n_train": task.n_train,
        "fingerprint": task.fingerprint,
        "step": 8,
        "tokens": 8 * 4 * 12,
        "sample": 32,
        "done": True,
        "epoch": 32 // task.n_train,
    }


def test_the_model_comes_back_with_its_tokenizer(trained):
    run, _ = trained
    model, tokenizer, spec = Run.open(run.path).load_model("cpu")
    assert not model.training
    assert spec == run.spec
    assert tokenizer.decode(tokenizer.encode("red green")) == "red green"
    tokens = torch.tensor([tokenizer.encode("red green")])
    again = run.load_model()[0]
    assert torch.equal(model(tokens)[0], again(tokens)[0])


def test_a_run_is_never_written_into_another(spec, tmp_path):
    runs = [Run.create(spec, "", tmp_path) for _ in range(3)]
    stem = runs[0].path.name
    assert stem.startswith("toy-")
    assert [r.path.name for r in runs] == [stem, f"{stem}-2", f"{stem}-3"]


def test_a_run_that_cannot_be_made_leaves_nothing(spec, tmp_path, monkeypatch):
    def full(spec):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("glactl.run.manifest_of", full)
    with pytest.raises(OSError, match="No space left"):
        Run.create(spec, "", tmp_path / "runs")
    assert list((tmp_path / "runs").iterdir()) == []


def test_newest_is_the_run_that_saved_last(spec, make_toy, tiny_spec, tmp_path):
    with pytest.raises(NoRun, match=f"no run with a checkpoint in {tmp_path}; make one: glactl"):
        Run.newest(tmp_path)
    first, second, _ = (Run.create(tiny_spec, "", tmp_path) for _ in range(3))
    for run in (second, first):
        list(train(tiny_spec, device="cpu", run=run, task=make_toy()))
    assert Run.newest(tmp_path).path == first.path


def test_what_is_not_a_run(trained):
    run, _ = trained
    root = run.path.parent
    with pytest.raises(NoRun, match=f"absent is not a run folder; runs there: {run.path.name}"):
        Run.open(root / "absent")
    with pytest.raises(NoRun, match=r"/nowhere/absent is not a run folder$"):
        Run.open("/nowhere/absent")


def test_a_run_without_a_checkpoint(spec, tmp_path):
    run = Run.create(spec, "", tmp_path / "runs")
    with pytest.raises(NoRun, match="has no checkpoint"):
        run.load_model()
    with pytest.raises(NoRun, match="has no checkpoint"):
        next(train(spec, device="cpu", run=run, resume=True))


def stop_at(run, spec, task, step):
    steps = train(spec, device="cpu", run=run, task=task)
    for _ in range(step):
        next(steps)
    steps.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "made with other settings: seed 0 -> 1"),
        ({"model": {"n_layers": 4}}, "model.n_layers 2 -> 4"),
        ({"optim": {"lr": 0.1}, "train": {"steps": 9}}, "optim.lr 0.01 -> 0.1, train.steps 8 -> 9"),
    ],
)
def test_a_changed_spec_is_not_resumed(change, message, tiny_spec, make_toy, tmp_path):
    run = Run.create(tiny_spec, "", tmp_path)
    stop_at(run, tiny_spec, make_toy(), 4)
    plain = run.spec.model_dump(mode="json")
    for name, value in change.items():
        plain[name] = plain[name] | value if isinstance(value, dict) else value
    other = type(tiny_spec).model_validate(plain)
    with pytest.raises(ValueError, match="cannot be resumed") as error:
        next(train(other, device="cpu", run=run, resume=True, task=make_toy()))
    assert message in str(error.value)


def test_how_often_to_save_may_change(tiny_spec, make_toy, tmp_path):
    run = Run.create(tiny_spec, "", tmp_path)
    stop_at(run, tiny_spec, make_toy(), 4)
    plan = tiny_spec.train.model_copy(update={"save_every": 1, "keep_last": 1})
    other = tiny_spec.model_copy(update={"train": plan})
    steps = list(train(other, device="cpu", run=run, resume=True, task=make_toy()))
    assert [s.step for s in steps] == [5, 6, 7, 8]
    assert [p.name for p in checkpoints.committed(run.path / "checkpoints")] == ["step-000008"]


def test_metrics_of_steps_that_were_lost_are_dropped(tiny_spec, make_toy, tmp_path):
    """As after a kill -9: step 4 is saved, steps 5 and 6 are logged, the log ends mid-line."""
    run = Run.create(tiny_spec, "", tmp_path)
    stop_at(run, tiny_spec, make_toy(), 6)
    with open(run.path / "metrics.jsonl", "a") as f:
        f.write('{"step": 7, "lo')
    steps = list(train(tiny_spec, device="cpu", run=run, resume=True, task=make_toy()))
    assert [s.step for s in steps] == [5, 6, 7, 8]
    metrics = (run.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_changed_data_is_not_resumed(tiny_spec, make_toy, tmp_path):
    run = Run.create(tiny_spec, "", tmp_path)
    stop_at(run, tiny_spec, make_toy(), 4)
    with pytest.raises(ValueError, match="data fingerprint toy -> other"):
        next(train(tiny_spec, device="cpu", run=run, resume=True, task=make_toy(0, "other")))


def test_a_checkpoint_of_other_data_is_refused(tiny_spec, make_toy, tmp_path):
    """Where the manifest was replaced, the checkpoint itself still knows."""
    run = Run.create(tiny_spec, "", tmp_path)
    stop_at(run, tiny_spec, make_toy(), 4)
    manifest = run.manifest
    manifest["data"]["fingerprint"] = "other"
    (run.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="with fingerprint toy, the data now has other"):
        next(train(tiny_spec, device="cpu", run=run, resume=True, task=make_toy(0, "other")))


def test_a_damaged_checkpoint_is_named(trained):
    run, _ = trained
    path = run.newest_checkpoint()
    file = next((path / "model").glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=f"{file} has changed since it was written; delete {path}"):
        run.load_model()
    file.unlink()
    with pytest.raises(ValueError, match=f"{file} is missing; delete {path} to fall back"):
        run.load_model()


def test_a_checkpoint_of_another_model_is_refused(trained):
    run, _ = trained
    plain = run.spec.model_dump(mode="json")
    plain["model"]["d_model"] = 32
    (run.path / "spec.resolved.yaml").write_text(
        resolved_yaml(type(run.spec).model_validate(plain))
    )
    with pytest.raises(ValueError, match="does not hold the weights of this model"):
        Run.open(run.path).load_model()


class Died(BaseException):
    """Stands for the end of the process: nothing in the program catches it."""


def small(value):
    model = torch.nn.Linear(3, 2)
    torch.nn.init.constant_(model.weight, value)
    torch.nn.init.constant_(model.bias, value)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


PHASES = ["_write", "_sha256", "sync", "Path.write_text", "Path.rename", "_sync_folder", "rmtree"]


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_death_at_any_point_of_a_save_loses_nothing_committed(phase, call, tmp_path, monkeypatch):
    checkpoints.save(tmp_path, 1, *small(1.0), {"step": 1}, keep=1)
    owner, name = (checkpoints, phase)
    if phase.startswith("Path."):
        owner, name = Path, phase[5:]
    elif phase == "rmtree":
        owner = checkpoints.shutil
    real, calls = getattr(owner, name), 0

    def dying(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            raise Died
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, dying)
    try:
        checkpoints.save(tmp_path, 2, *small(2.0), {"step": 2}, keep=1)
        died = False
    except (Died, CheckpointException):  # torch wraps what happens inside of its own writer
        died = True
    monkeypatch.undo()
    assert died or call > 1  # every phase happens at least once
    path = checkpoints.committed(tmp_path)[-1]
    model, optimizer = small(0.0)
    position = checkpoints.load(path, model, optimizer)
    assert path.name == f"step-{position['step']:06}"
    assert model.weight.unique().item() == position["step"]
    checkpoints.save(tmp_path, 2, *small(2.0), {"step": 2}, keep=1)  # and the next one works
    checkpoints.load(checkpoints.committed(tmp_path)[-1], model, optimizer)
    assert model.weight.unique().item() == 2.0
    assert [p.name for p in checkpoints.committed(tmp_path)] == ["step-000002"]
    assert not list(tmp_path.glob(".tmp-*"))


def test_kill_9_during_a_save(tmp_path):
    """The same with a process that really dies, between the files and the mark."""
    code = f"""
import os, signal, torch
from glactl import checkpoints
model = torch.nn.Linear(3, 2)
torch.nn.init.ones_(model.weight)
save = lambda step: checkpoints.save(
    __import__("pathlib").Path({str(tmp_path)!r}), step, model,
    torch.optim.AdamW(model.parameters()), {{"step": step}}, keep=1)
save(1)
checkpoints._sha256 = lambda file: os.kill(os.getpid(), signal.SIGKILL)
save(2)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".tmp-")] == [
        ".tmp-step-000002"
    ]
    assert [p.name for p in checkpoints.committed(tmp_path)] == ["step-000001"]
    model, optimizer = small(0.0)
    assert checkpoints.load(checkpoints.committed(tmp_path)[-1], model, optimizer) == {"step": 1}
    assert model.weight.unique().item() == 1.0


def test_the_last_k_are_kept_and_the_sums_can_be_checked(tmp_path):
    for step in (1, 2, 3):
        checkpoints.save(tmp_path, step, *small(1.0), {"step": step}, keep=2)
    assert [p.name for p in checkpoints.committed(tmp_path)] == ["step-000002", "step-000003"]
    again = checkpoints.save(tmp_path, 3, *small(9.0), {"step": 3}, keep=2)  # committed: left alone
    model, optimizer = small(0.0)
    checkpoints.load(again, model, optimizer)
    assert model.weight.unique().item() == 1.0
    if shutil.which("sha256sum"):
        check = ["sha256sum", "--quiet", "-c", "manifest.sha256"]
        assert subprocess.run(check, cwd=again).returncode == 0


def test_epochs_follow_from_the_sample():
    assert Position(seed=0, n_train=40, fingerprint="", sample=79).epoch == 1
    assert Position(seed=0, n_train=40, fingerprint="", sample=80).epoch == 2


def test_where_numbers_were_measured(monkeypatch):
    about = measured_on(torch.device("cpu"))
    assert about["device"].startswith("CPU, ")
    assert about["torch"] == torch.__version__
    monkeypatch.setattr("glactl.manifest._git", lambda: {"commit": "abc", "changed": True})
    assert measured_on(torch.device("cpu"))["commit"] == "abc"
    assert measured_on(torch.device("cpu"), "def")["commit"] == "def"
    monkeypatch.setattr("glactl.manifest._git", lambda: None)
    assert measured_on(torch.device("cpu"))["commit"] is None
