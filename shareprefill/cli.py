"""The command `sp`: registers the commands, and turns expected errors into one line."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Annotated

import typer

from shareprefill import __version__
from shareprefill.commands.audit import audit_command
from shareprefill.commands.bench import bench_command
from shareprefill.commands.calibrate import calibrate_command
from shareprefill.commands.cluster import cluster_command
from shareprefill.commands.diff import diff_command
from shareprefill.commands.doctor import doctor_command
from shareprefill.commands.evaluate import eval_command
from shareprefill.commands.inspect import inspect_command
from shareprefill.commands.options import with_home
from shareprefill.commands.pull import pull_command
from shareprefill.commands.push import push_command
from shareprefill.commands.regenerate import regenerate_command
from shareprefill.commands.run import run_command
from shareprefill.commands.streams import open_streams, written_output
from shareprefill.commands.sweep import sweep_command
from shareprefill.commands.train import train_command
from shareprefill.commands.tune import tune_command
from shareprefill.errors import ShareprefillError
from shareprefill.files import printable

app = typer.Typer(
    name="sp",
    help="Make long prompts cheap: calibrate a model's attention patterns, cluster its heads, and "
    "run its prefill with shared sparse attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Shared sparse attention patterns for long prompts."""
    if version:
        typer.echo(f"sp {__version__}")
        raise typer.Exit


for _command in (
    *(calibrate_command, train_command, cluster_command, run_command, inspect_command),
    *(diff_command, doctor_command, eval_command, sweep_command, audit_command, bench_command),
    *(tune_command, regenerate_command, push_command, pull_command),
):
    app.command(_command.__name__.removesuffix("_command"))(with_home(_command))


def main() -> None:
    """Runs `sp`: an expected error is one line on stderr and exit status 1."""
    try:
        open_streams()
        with written_output():
            app()
    except ShareprefillError as error:
        with suppress(OSError):
            typer.echo(f"sp: {printable(error, 2000)}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
