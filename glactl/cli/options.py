"""What the commands share: options, and groups of commands whose usage errors are one line."""

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from glactl import console


class Group(TyperGroup):
    """Commands whose usage errors are one line too, as all other errors are."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Run the command named in the arguments, and exit."""
        alone = options.pop("standalone_mode", True)
        try:
            code = super().main(*args, **options | {"standalone_mode": False})
        except typer.TyperException as error:
            if not alone:
                raise
            console.error(error.format_message())
            sys.exit(error.exit_code)
        if not alone:
            return code
        sys.exit(code if isinstance(code, int) else 0)


Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda or cuda:1; by default CUDA if there is one.", metavar="NAME"),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]
Json = Annotated[bool, typer.Option("--json", help="Results as JSON lines on stdout.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a field: --set model.d_model=256."),
]
Run = Annotated[
    str | None, typer.Argument(metavar="[RUN]", help="A run folder; by default the newest one.")
]
