"""What `glactl profile` writes.

profiles/20250131-120000-cpu/   -2, -3, ... where the name is taken
  results.json                  all that was measured, with the machine and the versions
  results.csv                   a line a measured call; times in seconds, memory in bytes
  seqlen.svg, seqlen.png        operators: time against length, and the share of the floor
"""

import csv
import json
from dataclasses import asdict, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from glactl.console import finite
from glactl.profile_cases import Measured
from glactl.run import new_folder

COLOURS = {"attention": "#444444", "gla": "#1f77b4", "decay": "#2ca02c", "gsa": "#d62728"}


def write(
    out: Path, device: str, report: dict[str, Any], rows: list[Measured], scanned: list[Measured]
) -> Path:
    """Write the report to a new folder in `out`, which is returned."""
    folder = new_folder(out / f"{datetime.now():%Y%m%d-%H%M%S}-{device}")
    (folder / "results.json").write_text(json.dumps(finite(report), indent=1) + "\n")
    with open(folder / "results.csv", "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, [field.name for field in fields(Measured)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows + scanned)
    _plot(folder, report, rows, scanned)
    return folder


def _plot(
    folder: Path, report: dict[str, Any], rows: list[Measured], scanned: list[Measured]
) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    both = [r for r in rows + scanned if r.part == "operator" and r.work == "forward+backward"]
    names = list(dict.fromkeys(r.name for r in both))
    longest = max(r.T for r in both)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 4.2), width_ratios=(3, 2), layout="constrained"
    )
    for name in names:
        mine = sorted((r for r in both if r.name == name), key=lambda r: r.T)
        T, per_token = [r.T for r in mine], [1e6 * r.median / (r.batch * r.T) for r in mine]
        left.plot(T, per_token, marker="o", color=COLOURS[name], label=name)
    for name, at in report["crossover"].items():
        if at["length"] is not None:
            left.axvline(at["length"], color=COLOURS[name], linestyle=":", linewidth=1)
    lengths = sorted({r.T for r in both})
    left.set_xscale("log", base=2)
    left.set_yscale("log")
    left.set_xticks(lengths, [f"{T:,}" for T in lengths])
    left.minorticks_off()
    left.set_xlabel("sequence length T (tokens)")
    left.set_ylabel("µs a token")
    left.set_title("operators, forward + backward", fontsize=10)
    left.grid(alpha=0.3)
    left.legend(frameon=False)

    bars = [r for r in rows if longest == r.T]
    labels = [f"{r.name} {'model ' if r.part == 'model' else ''}{_short(r.work)}" for r in bars]
    shares = [100 * r.of_floor for r in bars]
    right.barh(labels, shares, color=[COLOURS.get(r.name, "#888888") for r in bars])
    for i, share in enumerate(shares):
        right.text(share, i, f" {share:.0f}", va="center", fontsize=8)
    right.invert_yaxis()
    right.margins(x=0.12)
    right.tick_params(axis="y", labelsize=8)
    right.set_xlabel("% of the floor (100: nothing is wasted)")
    right.set_title(f"T = {longest:,}", fontsize=10)
    figure.suptitle(f"{report['device']}, {report['dtype']}", fontsize=10)
    for suffix in ("svg", "png"):
        figure.savefig(folder / f"seqlen.{suffix}", dpi=150)
    plt.close(figure)


def _short(work: str) -> str:
    return "fwd" if work == "forward" else "fwd+bwd"
