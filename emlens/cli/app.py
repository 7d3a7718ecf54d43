"""The application that the verbs are put on."""

from __future__ import annotations

from typing import Annotated

import typer

EPILOG = """\b
Every verb: --quiet (nothing but the result), --json (one JSON object), --traceback.
Results go to standard output, progress and messages to standard error.
Exit codes: 0 done; 1 failed; 2 wrong usage, or input that cannot be used; 130 interrupted;
141 whoever read the output left early.
"""

app = typer.Typer(
    name="emlens",
    help="Find, train, edit and measure the directions by which finetuning changes a chat model.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        from emlens import __version__

        typer.echo(f"emlens {__version__}")
        raise typer.Exit


@app.callback()
def _emlens(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line."""
    app(prog_name="emlens")
