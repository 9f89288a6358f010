"""`glactl profile --baseline`: the rows of a profile beside those of an earlier one.

For medians m, b of a row now and then, and p10, p90 the tenth and ninetieth percentiles,

    change = m / b - 1                                                                     (1)
    noise = sqrt(s(now)^2 + s(then)^2),   s = (p90 - p10) / (2 median)                     (2)
    a regression:   change - noise > f                                                     (3)

f being --fail-above: a row fails where even the lower end of the change is above. A row that was
measured then and cannot be now is a regression too.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glactl import console
from glactl.profile.cases import Failed, Measured

SAME = ("device", "threads", "dtype")  # what two profiles must have in common
Key = tuple[str, str, str, int, int]


class Regression(RuntimeError):
    """Rows are slower than the baseline's."""

    exit_code = 1


@dataclass(frozen=True)
class Compared:
    """A row beside its baseline: (1), (2) and, by (3), whether it failed; None: not measured."""

    key: Key
    before: float
    now: float | None
    change: float | None
    noise: float | None
    failed: bool


def parse_share(text: str) -> float:
    """0.05 of "5%" or "0.05". Raises ValueError for what is no number of 0 or more."""
    number = text.strip().removesuffix("%")
    try:
        share = float(number) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not 0 <= share < math.inf:
        raise ValueError(f"fail_above is {text!r}; allowed: a share of 0 or more, 5% or 0.05")
    return share


def read(path: Path) -> dict[str, Any]:
    """The results.json of a profile, or of a profile's folder.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is none.
    """
    path = path / "results.json" if path.is_dir() else path
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if {"results", "settings", *SAME} <= found.keys():
            return dict(found)
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError):
        pass
    raise ValueError(f"{path} is not the results.json of a profile by this version")


def check(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ValueError where the two are not of one machine and element type."""
    for name in SAME:
        if before[name] != now[name]:
            raise ValueError(
                f"baseline {path} has {name} {before[name]!r}; allowed: {now[name]!r}, as here"
            )


def compare(
    before: dict[str, Any], rows: Sequence[Measured], failed: Sequence[Failed], above: float
) -> list[Compared]:
    """The rows that the baseline has too. Raises ValueError where there is none."""
    found = list(_compare(before, rows, failed, above))
    if not found:
        raise ValueError("baseline has no row of the calls measured here")
    return found


def _compare(
    before: dict[str, Any], rows: Sequence[Measured], failed: Sequence[Failed], above: float
) -> Iterator[Compared]:
    now = {row.key: row for row in rows}
    gone = {row.key for row in failed}
    for old in before["results"]:
        key: Key = (old["part"], old["name"], old["work"], old["T"], old["batch"])
        if key in gone:
            yield Compared(key, old["median"], None, None, None, True)
        elif key in now:
            row = now[key]
            change = row.median / old["median"] - 1  # (1)
            noise = math.hypot(
                _spread(row.median, row.p10, row.p90),
                _spread(old["median"], old["p10"], old["p90"]),
            )  # (2)
            failed_here = change - noise > above  # (3)
            yield Compared(key, old["median"], row.median, change, noise, failed_here)


def _spread(median: float, p10: float, p90: float) -> float:
    return (p90 - p10) / (2 * median)


def show(compared: Sequence[Compared], path: Path, above: float, quiet: bool = False) -> None:
    """The table on stdout, not if quiet. Raises Regression where a row failed."""
    rows = [
        [
            f"{part} {name}",
            work,
            T,
            1e3 * one.before,
            None if one.now is None else 1e3 * one.now,
            None if one.change is None else f"{100 * one.change:+.1f} %",
            None if one.noise is None else f"±{100 * one.noise:.1f} %",
            "regression" if one.failed else "ok",
        ]
        for one in compared
        for part, name, work, T, _ in [one.key]
    ]
    columns = ["", "work", "T", "ms then", "ms now", "change", "noise", ""]
    if not quiet:
        console.table(columns, rows, title=f"beside {path}")
    failed = [one for one in compared if one.failed]
    if failed:
        names = ", ".join(f"{k[0]} {k[1]} {k[2]} T={k[3]:,}" for k in (one.key for one in failed))
        raise Regression(f"{len(failed)} of {len(compared)} rows are over {above:.0%}: {names}")
