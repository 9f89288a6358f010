"""`glactl profile`: operators and models on the device at hand, beside what the device could do."""

import platform
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from glactl import __version__, console
from glactl.device import pick_device
from glactl.measure import rates
from glactl.models.lm import LMSpec
from glactl.operators import OPERATORS, Operator, Shape
from glactl.profile_cases import (
    Measured,
    crossover,
    measure_model,
    measure_operator,
    scan_operators,
)
from glactl.profile_report import write
from glactl.spec import load
from glactl.spec_source import nearest

SHORTEST = 256  # the crossover is looked for from this length on
VOCAB = 259  # of the models without a spec of their own: bytes and three marks
SLOTS = 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODEL_MIXERS = ("attention", "gla", "gsa")


def parse_lengths(text: str) -> list[int]:
    """Lengths from "512,1024" or a range "512:8192:x2" (512, 1024, ... up to 8192), ascending.

    Raises:
        ValueError: anything else, or a length below 1.
    """
    found: set[int] = set()
    for part in map(str.strip, text.split(",")):
        stretch = re.fullmatch(r"(\d+):(\d+)(?::x(\d+))?", part)
        low, high, factor = (int(n or 2) for n in stretch.groups()) if stretch else (0, 0, 0)
        if 1 <= low <= high and factor >= 2:
            while low <= high:
                found.add(low)
                low *= factor
        elif part.isdecimal() and int(part) >= 1:
            found.add(int(part))
        else:
            raise ValueError(
                f"seqlen is {part!r}; allowed: lengths of 1 or more, 512,1024, or a range "
                "512:8192:x2"
            )
    return sorted(found)


def profile_command(
    *,
    seqlen: str,
    mixers: str | None = None,
    spec: Path | None = None,
    tokens: int | None = None,
    heads: int = 4,
    width: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    out: Path = Path("profiles"),
    json: bool = False,
    quiet: bool = False,
) -> None:
    """Run `glactl profile`; the arguments are the command's options.

    Raises:
        ValueError: an option out of range, or a spec that cannot be used.
        FileNotFoundError: no such spec.
    """
    lengths = parse_lengths(seqlen)
    operators = _choose(mixers)
    where = pick_device(device)
    gpu = where.type == "cuda"
    kind = parse_dtype(dtype or ("bf16" if gpu else "fp32"))
    total = tokens or max(lengths[-1], 16_384 if gpu else 0)
    if total < lengths[-1]:
        raise ValueError(f"tokens is {total}; allowed: at least the longest seqlen, {lengths[-1]}")
    base = Shape(1, lengths[-1], heads, width or (128 if gpu else 64), SLOTS, kind)
    models = _models(spec, operators, base)
    reached = rates(where, kind)
    shorter = _shorter(lengths)
    turns = 2 * len(lengths) * (len(operators) + len(models)) + len(shorter) * len(operators)
    rows: list[Measured] = []
    with console.progress(turns, "profile", quiet=quiet) as advance:
        for T in lengths:
            shape = replace(base, T=T, batch=max(1, total // T))
            for operator in operators:
                rows += measure_operator(operator, shape, where, reached, advance)
            for name, model in models.items():
                rows += measure_model(name, model, shape, where, reached, advance)
        scanned = scan_operators(operators, base, shorter, total, where, reached, advance)
    report = {
        "glactl": __version__,
        "device": torch.cuda.get_device_name(where) if gpu else f"CPU, {platform.machine()}",
        "threads": None if gpu else torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(kind).removeprefix("torch."),
        "rates": asdict(reached),
        "shape": {"heads": heads, "width": base.width, "slots": SLOTS, "tokens": total},
        "models": {name: model.model_dump(mode="json") for name, model in models.items()},
        "crossover": crossover([r for r in rows + scanned if r.part == "operator"]),
        "results": [asdict(r) for r in rows],
        "scan": [asdict(r) for r in scanned],
    }
    folder = write(out, where.type, report, rows, scanned)
    if json:
        console.result(report | {"path": str(folder)})
    else:
        _print(report, rows)
    console.note(f"wrote {folder}: results.json, results.csv, seqlen.svg, seqlen.png")


def _choose(mixers: str | None) -> list[Operator]:
    known = {operator.name: operator for operator in OPERATORS}
    if mixers is None:
        return list(OPERATORS)
    names = [n.strip() for n in mixers.split(",") if n.strip()]
    for name in names:
        if name not in known:
            hint = nearest(name, list(known))
            raise ValueError(f"mixers has {name!r}; allowed: {', '.join(known)}{hint}")
    if not names:
        raise ValueError(f"mixers is empty; allowed: {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)]


def parse_dtype(name: str) -> torch.dtype:
    """The element type of that name. Raises ValueError for any other."""
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; allowed: {', '.join(DTYPES)}")
    return DTYPES[name]


def _models(spec: Path | None, operators: list[Operator], base: Shape) -> dict[str, LMSpec]:
    """Name -> model: of the spec, or two layers of each mixer in the operators' shape."""
    if spec is not None:
        model = load(spec).model
        vocab = model.vocab_size or VOCAB
        return {spec.stem: LMSpec.model_validate(model.model_dump() | {"vocab_size": vocab})}
    names = [operator.name for operator in operators if operator.name in MODEL_MIXERS]
    return {
        name: LMSpec.model_validate(
            {
                "d_model": base.heads * base.width,
                "n_layers": 2,
                "mixer": {"kind": name, "heads": base.heads},
                "vocab_size": VOCAB,
            }
        )
        for name in names
    }


def _shorter(lengths: list[int]) -> list[int]:
    """Where one length is asked for: powers of two from SHORTEST up to it, for the crossover."""
    found: list[int] = []
    while len(lengths) == 1 and SHORTEST << len(found) < lengths[0]:
        found.append(SHORTEST << len(found))
    return found


def _print(report: dict[str, Any], rows: list[Measured]) -> None:
    reached = report["rates"]
    threads = f", {report['threads']} threads" if report["threads"] else ""
    console.say(
        f"{report['device']}{threads}, {report['dtype']}, torch {report['torch']}: copies "
        f"{reached['copy'] / 1e9:.1f} GB/s, multiplies {reached['matmul'] / 1e9:,.0f} GFLOP/s"
    )
    shape = report["shape"]
    sizes = {(m["n_layers"], m["d_model"]) for m in report["models"].values()}
    models = "".join(f"; each model has {n} layers, width {d}" for n, d in sizes)
    console.say(
        f"{shape['tokens']:,} tokens a call, {shape['heads']} heads of {shape['width']}, "
        f"{shape['slots']} slots{models}"
    )
    columns = ["", "work", "T", "ms", "p10–p90", "n", "tokens/s", "peak MiB", "error"]
    columns += ["GFLOP", "MB", "floor ms", "% of floor"]
    table = [
        [
            row.name if row.part == "operator" else f"{row.name} model",
            "fwd" if row.work == "forward" else "fwd+bwd",
            row.T,
            1e3 * row.median,
            f"{1e3 * row.p10:.3g}–{1e3 * row.p90:.3g}",
            row.repeats,
            row.tokens_per_s,
            None if row.peak is None else row.peak / 2**20,
            None if row.error is None else f"{row.error:.0e}",
            row.flops / 1e9,
            row.moved / 1e6,
            1e3 * row.floor,
            100 * row.of_floor,
        ]
        for row in rows
    ]
    console.table(columns, table)
    longest = max(row.error_T or 0 for row in rows)
    console.say(
        "floor: the larger of MB over the copy rate and GFLOP over the matrix rate; error: largest "
        f"relative one against fp64, over at most {longest} tokens"
    )
    for name, at in report["crossover"].items():
        if at["length"] is not None:
            where = f"attention is faster below T = {at['length']:,}, {name} above"
        else:
            where = f"{at['faster']} is faster at every length from {at['from']:,}"
        times = f"{at['faster']} by {at['ratio']:.1f}x at {at['to']:,}"
        console.say(f"crossover attention / {name}, fwd+bwd: {where}; {times}")
