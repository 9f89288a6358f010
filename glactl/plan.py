"""What a run would cost, before it starts: all of it from the one cost model."""

from typing import Any

from glactl.models.cost import lm_cost
from glactl.spec import RunSpec
from glactl.tasks.tokenizer import load_tokenizer
from glactl.train import with_vocab

FP32 = 4  # bytes; weights, gradients and both moments of AdamW


def plan_numbers(spec: RunSpec) -> dict[str, Any]:
    """Sizes and work of a run.

    Args:
        spec: the run. Its tokenizer is read for its vocabulary; its data is not touched.

    Returns:
        Counts and, where the name says so, bytes. Activations are an estimate: what the forward
        moves is taken to be kept for the backward, over one micro-batch.
    """
    train, T = spec.train, spec.data.seq_len
    vocab = (
        load_tokenizer(spec.data.tokenizer).vocab_size
        if spec.data.kind == "text"
        else spec.data.vocab_size
    )
    spec = with_vocab(spec, vocab)
    cost = lm_cost(spec.model, T)
    tokens = train.batch_size * T
    weights = FP32 * cost.params
    activations = round(cost.bytes_token * tokens / train.accumulate)
    return {
        "name": spec.name,
        "params": cost.params,
        "params_embedding": cost.params_embedding,
        "state_bytes": cost.state_bytes,
        "flops_token": cost.flops_token,
        "flops_token_train": cost.flops_token_train,
        "bytes_token": cost.bytes_token,
        "memory_bytes": {
            "weights": weights,
            "gradients": weights,
            "optimizer": 2 * weights,
            "activations": activations,
            "sum": 4 * weights + activations,
        },
        "steps": train.steps,
        "tokens_step": tokens,
        "tokens": train.steps * tokens,
        "flops": cost.flops_token_train * train.steps * tokens,
        "checkpoint_bytes": 3 * weights,
    }


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
            f"{n['tokens_step']:,} = {train.batch_size} rows x {spec.data.seq_len}"
            + (f" in {train.accumulate} micro-batches" if train.accumulate > 1 else ""),
        ),
        ("steps", f"{train.steps:,}   ({short(n['tokens'])} tokens, {short(n['flops'])} FLOPs)"),
        ("disk", f"{binary(n['checkpoint_bytes'])} x {train.keep_last} checkpoints"),
    ]
    layers = f"{model.n_layers} layers of {', '.join(m.kind for m in mixers)}"
    head = f"{spec.name}: {layers}, d_model {model.d_model}, on {spec.data.kind}"
    return [head, *(f"  {name:<15} {text}" for name, text in rows)]


def short(number: float) -> str:
    """1,234,567 as "1.23 M"."""
    for unit in ("", " k", " M", " G", " T", " P"):  # noqa: B007
        if number < 999.5:
            break
        number /= 1000
    return f"{number:.3g}{unit}" if number < 999.5 else f"{number:,.0f}{unit}"


def binary(number: float) -> str:
    """1,572,864 bytes as "1.5 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):  # noqa: B007
        if number < 1000:
            break
        number /= 1024
    return f"{number:.3g} {unit}"
