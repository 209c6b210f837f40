"""`sp push`: an artifact into a repository of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shareprefill.commands.options import FileOption, ForceOption, RepositoryArgument


def push_command(
    artifact: Annotated[Path, typer.Argument(help="An artifact.")],
    repository: RepositoryArgument,
    file: FileOption = None,
    private: Annotated[
        bool,
        typer.Option("--private", help="Make a missing repository private; refuse a public one."),
    ] = False,
    force: ForceOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the model card, and send nothing.")
    ] = False,
) -> None:
    """Put an artifact into a repository of the hub, with a model card.

    Example:
      sp push clusters.st organisation/name --dry-run
    """
    from shareprefill.console import status
    from shareprefill.hub.transfer import push

    with status("talking to the hub"):
        found = push(artifact, repository, file=file, private=private, force=force, dry_run=dry_run)
    if found.address is None:
        typer.echo(found.card, nl=False)
        typer.echo(
            f"{found.repository} would get {found.file} and README.md; nothing was sent", err=True
        )
    else:
        typer.echo(f"{artifact}: pushed as {found.file}, {found.address}")
