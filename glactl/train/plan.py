"""What a run would cost, before it starts: from the cost model and from a small forward pass."""

from itertools import repeat
from typing import Any

import torch

from glactl.models.cost import lm_cost
from glactl.models.lm_spec import LMSpec
from glactl.models.mixers import MixerSpec
from glactl.spec import RunSpec, with_vocab
from glactl.tasks.tokenizer import load_tokenizer
from glactl.train.distributed import choose, device_memory, parts_of
from glactl.train.plan_fit import FP32, fitted, memory_of, state_bytes

CPU = torch.device("cpu")


def plan_numbers(
    spec: RunSpec, rate: float | None = None, device: torch.device = CPU, world: int = 1
) -> dict[str, Any]:
    """Sizes and work of a run.

    Args:
        spec: the run. Its tokenizer is read for its vocabulary where the spec does not say it; its
            data is not touched, and neither is the checkpoint it starts from.
        rate: FLOP/s that the device reaches in products; None: not known.
        device: whose memory is to suffice.
        world: processes, one for each device; "memory_bytes" are those of one of them.

    Returns:
        Counts and, where the name says so, bytes. Weights, gradients and moments are exact;
        activations are those of one micro-batch, see `activation_bytes`; "original" is the
        attention that layers are matched with. hours, None without a rate, are the least: all
        steps at that rate, as if there were nothing but products.
    """
    train, T, init = spec.train, spec.data.seq_len, spec.init
    if spec.data.kind != "text":
        spec = with_vocab(spec, spec.data.vocab_size)
    elif spec.model.vocab_size is None or init is None:
        spec = with_vocab(spec, load_tokenizer(spec.data.tokenizer).vocab_size)
    cost = lm_cost(spec.model, T)
    spec = fitted(spec, device, world)
    parts = parts_of(spec.rows, spec.parts, world)
    mode, why = choose(train.parallel, world, state_bytes(spec), device_memory(device))
    tokens = spec.rows * T
    memory = memory_of(spec, spec.rows // parts, device, world)
    if init is not None and init.match is not None:
        memory["original"] = FP32 * sum(map(_attention, spec.model.mixers, repeat(spec.model)))
    flops = cost.flops_token_train * spec.steps * tokens
    return {
        "name": spec.name,
        "params": cost.params,
        "params_embedding": cost.params_embedding,
        "state_bytes": cost.state_bytes,
        "flops_token": cost.flops_token,
        "flops_token_train": cost.flops_token_train,
        "bytes_token": cost.bytes_token,
        "memory_bytes": memory | {"sum": sum(memory.values())},
        "steps": spec.steps,
        "tokens_step": tokens,
        "processes": world,
        "parallel": mode,
        "parallel_reason": why,
        "micro_batches": parts,
        "tokens": spec.steps * tokens,
        "flops": flops,
        "rate": rate,
        "hours": None if rate is None else flops / rate / 3600 / world,
        "checkpoint_bytes": state_bytes(spec) // 4 * 3,
    }


def _attention(mixer: MixerSpec, model: LMSpec) -> int:
    """Weights of the attention that was where a new mixer is; 0 where it stays."""
    if mixer.kind == "attention":
        return 0
    heads, groups = getattr(mixer, "heads", 1), getattr(mixer, "groups", 1)
    return 2 * model.d_model * (model.d_model + groups * model.d_model // heads)


def plan_lines(spec: RunSpec, numbers: dict[str, Any]) -> list[str]:
    """`numbers` of `plan_numbers` for people."""
    n, model, train = numbers, spec.model, spec.train
    mixers = model.mixer if isinstance(model.mixer, list) else [model.mixer]
    memory = "   ".join(f"{k} {binary(v)}" for k, v in n["memory_bytes"].items() if k != "sum")
    rows = [
        ("parameters", f"{short(n['params'])}   (embeddings {short(n['params_embedding'])})"),
        ("state/sequence", f"{binary(n['state_bytes'])} at {spec.data.seq_len} tokens"),
        (
            "FLOPs/token",
            f"{short(n['flops_token'])} forward   {short(n['flops_token_train'])} train",
        ),
        ("bytes/token", f"{short(n['bytes_token'])} forward"),
        ("memory", f"about {binary(n['memory_bytes']['sum'])}: {memory}"),
        (
            "tokens/step",
            f"{n['tokens_step']:,} = {spec.rows} rows x {spec.data.seq_len}"
            + (f" in {n['micro_batches']} micro-batches" if n["micro_batches"] > 1 else ""),
        ),
        ("steps", f"{n['steps']:,}   ({short(n['tokens'])} tokens, {short(n['flops'])} FLOPs)"),
        *_parallel(n),
        *_time(n),
        ("disk", f"{binary(n['checkpoint_bytes'])} x {train.keep_last} checkpoints"),
    ]
    layers = f"{model.n_layers} layers of {', '.join(m.kind for m in mixers)}"
    head = f"{spec.name}: {layers}, d_model {model.d_model}, on {spec.data.kind}"
    return [head, *(f"  {name:<15} {text}" for name, text in rows)]


def _parallel(n: dict[str, Any]) -> list[tuple[str, str]]:
    if n["processes"] == 1:
        return []
    return [("parallel", f"{n['parallel']} on {n['processes']}: {n['parallel_reason']}")]


def _time(n: dict[str, Any]) -> list[tuple[str, str]]:
    if n["rate"] is None:
        return []
    shown = f"{n['hours']:,.1f} hours" if n["hours"] >= 1 else f"{60 * n['hours']:.2g} minutes"
    return [("time", f"at least {shown}, at {short(n['rate'])}FLOP/s in fp32 as measured here")]


def short(number: float) -> str:
    """1,234,567 as "1.23 M"."""
    for unit in ("", " k", " M", " G", " T", " P", " E"):
        if number < 999.5 or unit == " E":
            break
        number /= 1000
    return f"{number:.3g}{unit}" if number < 999.5 else f"{number:,.0f}{unit}"


def binary(number: float) -> str:
    """1,572,864 bytes as "1.5 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if number < 1000 or unit == "TiB":
            break
        number /= 1024
    return f"{number:.3g} {unit}"
