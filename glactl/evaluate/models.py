"""The models that `glactl eval` measures: a run of ours, or hf:PATH for one of transformers."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glactl.device import Precision, precision_on
from glactl.generate.states import checkpoint_hash
from glactl.run import Run
from glactl.tasks.documents import tokenizer_name
from glactl.tasks.engine import Engine
from glactl.tasks.engine_lm import LMEngine
from glactl.tasks.errors import DataUnavailable, PackageMissing

HF = "hf:"
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "config.json", "tokenizer*", "*.model")


@dataclass(frozen=True)
class Reading:
    """How every model of a command reads.

    batch_tokens: tokens at once, None: as `glactl.tasks.batching.budget` has it. bos: texts begin
    with BOS. max_length: tokens at most, None: what the model holds. reuse: what requests share is
    read once. precision: of weights and products.
    """

    batch_tokens: int | None = None
    bos: bool = False
    max_length: int | None = None
    reuse: bool = True
    precision: Precision = "auto"


@dataclass(frozen=True)
class Model:
    """A model ready to be asked.

    name: as results call it. engine: answers. facts: what results say of it; weights among them,
    the sha256 of what it was read from.
    """

    name: str
    engine: Engine
    facts: dict[str, Any]

    @property
    def key(self) -> str:
        """The hash of all that its answers depend on beside what is asked: 16 hex digits."""
        names = ("weights", "precision", "bos", "max_length", "tokenizer")
        text = repr([self.facts[name] for name in names])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def open_model(name: str | None, device: torch.device, reading: Reading) -> Model:
    """The model called `name`.

    Args:
        name: a run folder; hf:PATH, a folder or a name on the hub; None: the newest run.
        device: where it computes.
        reading: how.

    Raises:
        ValueError: a run that is not about text, or options that it cannot follow.
        FileNotFoundError: no such run, or no weights in it.
        DataUnavailable, PackageMissing: not to be had here.
    """
    if name is not None and name.startswith(HF):
        return _of_transformers(name, device, reading)
    return _of_run(Run.newest() if name is None else Run.open(name), device, reading)


def _of_run(run: Run, device: torch.device, reading: Reading) -> Model:
    checkpoint = run.newest_checkpoint()
    lm, tokenizer, _ = run.load_model(device)
    if tokenizer is None:
        raise ValueError(f"{run.path} has no tokenizer, its data is not text; eval needs text")
    precision = precision_on(device, reading.precision)
    engine = LMEngine(
        lm.bfloat16() if precision == "bf16" else lm,
        tokenizer,
        reading.batch_tokens,
        bos=reading.bos,
        max_length=reading.max_length,
        reuse=reading.reuse,
    )
    step = int(checkpoint.name.removeprefix("step-"))
    parameters = sum(p.numel() for p in lm.parameters())
    facts = {"run": str(run.path), "step": step, "weights": checkpoint_hash(checkpoint)}
    name = f"{run.path.resolve().name}@{step}"
    return Model(name, engine, facts | _facts(engine, reading, precision, parameters))


def _of_transformers(name: str, device: torch.device, reading: Reading) -> Model:
    try:
        import transformers
    except ModuleNotFoundError:
        raise PackageMissing(
            f"{name} needs the package transformers; pip install 'glactl[hf]'"
        ) from None
    from glactl.tasks.engine_hf import HFEngine, own_tokenizer
    from glactl.tasks.hub import reach, reason

    source = name.removeprefix(HF)
    if not Path(source).is_dir():
        reach("model", source)
    precision = precision_on(device, reading.precision)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        tokenizer = own_tokenizer(transformers.AutoTokenizer.from_pretrained(source))
    except (OSError, ValueError, KeyError) as error:
        if Path(source).is_dir():
            raise ValueError(f"{name} is not a model of transformers: {_line(error)}") from None
        raise DataUnavailable(f"{name} is no folder, nor on the hub: {reason(error)}") from None
    engine = HFEngine(
        model.eval().to(device),
        tokenizer,
        reading.batch_tokens,
        bos=reading.bos,
        max_length=reading.max_length,
    )
    commit = getattr(model.config, "_commit_hash", None)
    weights = f"commit {commit}" if commit else _sum(Path(source))
    facts = {
        "run": name,
        "step": None,
        "weights": weights,
        "transformers": transformers.__version__,
    }
    parameters = sum(p.numel() for p in model.parameters())
    label = "-".join(Path(source).resolve().parts[-2:] if Path(source).is_dir() else [source])
    whole = facts | _facts(engine, reading, precision, parameters)
    return Model(label.replace("/", "-"), engine, whole)


def _facts(engine: Engine, reading: Reading, precision: str, parameters: int) -> dict[str, Any]:
    return {
        "parameters": parameters,
        "precision": precision,
        "bos": reading.bos,
        "max_length": engine.max_length,
        "tokenizer": tokenizer_name(engine.tokenizer),
    }


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _sum(folder: Path) -> str:
    """The sha256 of the files that a model is read from."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in WEIGHTS for path in folder.glob(pattern)}):
        with open(path, "rb") as file:
            digest.update(
                f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode()
            )
    return digest.hexdigest()
