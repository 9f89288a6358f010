"""What `glactl profile` prints."""

from collections.abc import Sequence
from typing import Any

from glactl import console
from glactl.profile.cases import BOTH, Failed, Measured

COLUMNS = ["", "work", "T", "ms", "p10–p90", "tokens/s", "GFLOP/s", "GB/s", "% of floor", "bound"]
COLUMNS += ["peak MiB", "saved MiB", "error"]


def label(part: str, name: str) -> str:
    """The name of a row: an operator's alone, with the part for others."""
    return name if part == "operator" else f"{name} {part}"


def short(work: str) -> str:
    """The work of a row in a few letters."""
    return {"forward": "fwd", BOTH: "fwd+bwd"}.get(work, work)


def cells(row: Measured) -> list[object]:
    """The cells of a row, one for each of COLUMNS."""
    error = None if row.error is None else f"{row.error:.0e}{' WRONG' if row.wrong else ''}"
    return [
        label(row.part, row.name),
        short(row.work),
        row.T,
        1e3 * row.median,
        f"{_ms(row.p10)}–{_ms(row.p90)}",
        row.tokens_per_s,
        row.flops / row.median / 1e9,
        row.moved / row.median / 1e9,
        100 * row.of_floor,
        row.bound,
        None if row.peak is None else row.peak / 2**20,
        None if row.saved is None else row.saved / 2**20,
        error,
    ]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 0.9995 else f"{1e3 * seconds:,.0f}"


def head(report: dict[str, Any]) -> list[str]:
    """What was measured where, in two or three lines."""
    reached, shape = report["rates"], report["shape"]
    threads = f", {report['threads']} threads" if report["threads"] else ""
    lines = [
        f"{report['device']}{threads}, {report['dtype']}, torch {report['torch']}: copies "
        f"{reached['copy'] / 1e9:.1f} GB/s, multiplies {reached['matmul'] / 1e9:,.0f} GFLOP/s"
    ]
    if report["threads"]:
        lines.append("on a CPU the PyTorch forms run, not the kernels: times of a GPU are others")
    sizes = {(m["n_layers"], m["d_model"]) for m in report["models"].values()}
    models = "".join(f"; models of {n} layers, width {d}" for n, d in sorted(sizes))
    lines.append(
        f"{shape['tokens']:,} tokens a call, {shape['heads']} heads of {shape['width']}, "
        f"{shape['slots']} slots{models}"
    )
    return lines


def foot(report: dict[str, Any], rows: Sequence[Measured]) -> list[str]:
    """What the columns mean, and the crossovers."""
    lines = ["floor: the larger of bytes over the copy rate and FLOP over the matrix rate, both of"]
    lines[0] += " the least that the call needs"
    checked = [row for row in rows if row.error is not None]
    if checked:
        longest = max(row.error_T or 0 for row in checked)
        lines.append(
            f"error: largest relative one against fp64, over at most {longest} tokens; "
            f"{sum(not row.wrong for row in checked)} of {len(checked)} rows are right, that is "
            f"below {min(row.allowed or 0 for row in checked):.0e} times the root of the layers"
        )
    if any(row.work == "decode" for row in rows):
        lines.append("decode: one token of every row, after T tokens")
    for part, found in report["crossover"].items():
        for name, at in found.items():
            where = f"{at['faster']} is {at['ratio']:.1f}x as fast at {at['to']:,}"
            if at["length"] is not None:
                where = f"attention is faster below T = {at['length']:,}, {name} above; {where}"
            elif at["from"] < at["to"]:
                fast = f"{at['faster']} is faster at every length from {at['from']:,}"
                where = f"{fast}; {where}"
            lines.append(f"crossover attention / {name}, {part}: {where}")
    return lines


def show(report: dict[str, Any], rows: Sequence[Measured], failed: Sequence[Failed]) -> None:
    """All of it on stdout."""
    for line in head(report):
        console.say(line)
    console.table(COLUMNS, [cells(row) for row in rows])
    for one in failed:
        console.say(f"{label(one.part, one.name)}, {short(one.work)}, T {one.T:,}: {one.reason}")
    for line in foot(report, rows):
        console.say(line)
    for row in rows:
        if row.kernels:
            whole = sum(kernel["seconds"] for kernel in row.kernels)
            console.table(
                ["kernel", "calls", "ms", "%"],
                [
                    [k["name"], k["calls"], 1e3 * k["seconds"], 100 * k["seconds"] / whole]
                    for k in row.kernels
                ],
                title=f"\n{label(row.part, row.name)}, {short(row.work)}, T {row.T:,}: "
                f"{1e3 * whole:.4g} ms in kernels",
            )
