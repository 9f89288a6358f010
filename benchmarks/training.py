"""Training throughput: models of d 1024 and 24 layers on one device, ours and others'.

    python benchmarks/training.py [--models gla,gsa] [--modes eager,compiled,captured]
                                  [--lengths 2048,8192] [--write FILE] [--device cpu --tiny]

Each case is a process of its own, so that no cache, graph or failure reaches another: a model of
vocabulary 32,000, untied, 16,384 tokens a step in one micro-batch, products in bf16, weights,
gradients and moments in fp32, fused AdamW, gradient clipped to 1, the same tokens drawn at random.
Ours run through the steps of `glactl train`: `eager` as they are, `compiled` with train.compile,
`captured` the same as a CUDA graph, `graph` a graph of what is not compiled; each with the loss in
chunks. fla's GLA and GSA (with fla's fused loss) and transformers' Llama (sdpa) run in the loop
that their users write: autocast, backward, clip, AdamW; `compiled` is torch.compile of the model.

fla's kernels search for their settings at first use, some minutes; --caches gives it those of an
earlier search.

A line of JSON for each case as it is done: tokens_per_s of the median over --steps steps after
--warm, each step timed to its end; first_s, the seconds of the first step, with all compilation;
peak_gib; mfu, the share of the chip's peak that the products of the model's own mixer make up (see
models/cost.py; of others' models as of ours of that kind), None where the peak is not known; loss,
that of the last step. A case that fails is a line with its error.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from glactl.device import products
from glactl.manifest import measured_on
from glactl.models.cost import lm_cost
from glactl.models.lm import build_lm
from glactl.peaks import peak_flops
from glactl.spec import RunSpec
from glactl.tasks import Batch
from glactl.train.feed import Portion
from glactl.train.layers import quicken
from glactl.train.optim import make_optimizer
from glactl.train.stages import stage_at
from glactl.train.step import Stepper

OURS = ("gla", "gsa", "retnet", "attention")
THEIRS = ("fla_gla", "fla_gsa", "llama")
MODES = {
    "eager": {"capture": False},
    "graph": {"capture": True},
    "compiled": {"capture": False, "compile": True},
    "captured": {"capture": True, "compile": True},
}
HEADS = {"attention": 16}  # of 64; others have 4
LIMIT = 600  # seconds of a case


def sizes(tiny: bool) -> dict[str, int]:
    """Width, layers, vocabulary and tokens of a step."""
    if tiny:
        return {"d_model": 64, "n_layers": 2, "vocab_size": 500, "tokens": 512}
    return {"d_model": 1024, "n_layers": 24, "vocab_size": 32_000, "tokens": 16_384}


def spec_of(kind: str, mode: str, T: int, tiny: bool) -> RunSpec:
    """The run of one of our models."""
    size = sizes(tiny)
    tokens = size.pop("tokens")
    return RunSpec.model_validate(
        {
            "model": size | {"mixer": {"kind": kind, "heads": HEADS.get(kind, 4)}},
            "data": {"kind": "text", "seq_len": T},
            "optim": {"lr": 3e-4, "warmup_steps": 0, "schedule": "constant"},
            "train": {"batch_tokens": tokens, "precision": "bf16", "loss": "chunked"} | MODES[mode],
        }
    )


def batches(vocab: int, rows: int, T: int) -> Callable[[int], Batch]:
    """Tokens of step s, the same for every model."""

    def draw(step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        drawn = torch.randint(vocab, (rows, T + 1), generator=generator)
        return Batch(drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous())

    return draw


def ours(kind: str, mode: str, T: int, device: torch.device, tiny: bool) -> Callable[[int], float]:
    """A step of our loop, by its number; gives the loss, when the device is done."""
    spec = spec_of(kind, mode, T, tiny)
    lm = build_lm(spec.model, 0, device=device)
    quicken(lm, spec.train.compile, spec.train.recompute)
    stage = stage_at(0, spec, lm, _nothing, frozenset())
    stepper = Stepper(spec, lm, stage, device)
    draw = batches(spec.model.vocab, spec.rows, T)
    ready = {0: draw(0)}

    def step(s: int) -> float:
        batch = ready.pop(s)
        portion = Portion(s, 1, [(0, batch)], batch.targets.numel(), batch.tokens.numel())
        done = stepper(portion, spec.optim.lr, lambda: ready.update({s + 1: draw(s + 1)}))
        if stepper.reason and MODES[mode]["capture"] and device.type == "cuda":
            raise RuntimeError(f"not captured: {stepper.reason}")
        assert done is not None
        return done.loss

    return step


def _nothing() -> Any:
    raise AssertionError("no layers are matched here")


def theirs(
    name: str, mode: str, T: int, device: torch.device, tiny: bool
) -> Callable[[int], float]:
    """A step of another project's model in a plain loop."""
    size = sizes(tiny)
    lm = _their_model(name, size, T).to(device)
    call: Any = torch.compile(lm) if mode == "compiled" else lm
    optimizer = make_optimizer(lm, spec_of("gla", "eager", T, tiny).optim)
    draw = batches(size["vocab_size"], size["tokens"] // T, T)

    def step(s: int) -> float:
        batch = draw(s)
        tokens, targets = (x.to(device) for x in (batch.tokens, batch.targets))
        with products(device, "bf16"):
            if name == "llama":
                logits = call(input_ids=tokens, use_cache=False).logits
                loss = torch.nn.functional.cross_entropy(
                    logits.float().flatten(0, 1), targets.flatten()
                )
            else:
                # fla shifts labels by itself
                loss = call(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.item())

    return step


def _their_model(name: str, size: dict[str, int], T: int) -> Any:
    d, layers, vocab = size["d_model"], size["n_layers"], size["vocab_size"]
    hidden = 256 * -(-8 * d // (3 * 256)) if d >= 1024 else 192
    common = {"hidden_size": d, "num_hidden_layers": layers, "vocab_size": vocab}
    if name == "llama":
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            **common,
            num_attention_heads=HEADS["attention"],
            intermediate_size=hidden,
            max_position_embeddings=T,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
        )
        return LlamaForCausalLM(config)
    import fla.models as fla

    common |= {"intermediate_size": hidden, "num_heads": 4, "tie_word_embeddings": False}
    if name == "fla_gla":
        return fla.GLAForCausalLM(fla.GLAConfig(**common))
    return fla.GSAForCausalLM(fla.GSAConfig(**common, num_slots=64))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The numbers of one case."""
    name, mode, T = args.one.split(",")
    device, size = torch.device(args.device), sizes(args.tiny)
    make = ours if name in OURS else theirs
    began = time.perf_counter()
    step = make(name, mode, int(T), device, args.tiny)
    built = time.perf_counter()
    loss = step(0)
    first = time.perf_counter() - built
    times = []
    for s in range(1, args.warm + args.steps + 1):
        start = time.perf_counter()
        loss = step(s)  # its loss is read, so the device is done
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[args.warm :])
    rate = size["tokens"] / seconds
    kind = {"llama": "attention"}.get(name, name.removeprefix("fla_"))
    cost = lm_cost(spec_of(kind, "eager", int(T), args.tiny).model, int(T))
    peak = peak_flops(device, torch.bfloat16)
    gpu = device.type == "cuda"
    return {
        "tokens_per_s": round(rate),
        "step_ms": round(1e3 * seconds, 2),
        "p10_ms": round(1e3 * sorted(times[args.warm :])[args.steps // 10], 2),
        "mfu": None if peak is None else round(rate * cost.flops_token_train / peak, 4),
        "first_s": round(first, 1),
        "build_s": round(built - began, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 2) if gpu else None,
        "params": cost.params,
        "loss": round(loss, 4) if math.isfinite(loss) else str(loss),
    }


def one(args: argparse.Namespace) -> None:
    """Measure a case in this process."""
    name, mode, T = args.one.split(",")
    head = {"model": name, "mode": mode, "T": int(T)}
    try:
        print(json.dumps(head | measure(args)), flush=True)
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        print(json.dumps(head | {"error": f"{type(error).__name__}: {text}"}), flush=True)
        sys.exit(1)


def run(case: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure a case in a process, with compilers' caches of its own, which are empty but for the
    copy of --caches that fla begins with."""
    name, mode, T = case.split(",")
    command = [sys.executable, __file__, "--one", case, "--device", args.device]
    command += ["--steps", str(args.steps), "--warm", str(args.warm), *["--tiny"] * args.tiny]
    began, failure, found = time.monotonic(), "no result", {}
    with tempfile.TemporaryDirectory() as caches:
        if args.caches and name.startswith("fla"):
            shutil.copytree(args.caches / name, f"{caches}/triton")
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=args.limit,
                env=_environment(caches),
            )
            lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
            found = json.loads(lines[-1]) if lines else {}
            failure = (done.stderr.strip().splitlines() or [failure])[-1][:300]
        except subprocess.TimeoutExpired:
            failure = f"no result within {args.limit} s"
    found = found or {"model": name, "mode": mode, "T": int(T), "error": failure}
    return found | {"process_s": round(time.monotonic() - began, 1)}


def _environment(caches: str) -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    kept = {"TRITON_CACHE_DIR": f"{caches}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor"}
    return os.environ | {"PYTHONPATH": path} | kept


def cases(args: argparse.Namespace) -> list[str]:
    """Models, modes and lengths that belong together, the shorter length first."""
    found = []
    for T in args.lengths.split(","):
        for name in args.models.split(","):
            modes = [m for m in args.modes.split(",") if name in OURS or m in ("eager", "compiled")]
            if name.startswith("fla"):
                modes = [m for m in modes if m == "eager"]
            found += [f"{name},{mode},{T}" for mode in modes]
    return found


def main() -> None:
    """Measure all cases, or one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(OURS + THEIRS))
    parser.add_argument("--modes", default="captured,compiled,graph,eager")
    parser.add_argument("--lengths", default="2048,8192")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--warm", type=int, default=5)
    parser.add_argument("--limit", type=int, default=LIMIT, help="seconds of a case")
    parser.add_argument(
        "--caches", type=Path, help="fla's tuned kernels: a folder for each of its models"
    )
    parser.add_argument("--commit", help="of the source, where it is no git checkout")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="small models, to try it")
    parser.add_argument("--one", metavar="MODEL,MODE,T", help="in this process")
    parser.add_argument("--write", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.one:
        one(args)
        return
    gpu = torch.cuda.is_available() and args.device != "cpu"
    head = {
        **measured_on(torch.device("cuda" if gpu else "cpu"), args.commit),
        "sizes": sizes(args.tiny),
    }
    print(json.dumps(head), flush=True)
    results = []
    for case in cases(args):
        results.append(run(case, args))
        print(json.dumps(results[-1]), flush=True)
        if args.write:
            args.write.write_text(json.dumps(head | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
