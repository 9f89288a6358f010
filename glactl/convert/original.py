"""The checkpoint that a run starts from, of another project or of ours, by the names of our model.

Nothing is read but names and shapes until a weight is asked for; each passes alone through memory.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from glactl import checkpoints
from glactl.convert.files import Weights, config, find
from glactl.convert.maps import Origin, Understood, understand
from glactl.models.lm import LM
from glactl.models.lm_spec import LMSpec
from glactl.run import Run

ATTENTION = re.compile(r"(blocks\.\d+\.mixer)\.(q|k|v|out)\.weight")


@dataclass(frozen=True)
class Original:
    """A checkpoint.

    source: as the user wrote it. family: its kind, "run" for ours. spec: of the model in it.
    names: what each weight of ours is called there, "-" for one that is 1 everywhere. read: gives
    the weight of one of our names, fp32. tokenizer: the folder of its tokenizer, None without one.
    notes: what was taken for granted.
    """

    source: str
    family: str
    spec: LMSpec
    names: Mapping[str, str]
    read: Callable[[str], Tensor]
    tokenizer: Path | None
    notes: list[str]


def find_original(source: str, *, download: bool = True) -> Original | None:
    """The checkpoint called `source`.

    Args:
        source: a run folder; a folder with config.json and weights, or a file of weights in one; or
            owner/name on the hub, whose size is told before it is downloaded.
        download: False: what is not here is None.

    Raises:
        ValueError: it is of no known kind, is not whole, or has what no model here has.
        FileNotFoundError, DataUnavailable: as of convert_files.find.
    """
    path = Path(source)
    if (path / "spec.resolved.yaml").exists():
        return _of_run(source, Run.open(path))
    if not download and not path.exists():
        return None
    weights = Weights(find(source))
    found = understand(config(weights.folder), weights.shapes, shapes_of)
    check_repeats(found, weights)
    ours = shapes_of(found.spec)
    return Original(
        source=source,
        family=found.family,
        spec=found.spec,
        names={mine: origin.theirs or "-" for mine, origin in found.origins.items()},
        read=lambda name: take(found.origins[name], weights, ours[name]),
        tokenizer=weights.folder if (weights.folder / "tokenizer.json").is_file() else None,
        notes=found.notes,
    )


def _of_run(source: str, run: Run) -> Original:
    path, ours = run.newest_checkpoint(), shapes_of(run.spec.model)
    checkpoints.verify(path)
    tokenizer = run.path / "tokenizer"
    return Original(
        source=source,
        family="run",
        spec=run.spec.model,
        names={name: name for name in ours},
        read=lambda name: checkpoints.read_weight(path, name, ours[name]),
        tokenizer=tokenizer if tokenizer.is_dir() else None,
        notes=[f"the weights after step {int(path.name[5:])}"],
    )


def shapes_of(spec: LMSpec) -> dict[str, tuple[int, ...]]:
    """The shape of every weight of a model, without making one."""
    with torch.device("meta"):
        return {name: tuple(x.shape) for name, x in LM(spec).state_dict().items()}


def take(origin: Origin, weights: Weights, shape: tuple[int, ...]) -> Tensor:
    """The weight that comes from there, fp32."""
    if origin.theirs is None:
        return torch.ones(shape)
    x = weights.read(origin.theirs)
    if origin.part is not None:
        i, n = origin.part
        x = x.chunk(n)[i]
    return x.to(torch.float32).contiguous()


def check_repeats(found: Understood, weights: Weights) -> None:
    """Raise ValueError where a tensor that must repeat another one does not."""
    for name, other in found.same.items():
        if other is not None and not torch.equal(weights.read(name), weights.read(other)):
            raise ValueError(f"tie_word_embeddings is true, but {name} differs from {other}")
