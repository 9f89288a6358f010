"""Data as a pure function of (spec, seed). To add a kind of data: its file, and its lines here."""

from typing import Annotated

from pydantic import Field

from glactl.tasks.errors import DataUnavailable
from glactl.tasks.mqar import MQARSpec, MQARTask
from glactl.tasks.packing import batch_hash
from glactl.tasks.sharded import ShardsSpec, ShardsTask
from glactl.tasks.task import Batch, Task
from glactl.tasks.text import TextSpec, TextTask
from glactl.tasks.tokenizer import Tokenizer

__all__ = ["Batch", "DataUnavailable", "Task", "TaskSpec", "batch_hash", "load_task"]

TaskSpec = Annotated[
    TextSpec  # language modelling on text
    | ShardsSpec  # the same on prepared data
    | MQARSpec,  # multi-query associative recall
    Field(discriminator="kind"),
]


def load_task(
    spec: TextSpec | ShardsSpec | MQARSpec, seed: int, tokenizer: Tokenizer | None = None
) -> Task:
    """The data that `spec` describes, read or made from `seed`.

    tokenizer: that of `spec`, where it is not to be had from the place that `spec` names.

    Raises:
        ValueError, FileNotFoundError: the data cannot be used; one line with the file.
        DataUnavailable: a data set or tokenizer of the hub that cannot be reached.
    """
    if isinstance(spec, MQARSpec):
        return MQARTask(spec, seed)
    if isinstance(spec, ShardsSpec):
        return ShardsTask(spec, seed)
    return TextTask(spec, seed, tokenizer)
