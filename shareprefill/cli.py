"""The command `sp`: registers the commands, and turns expected errors into one line."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Annotated

import typer

from shareprefill.commands.audit import audit_command
from shareprefill.commands.bench import bench_command
from shareprefill.commands.bench_serve import bench_serve_command
from shareprefill.commands.calibrate import calibrate_command
from shareprefill.commands.cluster import cluster_command
from shareprefill.commands.common import (
    loads_told,
    may_be_sent,
    outcomes_kept,
    prompts_kept,
    register,
    stages_kept,
)
from shareprefill.commands.diff import diff_command
from shareprefill.commands.doctor import doctor_command
from shareprefill.commands.evaluate import eval_command
from shareprefill.commands.help import Group
from shareprefill.commands.inspect import inspect_command
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
from shareprefill.version import __version__

app = typer.Typer(
    name="sp",
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Make long prompts cheap: find out once which attention heads are alike, and let them share.

    Examples:
      sp calibrate --model sp-tiny --length 4K
      sp cluster
      sp run prompt.txt --compare-dense

    Environment: HF_HOME and HF_TOKEN as for all Hugging Face libraries, NO_COLOR for plain output,
    COLUMNS for the width.
    """
    if version:
        typer.echo(f"sp {__version__}")
        raise typer.Exit


_KEEPS = {
    calibrate_command: prompts_kept,
    eval_command: outcomes_kept,
    sweep_command: outcomes_kept,
    regenerate_command: stages_kept,
    push_command: may_be_sent,
    bench_serve_command: loads_told,
}
for _command in (
    *(calibrate_command, train_command, cluster_command, run_command, inspect_command),
    *(diff_command, doctor_command, eval_command, sweep_command, audit_command, bench_command),
    *(bench_serve_command, tune_command, regenerate_command, push_command, pull_command),
):
    register(app, _command, _KEEPS.get(_command))


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
