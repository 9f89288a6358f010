"""Hold our models against flash-linear-attention's (fla): the same weights, the same logits.

    python benchmarks/parity.py [--cases gla,gsa-grouped] [--jobs 12] [--write FILE] [--commit HASH]

Needs a CUDA device, fla and transformers. fla's model is made with random weights everywhere,
saved, and read as `glactl import` reads it; both are fp32, without TF32. A difference is

    max |ours - fla's| / max |fla's|                                                         (1)

over the logits of (whole) 2 rows of 300 tokens, by our default engine and the two others;
(packed) 5 documents in one row of 300; (stepped) 40 tokens one at a time after 100 read at once.
`steps` is (1) between either's logits of these 40 tokens and its own of the whole row. fla's ABC
takes neither documents nor single tokens. fla's softmax attention calls a package that has no fp32;
here the call is the equation, `attend`.

fla's kernels try hundreds of configurations at first use. Any one is right, so here the first that
compiles is taken: no time of such a run means anything. Each case runs in a process of its own.
"""

import argparse
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")  # of fla's products; ours name their own
os.environ["FLA_CACHE_RESULTS"] = "0"  # what is chosen here must not be taken for a tuned choice

import torch
from torch import Tensor

from glactl.convert.command import read_model
from glactl.models.lm import LM

ROWS, TOKENS = 2, 300
READ, STEPS = 100, 40  # more than 64 are read, so that fla takes its chunked kernels
BOUNDS = (0, 100, 101, 165, 230, TOKENS)
TIMEOUT = 300  # seconds of one case
AGAINST_FLA = ("whole, chunked", "whole, reference", "packed", "stepped")
SMALL = {"hidden_size": 256, "num_hidden_layers": 3, "num_heads": 4, "vocab_size": 512}
WIDE = SMALL | {"hidden_size": 1024, "num_hidden_layers": 2}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {  # the name of fla's classes, more of the config
    "transformer": ("Transformer", {}),
    "gla": ("GLA", {}),
    "gsa": ("GSA", {}),
    "retnet": ("RetNet", {}),
    "hgrn2": ("HGRN2", {"num_heads": None, "expand_ratio": 64}),
    "abc": ("ABC", {}),
}
HYBRID = {"attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "window_size": 50}}
CASES: dict[str, dict[str, Any]] = {kind: SMALL | more for kind, (_, more) in KINDS.items()} | {
    "transformer-grouped": SMALL | {"num_kv_heads": 2, "window_size": 50},
    "gla-grouped": SMALL | {"num_kv_heads": 2, "feature_map": "relu"},
    "gla-tied": SMALL | {"tie_word_embeddings": True, "use_output_gate": False},
    "gla-hybrid": SMALL | HYBRID,
    "gsa-grouped": SMALL | {"num_kv_heads": 2, "gate_logit_normalizer": 4},
    "gsa-hybrid": SMALL | HYBRID,
    **{f"{kind}-wide": WIDE | more for kind, (_, more) in KINDS.items()},
    "hgrn2-wide": WIDE | {"num_heads": None, "expand_ratio": 128},
}


class Missing(RuntimeError):
    """What the comparison needs is not here."""


def attend(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = True, window_size: tuple[int, int] = (-1, -1)
) -> Tensor:
    """Causal softmax attention aligned to the last key, (B, T, H, D) and (B, S, G, D)."""
    (T, H), S = q.shape[1:3], k.shape[1]
    k, v = (x.repeat_interleave(H // x.shape[2], 2) for x in (k, v))
    place = torch.arange(S - T, S, device=q.device)[:, None]
    key = torch.arange(S, device=q.device)
    seen = key <= place
    if window_size[0] >= 0:
        seen = seen & (key >= place - window_size[0])
    z = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[3] ** -0.5
    return torch.einsum("bhts,bshd->bthd", z.masked_fill(~seen, -torch.inf).softmax(-1), v)


def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, window_size: tuple[int, int], **_: Any
) -> Tensor:
    """The same of documents packed into (T, H, D)."""
    cuts = [(end - begin).item() for begin, end in pairwise(cu_seqlens_q)]
    parts = zip(*(x.split(cuts) for x in (q, k, v)), strict=True)
    return torch.cat(
        [attend(*(x[None] for x in part), window_size=window_size)[0] for part in parts]
    )


def prepare() -> None:
    """Make fla's kernels take the first configuration that compiles, and its attention fp32."""
    from triton.runtime.autotuner import Autotuner, Config

    prune, bench = Autotuner.prune_configs, Autotuner._bench

    def prune_configs(self: Any, options: dict[str, Any]) -> list[Config]:
        self.settled = False
        found: list[Config] = prune(self, options)
        return sorted(found, key=lambda c: (abs(c.num_warps - 4), c.num_stages))  # compile fast

    def once(self: Any, *args: Any, config: Config, **options: Any) -> list[float]:
        if self.settled:
            return [float("inf")] * 3
        times: list[float] = bench(self, *args, config=config, **options)
        self.settled = times[0] == 0
        return times

    def call(kernel: Callable[[], object], quantiles: tuple[float, ...]) -> list[float]:
        kernel()
        return [0.0] * 3

    Autotuner.prune_configs, Autotuner._bench = prune_configs, once
    Autotuner.do_bench = staticmethod(call)
    there = types.ModuleType("flash_attn")
    there.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    there.__dict__.update(flash_attn_func=attend, flash_attn_varlen_func=attend_packed)
    sys.modules["flash_attn"] = there
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def fla_model(name: str) -> torch.nn.Module:
    """fla's model of a case, with random weights in the place of every parameter."""
    import fla.models

    kind = KINDS[name.split("-")[0]][0]
    config = getattr(fla.models, f"{kind}Config")(**CASES[name])
    model: torch.nn.Module = getattr(fla.models, f"{kind}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, p in model.named_parameters():
            x = torch.randn(p.shape, generator=generator)
            if p.ndim == 1:  # norms are about 1, biases about 0
                x = x if path.endswith("bias") else 1 + 0.3 * x
            elif "embeddings" not in path and "lower_bounds" not in path:
                x = x * p.shape[1] ** -0.5
            p.copy_(x)
    return model


@contextmanager
def engine(name: str | None) -> Iterator[None]:
    """Run our operators on this engine; None: on the device's own."""
    if name is None:
        yield
        return
    with (
        patch.object(sys.modules["glactl.kernels.gla"], "pick_backend", lambda *_: name),
        patch.object(sys.modules["glactl.kernels.gsa"], "pick_backend", lambda *_: name),
    ):
        yield


def difference(ours: Tensor, theirs: Tensor) -> float:
    """(1). Raises ValueError where a number is not finite."""
    for who, x in (("ours", ours), ("fla's", theirs)):
        if not x.isfinite().all():
            raise ValueError(f"not all of {who} are finite")
    share = (ours - theirs).abs().max() / theirs.abs().max()
    return float(f"{share.item():.2e}")


def read(lm: LM, tokens: Tensor, **options: Any) -> Tensor:
    """Our logits."""
    return lm.logits(lm(tokens, **options)[0])


def ours_stepped(lm: LM, tokens: Tensor) -> Tensor:
    """Our logits of the last STEPS tokens, one at a time."""
    _, state = lm(tokens[:, :-STEPS], lm.initial_state(len(tokens)))
    return torch.stack([lm.logits(lm.step(x, state)) for x in tokens[:, -STEPS:].unbind(1)], 1)


def fla_stepped(model: Any, tokens: Tensor) -> Tensor:
    """fla's, by its cache."""
    cache = model(tokens[:, :-STEPS], use_cache=True).past_key_values
    made = []
    for x in tokens[:, -STEPS:].split(1, 1):
        out = model(x, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        made.append(out.logits)
    return torch.cat(made, 1)


@torch.no_grad()
def measure(name: str, device: torch.device) -> dict[str, Any]:
    """The differences of one case; where one could not be had, what was said."""
    started = time.monotonic()
    theirs: Any = fla_model(name)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        lm, found = read_model(Path(folder), device)
    theirs = theirs.to(device)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(lm.spec.vocab, (ROWS, TOKENS), generator=generator).to(device)
    short, row = tokens[:, : READ + STEPS], tokens[:1]
    bounds = torch.tensor(BOUNDS, device=device, dtype=torch.int32)

    def whole(on: str | None) -> float:
        with engine(on):
            return difference(read(lm, tokens), theirs(tokens, use_cache=False).logits)

    def packed() -> float:
        fla = theirs(row, cu_seqlens=bounds, use_cache=False).logits
        return difference(read(lm, row, cu_seqlens=bounds.cpu()), fla)

    def stepped() -> float:
        return difference(ours_stepped(lm, short), fla_stepped(theirs, short))

    def steps_ours() -> float:
        return difference(ours_stepped(lm, short), read(lm, short)[:, -STEPS:])

    def steps_fla() -> float:
        logits = theirs(short, use_cache=False).logits
        return difference(fla_stepped(theirs, short), logits[:, -STEPS:])

    checks: dict[str, Callable[[], float]] = {
        "whole": lambda: whole(None),
        "whole, chunked": lambda: whole("chunked"),
        "whole, reference": lambda: whole("reference"),
        "packed": packed,
        "stepped": stepped,
        "steps, ours": steps_ours,
        "steps, fla": steps_fla,
    }
    if lm.spec.mixers[0].kind == "abc":
        for text in ("packed", "stepped", "steps, fla"):
            del checks[text]
    made: dict[str, Any] = {"case": name, "mixer": lm.spec.mixers[0].kind, "notes": found.notes}
    for text, check in checks.items():
        try:
            made[text] = check()
        except Exception as error:  # of two projects and a compiler: whatever it is, it is told
            made[text] = {"error": f"{type(error).__name__}: {error}".strip()[:300]}
    return made | {"seconds": round(time.monotonic() - started, 1)}


def apart(name: str) -> dict[str, Any]:
    """`measure` in a process of its own, and what it said where it ended without an answer."""
    command = [sys.executable, __file__, "--one", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
        made: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"case": name, "error": f"no answer after {TIMEOUT} s"}
    except (IndexError, ValueError):
        last = (done.stderr.strip() or "nothing said").splitlines()[-1]
        return {"case": name, "error": f"exit code {done.returncode}: {last[:300]}"}
    return made


def need() -> str:
    """The name of the GPU. Raises Missing."""
    for package in ("fla", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise Missing(f"{package} is not installed (flash-linear-attention 0.6.0)")
    if not torch.cuda.is_available():
        raise Missing("no CUDA device")
    return torch.cuda.get_device_name()


def largest(row: dict[str, Any]) -> float | None:
    """The largest difference from fla in a case; None where one could not be had."""
    values = [row.get("whole"), *(row[text] for text in AGAINST_FLA if text in row)]
    return max(values) if all(isinstance(x, float) for x in values) else None


def main() -> None:
    """Measure the cases asked for and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES), help=", ".join(CASES))
    parser.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1))
    parser.add_argument("--one", choices=CASES, help="one case, in this process")
    parser.add_argument("--commit", help="of the source, where it is no git checkout")
    parser.add_argument("--write", metavar="FILE", help="write the results as JSON")
    args = parser.parse_args()
    try:
        gpu = need()
    except Missing as error:
        sys.exit(f"parity needs a GPU, fla and transformers: {error}")
    if args.one:
        prepare()
        print(json.dumps(measure(args.one, torch.device("cuda"))))
        return
    names = args.cases.split(",")
    if unknown := set(names) - set(CASES):
        sys.exit(f"--cases {','.join(sorted(unknown))}: allowed: {', '.join(CASES)}")
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    versions = {p: importlib.metadata.version(p) for p in ("torch", "triton", "transformers")}
    about: dict[str, Any] = {
        "device": gpu,
        **versions,
        "fla": importlib.metadata.version("flash-linear-attention"),
        "python": platform.python_version(),
        "commit": args.commit or head.stdout.strip() or None,
        "products": f"fp32, fla's in {os.environ['TRITON_F32_DEFAULT']}",
        "results": [],
    }
    with ThreadPoolExecutor(args.jobs) as pool:
        for done in as_completed([pool.submit(apart, name) for name in names]):
            about["results"].append(done.result())
            about["results"].sort(key=lambda row: names.index(row["case"]))
            print(json.dumps(done.result()), flush=True)
            if args.write:
                Path(args.write).write_text(json.dumps(about, indent=1) + "\n")
    for row in about["results"]:
        value = largest(row)
        print(f"{row['case']:20} {'not whole' if value is None else value}")


if __name__ == "__main__":
    main()
