"""Time the kernels of softmax attention on one GPU: forms of each, beside torch's and the floors.

    python benchmarks/attention.py [--quick] [--commit HASH] [--write FILE]

Of `attention_step`: sequences after 1,995 tokens in rows of 2,049, bf16, every form of TILES and
PROGRAMS, and for 200 sequences other sizes of the rows. TB_per_s counts the keys and values read.
Of `attention_packed`: sequences of equal length, bf16, every form of PACKED, beside torch's flash
attention with the same bounds; TFLOP_per_s counts the pairs that see each other. Times are medians
of 5 replays of a CUDA graph of a few calls, in microseconds. A form is timed after its result has
been held against the form that ships (largest difference over the largest entry, `error`).
"""

import argparse
import itertools
import json
from collections.abc import Callable
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor

from glactl.kernels import triton_attention, triton_packed
from glactl.manifest import measured_on

HELD, ROWS, THETA = 1995, 2049, 1e4
STEPS = (  # sequences, heads of keys, D, queries to a head of keys
    (200, 16, 64, 1), (143, 16, 64, 1), (100, 16, 64, 1), (63, 16, 64, 1), (16, 16, 64, 1),
    (1, 16, 64, 1), (64, 8, 128, 1), (64, 4, 64, 4), (64, 8, 128, 4),
)  # fmt: skip
TILES = ((1024, 1), (1024, 2), (2048, 1), (2048, 2), (2048, 4), (4096, 2), (4096, 4))
PROGRAMS = (1, 2048, 4224, 8448)  # with more queries to a head the kernel takes 264 at most
CAPACITIES = (2037, 2048, 2049, 2056, 2112)
SEQUENCES = (  # sequences, tokens, heads, heads of keys, D
    (16, 1989, 16, 16, 64), (16, 1989, 8, 8, 128), (16, 1989, 16, 4, 64), (256, 128, 16, 16, 64),
    (4, 8192, 16, 16, 64),
)  # fmt: skip
PACKED = (  # queries, keys, warps, stages
    (64, 64, 4, 3), (64, 64, 4, 4), (64, 64, 4, 2), (128, 64, 8, 3), (128, 64, 4, 3),
    (64, 32, 4, 3), (64, 32, 4, 4), (128, 128, 8, 3), (64, 128, 4, 3), (128, 64, 8, 2),
)  # fmt: skip


def replayed(call: Callable[[], object], calls: int) -> float:
    """Microseconds of a call within a CUDA graph."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    graph.replay()
    found = []
    for _ in range(5):
        begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) / calls * 1e3)
    return round(median(found), 1)


def error(found: Tensor, wanted: Tensor) -> float:
    """The largest difference over the largest entry."""
    return float(f"{(found - wanted).abs().max() / wanted.abs().max():.1e}")


def draw(*shape: int) -> Tensor:
    """A tensor in bf16."""
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


class Step:
    """A case of `attention_step`, whose sequences stay at one length."""

    def __init__(self, case: tuple[int, int, int, int], rows: int = ROWS) -> None:
        N, H, D, self.queries = case
        # a head's rows one after another, as models hold them
        self.state = draw(N, H, rows, D).transpose(1, 2), draw(N, H, rows, D).transpose(1, 2)
        self.length = torch.full((N,), HELD, device="cuda")
        self.inputs = draw(N, H * self.queries, D), draw(N, H, D), draw(N, H, D)
        self.bytes = N * HELD * H * D * 4

    def __call__(self) -> Tensor:
        """The result, and the length as before."""
        step = triton_attention.attention_step_triton
        o = step(*self.inputs, self.state, self.length, THETA)
        self.length.sub_(1)
        return o

    def timed(self) -> dict[str, Any]:
        """The time and what memory gave."""
        us = replayed(self, 4)
        return {"us": us, "TB_per_s": round(self.bytes / us / 1e6, 2)}

    def forms(self) -> list[dict[str, Any]]:
        """Every form, the fastest first."""
        found, wanted = [], self()
        for (tile, warps), most in itertools.product(TILES, PROGRAMS):
            if self.queries > 1 and (warps == 1 or tile < 2048 or most > PROGRAMS[1]):
                continue
            form = {"tile": tile, "warps": warps, "programs": most}

            def rule(R: int, wide: int, tile: int = tile, warps: int = warps) -> tuple[int, int]:
                return max(16, tile // wide), warps

            with patch.multiple(triton_attention, _tile=rule, PROGRAMS=most):
                found.append(form | {"error": error(self(), wanted)} | self.timed())
        return sorted(found, key=lambda form: form["us"])


def packed(n: int, T: int, H: int, G: int, D: int) -> dict[str, Any]:
    """torch's flash attention and every form of `attention_packed`, the fastest first."""
    bounds = torch.arange(n + 1, device="cuda", dtype=torch.int32) * T
    q, k, v = draw(n * T, H, D), draw(n * T, G, D), draw(n * T, G, D)
    flops = 2 * n * T * T * D * H  # half of the pairs

    def rate(call: Callable[[], Tensor]) -> dict[str, Any]:
        us = replayed(call, 3)
        return {"us": us, "TFLOP_per_s": round(flops / us / 1e6)}

    def flash() -> Tensor:
        o: Tensor = torch.ops.aten._flash_attention_forward(
            q, k, v, bounds, bounds, T, T, 0.0, True, False
        )[0]
        return o

    def ours() -> Tensor:
        return triton_packed.attention_packed_triton(q, k, v, bounds, bounds, T)

    wanted, found = flash(), []
    shipped = rate(ours) | {"error": error(ours(), wanted)}
    for form in PACKED:
        names = dict(zip(("queries", "keys", "warps", "stages"), form, strict=True))
        with patch.object(triton_packed, "_tile", lambda D, form=form: form):
            try:
                found.append(names | {"error": error(ours(), wanted)} | rate(ours))
            except triton.runtime.errors.OutOfResources as lacking:
                found.append(names | {"lacks": str(lacking)[:80]})
    found.sort(key=lambda form: form.get("us", float("inf")))
    return {"torch_flash": rate(flash), "shipped": shipped, "forms": found}


def main() -> None:
    """Measure all and print the best of each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the first case of each kernel")
    parser.add_argument("--commit", help="of the source")
    parser.add_argument("--write", metavar="FILE", help="write the results as JSON")
    args = parser.parse_args()
    torch.manual_seed(0)
    about: dict[str, Any] = {
        **measured_on(torch.device("cuda"), args.commit),
        "attention_step": [],
        "attention_step_capacity": [],
        "attention_packed": [],
    }
    for case in STEPS[:1] if args.quick else STEPS:
        step = Step(case)
        names = ("rows", "kv_heads", "D", "queries_a_head")
        row: dict[str, Any] = dict(zip(names, case, strict=True))
        row |= {"shipped": step.timed(), "forms": step.forms()}
        about["attention_step"].append(row)
        print(json.dumps(row | {"forms": row["forms"][:3]}), flush=True)
    for capacity in () if args.quick else CAPACITIES:
        row = {"capacity": capacity} | Step(STEPS[0], capacity).timed()
        about["attention_step_capacity"].append(row)
        print(json.dumps(row), flush=True)
    for sequences in SEQUENCES[:1] if args.quick else SEQUENCES:
        parts = ("sequences", "tokens", "heads", "kv_heads", "D")
        row = dict(zip(parts, sequences, strict=True))
        row |= packed(*sequences)
        about["attention_packed"].append(row)
        print(json.dumps(row | {"forms": row["forms"][:3]}), flush=True)
    if args.write:
        with open(args.write, "w") as file:
            json.dump(about, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
