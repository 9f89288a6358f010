"""The spec of a run: what to build, what to train it on, how; and how a spec is read.

A field that a spec leaves out has its default, and the defaults are the preset `default`. A spec
is read from YAML (or a preset), changed by --set, and checked whole before anything starts.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, create_model, model_validator

from glactl.device import Precision
from glactl.models.lm import LMSpec
from glactl.models.spec import Spec
from glactl.spec_errors import explain
from glactl.spec_source import (
    Source,
    SpecError,
    apply_set,
    parse,
    preset_names,
    preset_text,
    read_file,
)
from glactl.tasks import TaskSpec
from glactl.tasks.text import TextSpec

__all__ = ["OptimSpec", "RunSpec", "SpecError", "TrainSpec", "json_schema", "load", "spec_hash"]


class OptimSpec(Spec):
    """AdamW and its learning rate, in steps of the optimizer.

    The rate rises linearly over warmup_steps to lr. Then: cosine falls to lr * lr_min_ratio at the
    last step; wsd stays and falls linearly to it over the last decay_fraction of the steps;
    constant stays. Weights of two or more dimensions decay, norms and biases do not.
    """

    lr: float = Field(3e-3, gt=0)
    lr_min_ratio: float = Field(0.1, ge=0, le=1)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    clip: float | None = Field(1.0, gt=0)  # largest norm of the whole gradient; None: no limit
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = Field(20, ge=0)
    decay_fraction: float = Field(0.2, gt=0, le=1)  # wsd only

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas are {list(self.betas)}; allowed: two numbers from 0 up to 1")
        return self


class TrainSpec(Spec):
    """How long, in what portions, on how many devices, how often to look and to save; in steps.

    batch_tokens gives the size of a step in tokens in the place of batch_size. accumulate auto is
    the least number of micro-batches whose estimated memory fits the device; the run keeps the
    number. keep_last checkpoints stay, and with keep_every those of its multiples.

    precision is that of products: auto is bf16 on a GPU that has it, fp32 elsewhere. Weights, their
    gradients and moments, the residual, norms, gates and states are fp32 in either. loss: how the
    logits are held, see train/loss.py. compile: layers and loss through torch.compile. recompute:
    what is inside of a layer is computed again in the backward pass, not kept. capture: the step as
    a CUDA graph; auto: where its shapes do not change. parallel: how several processes of torchrun
    share a model, see train/distributed.py.
    """

    steps: int = Field(500, ge=1)
    batch_size: int = Field(16, ge=1)  # rows a step
    batch_tokens: int | None = Field(None, ge=1)
    accumulate: Literal["auto"] | Annotated[int, Field(ge=1)] = 1  # micro-batches of a step
    valid_every: int = Field(250, ge=1)
    save_every: int = Field(250, ge=1)
    keep_last: int = Field(2, ge=1)
    keep_every: int | None = Field(None, ge=1)
    log_every: int = Field(1, ge=1)
    precision: Precision = "auto"
    loss: Literal["auto", "whole", "chunked", "liger"] = "auto"
    compile: bool = False
    recompute: bool = False
    capture: Literal["auto"] | bool = "auto"
    parallel: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    stop_accuracy: float | None = Field(None, gt=0, le=1)  # end once validation accuracy passes it

    @model_validator(mode="after")
    def _check(self) -> Self:
        parts = 1 if self.accumulate == "auto" else self.accumulate
        if self.batch_tokens is None and self.batch_size % parts:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of accumulate {parts}"
            )
        return self


class MatchSpec(Spec):
    """The first stage of a transfer: new mixers learn to give what attention gave.

    AdamW as in `optim`, but with this lr, warm-up and number of steps; the rate falls by optim's
    schedule. moves: all parameters of the new mixers, or only those that were not copied.
    """

    steps: int = Field(ge=1)
    lr: float = Field(1e-3, gt=0)
    warmup_steps: int = Field(20, ge=0)
    moves: Literal["mixer", "new"] = "mixer"


class InitSpec(Spec):
    """Start from the weights of a checkpoint.

    from: a folder or file of another project, a name on the hub, or a run folder. map: same takes
    a model of the very same shape; t2r puts other mixers in the place of softmax attention, with
    its projections copied. calibrate: fresh parameters of the new mixers are fitted to the first
    batch of training rows; false: as in any new model.
    """

    map: Literal["same", "t2r"] = "same"
    calibrate: bool = True
    match: MatchSpec | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.match is not None and self.map == "same":
            raise ValueError("match is set, but map same has no new mixers; allowed with map t2r")
        return self

    @property
    def source(self) -> str:
        """The field `from`."""
        return str(getattr(self, "from"))


if not TYPE_CHECKING:  # `from` is a word of Python and cannot be written as a field
    InitSpec = create_model(
        "InitSpec", __base__=InitSpec, __doc__=InitSpec.__doc__, **{"from": (str, ...)}
    )


class RunSpec(Spec):
    """All that a run is made from; a run is a function of it and of nothing else."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")  # of the run folder
    seed: int = Field(0, ge=0)
    model: LMSpec = LMSpec()
    data: TaskSpec = TextSpec()
    optim: OptimSpec = OptimSpec()
    train: TrainSpec = TrainSpec()
    init: InitSpec | None = None

    @property
    def steps(self) -> int:
        """Of the whole run: those that match layers, then those of `train`."""
        match = None if self.init is None else self.init.match
        return self.train.steps + (0 if match is None else match.steps)

    @property
    def rows(self) -> int:
        """Rows of a step."""
        wanted = self.train.batch_tokens
        return self.train.batch_size if wanted is None else wanted // self.data.seq_len

    @property
    def parts(self) -> int:
        """Micro-batches of a step. Raises ValueError where they are still to be derived."""
        if self.train.accumulate == "auto":
            raise ValueError("train.accumulate auto is not a number yet")
        return self.train.accumulate

    @model_validator(mode="after")
    def _check(self) -> Self:
        wanted, length = self.train.batch_tokens, self.data.seq_len
        if wanted is not None and wanted % length:
            raise ValueError(
                f"train.batch_tokens {wanted} is not a multiple of data.seq_len {length}; "
                f"nearest: {max(round(wanted / length), 1) * length}"
            )
        if self.train.accumulate != "auto" and self.rows % self.parts:
            raise ValueError(
                f"train.accumulate {self.parts} does not divide the {self.rows} rows of a step"
            )
        longest = self.model.max_len
        if longest is not None and self.data.seq_len > longest:
            raise ValueError(
                f"data.seq_len {self.data.seq_len} is longer than model.max_len {longest}"
            )
        if self.model.vocab_size is not None and self.data.kind == "mqar":
            need_vocab(self.model.vocab_size, self.data.vocab_size)
        return self


def with_vocab(spec: RunSpec, vocab_size: int) -> RunSpec:
    """`spec` with model.vocab_size filled in. Raises ValueError where it is set and too small."""
    if spec.model.vocab_size is not None:
        need_vocab(spec.model.vocab_size, vocab_size)
        return spec
    model = spec.model.model_copy(update={"vocab_size": vocab_size})
    return spec.model_copy(update={"model": model})


def need_vocab(have: int, need: int) -> None:
    """Raise ValueError where a model has fewer rows of embeddings than its data has tokens."""
    if have < need:
        raise ValueError(f"model.vocab_size {have} is smaller than the data's vocabulary {need}")


def load(
    path: Path | str | None = None, preset: str | None = None, sets: list[str] | None = None
) -> RunSpec:
    """The spec at `path`, or of a preset, with the changes in `sets`; see `read`."""
    return read(path, preset, sets)[1]


def read(
    path: Path | str | None = None,
    preset: str | None = None,
    sets: list[str] | None = None,
    fill: Callable[[Source], None] | None = None,
) -> tuple[str, RunSpec]:
    """The text and the checked spec of a file or a preset.

    Args:
        path: a YAML file. None: the preset.
        preset: the name of a preset, instead of a path; None without a path is "default".
        sets: changes "a.b=value", applied in order.
        fill: adds to what was written before it is checked.

    Returns:
        The YAML as it was written, byte for byte and without the changes, and the spec.

    Raises:
        SpecError: the spec cannot be used; one line with the place, the value, what is allowed.
        FileNotFoundError: no such file.
    """
    if path is not None and preset is not None:
        raise SpecError(f"both a spec ({path}) and --preset {preset}; give one of them")
    text, source = _preset(preset or "default") if path is None else read_file(Path(path))
    for setting in sets or []:
        apply_set(source, setting, RunSpec().model_dump(mode="json"))
    if fill is not None:
        fill(source)
    return text, check(source)


def check(source: Source) -> RunSpec:
    """The spec that `source` describes. Raises SpecError."""
    try:
        return RunSpec.model_validate(source.data)
    except ValidationError as error:
        raise SpecError(explain(error, RunSpec, source)) from None


def presets() -> list[str]:
    """The names of the presets."""
    return preset_names("presets")


def _preset(name: str) -> tuple[str, Source]:
    text = preset_text("presets", name)
    return text, parse(text, f"preset {name}")


def canonical(spec: Spec) -> dict[str, Any]:
    """The fields of `spec` that are not at their default, and the kind of every part shown."""
    fields = type(spec).model_fields
    shown: dict[str, Any] = {}
    for name in fields:
        value = getattr(spec, name)
        if name == "kind" or value != fields[name].get_default(call_default_factory=True):
            shown[name] = _plain(value)
    return shown


def _plain(value: Any) -> Any:
    if isinstance(value, Spec):
        return canonical(value)
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def spec_hash(spec: RunSpec) -> str:
    """The sha256 (64 hex digits) that names what `spec` computes.

    Fields at their default are left out, so that a field added later changes no hash of an older
    spec, and so is the run's name, which changes no result.
    """
    shown = {k: v for k, v in canonical(spec).items() if k != "name"}
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def resolved_yaml(spec: RunSpec) -> str:
    """`spec` as YAML with every default written out; `load` reads it back to an equal spec."""
    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False)


def json_schema() -> dict[str, Any]:
    """The JSON schema of RunSpec, for editors."""
    return RunSpec.model_json_schema()
