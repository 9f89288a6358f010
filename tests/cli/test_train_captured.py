"""Steps as CUDA graphs: on a GPU; on a CPU their bookkeeping, with the call itself as a graph."""

import json
from dataclasses import replace

import pytest
import torch

from glactl.models.lm import build_lm
from glactl.run import Run
from glactl.spec import RunSpec
from glactl.train.loop import train

GPU = pytest.param("cuda", marks=pytest.mark.gpu)


class Itself:
    """Stands for a graph: does the call every time."""

    def __init__(self, device, warm=0):
        pass

    def __call__(self, call):
        call()


@pytest.fixture(params=["cpu", GPU])
def device(request, monkeypatch):
    """On a CPU the real questions about a device are left out."""
    if request.param == "cpu":
        monkeypatch.setattr("glactl.train.step.Graph", Itself)
        monkeypatch.setattr(
            "glactl.train.step.capturable",
            lambda spec, *rest: None if spec.train.capture else "train.capture is false",
        )
    elif not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


@pytest.fixture
def data(tiny_data):
    tiny_data["model"]["dropout"] = 0.0
    tiny_data["train"] |= {"precision": "fp32"}
    return tiny_data


def spec_of(data, **options):
    return RunSpec.model_validate(data | {"train": data["train"] | options})


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_captured_steps_are_plain_steps(parts, data, make_toy, device):
    ends = []
    for capture in (False, "auto"):
        spec = spec_of(data, accumulate=parts, capture=capture)
        steps = list(train(spec, device=device, task=make_toy()))
        ends.append([[s.loss, s.grad_norm] for s in steps])
    for found, wanted in zip(ends[1], ends[0], strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_all_graphs_of_a_step_are_captured_in_the_same_step(parts, data, make_toy, monkeypatch):
    """A graph that adds to gradients must add to those of the graph before it."""
    begun = []

    class Counted:
        def __init__(self, device, warm):
            self.left = warm

        def __call__(self, call):
            if self.left == 0:
                begun.append(len(steps))
            self.left -= 1
            call()

    monkeypatch.setattr("glactl.train.step.Graph", Counted)
    monkeypatch.setattr("glactl.train.step.capturable", lambda *_: None)
    spec, steps = spec_of(data, accumulate=parts), []
    for step in train(spec, device="cpu", task=make_toy()):
        steps.append(step)
    assert begun == [2] * (1 if parts == 1 else 3)


def test_a_captured_step_that_is_not_finite_changes_nothing(data, make_toy, device, monkeypatch):
    class Bad(type(make_toy())):
        """Step 4 asks for a token that the model's table gives an infinity for."""

        def train_batch(self, index, batch_size):
            batch = super().train_batch(index, batch_size)
            if index != 3:
                return batch
            tokens = batch.tokens.clone()
            tokens[0, 0] = 13
            return replace(batch, tokens=tokens)

        vocab_size = 14

    def build(*args, **options):
        model = build_lm(*args, **options)
        with torch.no_grad():
            model.embed.weight[13] = torch.inf
        return model

    monkeypatch.setattr("glactl.train.loop.build_lm", build)
    spec = spec_of(data, accumulate=1)
    steps = list(train(spec, device=device, task=Bad()))
    assert [s.step for s in steps if s.skipped] == [4]
    assert steps[-1].loss < steps[0].loss


def test_a_captured_run_is_resumed_without_graphs_and_back(data, make_toy, device, tmp_path):
    run = Run.create(spec_of(data, save_every=2), "", tmp_path)
    modes = ["auto", False, "auto"]
    for resume, capture in enumerate(modes):
        spec = run.spec.model_copy(
            update={"train": run.spec.train.model_copy(update={"capture": capture})}
        )
        going = train(spec, device=device, run=run, resume=bool(resume), task=make_toy())
        [next(going) for _ in range(2)]
        going.close()
    whole = list(train(spec_of(data, capture=False), device=device, task=make_toy()))
    lines = map(json.loads, (run.path / "metrics.jsonl").read_text().splitlines())
    found = [line["loss"] for line in lines]
    assert found == pytest.approx([s.loss for s in whole[:6]], rel=1e-4)


def test_batches_of_another_shape_end_the_capture(data, make_toy, device, tmp_path):
    class Growing(type(make_toy())):
        def train_batch(self, index, batch_size):
            batch = super().train_batch(index, batch_size)
            width = 12 if index < 8 else 10
            return replace(batch, tokens=batch.tokens[:, :width], targets=batch.targets[:, :width])

    ends = []
    for capture in (False, "auto"):
        run = Run.create(spec_of(data, capture=capture), "", tmp_path)
        ends.append([s.loss for s in train(run.spec, device=device, run=run, task=Growing())])
    assert ends[1] == pytest.approx(ends[0], rel=1e-4)
    events = map(json.loads, (run.path / "events.jsonl").read_text().splitlines())
    (told,) = [e for e in events if e["event"] == "capture"]
    assert told["reason"] == "batches of other shapes, [(2, 10)]"


def test_capture_where_there_can_be_none(data, make_toy):
    with pytest.raises(ValueError, match=r"train\.capture is true, but there are no graphs on cpu"):
        next(train(spec_of(data, capture=True), device="cpu", task=make_toy()))
