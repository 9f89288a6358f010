import math
import os
import signal
from dataclasses import asdict, replace

import pytest
import torch

from glactl.models.lm import build_lm
from glactl.run import Run
from glactl.spec import OptimSpec, RunSpec
from glactl.train.loop import MAX_SKIPPED, Stopped, seeded, train, validate, with_vocab
from glactl.train.optim import learning_rate, make_optimizer

CPU = torch.device("cpu")
SUMS = 4 * 12 * torch.finfo(torch.float32).eps  # a sum over a step's targets, in any order
NOT_THE_SAME = ("seconds", "tokens_per_s", "checkpoint")  # of two runs


def numbers(steps):
    return [{k: v for k, v in asdict(s).items() if k not in NOT_THE_SAME} for s in steps]


def run_in(folder, spec):
    return Run.create(spec, "", folder)


def weights(run, toy):
    spec = with_vocab(run.spec, toy.vocab_size)
    model = build_lm(spec.model, spec.seed)
    found = run.load_model()[0]
    assert set(found.state_dict()) == set(model.state_dict())
    return found.state_dict()


def test_two_runs_print_the_same_numbers_whatever_the_global_generator(tiny_spec, make_toy):
    first = list(train(tiny_spec, device="cpu", task=make_toy()))
    torch.manual_seed(12345)
    torch.rand(7)
    before = torch.get_rng_state()
    second = list(train(tiny_spec, device="cpu", task=make_toy()))
    assert numbers(first) == numbers(second)
    assert torch.equal(before, torch.get_rng_state())
    assert [s.step for s in first] == list(range(1, 9))
    assert [s.step for s in first if s.valid] == [4, 8]


def test_another_seed_gives_other_numbers(tiny_spec, make_toy):
    first = next(train(tiny_spec, device="cpu", task=make_toy()))
    other = next(train(tiny_spec.model_copy(update={"seed": 1}), device="cpu", task=make_toy()))
    assert first.loss != other.loss


def test_it_learns(tiny_data, toy):
    tiny_data["model"]["dropout"] = 0.0
    tiny_data["train"] |= {"steps": 60, "valid_every": 60}
    steps = list(train(RunSpec.model_validate(tiny_data), device="cpu", task=toy))
    assert steps[0].loss == pytest.approx(math.log(13), rel=0.05)  # knows nothing yet
    assert steps[-1].valid["accuracy"] > 0.9
    assert steps[-1].tokens == 60 * 4 * 12


def test_bf16_rounds_products_and_keeps_weights_wide(tiny_data, make_toy, tmp_path):
    ends = {}
    for precision in ("fp32", "bf16", "auto"):
        tiny_data["train"] |= {"precision": precision, "steps": 4, "save_every": 4}
        spec = RunSpec.model_validate(tiny_data)
        run = run_in(tmp_path / precision, spec)
        ends[precision] = list(train(spec, device="cpu", task=make_toy(), run=run))[-1]
        assert {x.dtype for x in weights(run, make_toy()).values()} == {torch.float32}
    assert ends["auto"].valid == ends["fp32"].valid  # of a CPU
    assert ends["bf16"].loss != ends["fp32"].loss
    assert ends["bf16"].loss == pytest.approx(ends["fp32"].loss, rel=4 * 2**-8)


def test_accumulation_changes_no_number(tiny_data, make_toy):
    """The mean is over all targets of a step, so cutting a batch moves rounding only."""
    tiny_data["model"]["dropout"] = 0.0

    class Uneven(type(make_toy())):
        """Rows whose numbers of targets differ: a mean of means would show."""

        def train_batch(self, index, batch_size):
            rows = range(index * batch_size, (index + 1) * batch_size)
            parts = [self._batch(i, 1) for i in rows]  # row i of the run, however they are cut
            targets = torch.cat([p.targets for p in parts])
            for row, i in zip(targets, rows, strict=True):
                row[: i % 4 * 3] = -100
            return replace(parts[0], tokens=torch.cat([p.tokens for p in parts]), targets=targets)

    first = []
    for accumulate in (1, 2, 4):
        tiny_data["train"]["accumulate"] = accumulate
        step = next(train(RunSpec.model_validate(tiny_data), device="cpu", task=Uneven()))
        first.append([step.loss, step.grad_norm])
    assert first[1] == pytest.approx(first[0], rel=SUMS)
    assert first[2] == pytest.approx(first[0], rel=SUMS)


def interrupted(spec, run, task, at, number=signal.SIGINT):
    """The steps of a run that gets a signal after step `at`."""
    running = train(spec, device="cpu", run=run, task=task, signals=True)
    steps = [next(running) for _ in range(at)]
    os.kill(os.getpid(), number)
    with pytest.raises(Stopped) as stopped:
        next(running)
    return steps, stopped.value


@pytest.mark.parametrize(
    ("at", "number"), [(3, signal.SIGINT), (4, signal.SIGTERM), (6, signal.SIGINT)]
)
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(
    at, number, tiny_spec, make_toy, tmp_path
):
    whole_run = run_in(tmp_path / "whole", tiny_spec)
    whole = list(train(tiny_spec, device="cpu", run=whole_run, task=make_toy()))
    run = run_in(tmp_path / "cut", tiny_spec)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    first, stopped = interrupted(tiny_spec, run, make_toy(), at, number)
    assert stopped.step == at
    assert stopped.path == str(run.path / "checkpoints" / f"step-{at:06}")
    assert str(stopped) == (
        f"stopped after step {at}, saved; resume: glactl train --resume {run.path}"
    )
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    torch.rand(5)  # what else the process draws must not matter
    again = Run.open(run.path)
    rest = list(train(again.spec, device="cpu", run=again, resume=True, task=make_toy()))
    assert numbers(first + rest) == numbers(whole)
    ours, theirs = weights(run, make_toy()), weights(whole_run, make_toy())
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


def test_a_signal_between_micro_batches_saves_the_step_before(tiny_spec, make_toy, tmp_path):
    toy = make_toy()
    run = run_in(tmp_path, tiny_spec)
    steps = train(tiny_spec, device="cpu", run=run, task=toy, signals=True)
    next(steps)
    kept = toy.train_batch

    def killing(index, batch_size):
        if (index, batch_size) == (3, 2):  # the second micro-batch of the second step
            os.kill(os.getpid(), signal.SIGTERM)
        return kept(index, batch_size)

    toy.train_batch = killing
    with pytest.raises(Stopped) as stopped:
        next(steps)
    assert stopped.value.step == 1


def test_without_a_run_a_stop_has_no_path(tiny_spec, toy):
    _, stopped = interrupted(tiny_spec, None, toy, 2)
    assert stopped.path is None
    assert str(stopped) == "stopped after step 2"


def test_the_data_is_asked_for_by_position(tiny_spec, make_toy):
    toy = make_toy()
    list(train(tiny_spec, device="cpu", task=toy))
    assert toy.asked == [(i, 2) for i in range(16)]  # 8 steps of 2 micro-batches of 2 rows


def test_training_ends_once_the_accuracy_is_reached(tiny_data, toy, tmp_path):
    tiny_data["train"] |= {"steps": 1000, "valid_every": 10, "stop_accuracy": 0.9}
    spec = RunSpec.model_validate(tiny_data)
    run = run_in(tmp_path, spec)
    last = list(train(spec, device="cpu", run=run, task=toy))[-1]
    assert last.valid["accuracy"] > 0.9
    assert last.step < 1000
    assert last.checkpoint
    with pytest.raises(ValueError, match=rf"{run.path} is finished \(step {last.step}\)"):
        next(train(run.spec, device="cpu", run=run, resume=True, task=toy))


def poison(model, when):
    """Make the gradient of `model` infinite in the steps `when`, counted from 1."""
    count = 0

    def hook(grad):
        nonlocal count
        count += 1
        return grad * math.inf if count in when else grad

    next(p for p in model.parameters() if p.ndim == 1).register_hook(hook)


@pytest.fixture
def poisoned(monkeypatch):
    def poisoned(when):
        def build(*args, **kwargs):
            model = build_lm(*args, **kwargs)
            poison(model, when)
            return model

        monkeypatch.setattr("glactl.train.loop.build_lm", build)

    return poisoned


def test_a_step_that_is_not_finite_is_skipped(tiny_data, make_toy, poisoned, tmp_path):
    tiny_data["train"]["accumulate"] = 1
    spec = RunSpec.model_validate(tiny_data)
    poisoned({2, 3})
    run = run_in(tmp_path, spec)
    steps = list(train(spec, device="cpu", run=run, task=make_toy()))
    assert [s.step for s in steps if s.skipped] == [2, 3]
    assert all(torch.isfinite(w).all() for w in weights(run, make_toy()).values())
    events = (run.path / "events.jsonl").read_text()
    assert '"event": "skip"' in events
    assert "Infinity" not in events + (run.path / "metrics.jsonl").read_text()


def test_too_many_steps_that_are_not_finite_end_the_run(tiny_data, toy, poisoned):
    tiny_data["train"]["accumulate"] = 1
    poisoned({4, 5, 6})
    steps = train(RunSpec.model_validate(tiny_data), device="cpu", task=toy)
    with pytest.raises(FloatingPointError, match="in 3 steps in a row, the last of them step 6"):
        list(steps)
    assert MAX_SKIPPED == 3


def test_a_model_with_too_small_a_vocabulary_is_refused(tiny_data, toy):
    tiny_data["model"]["vocab_size"] = 12
    with pytest.raises(ValueError, match=r"model\.vocab_size 12 is smaller than .* vocabulary 13"):
        next(train(RunSpec.model_validate(tiny_data), device="cpu", task=toy))


def test_validation_counts_targets_and_bytes(tiny_spec, toy):
    """Against the same sums, written out from the logits in fp64."""
    spec = with_vocab(tiny_spec, toy.vocab_size)
    model = build_lm(spec.model, 0).eval()
    loss, correct, count = 0.0, 0, 0
    with torch.no_grad():
        for batch in toy.valid_batches(1):
            logits = model.logits(model(batch.tokens)[0]).double()
            loss -= logits.log_softmax(-1).gather(-1, batch.targets[..., None]).sum().item()
            correct += (logits.argmax(-1) == batch.targets).sum().item()
            count += batch.targets.numel()
    found = validate(model, toy, 1, CPU)
    eps = torch.finfo(torch.float32).eps
    assert found["loss"] == pytest.approx(loss / count, rel=64 * eps)
    assert found["ppl"] == math.exp(found["loss"])
    assert found["accuracy"] == correct / count
    assert found["bpb"] == pytest.approx(found["loss"] / math.log(2), rel=64 * eps)  # 1 byte each


def test_packed_documents_are_one_row_with_bounds(tiny_data, make_toy):
    """Two rows as two documents of one packed row are the same batch."""
    tiny_data["model"]["dropout"] = 0.0

    class Packed(type(make_toy())):
        def _batch(self, seed, rows):
            batch = super()._batch(seed, rows)
            bounds = torch.arange(rows + 1) * 12
            return replace(batch, cu_seqlens=bounds.to(torch.int32))

    spec = RunSpec.model_validate(tiny_data)
    plain = next(train(spec, device="cpu", task=make_toy()))
    packed = next(train(spec, device="cpu", task=Packed()))
    assert packed.loss == pytest.approx(plain.loss, rel=SUMS)
    assert packed.grad_norm == pytest.approx(plain.grad_norm, rel=SUMS)


def test_rates_cosine():
    spec = OptimSpec(lr=1.0, lr_min_ratio=0.1, warmup_steps=4)
    rates = [learning_rate(spec, s, 12) for s in range(12)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[7] == pytest.approx((1.0 + 0.1) / 2)  # half way down
    assert rates[11] == pytest.approx(0.1)
    assert rates[3:] == sorted(rates[3:], reverse=True)


def test_rates_wsd():
    spec = OptimSpec(lr=1.0, lr_min_ratio=0.0, warmup_steps=2, schedule="wsd", decay_fraction=0.5)
    rates = [learning_rate(spec, s, 8) for s in range(8)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 0.75, 0.5, 0.25, 0])


def test_rates_constant_and_a_run_shorter_than_its_warmup():
    spec = OptimSpec(lr=1.0, warmup_steps=0, schedule="constant")
    assert {learning_rate(spec, s, 5) for s in range(5)} == {1.0}
    short = OptimSpec(lr=1.0, warmup_steps=10)
    assert [learning_rate(short, s, 3) for s in range(3)] == pytest.approx([0.1, 0.2, 0.3])


def test_norms_and_biases_do_not_decay(tiny_spec, toy):
    spec = with_vocab(tiny_spec, toy.vocab_size)
    model = build_lm(spec.model, 0)
    decayed, plain = make_optimizer(model, spec.optim).param_groups
    assert decayed["weight_decay"] == spec.optim.weight_decay
    assert plain["weight_decay"] == 0
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert all(p.ndim < 2 for p in plain["params"])
    assert plain["params"]
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_the_gradient_is_clipped_as_a_whole(tiny_data, toy, monkeypatch):
    """All gradients together have the norm asked for; what is reported is the norm before."""
    tiny_data["optim"]["clip"] = 1e-3
    seen = []

    def look(optimizer, args, kwargs):
        grads = [p.grad for g in optimizer.param_groups for p in g["params"]]
        seen.append(torch.cat([g.flatten() for g in grads]).norm().item())

    def make(*args):
        optimizer = make_optimizer(*args)
        optimizer.register_step_pre_hook(look)
        return optimizer

    monkeypatch.setattr("glactl.train.stages.make_optimizer", make)
    step = next(train(RunSpec.model_validate(tiny_data), device="cpu", task=toy))
    assert seen == pytest.approx([1e-3], rel=1e-2)  # torch adds 1e-6 to the norm it divides by
    assert step.grad_norm > 0.1
    tiny_data["optim"]["clip"] = None
    free = next(train(RunSpec.model_validate(tiny_data), device="cpu", task=toy))
    assert free.grad_norm == step.grad_norm == pytest.approx(seen[1], rel=1e-6)


def test_seeds_of_neighbouring_steps_differ():
    def draw(*numbers):
        with seeded(CPU, *numbers):
            return torch.rand(4).tolist()

    drawn = [tuple(draw(a, b, c)) for a in range(3) for b in range(3) for c in range(3)]
    assert len(set(drawn)) == 27
    assert draw(1, 2, 0) == draw(1, 2, 0)
