"""The training loop: a generator of steps, with no terminal in it.

One step draws batch number `step` of the task, a pure function of (spec, seed, step), and takes

    loss = sum of the targets' cross-entropies / number of targets                          (1)

over the whole batch, however many micro-batches and processes it is cut into; clips the gradient to
norm c, g <- g min(1, c / |g|); and applies AdamW at the rate of `learning_rate` (step.py).
No random state outlives a step, so a resumed run computes the same numbers, bit for bit, as one
that was never stopped; on another number of processes, the same but for the order of sums.

A run whose spec has `init` begins with the weights of a checkpoint, and with matched layers where
that is asked for, whose loss then stands in the place of (1): see transfer.py, stages.py, match.py.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from glactl.device import precision_on
from glactl.models.cost import lm_cost
from glactl.models.lm import build_lm
from glactl.peaks import peak_flops
from glactl.run import Position, Run
from glactl.spec import RunSpec, with_vocab
from glactl.tasks import Task, load_task
from glactl.train.checkpoints_async import Saver
from glactl.train.distributed import ALONE, Group, choose, device_memory, settle, spread
from glactl.train.faults import first_fault, in_words
from glactl.train.feed import Feed, Portion
from glactl.train.layers import quicken
from glactl.train.loss import Objective
from glactl.train.optim import learning_rate
from glactl.train.plan_fit import explained, fitted, state_bytes
from glactl.train.record import Step
from glactl.train.stages import Source
from glactl.train.step import Result, Stepper, seeded
from glactl.train.stop import StopFlag, Stopped
from glactl.train.valid import validate

__all__ = ["MAX_SKIPPED", "Step", "Stopped", "seeded", "train", "validate", "with_vocab"]

MAX_SKIPPED = 3  # steps in a row whose gradient is not finite before the run is given up


def train(
    spec: RunSpec,
    *,
    device: torch.device | str,
    run: Run | None = None,
    resume: bool = False,
    task: Task | None = None,
    signals: bool = False,
    group: Group = ALONE,
) -> Iterator[Step]:
    """Train the model of `spec` on its task.

    Args:
        spec: what to do.
        device: where.
        run: the folder for metrics and checkpoints; None writes nothing.
        resume: continue from the newest checkpoint of `run`.
        task: the data of `spec`, where the caller has it already.
        signals: SIGINT and SIGTERM end the run after the micro-batch at hand, saved; after the step
            where there are several processes, all of which end then.
        group: the processes that train this model, each of which calls this.

    Yields:
        Step, once a step; with `valid` every valid_every steps and at the end. Where the spec has
        `init`, first step 0, with the held-out loss before any training.

    Raises:
        ValueError: the model cannot take the data, or the weights of `init`; with `resume`, the
            spec, the data or the tokenizer is not what the checkpoint was made with, or the run is
            finished; the processes cannot share the rows or the stage.
        Stopped: a signal came.
        FloatingPointError: MAX_SKIPPED steps in a row had a loss or gradient that is not finite.
        OutOfMemory: of the device.
        OSError: a checkpoint could not be written.
    """
    device = torch.device(device)
    task = load_task(spec.data, spec.seed) if task is None else task
    spec = fitted(with_vocab(spec, task.vocab_size), device, group.world)
    loop = _Loop(spec, task, device, run, group)
    stop = loop.stop
    with explained(spec, device, group.world), stop.listening() if signals else stop.deaf():
        try:
            yield from loop.begin(resume)
            yield from loop.steps()
        finally:
            loop.wait()


class _Loop:
    def __init__(
        self, spec: RunSpec, task: Task, device: torch.device, run: Run | None, group: Group
    ) -> None:
        self.spec, self.task, self.device, self.run, self.group = spec, task, device, run, group
        self.stop, self.feed = StopFlag(), Feed(spec, task, group)
        self.mode, self.why = choose(
            spec.train.parallel, group.world, state_bytes(spec), device_memory(device)
        )
        where = torch.device("cpu") if self.mode == "fsdp" else device  # it is spread from there
        self.model = build_lm(spec.model, spec.seed, device=where)
        self.source = Source(spec, self._spread)
        self.at = Position(seed=spec.seed, n_train=task.n_train, fingerprint=task.fingerprint)
        self.saver = self._saver()
        dtype = torch.bfloat16 if precision_on(device, spec.train.precision) == "bf16" else None
        peak = None if dtype is None else peak_flops(device, dtype)
        self.peak = None if peak is None else peak * group.world
        self.flops = lm_cost(spec.model, spec.data.seq_len).flops_token_train

    def begin(self, resume: bool) -> Iterator[Step]:
        """Find the weights and the place to go on from; step 0 of a run with `init`."""
        run, spec = self.run, self.spec
        if spec.init is not None and spec.init.match is not None and self.group.world > 1:
            raise ValueError("init.match is set; layers are matched by one process alone")
        if run is not None:
            run.lead = self.group.lead
            run.begin(spec, self.task, resume=resume)
        if run is not None and resume:
            self.source.copied, self.source.then = run.copied(), run.manifest.get("init")
            self.stage = self.source.stage(run.newest_position().step, self.model)
            self.at = run.load_checkpoint(self.model, self.stage.optimizer, self.at)
            if self.at.done:
                raise ValueError(f"{run.path} is finished (step {self.at.step}); nothing to resume")
            self._same_data(run)
        else:
            if spec.init is not None:
                yield self._start()
            self.stage = self.source.stage(0, self.model)
        self.stepper = self._stepper()

    def steps(self) -> Iterator[Step]:
        """From there to the end."""
        start, before, skips, plan = time.monotonic(), self.at.tokens, 0, self.spec.train
        while not self.at.done:
            if self.saver is not None:
                self.saver.poll()
            if self._stopping():
                self._leave()
            stage, first = self.stage, self.at.step
            rate = learning_rate(stage.optim, first - stage.first, stage.last - stage.first)
            portion = self.feed(first)
            captured = self.stepper.reason is None
            done = self.stepper(portion, rate, partial(self._ahead, first + 1))
            if captured and self.stepper.reason is not None:
                self._event("capture", step=first + 1, reason=self.stepper.reason)
            if done is None:
                continue  # stopped between micro-batches: what is saved is the state before this
            self.at = replace(
                self.at,
                step=first + 1,
                tokens=self.at.tokens + portion.tokens,
                sample=self.at.sample + self.spec.rows,
                done=first + 1 == self.spec.steps,
            )
            skips = 0 if done.finite else skips + 1
            if not done.finite:
                self._skipped(done, portion, skips)
            valid = None
            if self.at.done or self.at.step % plan.valid_every == 0:
                # the last one is waited for: nothing could be resumed to make up for it
                valid = self._validate(wait=self.at.done)
                if valid and plan.stop_accuracy and valid["accuracy"] > plan.stop_accuracy:
                    self.at = replace(self.at, done=True)
            path = self._keep()
            seconds = time.monotonic() - start
            rate_now = (self.at.tokens - before) / seconds
            step = Step(
                step=self.at.step,
                steps=self.spec.steps,
                tokens=self.at.tokens,
                loss=done.loss,
                lr=rate,
                grad_norm=done.norm,
                tokens_per_s=rate_now,
                seconds=seconds,
                skipped=not done.finite,
                valid=valid,
                checkpoint=path,
                stage=stage.name,
                mfu=None if self.peak is None else rate_now * self.flops / self.peak,
                memory=self._memory(),
            )
            if valid or step.skipped or step.step % plan.log_every == 0:
                self._log(step)
            yield step

    def _spread(self, objective: Objective) -> nn.Module:
        """What processes share in the place of an objective; its layers are made fast."""
        train = self.spec.train
        quicken(self.model, train.compile, train.recompute)
        return spread(objective, list(self.model.blocks), self.mode, self.device)

    def wait(self) -> None:
        """Wait until no checkpoint is being written; raises what went wrong."""
        if self.saver is not None:
            self.saver.wait()

    def _saver(self) -> Saver | None:
        plan, run, lead = self.spec.train, self.run, self.group.lead
        if run is None:
            return None
        return Saver(
            run.path / "checkpoints",
            plan.keep_last,
            plan.keep_every,
            lead=lead,
            together=self.group.saver if self.mode == "fsdp" else None,
            told=lambda step, seconds: run.event("save", step=step, seconds=round(seconds, 3)),
        )

    def _stepper(self) -> Stepper:
        return Stepper(
            self.spec,
            self.model,
            self.stage,
            self.device,
            self.group,
            lambda: self.stop.wanted,
        )

    def _same_data(self, run: Run) -> None:
        """Note that the next batches are those that would have come without a stop."""
        now = self.feed.hash(self.at.step)
        if self.at.ahead is not None and self.at.ahead != now:
            raise ValueError(
                f"{run.path} cannot be resumed: the next batches are {now[:12]}, and were "
                f"{self.at.ahead[:12]} when it stopped"
            )
        self._event("resume", step=self.at.step, ahead=now, processes=self.group.world)

    def _stopping(self) -> bool:
        return self.group.any(self.stop.wanted)

    def _leave(self) -> None:
        path = self._save()
        self.wait()
        self._event("stop", step=self.at.step)
        raise Stopped(self.at.step, path)

    def _memory(self) -> int | None:
        gpu = self.device.type == "cuda"
        return torch.cuda.max_memory_allocated(self.device) if gpu else None

    def _ahead(self, step: int) -> None:
        if self.device.type == "cuda":
            self.feed.ahead(step)

    def _skipped(self, done: Result, portion: Portion, skips: int) -> None:
        """Tell what was not finite; too many such steps in a row end the run."""
        fault = {}
        if self.stage.objective is not None and not math.isfinite(done.loss):
            fault = first_fault(
                self.spec, self.model, self.stage.objective, portion, self.device, self.group
            )
        told = in_words(fault, done.bad)
        rows = fault.get("rows")
        self._event(
            "skip", step=self.at.step, loss=done.loss, grad_norm=done.norm, where=told, rows=rows
        )
        if skips == MAX_SKIPPED:
            raise FloatingPointError(
                f"the loss or its gradient was not finite in {skips} steps in a row, the last of "
                f"them step {self.at.step} (loss {done.loss}, gradient norm {done.norm}): {told}; "
                "a lower optim.lr helps"
            )

    def _validate(self, wait: bool) -> dict[str, float] | None:
        return validate(
            self.model,
            self.task,
            self.feed.micro,
            self.device,
            (lambda: False) if wait else self._stopping,
            self.spec.train.precision,
            self.stage.objective,
            self.group,
        )

    def _keep(self) -> str | None:
        """Save where the step is one to be saved, and go over to the next stage."""
        if self.at.step == self.stage.last and not self.at.done:
            # the next stage begins from weights alone
            self.stage = self.source.stage(self.at.step, self.model)
            self.stepper = self._stepper()
            self.wait()  # of two saves at once, one clears away the other
            return None if self.run is None else str(self.run.save_weights(self.model, self.at))
        if self.at.done or self.at.step % self.spec.train.save_every == 0:
            path = self._save()
            if self.at.done:
                self.wait()
            return path
        return None

    def _save(self) -> str | None:
        if self.saver is None:
            return None
        if self.stage.objective is not None:
            settle(self.stage.objective)
        self.at = replace(self.at, ahead=self.feed.hash(self.at.step))
        position = asdict(self.at) | {"epoch": self.at.epoch}
        return str(self.saver.save(self.at.step, self.model, self.stage.optimizer, position))

    def _start(self) -> Step:
        """Give the model the weights to start with; step 0, whose record is left in the run."""
        start = self.source.begin(self.model, self.task.train_batch(0, self.feed.micro))
        valid = validate(
            self.model,
            self.task,
            self.feed.micro,
            self.model.device,
            precision=self.spec.train.precision,
        )
        assert valid is not None
        step = Step(0, self.spec.steps, 0, valid["loss"], 0.0, 0.0, 0.0, 0.0, valid=valid)
        if self.run is not None and self.group.lead:
            self.run.record_start(start | {"valid": valid})
            path = self.run.save_weights(self.model, self.at)
            step = replace(step, checkpoint=str(path))
            self._log(step)
        return step

    def _event(self, name: str, **details: Any) -> None:
        if self.run is not None:
            self.run.event(name, **details)

    def _log(self, step: Step) -> None:
        if self.run is not None:
            self.run.log(asdict(step))
