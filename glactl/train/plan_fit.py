"""What of a run fits the memory of a device, before it starts and after it did not.

Of W processes with fsdp each holds 1 / W of weights, gradients and moments, and the weights that it
has gathered; with ddp all of them.
Activations are those of one micro-batch, as plan_memory.py counts them: with recompute the inputs
of all layers and what is inside of one; with the loss in chunks, two chunks of logits, not all.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from glactl.console import exit_code
from glactl.models.cost import lm_cost
from glactl.spec import RunSpec
from glactl.train.distributed import UNIT, choose, device_memory, stays
from glactl.train.loss import LARGEST
from glactl.train.plan_memory import activation_bytes

FP32 = 4  # bytes; weights, gradients and both moments of AdamW
ROOM = 0.9  # of a device's memory; the rest goes to buffers, libraries and gaps


class OutOfMemory(RuntimeError):
    """Memory ran out; the message says what was largest and what fits."""

    exit_code = 4


def state_bytes(spec: RunSpec) -> int:
    """Weights, gradients and both moments of AdamW, in fp32; model.vocab_size is set."""
    return 4 * FP32 * lm_cost(spec.model, spec.data.seq_len).params


def memory_of(spec: RunSpec, rows: int, device: torch.device, world: int = 1) -> dict[str, int]:
    """Bytes of a device, by what they are for, with micro-batches of so many rows."""
    memory, whole = device_memory(device), state_bytes(spec) // 4
    mode = choose(spec.train.parallel, world, 4 * whole, memory)[0]
    weights = whole // world if mode == "fsdp" else whole
    found = {
        "weights": weights,
        "gradients": weights,
        "optimizer": 2 * weights,
        "activations": micro_bytes(spec, rows),
    }
    if mode == "fsdp":  # whole weights of all layers, or of those at work and the next ones
        found["gathered"] = whole if stays(whole, memory) else min(whole, 2 * FP32 * UNIT)
    return found


def micro_bytes(spec: RunSpec, rows: int) -> int:
    """Activations and logits of a micro-batch of so many rows; an estimate from above."""
    tokens, model, plan = rows * spec.data.seq_len, spec.model, spec.train
    logits = FP32 * model.vocab * tokens
    if plan.recompute:
        cycle = len(model.mixer) if isinstance(model.mixer, list) else 1
        inside = activation_bytes(model.model_copy(update={"n_layers": cycle}), tokens)
        kept = inside + FP32 * model.d_model * tokens * model.n_layers
    else:
        kept = activation_bytes(model, tokens)
    chunked = plan.loss in ("chunked", "liger") or (
        plan.loss == "auto" and model.vocab * tokens > LARGEST
    )
    if chunked:
        kept -= logits - min(logits, 2 * FP32 * LARGEST)
    return kept


def fitting(spec: RunSpec, device: torch.device, world: int = 1) -> int | None:
    """The least number of micro-batches whose memory fits; None where a single row does not."""
    memory = ROOM * device_memory(device)
    for parts in range(1, spec.rows + 1):
        fits = spec.rows % parts == 0 and parts % world == 0
        if fits and sum(memory_of(spec, spec.rows // parts, device, world).values()) <= memory:
            return parts
    return None


def fitted(spec: RunSpec, device: torch.device, world: int = 1) -> RunSpec:
    """`spec` with a number in the place of accumulate auto; of single rows where nothing fits."""
    if spec.train.accumulate != "auto":
        return spec
    parts = fitting(spec, device, world) or spec.rows
    plan = spec.train.model_copy(update={"accumulate": parts})
    return spec.model_copy(update={"train": plan})


@contextmanager
def explained(spec: RunSpec, device: torch.device, world: int = 1) -> Iterator[None]:
    """Within, an error of memory becomes OutOfMemory, which says what was largest and what fits."""
    try:
        yield
    except Exception as error:
        if exit_code(error) != 4 or isinstance(error, OutOfMemory):
            raise
        raise OutOfMemory(_told(spec, device, world)) from error


def _told(spec: RunSpec, device: torch.device, world: int) -> str:
    rows = max(spec.rows // max(spec.parts, world), 1)
    parts = memory_of(spec, rows, device, world)
    name, largest = max(parts.items(), key=lambda part: part[1])
    gib = device_memory(device) / 2**30
    told = (
        f"out of memory on {device} ({gib:.3g} GiB): largest are {name}, about "
        f"{largest / 2**30:.3g} GiB with micro-batches of {rows} rows"
    )
    fits = [n for n in range(spec.parts + 1, spec.rows + 1) if spec.rows % n == 0]
    most = fitting(spec, device, world)
    better = next((n for n in fits if most is not None and n >= most), None)
    if better is None:
        return f"{told}; a single row does not fit: train.recompute, fsdp or a smaller model"
    return f"{told}; train.accumulate {better} (of {spec.rows // better} rows) should fit"
