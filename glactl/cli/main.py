"""The command line.

Its commands, in the files beside this one, are thin: read the arguments, call one function, print.

Everything heavy is imported inside a command: torch takes over 0.7 s to import, and
`glactl --help` answers in a fifth of that.
"""

from typing import Annotated

import typer

from glactl import console
from glactl.cli import files as cli_files
from glactl.cli import measure as cli_measure
from glactl.cli import models as cli_models
from glactl.cli.options import Group

app = typer.Typer(
    cls=Group,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Build, train, test and measure gated linear attention language models.",
)


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="The version and its environment.")
    ] = False,
) -> None:
    if version:
        from glactl.versions import lines

        for line in lines():
            console.say(line)
    elif ctx.invoked_subcommand is None:
        console.say(ctx.get_help())


app.command(epilog="Example: glactl train --preset tiny --set model.mixer=gsa")(cli_models.train)
app.command(epilog="Example: glactl mqar --dims 64,128,256")(cli_models.mqar)
app.command("eval", epilog="Example: glactl eval --tasks swde,squad --data-dir data")(
    cli_models.evaluate
)
app.command(epilog='Example: glactl generate --prompt "The function " --temperature 0.7')(
    cli_models.generate
)
app.command(epilog="Example: glactl profile --seqlen 8192")(cli_measure.profile)
app.command("import", epilog="Example: glactl import ./gla-1.3B-100B --out runs/gla-1.3b")(
    cli_files.import_
)
app.command(epilog="Example: glactl export runs/NAME-7f3a91 --format fla --out gla-fla")(
    cli_files.export
)
app.add_typer(cli_files.data, name="data")
app.command(epilog="Example: glactl doctor --device cpu")(cli_measure.doctor)
app.command(epilog="Example: glactl report runs/NAME-7f3a91")(cli_measure.report)
app.command()(cli_files.schema)


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
