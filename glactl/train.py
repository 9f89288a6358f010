"""The training loop: a generator of steps, with no terminal in it.

One step draws batch number `step` of the task, a pure function of (spec, seed, step), and takes

    loss = sum of the targets' cross-entropies / number of targets                          (1)

over the whole batch, however many micro-batches it is cut into; clips the gradient to norm c,
g <- g min(1, c / |g|); and applies AdamW at the rate of `learning_rate`. Dropout draws from a
generator seeded by (seed, step, micro-batch), so that no random state outlives a step and a
resumed run computes the same numbers, bit for bit, as one that was never stopped.

A run whose spec has `init` begins with the weights of a checkpoint, and with matched layers where
that is asked for, whose loss then stands in the place of (1): see transfer.py, stages.py, match.py.
"""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType

import torch

from glactl.device import Precision, products
from glactl.models.lm import LM, build_lm, token_losses
from glactl.optim import clip, learning_rate
from glactl.run import Position, Run
from glactl.slices import Slices
from glactl.spec import RunSpec, need_vocab
from glactl.stages import Source, Stage, read
from glactl.tasks import Task, load_task

MAX_SKIPPED = 3  # steps in a row whose gradient is not finite before the run is given up


@dataclass(frozen=True)
class Step:
    """What one step did; see RunSpec for the fields' units.

    step counts from 1 to steps; tokens are those read since the start of the run; loss
    (nats a target) and grad_norm (before clipping) are of this step, before its update; seconds
    are since this process began to train. In stage "match" loss is the distance of layers. Step 0
    is the start of a run with `init`, its loss that of validation.
    """

    step: int
    steps: int
    tokens: int
    loss: float
    lr: float
    grad_norm: float
    tokens_per_s: float
    seconds: float
    skipped: bool = False
    valid: dict[str, float] | None = None  # loss, ppl, accuracy and, for text, bpb
    checkpoint: str | None = None  # where the state after this step was saved
    stage: str = "train"


class Stopped(Exception):
    """A signal ended the run after `step`; `path` is the checkpoint, None where nothing is kept."""

    exit_code = 6

    def __init__(self, step: int, path: str | None) -> None:
        message = f"stopped after step {step}"
        if path is not None:  # RUN/checkpoints/step-000123
            message += f", saved; resume: glactl train --resume {Path(path).parents[1]}"
        super().__init__(message)
        self.step, self.path = step, path


def train(
    spec: RunSpec,
    *,
    device: torch.device | str,
    run: Run | None = None,
    resume: bool = False,
    task: Task | None = None,
    signals: bool = False,
) -> Iterator[Step]:
    """Train the model of `spec` on its task.

    Args:
        spec: what to do.
        device: where.
        run: the folder for metrics and checkpoints; None writes nothing.
        resume: continue from the newest checkpoint of `run`.
        task: the data of `spec`, where the caller has it already.
        signals: SIGINT and SIGTERM end the run after the micro-batch at hand, saved.

    Yields:
        Step, once a step; with `valid` every valid_every steps and at the end. Where the spec has
        `init`, first step 0, with the held-out loss before any training.

    Raises:
        ValueError: the model cannot take the data, or the weights of `init`; with `resume`, the
            spec, the data or the tokenizer is not what the checkpoint was made with, or the run is
            finished.
        Stopped: a signal came.
        FloatingPointError: MAX_SKIPPED steps in a row had a loss or gradient that is not finite.
    """
    device = torch.device(device)
    task = load_task(spec.data, spec.seed) if task is None else task
    spec = with_vocab(spec, task.vocab_size)
    model = build_lm(spec.model, spec.seed, device=device)
    source = Source(spec)
    at = Position(seed=spec.seed, n_train=task.n_train, fingerprint=task.fingerprint)
    if run is not None:
        run.begin(spec, task, resume=resume)
    if run is not None and resume:
        source.copied, source.then = run.copied(), run.manifest.get("init")
        stage = source.stage(run.newest_position().step, model)
        at = run.load_checkpoint(model, stage.optimizer, at)
        if at.done:
            raise ValueError(f"{run.path} is finished (step {at.step}); nothing to resume")
    else:
        if spec.init is not None:
            yield _begin(spec, source, model, task, run, at, device)
        stage = source.stage(0, model)
    stop = _StopFlag()
    with stop.listening() if signals else stop.deaf():
        yield from _steps(spec, model, source, stage, task, run, at, stop, device)


def _steps(
    spec: RunSpec,
    model: LM,
    source: Source,
    stage: Stage,
    task: Task,
    run: Run | None,
    at: Position,
    stop: "_StopFlag",
    device: torch.device,
) -> Iterator[Step]:
    plan, start, before, skips = spec.train, time.monotonic(), at.tokens, 0
    while not at.done:
        if stop.wanted:
            path = _save(run, spec, model, stage.optimizer, at)
            if run is not None:
                run.event("stop", step=at.step)
            raise Stopped(at.step, path)
        name, optimizer = stage.name, stage.optimizer
        rate = learning_rate(stage.optim, at.step - stage.first, stage.last - stage.first)
        for group in optimizer.param_groups:
            group["lr"] = rate
        done = _gradient(spec, model, stage, task, at.step, stop, device)
        if done is None:
            continue  # stopped between micro-batches: what is saved is the state before this step
        loss, tokens = done
        norm = clip(stage.module, spec.optim.clip)
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        skips = skips + 1 if skipped else 0
        if skipped and run is not None:
            run.event("skip", step=at.step + 1, loss=loss, grad_norm=norm)
        if not skipped:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        at = replace(
            at,
            step=at.step + 1,
            tokens=at.tokens + tokens,
            sample=at.sample + plan.batch_size,
            done=at.step + 1 == spec.steps,
        )
        if skips == MAX_SKIPPED:
            raise FloatingPointError(
                f"the loss or its gradient was not finite in {skips} steps in a row, the last of "
                f"them step {at.step} (loss {loss}, gradient norm {norm}); a lower optim.lr helps"
            )
        valid = None
        if at.done or at.step % plan.valid_every == 0:
            # the last one is waited for: nothing could be resumed to make up for it
            flag = None if at.done else stop
            rows = plan.batch_size // plan.accumulate
            valid = validate(model, task, rows, device, flag, plan.precision)
            if valid and plan.stop_accuracy and valid["accuracy"] > plan.stop_accuracy:
                at = replace(at, done=True)
        path = None
        if at.step == stage.last and not at.done:  # the next stage begins from weights alone
            stage = source.stage(at.step, model)
            path = None if run is None else str(run.save_weights(model, at))
        elif at.done or at.step % plan.save_every == 0:
            path = _save(run, spec, model, optimizer, at)
        seconds = time.monotonic() - start
        step = Step(
            step=at.step,
            steps=spec.steps,
            tokens=at.tokens,
            loss=loss,
            lr=rate,
            grad_norm=norm,
            tokens_per_s=(at.tokens - before) / seconds,
            seconds=seconds,
            skipped=skipped,
            valid=valid,
            checkpoint=path,
            stage=name,
        )
        if run is not None and (valid or skipped or at.step % plan.log_every == 0):
            run.log(asdict(step))
        yield step


def _begin(
    spec: RunSpec,
    source: Source,
    model: LM,
    task: Task,
    run: Run | None,
    at: Position,
    device: torch.device,
) -> Step:
    """Give `model` the weights to start with; step 0, whose record is left in the run."""
    rows = spec.train.batch_size // spec.train.accumulate
    start = source.begin(model, task.train_batch(0, rows))
    valid = validate(model, task, rows, device, precision=spec.train.precision)
    assert valid is not None
    step = Step(0, spec.steps, 0, valid["loss"], 0.0, 0.0, 0.0, 0.0, valid=valid)
    if run is not None:
        run.record_start(start | {"valid": valid})
        step = replace(step, checkpoint=str(run.save_weights(model, at)))
        run.log(asdict(step))
    return step


def _gradient(
    spec: RunSpec,
    model: LM,
    stage: Stage,
    task: Task,
    step: int,
    stop: "_StopFlag",
    device: torch.device,
) -> tuple[float, int] | None:
    """The stage's loss, its gradient left in the model, and the tokens read; None at a signal.

    The rows of micro-batch m of step s are those that task.train_batch numbers s * accumulate + m.
    """
    n = spec.train.accumulate
    rows = spec.train.batch_size // n
    batches = [task.train_batch(step * n + m, rows) for m in range(n)]
    count = sum(int((b.targets >= 0).sum()) for b in batches)
    model.train()
    total = torch.zeros((), device=device)
    for m, batch in enumerate(batches):
        if stop.wanted:
            return None
        with seeded(device, spec.seed, step, m):
            loss = stage.loss(batch, count, n)  # (1)
            loss.backward()
        total += loss.detach()
    return total.item(), sum(b.tokens.numel() for b in batches)


@torch.no_grad()
def validate(
    model: LM,
    task: Task,
    batch_size: int,
    device: torch.device,
    stop: "_StopFlag | None" = None,
    precision: Precision = "fp32",
) -> dict[str, float] | None:
    """The model on the whole validation split.

    Returns:
        loss in nats a target; ppl = exp(loss); accuracy, the share of targets that are the most
        likely token, in a mixture as in slices.py, with its slices; bpb, bits per byte of the text
        that the targets stand for, where the task counts bytes. None when a signal came meanwhile.
    """
    model.eval()
    loss, correct, count, n_bytes, slices = 0.0, 0, 0, 0, Slices()
    for batch in task.valid_batches(batch_size):
        if stop is not None and stop.wanted:
            return None
        with products(device, precision):
            hidden, targets = read(model, batch, device)
            losses, right = token_losses(model, hidden, targets, correct=True)
        loss += losses.double().sum().item()
        correct += int(right.sum())
        count += len(losses)
        n_bytes += batch.n_bytes or 0
        slices.add(batch, right)
    mean = loss / max(count, 1)
    valid = {"loss": mean, "ppl": math.exp(min(mean, 700.0)), "accuracy": correct / max(count, 1)}
    valid |= slices.numbers()
    if n_bytes:
        valid["bpb"] = loss / math.log(2) / n_bytes
    return valid


def with_vocab(spec: RunSpec, vocab_size: int) -> RunSpec:
    """`spec` with model.vocab_size filled in. Raises ValueError where it is set and too small."""
    if spec.model.vocab_size is not None:
        need_vocab(spec.model.vocab_size, vocab_size)
        return spec
    model = spec.model.model_copy(update={"vocab_size": vocab_size})
    return spec.model_copy(update={"model": model})


def _save(
    run: Run | None,
    spec: RunSpec,
    model: LM,
    optimizer: torch.optim.Optimizer,
    at: Position,
) -> str | None:
    if run is None:
        return None
    return str(run.save_checkpoint(model, optimizer, at, keep=spec.train.keep_last))


@contextmanager
def seeded(device: torch.device, *numbers: int) -> Iterator[None]:
    """torch's generators seeded by `numbers` within, and as they were afterwards."""
    seed = 0
    for n in numbers:  # a polynomial over a prime keeps (seed, step, micro-batch) apart
        seed = (seed * 1_000_003 + n) % (2**61 - 1)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


class _StopFlag:
    """Set by a signal, read by the loop; a second signal acts as if nobody listened."""

    def __init__(self) -> None:
        self.wanted = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note SIGINT and SIGTERM in `wanted` for as long as this lasts."""
        old = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

        def note(number: int, frame: FrameType | None) -> None:
            self.wanted = True
            signal.signal(number, old[signal.Signals(number)])

        for number in old:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    @contextmanager
    def deaf(self) -> Iterator[None]:
        """Leave the signals as they are."""
        yield
