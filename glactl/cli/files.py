"""The commands of files: import, export, data, schema."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from glactl import console
from glactl.cli.options import Device, Group, Json, Quiet, Run


def import_(
    source: Annotated[
        str, typer.Argument(help="A folder, a file of weights in one, or owner/name on the hub.")
    ],
    out: Annotated[Path, typer.Option(help="The run folder to make.")],
    json: Json = False,
) -> None:
    """Make a run folder of a checkpoint of Hugging Face's Llama, Mistral or Mamba, or of fla."""
    with console.errors():
        from glactl.convert.command import import_command

        import_command(source, out=out, json=json)


def export(
    run: Run = None,
    format: Annotated[
        Literal["hf", "fla"],
        typer.Option(help="hf, for attention and mamba, or fla (flash-linear-attention)."),
    ] = "hf",
    out: Annotated[Path, typer.Option(help="The folder to make.")] = Path("export"),
    device: Device = None,
    json: Json = False,
) -> None:
    """Write a model as a checkpoint of another project, and compare its logits read back."""
    with console.errors():
        from glactl.convert.command import export_command

        export_command(run, format=format, out=out, device=device, json=json)


data = typer.Typer(cls=Group, rich_markup_mode=None, help="Turn text into data to train on.")


@data.command(
    "prepare", epilog="Example: glactl data prepare corpus/ --out data/corpus --tokenizer byte"
)
def data_prepare(
    source: Annotated[
        str | None,
        typer.Argument(
            help="A file or folder of txt, jsonl or parquet, pydoc, or owner/name[:config] of the "
            "hub."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder to make, or to go on with.")] = Path(
        "data/prepared"
    ),
    preset: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="fineweb_edu or slimpajama, in place of a source."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="byte, a tokenizer.json or its folder, or a name on the hub."),
    ] = None,
    valid: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Of documents held out; by default 0.0625."),
    ] = None,
    frame: Annotated[
        Literal["both", "bos"] | None,
        typer.Option(help="both: BOS and EOS around documents; bos: BOS alone."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents to read at most.")] = None,
    shard_mib: Annotated[
        float | None, typer.Option(metavar="MIB", help="Text a shard; by default 64.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Processes; by default one for each core.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Tokenise text once into shards that training reads from the disk; goes on where it was."""
    with console.errors():
        from glactl.data_command import prepare_command

        given = {
            "tokenizer": tokenizer,
            "valid": valid,
            "frame": frame,
            "limit": limit,
            "shard_mib": shard_mib,
        }
        prepare_command(
            source, out=out, preset=preset, given=given, jobs=jobs, json=json, quiet=quiet
        )


@data.command("check", epilog="Example: glactl data check data/corpus")
def data_check(
    folder: Annotated[Path, typer.Argument(help="A folder that `glactl data prepare` made.")],
    json: Json = False,
) -> None:
    """Hold every byte of prepared data against its hash."""
    with console.errors():
        from glactl.data_command import check_command

        check_command(folder, json=json)


def schema() -> None:
    """Print the JSON schema of a run spec, for editors."""
    with console.errors():
        from glactl.spec import json_schema

        console.result(json_schema())
