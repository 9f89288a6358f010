"""`glactl report`: the page of a result, one file to read and to send.

A run's page is made here, of what the run has written so far. Sweeps, evaluations and profiles
write theirs when they end, and that of a profile is made again of its results.json.
"""

from pathlib import Path

from glactl import console
from glactl.profile import report as profile_report
from glactl.report import run as report_run
from glactl.run import NoRun, Run

# file that only such a folder has -> what it is, and what makes its page
OTHERS = {
    "sweep.yaml": ("sweep", "the sweep's command with --plot-only"),
    "summary.json": ("evaluation", "glactl eval, when it ends"),
}


def report_command(path: Path | None, *, json: bool = False) -> None:
    """Run `glactl report`; the arguments are the command's options.

    Raises:
        FileNotFoundError: no such folder, nothing in it that a page could be made of, or no page
            of a sweep or an evaluation.
        ValueError: a results.json that is no profile's.
    """
    folder = Run.newest().path if path is None else path
    kind, page = make(folder)
    if json:
        console.result({"kind": kind, "path": str(page), "bytes": page.stat().st_size})
    else:
        console.say(f"{page}: {kind}, {page.stat().st_size / 1024:,.0f} KiB, needs no network")


def make(folder: Path) -> tuple[str, Path]:
    """What the folder holds and its page, made if it is of a run or a profile. Raises as above."""
    page = folder / "report.html"
    if (folder / "spec.resolved.yaml").exists():
        page.write_text(report_run.html(Run.open(folder)), encoding="utf-8")
        return "run", page
    if (folder / "results.json").exists():
        try:
            text = profile_report.html(folder)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{folder / 'results.json'} is not of a profile by this version: {error}"
            ) from None
        page.write_text(text, encoding="utf-8")
        return "profile", page
    for name, (kind, maker) in OTHERS.items():
        if (folder / name).exists():
            if not page.exists():
                raise NoRun(f"{folder} has no report.html; that of its {kind} is made by {maker}")
            return kind, page
    raise NoRun(
        f"{folder} has no result; allowed: the folder of a run, a sweep, an evaluation or a profile"
    )
