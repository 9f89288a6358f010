"""The commands that measure and tell: profile, doctor, report."""

from pathlib import Path
from typing import Annotated

import typer

from glactl import console
from glactl.cli.options import Device, Json, Quiet


def profile(
    seqlen: Annotated[
        str | None,
        typer.Option(metavar="N,N", help="Lengths: 512,1024 or 512:8192:x2; by default 1024."),
    ] = None,
    mixers: Annotated[
        str | None,
        typer.Option(
            metavar="A,B", help="Of attention, gla, decay, gsa (the default) and a spec's mixers."
        ),
    ] = None,
    spec: Annotated[
        Path | None, typer.Option(help="Measure this run spec's model, not one of each mixer.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(metavar="NAME", help="Or that of a preset, such as tiny.")
    ] = None,
    parts: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Of operators, layers, models; by default no layers."),
    ] = None,
    phase: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Of models: train, prefill, decode; by default all."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens a call; else the longest length.")
    ] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="By default 4.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Of a head.")] = None,
    dtype: Annotated[str | None, typer.Option(metavar="NAME", help="fp32, bf16 or fp16.")] = None,
    fla: Annotated[
        bool, typer.Option("--fla", help="flash-linear-attention's operators beside ours.")
    ] = False,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="The time of every kernel of a call too.")
    ] = False,
    baseline: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Measure what this results.json has, and compare."),
    ] = None,
    fail_above: Annotated[
        str, typer.Option(metavar="SHARE", help="Slower than the baseline by more fails.")
    ] = "5%",
    tune: Annotated[
        bool,
        typer.Option(
            "--tune", help="Search tile shapes for the GPU's kernels; later runs use them."
        ),
    ] = False,
    out: Annotated[Path, typer.Option(help="The folder that results go to.")] = Path("profiles"),
    device: Device = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure operators, layers and models on the device at hand."""
    with console.errors():
        if tune:
            from glactl.profile.tune import tune_command

            tune_command(
                seqlen=seqlen or "1024",
                mixers=mixers,
                spec=spec,
                tokens=tokens,
                heads=heads or 4,
                width=width,
                dtype=dtype,
                device=device,
                json=json,
                quiet=quiet,
            )
            return
        from glactl.profile.command import profile_command

        profile_command(
            seqlen=seqlen,
            mixers=mixers,
            spec=spec,
            preset=preset,
            parts=parts,
            phase=phase,
            tokens=tokens,
            heads=heads,
            width=width,
            dtype=dtype,
            fla=fla,
            kernels=kernels,
            baseline=baseline,
            fail_above=fail_above,
            out=out,
            device=device,
            json=json,
            quiet=quiet,
        )


def doctor(device: Device = None, json: Json = False) -> None:
    """Tell what this machine has, what is missing and what that costs."""
    with console.errors():
        from glactl.doctor import doctor_command

        doctor_command(device=device, json=json)


def report(
    path: Annotated[
        Path | None,
        typer.Argument(
            help="The folder of a run, sweep, evaluation or profile; by default the newest run."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Write report.html into a result's folder: tables and figures in one file."""
    with console.errors():
        from glactl.report.command import report_command

        report_command(path, json=json)
