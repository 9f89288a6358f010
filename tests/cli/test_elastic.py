"""Runs of two processes (gloo), and runs that change the number of their processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from glactl import checkpoints
from glactl.run import Run
from glactl.spec import RunSpec
from glactl.train import distributed
from glactl.train.distributed import choose, parts_of
from glactl.train.loop import train

HERE = Path(__file__).parent
EPS = torch.finfo(torch.float32).eps
ROWS = 4 * 12  # tokens of a step, over which losses are summed in another order


@pytest.fixture
def data(tiny_data, corpus):
    """A tiny spec on a file of text, whose rows do not depend on how a batch is cut."""
    tiny_data["data"]["source"] = str(corpus)
    tiny_data["train"] |= {"steps": 6, "valid_every": 3, "save_every": 2, "keep_last": 9}
    return tiny_data


def make(data, folder, parallel="auto"):
    data["train"]["parallel"] = parallel
    return Run.create(RunSpec.model_validate(data), "", folder)


def alone(run, steps, resume=False):
    going = train(run.spec, device="cpu", run=run, resume=resume)
    for _ in range(steps):
        next(going)
    going.close()


def together(run, steps, fault=""):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(HERE / "elastic.py"), str(run.path), str(steps), fault or "none"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def lines(run, name):
    return [json.loads(line) for line in (run.path / f"{name}.jsonl").read_text().splitlines()]


def numbers(run):
    return [[row["loss"], row["grad_norm"]] for row in lines(run, "metrics")]


def close(found, wanted):
    """Sums in another order, carried on by up to six updates of AdamW.

    One update moves a weight by lr g / (sqrt(v) + eps), which passes on the relative error of g;
    where g is 0 but for rounding that is an error of up to lr, and few weights are.
    """
    assert len(found) == len(wanted) == 6
    assert found[0] == pytest.approx(wanted[0], rel=ROWS * EPS)
    for a, b in zip(found, wanted, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def hashes(run):
    """What a run noted of the batches that come, at each of its checkpoints."""
    found = checkpoints.committed(run.path / "checkpoints")
    return {p.name: checkpoints.read_position(p)["ahead"] for p in found}


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_one_process_then_two_then_one(parallel, data, tmp_path):
    whole = make(data, tmp_path / "whole")
    alone(whole, 6)
    run = make(data, tmp_path / "parts", parallel)
    alone(run, 2)
    together(run, 2)
    alone(run, 2, resume=True)
    assert hashes(run) == hashes(whole)  # the same global batches
    assert len(set(hashes(run).values())) == 3
    close(numbers(run), numbers(whole))
    ours, theirs = (Run.open(r.path).load_model()[0].state_dict() for r in (run, whole))
    worst = max((ours[n] - theirs[n]).abs().max().item() for n in theirs)
    assert worst < 2 * 1e-2  # two steps of lr, as where a gradient is 0 but for rounding
    assert [e["processes"] for e in lines(run, "events") if e["event"] == "resume"] == [2, 1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "recompute", "weights"),
    [("ddp", False, ""), ("fsdp", False, ""), ("fsdp", True, "again"), ("fsdp", True, "")],
)
def test_two_processes_from_the_beginning(parallel, recompute, weights, data, tmp_path):
    """Dropout too: a micro-batch draws the same in whichever process it is. Layers that fsdp
    gathers together, once or again for the backward pass, may be computed again one by one."""
    data["train"] |= {"recompute": recompute}
    whole, run = make(data, tmp_path / "whole"), make(data, tmp_path / "two", parallel)
    alone(whole, 6)
    together(run, 6, weights)
    close(numbers(run), numbers(whole))
    found, wanted = ([r["valid"] for r in lines(x, "metrics") if r["valid"]] for x in (run, whole))
    for a, b in zip(found, wanted, strict=True):
        assert a == pytest.approx(b, rel=1e-3)


def test_small_layers_are_gathered_together(monkeypatch):
    monkeypatch.setattr(distributed, "UNIT", 10)
    layers = [nn.Linear(n, 1, bias=False) for n in (4, 5, 1, 12, 3, 3)]
    found = [[layer.in_features for layer in unit] for unit in distributed._units(layers)]
    assert found == [[4, 5, 1], [12], [3, 3]]


@pytest.mark.slow
def test_what_is_not_finite_in_one_process_is_skipped_by_both(data, tmp_path):
    run = make(data, tmp_path, "ddp")
    together(run, 4, "poison")
    assert [row["skipped"] for row in lines(run, "metrics")] == [False, True, False, True]
    skips = [e for e in lines(run, "events") if e["event"] == "skip"]
    assert all("blocks.1" in e["where"] for e in skips)
    model = Run.open(run.path).load_model()[0]
    assert all(w.isfinite().all() for w in model.state_dict().values())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_saves_once(number, data, tmp_path):
    """As Ctrl-C in a terminal, and as a scheduler's word to torchrun alone."""
    (tmp_path / "spec.yaml").write_text(json.dumps(data | {"name": "cut"}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "glactl.cli", "train", "spec.yaml", "--steps", "100000", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    end = time.monotonic() + 60
    while not list(tmp_path.glob("runs/*/checkpoints/step-*")) and time.monotonic() < end:
        time.sleep(0.05)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert told.count("stopped after step ") == 1, told[-3000:]
    (run,) = map(Run.open, tmp_path.glob("runs/*"))
    (stop,) = [e for e in lines(run, "events") if e["event"] == "stop"]
    assert run.newest_position().step == stop["step"]


@pytest.mark.parametrize(
    ("rows", "wanted", "world", "parts"), [(4, 1, 2, 2), (4, 4, 2, 4), (12, 3, 2, 4), (6, 1, 1, 1)]
)
def test_micro_batches_are_as_many_as_processes_share(rows, wanted, world, parts):
    assert parts_of(rows, wanted, world) == parts


def test_rows_that_cannot_be_shared():
    with pytest.raises(ValueError, match=r"6 rows cannot be shared by 4 .*batch_size: 8"):
        parts_of(6, 1, 4)


def test_how_processes_share_a_model():
    GB = 10**9
    assert choose("auto", 1, 100 * GB, 80 * GB)[0] == "none"
    assert choose("auto", 2, 16 * 1.3 * GB, 80 * GB)[0] == "ddp"
    assert choose("auto", 2, 16 * 2.7 * GB, 80 * GB)[0] == "fsdp"
    assert choose("auto", 2, 16 * 1.3 * GB, 40 * GB)[0] == "fsdp"
    assert choose("fsdp", 2, 1 * GB, 80 * GB)[0] == "fsdp"
    with pytest.raises(ValueError, match=r"parallel is none, and there are 2 processes"):
        choose("none", 2, 1 * GB, 80 * GB)


def test_a_plan_of_two_processes(data):
    from glactl.train.plan import plan_lines, plan_numbers

    spec = RunSpec.model_validate(data)
    one, two = (plan_numbers(spec, 1e9, world=n) for n in (1, 2))
    assert (one["parallel"], two["parallel"]) == ("none", "ddp")
    assert two["hours"] == one["hours"] / 2
    assert two["tokens_step"] == one["tokens_step"]
    (line,) = [row for row in plan_lines(spec, two) if "parallel" in row]
    assert "ddp on 2: " in line
