"""A sweep as jobs of a SLURM cluster, through submitit.

Each job runs the same `glactl mqar` on the sweep's folder, where trials are claimed one by one
(claims.py): jobs may begin late, end early and be as many as there is room for, and a trial
that was cut short goes on in another. The folder is one that all nodes share, on a file system
whose locks hold between nodes. Where there is no SLURM, submitit starts processes here.

Source: submitit 1.5, https://github.com/facebookincubator/submitit.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glactl import console
from glactl.sweep.command import mqar_command
from glactl.sweep.grid import make_grid
from glactl.sweep.prune import parse_prune
from glactl.sweep.run import SweepStopped
from glactl.tasks.errors import PackageMissing

DAY = 24 * 60  # minutes of a job, where --minutes does not say
SPARE = 10  # minutes of a job beyond --minutes, for tables, figures and a slow beginning
COMMON = ("mem_gb", "gpus_per_node", "cpus_per_task")  # submitit's own; all else is SLURM's
GRID = ("file", "preset", "dims", "mixers", "lrs", "seeds", "pairs", "seqlen", "form")


def submit(options: dict[str, Any], nodes: int, slurm: Sequence[str] = ()) -> list[str]:
    """Hand a sweep to the cluster and come back at once.

    Args:
        options: the arguments of `mqar_command`.
        nodes: jobs, 1 or more, each of one node.
        slurm: KEY=VALUE, of sbatch: partition=gpu, gpus_per_node=8.

    Returns:
        the numbers of the jobs.

    Raises:
        ValueError: an option, or a spec that the options make; before anything is handed over.
        PackageMissing: submitit is not here.
    """
    grid = make_grid(**{name: options.get(name) for name in GRID})
    parse_prune(options.get("prune"))
    parameters = _parameters(slurm)
    try:
        import submitit
    except ModuleNotFoundError:
        raise PackageMissing(
            "--nodes needs the package submitit; pip install 'glactl[slurm]'"
        ) from None
    folder = (options.get("out") or Path("sweeps") / grid.preset).resolve()
    there = options | {"out": folder, "quiet": True, "json": False}
    if options.get("file") is not None:
        there["file"] = options["file"].resolve()
    minutes = options.get("minutes")
    logs = folder / "jobs"
    executor = submitit.AutoExecutor(folder=logs)
    longest = DAY if minutes is None else round(minutes) + SPARE
    executor.update_parameters(name=f"mqar-{grid.preset}", timeout_min=longest, **parameters)
    with executor.batch():
        jobs = [executor.submit(work, there) for _ in range(nodes)]
    numbers = [str(job.job_id) for job in jobs]
    console.note(
        f"{len(grid.trials)} trials in {nodes} job(s) of {executor.cluster}: {', '.join(numbers)}; "
        f"logs in {logs}; the same command with --plot-only in the place of --nodes shows what "
        "there is"
    )
    return numbers


def work(options: dict[str, Any]) -> str:
    """A job: how the sweep ended."""
    try:
        mqar_command(**options)
    except SweepStopped as stopped:
        return str(stopped)
    return "done"


def _parameters(slurm: Sequence[str]) -> dict[str, int | str]:
    found: dict[str, int | str] = {}
    for part in slurm:
        name, equal, value = part.partition("=")
        if not (name and equal and value):
            raise ValueError(f"--slurm {part!r}; allowed: KEY=VALUE, such as partition=gpu")
        found[name if name in COMMON else f"slurm_{name}"] = (
            int(value) if value.isdigit() else value
        )
    return found
