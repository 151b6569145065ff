"""Run and inspect the pipeline from the command line, without Prefect."""

from __future__ import annotations

import sys

import typer
from rich.markup import escape

from lilpipe.cli import model_commands, pipeline_commands
from lilpipe.errors import LilpipeError
from lilpipe.terminal import make_console

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(pipeline_commands.app)
app.add_typer(model_commands.app)


def main() -> None:
    """Entry point: user errors (``LilpipeError``) are printed without a traceback."""
    try:
        app()
    except LilpipeError as error:
        make_console(stderr=True, highlight=False, soft_wrap=True).print(f"[red bold]error[/]: {escape(str(error))}")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
