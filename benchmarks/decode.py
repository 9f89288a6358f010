"""Time decoding, and the reading of a long prompt, with random weights.

    python benchmarks/decode.py [--models gla_340m,gsa_340m,gla_1.3b] [--write FILE]

Models are those of specs/, in bf16 on a GPU and fp32 on a CPU. A text of so many tokens is read by
`prefill`, its state is given to every row of a batch, and the steps from there on are timed as
`glactl generate` takes them: captured and replayed on a GPU, 16 to a block, each with the draw of
the next token. `step_ms` is the median over blocks of a block's time over its steps; tokens_per_s
counts all rows. `floor_ms` bounds a step from below: the weights read once and the states read and
written once, over 3.02 TB/s, the copy rate of an H100; `floor_share` is our part of it. Memory is
the peak in MiB above the weights, the states among it. `plain_step_ms` is a step without a graph,
`kernels` how many a step launches, and with --kernels the microseconds of each.

Prefill is one row in pieces: its tokens a second, and its peak, which must not grow.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from glactl.manifest import measured_on
from glactl.models.decode import PIECE, prefill
from glactl.models.lm import LM, LMSpec, LMState, build_lm
from glactl.models.sampling import Sampler, Sampling
from glactl.models.steps import BLOCK, Stepper, take
from glactl.spec import load

COPY = 3.02e12  # bytes/s
SPECS = Path(__file__).parent.parent / "specs"
TINY = {"d_model": 32, "n_layers": 2, "vocab_size": 50}
SAMPLINGS = {
    "greedy": Sampling(),
    "temperature": Sampling(0.8),
    "top_p": Sampling(0.8, top_p=0.9),
}


def numbers(text: str) -> list[int]:
    """Whole numbers, separated by commas."""
    return [int(part) for part in text.split(",") if part]


def model(name: str, device: torch.device, tiny: bool) -> LM:
    """The model of a spec with random weights; if tiny, its mixer alone."""
    spec = load(SPECS / f"{name}.yaml").model
    if tiny:
        spec = LMSpec.model_validate({**TINY, "mixer": name.split("_")[0]})
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return build_lm(spec, 0, device, dtype).eval()


def wait(device: torch.device) -> float:
    """The time when the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak(device: torch.device, base: int | None = None) -> int:
    """MiB above `base` bytes at the most; without a base, bytes held now, and counting begins."""
    if device.type != "cuda":
        return 0
    if base is None:
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return round((torch.cuda.max_memory_allocated(device) - base) / 2**20)


def text(lm: LM, length: int) -> list[int]:
    """Tokens drawn at random."""
    generator = torch.Generator().manual_seed(length)
    drawn: list[int] = torch.randint(lm.spec.vocab, (length,), generator=generator).tolist()
    return drawn


def floor_ms(lm: LM, state: LMState) -> float:
    """All weights but the rows of the embedding that are not looked at, and the states twice."""
    weights = sum(p.nbytes for p in lm.parameters())
    if lm.head.weight is not lm.embed.weight:
        weights -= lm.embed.weight.nbytes
    states = sum(part.nbytes for layer in state.layers for part in layer.values())
    return (weights + 2 * states) / COPY * 1e3


def kernels(stepper: Stepper, device: torch.device) -> dict[str, float]:
    """Microseconds of every kernel of a plain step, largest first, and their number."""
    kind = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kind.CPU, kind.CUDA]) as record, torch.inference_mode():
        stepper._slot.zero_()
        stepper._once()
        wait(device)
    times: dict[str, float] = {}
    count = 0
    for event in record.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            count += 1
            times[event.name[:60]] = times.get(event.name[:60], 0.0) + event.device_time_total
    ordered = sorted(times.items(), key=lambda x: -x[1])
    return {"count": count} | {name: round(t, 1) for name, t in ordered}


@torch.inference_mode()
def steps(
    lm: LM,
    past: tuple[torch.Tensor, LMState],
    batch: int,
    sampling: str,
    tokens: int,
    extra: bool,
    compiled: bool = False,
) -> dict[str, Any]:
    """Steps of a batch of copies of one text; `extra`: without a graph too, and kernels."""
    device, read = lm.device, None
    if compiled:
        torch.compiler.reset()
        # products of one row become sums that Inductor fuses with what is around them
        options: dict[str, Any] = {"coordinate_descent_tuning": True}
        read = torch.compile(lm.step, fullgraph=True, dynamic=False, options=options)
    base = peak(device)
    index = torch.zeros(batch, device=device, dtype=torch.int64)
    state = take(past[1], index)
    sampler = Sampler(SAMPLINGS[sampling], range(batch)).start(device, lm.spec.vocab)
    first = sampler.draw(lm.logits(past[0][index]), sampler.uniform(state.position))
    stepper = Stepper(lm, first, state, sampler, tokens + 4 * BLOCK, read=read)
    row: dict[str, Any] = {"floor_ms": round(floor_ms(lm, state), 4)}
    began = wait(device)
    stepper.run(BLOCK)
    row["first_block_s"] = round(wait(device) - began, 2)

    def timed(blocks: int) -> float:
        spent = []
        for _ in range(blocks):
            start = wait(device)
            stepper.run(BLOCK)
            spent.append((wait(device) - start) / BLOCK * 1e3)
        return statistics.median(spent)

    ms = timed(-(-tokens // BLOCK))
    row |= {
        "step_ms": round(ms, 4),
        "tokens_per_s": round(batch / ms * 1e3),
        "floor_share": round(row["floor_ms"] / ms, 3),
        "peak_mib": peak(device, base),
    }
    if extra and stepper.captured:
        stepper._graph = None
        row["plain_step_ms"] = round(timed(2), 4)
        row["kernels"] = kernels(stepper, device)
    return row


def read(lm: LM, length: int, piece: int) -> tuple[dict[str, Any], tuple[torch.Tensor, LMState]]:
    """One text of `length` tokens, read in pieces."""
    device, prompt = lm.device, text(lm, length)
    prefill(lm, [prompt[: min(length, 2 * piece)]], piece)  # kernels compile
    base, start = peak(device), wait(device)
    past = prefill(lm, [prompt], piece)
    seconds = wait(device) - start
    row = {"seconds": round(seconds, 4), "tokens_per_s": round(length / seconds)}
    return row | {"peak_mib": peak(device, base)}, past


def main() -> None:
    """Measure what was asked for and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="gla_340m,gsa_340m,gla_1.3b", help="names in specs/")
    parser.add_argument("--batches", default="1,64")
    parser.add_argument("--positions", default="100,512,10000,100000", help="tokens read before")
    parser.add_argument("--samplings", default="greedy,temperature,top_p")
    parser.add_argument("--tokens", type=int, default=512, help="steps that are timed")
    parser.add_argument("--prefill", default="100000,1000000", help="lengths; empty for none")
    parser.add_argument("--piece", type=int, default=PIECE)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models, to try the script")
    parser.add_argument("--kernels", action="store_true", help="the time of each kernel of a step")
    parser.add_argument("--compile", action="store_true", help="also steps that torch compiled")
    parser.add_argument("--commit", help="of the source, where it is no git checkout")
    parser.add_argument("--write", metavar="FILE", help="write the results as JSON")
    args = parser.parse_args()
    device = torch.device(args.device)
    about: dict[str, Any] = {
        **measured_on(device, args.commit),
        "tiny": args.tiny,
        "results": [],
    }

    def keep(row: dict[str, Any]) -> None:
        if "kernels" in row and not args.kernels:
            row["kernels"] = row["kernels"]["count"]
        about["results"].append(row)
        print(json.dumps(row), flush=True)
        if args.write:
            Path(args.write).write_text(json.dumps(about, indent=1) + "\n")

    samplings = args.samplings.split(",")
    for name in args.models.split(","):
        lm = model(name, device, args.tiny)
        for n, position in enumerate(numbers(args.positions)):
            _, past = read(lm, position, args.piece)
            for batch in numbers(args.batches):
                what = {"model": name, "batch": batch, "position": position}
                for sampling in samplings if n == 0 else samplings[:1]:
                    extra = n == 0
                    row = steps(lm, past, batch, sampling, args.tokens, extra)
                    keep(what | {"sampling": sampling} | row)
                if args.compile and n == 0:
                    row = steps(lm, past, batch, samplings[0], args.tokens, True, compiled=True)
                    keep(what | {"sampling": samplings[0], "compiled": True} | row)
        for length in numbers(args.prefill):
            row, _ = read(lm, length, args.piece)
            keep({"model": name, "prefill": length, "piece": args.piece} | row)
        del lm


if __name__ == "__main__":
    main()
