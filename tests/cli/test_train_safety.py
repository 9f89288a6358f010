"""What a run tells when something goes wrong, and what it keeps."""

import json
import os
import re

import pytest
import torch

from glactl import checkpoints
from glactl.models.lm import build_lm
from glactl.run import Run
from glactl.spec import RunSpec
from glactl.train.checkpoints_async import Saver
from glactl.train.loop import train
from glactl.train.plan_fit import OutOfMemory, fitted, fitting, memory_of

CPU = torch.device("cpu")


def make(data, folder):
    return Run.create(RunSpec.model_validate(data), "", folder)


def events(run, name):
    lines = (run.path / "events.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["event"] == name]


def names(run):
    return [p.name for p in checkpoints.committed(run.path / "checkpoints")]


def broken(token, row_module):
    """A model whose module gives infinities at every token of this kind."""

    def build(*args, **options):
        model = build_lm(*args, **options)

        def hook(module, inputs, output):
            hit = seen["tokens"] == token
            return output.masked_fill(hit[..., None], torch.inf)

        seen = {}
        model.register_forward_pre_hook(lambda m, x: seen.update(tokens=x[0]))
        model.get_submodule(row_module).register_forward_hook(hook)
        return model

    return build


class Marked:
    """Data of which row 3 of step 2, and no other, has token 12."""

    vocab_size, tokenizer, n_train, fingerprint = 13, None, 40, "marked"

    def train_batch(self, index, batch_size):
        from glactl.tasks import Batch

        rows = torch.arange(index * batch_size, (index + 1) * batch_size)
        tokens = (rows[:, None] + torch.arange(13)) % 12
        tokens[rows == 2 * 4 + 3, 5] = 12
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    def valid_batches(self, batch_size):
        yield self.train_batch(0, 2)

    def floors(self):
        return {}


def test_the_module_and_the_rows_that_are_not_finite_are_named(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr("glactl.train.loop.build_lm", broken(12, "blocks.1.ffn.up"))
    run = make(tiny_data, tmp_path)
    steps = list(train(run.spec, device="cpu", run=run, task=Marked()))
    assert [s.step for s in steps if s.skipped] == [3]
    (skip,) = events(run, "skip")
    assert skip["rows"] == [3]
    assert skip["where"] == (
        "the first output that is not finite is that of blocks.1.ffn.up in rows 3"
    )


def test_a_run_that_is_given_up_says_where(tiny_data, toy, monkeypatch):
    def build(*args, **options):
        model = build_lm(*args, **options)
        model.blocks[0].mixer.out.weight.register_hook(lambda grad: grad * torch.inf)
        return model

    monkeypatch.setattr("glactl.train.loop.build_lm", build)
    place = re.escape("the backward pass ceases to be finite at blocks.0.mixer.out.weight")
    with pytest.raises(FloatingPointError, match=place):
        list(train(RunSpec.model_validate(tiny_data), device="cpu", task=toy))


def test_the_last_k_and_every_m_are_kept(tiny_data, toy, tmp_path):
    tiny_data["train"] |= {"save_every": 1, "keep_last": 2, "keep_every": 3}
    run = make(tiny_data, tmp_path)
    list(train(run.spec, device="cpu", run=run, task=toy))
    assert names(run) == [f"step-{n:06}" for n in (3, 6, 7, 8)]
    assert [e["step"] for e in events(run, "save")] == list(range(1, 9))


def test_a_full_disk_is_named_and_loses_nothing(tiny_data, make_toy, tmp_path, monkeypatch):
    tiny_data["train"] |= {"save_every": 2, "keep_last": 1}
    run = make(tiny_data, tmp_path)
    real, calls = os.fsync, 0

    def full(handle):
        nonlocal calls
        calls += 1
        if len(names(run)) and calls > 20:
            raise OSError(28, os.strerror(28))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device; step-00000. is whole") as error:
        list(train(run.spec, device="cpu", run=run, task=make_toy()))
    assert error.value.exit_code == 3
    monkeypatch.undo()
    assert len(names(run)) == 1
    assert not list((run.path / "checkpoints").glob(".tmp-*"))  # nor is the disk left full
    steps = list(train(run.spec, device="cpu", run=run, resume=True, task=make_toy()))
    whole = list(train(run.spec, device="cpu", task=make_toy()))
    assert [s.loss for s in steps] == [s.loss for s in whole[-len(steps) :]]


def test_a_truncated_checkpoint_is_named(tiny_data, make_toy, tmp_path):
    run = make(tiny_data, tmp_path)
    going = train(run.spec, device="cpu", run=run, task=make_toy())
    [next(going) for _ in range(4)]
    going.close()
    file = next((run.path / "checkpoints" / "step-000004" / "optim").glob("*.distcp"))
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(ValueError, match=f"{file} has changed since it was written; delete"):
        next(train(run.spec, device="cpu", run=run, resume=True, task=make_toy()))


def test_a_save_copies_before_the_next_step_changes_anything(tmp_path, monkeypatch):
    """The thread is held back until the weights are others."""
    model = torch.nn.Linear(3, 2)
    torch.nn.init.ones_(model.weight)
    optimizer = torch.optim.AdamW(model.parameters())
    gate, real = __import__("threading").Event(), checkpoints.commit

    def late(*args):
        gate.wait(30)
        real(*args)

    monkeypatch.setattr(checkpoints, "commit", late)
    told = []
    saver = Saver(tmp_path, 2, told=lambda step, seconds: told.append(step))
    path = saver.save(1, model, optimizer, {"step": 1})
    torch.nn.init.zeros_(model.weight)
    assert not path.exists()
    gate.set()
    saver.wait()
    assert told == [1]
    checkpoints.load(path, model, optimizer)
    assert model.weight.unique().item() == 1


def test_what_goes_wrong_in_a_save_is_raised_at_the_next_word(tmp_path, monkeypatch):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())

    def failing(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoints, "_write", failing)
    saver = Saver(tmp_path, 2)
    saver.save(1, model, optimizer, {"step": 1})
    with pytest.raises(OSError, match=r"step-000001 was not written: Input/output error; there is"):
        saver.wait()
    saver.wait()  # told once


def test_other_data_ahead_is_not_gone_on_with(tiny_data, make_toy, tmp_path):
    """Where fingerprint and sizes are the same, and the rows are not."""
    run = make(tiny_data, tmp_path)
    going = train(run.spec, device="cpu", run=run, task=make_toy())
    [next(going) for _ in range(4)]
    going.close()
    with pytest.raises(ValueError, match=r"the next batches are .*, and were .* when it stopped"):
        next(train(run.spec, device="cpu", run=run, resume=True, task=make_toy(seed=1)))


def test_tokens_of_a_step_make_its_rows(tiny_data, make_toy):
    by_rows = list(train(RunSpec.model_validate(tiny_data), device="cpu", task=make_toy()))
    tiny_data["train"] |= {"batch_tokens": 4 * 12, "batch_size": 7}
    by_tokens = list(train(RunSpec.model_validate(tiny_data), device="cpu", task=make_toy()))
    assert [s.loss for s in by_tokens] == [s.loss for s in by_rows]
    tiny_data["train"]["batch_tokens"] = 50
    with pytest.raises(ValueError, match=r"batch_tokens 50 is not a multiple .* nearest: 48"):
        RunSpec.model_validate(tiny_data)
    tiny_data["train"] |= {"batch_tokens": 36, "accumulate": 2}
    with pytest.raises(ValueError, match=r"accumulate 2 does not divide the 3 rows"):
        RunSpec.model_validate(tiny_data)


@pytest.fixture
def memory(monkeypatch):
    """Sets the bytes of a device."""

    def of(size):
        monkeypatch.setattr("glactl.train.plan_fit.device_memory", lambda device: int(size))

    return of


def test_micro_batches_are_derived_from_memory(tiny_data, memory):
    tiny_data["model"]["vocab_size"] = 300
    tiny_data["train"] |= {"batch_size": 16, "accumulate": "auto"}
    spec = RunSpec.model_validate(tiny_data)
    four = sum(memory_of(spec, 4, CPU).values())
    memory(four / 0.9 + 10)
    assert fitting(spec, CPU) == fitted(spec, CPU).parts == 4  # four rows, and no more, fit
    memory(10 * four)
    assert fitted(spec, CPU).parts == 1
    memory(100)
    assert fitting(spec, CPU) is None
    assert fitted(spec, CPU).parts == 16


def test_a_derived_number_is_kept_with_the_run(tiny_data, toy, tmp_path):
    tiny_data["train"]["accumulate"] = "auto"
    run = make(tiny_data, tmp_path)
    next(train(run.spec, device="cpu", run=run, task=toy))
    assert Run.open(run.path).spec.parts == 1


def test_out_of_memory_says_what_was_largest_and_what_fits(tiny_data, toy, memory, monkeypatch):
    tiny_data["train"] |= {"batch_size": 16, "accumulate": 1}
    tiny_data["model"]["vocab_size"] = 300
    spec = RunSpec.model_validate(tiny_data)

    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("glactl.train.loss.Objective.forward", full)
    memory(sum(memory_of(spec, 4, CPU).values()) / 0.9 + 10)
    told = r"largest are activations, .* of 16 rows; train.accumulate 4 \(of 4 rows\) should fit"
    with pytest.raises(OutOfMemory, match=told):
        next(train(spec, device="cpu", task=toy))
    memory(10)
    with pytest.raises(OutOfMemory, match="a single row does not fit"):
        next(train(spec, device="cpu", task=toy))


def test_memory_of_a_plan_with_recompute_and_of_a_share(tiny_data):
    tiny_data["model"] |= {"vocab_size": 300, "n_layers": 8}
    whole = memory_of(RunSpec.model_validate(tiny_data), 4, CPU)
    tiny_data["train"] |= {"recompute": True, "parallel": "fsdp"}
    less = memory_of(RunSpec.model_validate(tiny_data), 4, CPU, world=2)
    assert less["activations"] < whole["activations"] / 2
    assert less["optimizer"] == pytest.approx(whole["optimizer"] / 2, abs=8)
    assert less["gathered"] == whole["weights"]  # a small part of the memory, so they stay
    assert "gathered" not in whole
