"""`glactl profile`: operators, layers and models on the device at hand, beside what it could do."""

from dataclasses import asdict
from pathlib import Path

import torch

from glactl import console
from glactl.device import pick_device
from glactl.measure import Rates, rates
from glactl.profile import baseline as profile_baseline
from glactl.profile.cases import Failed, Measured, crossovers
from glactl.profile.plan import Plan
from glactl.profile.process import run, warm
from glactl.profile.report import write
from glactl.profile.tables import show


class WrongResults(RuntimeError):
    """A row is not what fp64 says, or ended in an error."""

    exit_code = 1


class NoMemory(RuntimeError):
    """No row could be measured, for lack of memory."""

    exit_code = 4


def profile_command(
    *,
    seqlen: str | None = None,
    mixers: str | None = None,
    spec: Path | None = None,
    preset: str | None = None,
    parts: str | None = None,
    phase: str | None = None,
    tokens: int | None = None,
    heads: int | None = None,
    width: int | None = None,
    dtype: str | None = None,
    fla: bool = False,
    kernels: bool = False,
    baseline: Path | None = None,
    fail_above: str = "5%",
    device: str | None = None,
    out: Path = Path("profiles"),
    json: bool = False,
    quiet: bool = False,
) -> None:
    """Run `glactl profile`; the arguments are the command's options.

    What is None is the baseline's where there is one.

    Raises:
        ValueError: an option out of range, a spec or a baseline that cannot be used.
        FileNotFoundError: no such spec or baseline.
        WrongResults: rows differ from fp64 by more than rounding, or ended in an error.
        NoMemory: there was too little for any row.
        profile_baseline.Regression: rows are slower than the baseline's.
    """
    above = profile_baseline.parse_share(fail_above)
    before = None if baseline is None else profile_baseline.read(baseline)
    given = {
        "seqlen": seqlen,
        "mixers": mixers,
        "spec": None if spec is None else str(spec),
        "preset": preset,
        "parts": parts,
        "phase": phase,
        "tokens": tokens,
        "heads": heads,
        "width": width,
        "dtype": dtype,
        "fla": fla or None,
    }
    old = {} if before is None else before["settings"]
    settings = {k: old.get(k) if v is None else v for k, v in given.items()}
    where = pick_device(device)
    plan = Plan(settings, where, kernels)
    report = plan.about()
    if before is not None and baseline is not None:
        profile_baseline.check(baseline, before, report)
    reached = rates(where, plan.dtype)
    if where.type == "cuda":
        torch.cuda.empty_cache()  # the memory is the cases' now
    rows, failed, scanned = _run(plan, reached, quiet)
    report |= {
        "rates": asdict(reached),
        "crossover": crossovers(rows + scanned),
        "results": [asdict(r) for r in rows],
        "failed": [asdict(r) for r in failed],
        "scan": [asdict(r) for r in scanned],
    }
    compared = None
    if before is not None:
        compared = profile_baseline.compare(before, rows, failed, above)
        report["baseline"] = {"path": str(baseline), "rows": [asdict(c) for c in compared]}
    folder, files = write(out, where.type, report, rows, failed, scanned)
    if json:
        console.result(report | {"path": str(folder)})
    else:
        show(report, rows, failed)
    console.note(f"wrote {folder}: {', '.join(files)}")
    _judge(rows, failed)
    if compared is not None and baseline is not None:
        profile_baseline.show(compared, baseline, above, quiet=json)


def _judge(rows: list[Measured], failed: list[Failed]) -> None:
    """Raise where a row is wrong; a lack of memory is no fault unless there is nothing else."""
    wrong = [f"{r.part} {r.name} {r.work} T={r.T:,}: error {r.error:.1e}" for r in rows if r.wrong]
    wrong += [
        f"{r.part} {r.name} {r.work} T={r.T:,}: {r.reason}"
        for r in failed
        if not r.reason.startswith("out of memory") and not r.name.endswith(" fla")
    ]
    if wrong:
        raise WrongResults(f"{len(wrong)} rows are not right: {'; '.join(wrong)}")
    if not rows:
        raise NoMemory(f"out of memory in all of {len(failed)} rows; --tokens says how many a call")


def _run(
    plan: Plan, reached: Rates, quiet: bool
) -> tuple[list[Measured], list[Failed], list[Measured]]:
    """Measured rows, failed rows, and those of the scan."""
    rows: list[Measured] = []
    failed: list[Failed] = []
    scanned: list[Measured] = []
    cases, scans = plan.cases(reached), plan.scans(reached)
    first = [case for case in cases if case.items[0][1] == plan.lengths[0]]
    ahead = len(first) if plan.device.type == "cuda" else 0
    turns = ahead + sum(len(case.items) for case in cases + scans)
    with console.progress(turns, "profile", quiet=quiet) as advance:
        if ahead:
            warm(first, advance)
        for case in cases + scans:
            for row in run(case):
                if isinstance(row, Failed):
                    failed += [] if case.scan else [row]
                else:
                    (scanned if case.scan else rows).append(row)
                advance(1)
    return rows, failed, scanned
