"""A trial's own steps: the plain loop's numbers, whatever stops it; and what is captured."""

import json
import math
from contextlib import nullcontext
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from glactl.spec import RunSpec
from glactl.sweep import trial, trial_steps
from glactl.sweep.grid import make_grid, read_preset
from glactl.sweep.trial import Kept, Record, run_trial
from glactl.sweep.trial_steps import TrialSteps
from glactl.tasks import load_task
from glactl.train import loss as train_loss
from glactl.train import optim
from glactl.train.loop import Stopped, train, with_vocab

ONE = {"vocab_size": 32, "seq_len": 8, "pairs": 2, "n_train": 30, "n_valid": 16}
PARTS = [{"seq_len": 8, "pairs": 1, "rows": 20}, {"seq_len": 16, "pairs": 2, "rows": 13}]
MIXED = {"vocab_size": 32, "train": PARTS, "valid": PARTS}
CASES = {
    "gla": {"mixer": {"kind": "gla", "heads": 2}, "short_conv": 3},
    "gsa": {"mixer": {"kind": "gsa", "heads": 1, "slots": 4}},
    "attention": {"mixer": {"kind": "attention", "heads": 1}, "positions": "learned"},
}


def spec_of(model, data=None, optim=None, **plan):
    fixed = {"d_model": 16, "n_layers": 1, "ffn": "none", "positions": "none", "max_len": 16}
    return RunSpec.model_validate(
        {
            "seed": 5,
            "model": fixed | {"embed_dropout": 0.1, "tie_embeddings": True} | CASES[model],
            "data": {"kind": "mqar"} | (data or ONE),
            "optim": {"warmup_steps": 2, "lr": 1e-2} | (optim or {}),
            "train": {"steps": 12, "batch_size": 6, "valid_every": 5} | plan,
        }
    )


def ran(spec, **options):
    return list(run_trial(spec, device="cpu", task=load_task(spec.data, spec.seed), **options))


SPECS = {
    "gla": spec_of("gla"),
    "gsa, no clipping": spec_of("gsa", optim={"clip": None}),
    "learned positions, dropped after one step": spec_of("attention", stop_accuracy=1e-9),
    "a mixture, some of it packed": spec_of("gla", MIXED),
    "in the order of the list": spec_of("gla", MIXED | {"shuffle": False}),
    "micro-batches": spec_of("attention", accumulate=3),
    "batches of two epochs": spec_of("gsa", ONE | {"n_train": 7}),
    "a batch of many epochs": spec_of("gla", ONE | {"n_train": 2}),
    "bf16": spec_of("gla", precision="bf16"),
}


@pytest.mark.parametrize("name", SPECS)
def test_the_numbers_are_the_plain_loops(name):
    spec = SPECS[name]
    plain, records = list(train(spec, device="cpu")), ran(spec)
    assert [r.loss for r in records] == [s.loss for s in plain]
    valid = [(s.step, s.valid) for s in plain if s.valid]
    assert [step for step, _ in records[-1].curve] == [step for step, _ in valid]
    assert records[-1].valid == valid[-1][1]
    assert [r.done for r in records] == [False] * (len(plain) - 1) + [True]


def test_weights_are_the_plain_loops_too(tmp_path):
    """Of a run with steps that are not finite, which change neither weights nor moments."""
    spec = SPECS["gla"]
    task = load_task(spec.data, spec.seed)
    one, two = (TrialSteps(with_vocab(spec, 32), task, torch.device("cpu")) for _ in range(2))
    for steps, count in ((one, [4, 3]), (two, [1, 1, 5])):
        for n in count:
            steps.take(n)
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(a, b)


def broken_at(monkeypatch, broken):
    """The embeddings' gradient of these steps, counted from 1, is infinite in both loops."""
    inner = optim.clip

    def spoiled():
        taken = 0

        def clip(model, largest):
            nonlocal taken
            taken += 1
            if taken in broken:
                model.embed.weight.grad.fill_(math.inf)
            return inner(model, largest)

        return clip

    monkeypatch.setattr("glactl.train.step.clip", spoiled())
    monkeypatch.setattr(trial_steps, "clip", spoiled())


def test_steps_that_are_not_finite_are_left_out_as_in_the_plain_loop(monkeypatch):
    broken_at(monkeypatch, {2, 3, 7, 8})
    spec = SPECS["gla"]
    plain, records = list(train(spec, device="cpu")), ran(spec)
    assert [s.skipped for s in plain].count(True) == 4
    assert [r.skips for r in records] == [0, 1, 2, 0, 0, 0, 1, 2, 0, 0, 0, 0]
    assert [r.loss for r in records] == [s.loss for s in plain]
    assert records[-1].valid == plain[-1].valid


def test_three_in_a_row_end_it(monkeypatch):
    broken_at(monkeypatch, {4, 5, 6})
    with pytest.raises(FloatingPointError, match="3 steps in a row, the last of them step 6 "):
        ran(SPECS["gla"])


class After:
    """True from the n-th question on."""

    def __init__(self, n):
        self.left = n

    def __call__(self):
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("name", ["gla", "a mixture, some of it packed", "micro-batches"])
@pytest.mark.parametrize("stops", [[0], [1, 4], [5, 0, 6], [3, 100]])
def test_a_trial_that_was_stopped_ends_with_the_same_numbers(name, stops, tmp_path):
    spec, kept = SPECS[name], Kept(tmp_path / "kept", "key")
    whole = ran(spec)
    for n in stops:
        if n > 12:
            records = ran(spec, kept=kept, stop=After(n))
            break
        with pytest.raises(Stopped):
            ran(spec, kept=kept, stop=After(n))
        before = kept.read()
        assert not before.done
    else:
        records = ran(spec, kept=kept)
    assert records[0].step == before.step + 1
    assert records[-1].curve == whole[-1].curve
    assert records[-1].valid == whole[-1].valid
    assert [r.loss for r in records] == [r.loss for r in whole[before.step :]]
    assert records[-1].seconds > before.seconds
    kept.drop()
    assert not (tmp_path / "kept").exists()


def test_a_pause_keeps_the_state_and_the_rest_follows(tmp_path):
    spec, kept = SPECS["gla"], Kept(tmp_path, "key")
    whole = ran(spec)
    first = ran(spec, kept=kept, pause=5)
    assert (first[-1].step, first[-1].done, len(first[-1].curve)) == (5, False, 1)
    assert ran(spec, kept=kept, pause=5) == []
    assert kept.read() == first[-1]
    rest = ran(spec, kept=kept)
    assert rest[-1].curve == whole[-1].curve
    assert ran(spec, kept=Kept(tmp_path, "other"), pause=99)[-1].done


def test_a_record_ahead_of_its_state_is_taken_back(tmp_path):
    """A kill after a validation and before the next save: the steps since are taken again."""
    spec, kept = SPECS["gla"], Kept(tmp_path, "key")
    with pytest.raises(Stopped):
        ran(spec, kept=kept, stop=After(3))
    state = kept.state.read_bytes()
    ran(spec, kept=kept, pause=10)
    kept.state.write_bytes(state)
    assert kept.read().step == 10
    records = ran(spec, kept=kept)
    assert records[0].step == 4
    assert records[-1].curve == ran(spec)[-1].curve


@pytest.mark.parametrize("content", [b"", b"{", b"PK\x03\x04 cut off"])
def test_files_that_cannot_be_read_count_as_none(content, tmp_path):
    spec, kept = SPECS["gla"], Kept(tmp_path, "key")
    ran(spec, kept=kept, pause=5)
    kept.state.write_bytes(content)
    kept.record.write_bytes(content)
    assert kept.read() == Record()
    assert ran(spec, kept=kept)[0].step == 1


def test_states_are_saved_once_in_a_while(tmp_path, monkeypatch):
    spec, kept = SPECS["gla"], Kept(tmp_path, "key")
    monkeypatch.setattr(trial, "SAVE_EVERY", 0.0)
    for record in run_trial(spec, device="cpu", task=load_task(spec.data, 5), kept=kept):
        if not record.done:
            saved = kept.load(torch.device("cpu"))
            assert saved is not None
            assert saved[1].step == json.loads(kept.record.read_text())["step"] == record.step


class FakeGraph:
    """In the place of a CUDA graph: does the call, and remembers how it would have been taken."""

    made = []  # noqa: RUF012

    def __init__(self, device, warm=0):
        self.calls = 0
        FakeGraph.made.append(self)

    def __call__(self, call):
        self.calls += 1
        call()


@pytest.fixture
def captured(monkeypatch):
    """Steps as on a GPU, but for the device; returns how often questions were forbidden."""
    FakeGraph.made, modes = [], []
    monkeypatch.setattr(trial_steps, "Graph", FakeGraph)
    monkeypatch.setattr(trial_steps, "captures", lambda device: True)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    idle = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: idle)
    return modes


@pytest.mark.parametrize(("name", "graphs"), [("gla", 1), ("a mixture, some of it packed", 2)])
def test_a_graph_for_each_segment_takes_the_same_steps(captured, name, graphs):
    spec = SPECS[name]
    plain, records = list(train(spec, device="cpu")), ran(spec)
    assert len(FakeGraph.made) == graphs
    assert captured == ["error", "default"] * graphs
    for record, step in zip(records, plain, strict=True):  # rates of fp32, not fp64
        assert record.loss == pytest.approx(step.loss, rel=1e-5)


@pytest.mark.parametrize(("name", "graphs"), [("gla", 1), ("a mixture, some of it packed", 2)])
def test_layers_of_captured_steps_are_compiled_once_for_every_shape(
    captured, monkeypatch, name, graphs
):
    """With a compiler that gives the traced graph back as it is."""
    traced, compiler = [], torch.compile

    def backend(graph, examples, options):
        traced.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr("glactl.train.loss._compiled_slope", lambda: train_loss._slope)
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: compiler(function, backend=backend, **options)
    )
    spec = SPECS[name]
    spec = spec.model_copy(update={"train": spec.train.model_copy(update={"compile": True})})
    for record, step in zip(ran(spec), train(SPECS[name], device="cpu"), strict=True):
        assert record.loss == pytest.approx(step.loss, rel=1e-4)
    assert len(traced) == graphs  # one layer
    torch._dynamo.reset()


def test_a_step_that_waits_for_the_device_is_never_captured(captured, monkeypatch):
    spec = SPECS["gla"]
    asked = []
    losses = trial_steps.Objective.total

    def asks(*args):
        if captured and captured[-1] == "error":
            asked.append(1)
            raise RuntimeError("called a synchronizing CUDA operation")
        return losses(*args)

    monkeypatch.setattr(trial_steps.Objective, "total", asks)
    plain, records = list(train(spec, device="cpu")), ran(spec)
    assert (len(asked), FakeGraph.made[0].calls) == (1, 2)
    for record, step in zip(records, plain, strict=True):
        assert record.loss == pytest.approx(step.loss, rel=1e-5)


def test_another_error_of_the_second_step_is_the_trials(captured, monkeypatch):
    monkeypatch.setattr(
        trial_steps.Objective,
        "total",
        lambda *_: (_ for _ in ()).throw(RuntimeError("out of paper")),
    )
    with pytest.raises(RuntimeError, match="out of paper"):
        ran(SPECS["gla"])


@pytest.fixture
def engines(monkeypatch):
    """Triton engines that give shapes without a launch, and an autocast that knows no meta."""
    pytest.importorskip("triton")
    for name in ("triton_gla_op", "triton_gsa_op", "triton_scalar_op", "triton_scan_op"):
        module = import_module(f"glactl.kernels.{name}")
        monkeypatch.setattr(module, "_run_forward", module._forward)
        monkeypatch.setattr(module, "_run_backward", module._backward)
    for name in ("gla", "gsa", "scan"):
        module = import_module(f"glactl.kernels.{name}")
        monkeypatch.setattr(module, "pick_backend", lambda *_: "triton")
        if name != "scan":
            monkeypatch.setattr(module, "proven_width", lambda *_: True)
    enabled = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind != "meta" and enabled(kind))
    monkeypatch.setattr(trial_steps, "products", lambda *_: nullcontext())


@pytest.mark.parametrize("mixer", read_preset("gsa")["mixers"])
def test_nothing_in_a_step_asks_for_values(mixer, engines, monkeypatch):
    """On tensors that have none, with the optimizer, which has no kernel for them, left out."""
    (trial,) = make_grid("gsa", mixers=mixer, dims="64", lrs="1e-3").trials
    spec = with_vocab(trial.spec, 8192)
    steps = TrialSteps(spec, load_task(spec.data, spec.seed), torch.device("meta"))
    monkeypatch.setattr(steps.optimizer, "step", lambda: None)
    steps.model.train()
    steps._whole(0)
    assert all(p.grad is not None for p in steps.model.parameters())
    assert steps.optimizer.found_inf.shape == ()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gla", "gsa, no clipping", "a mixture, some of it packed"])
def test_captured_steps_are_those_that_are_not(name):
    spec = with_vocab(SPECS[name], 32)
    task, cuda = load_task(spec.data, spec.seed), torch.device("cuda")
    one, two = (TrialSteps(spec, task, cuda, capture) for capture in (True, False))
    for _ in range(4):
        for a, b in zip(one.take(3)[0], two.take(3)[0], strict=True):
            assert a == pytest.approx(b, rel=1e-3)
    assert one.captured
