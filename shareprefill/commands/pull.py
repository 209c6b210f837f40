"""`sp pull`: an artifact from a repository of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shareprefill.commands.options import FileOption, ForceOption, RepositoryArgument


def pull_command(
    repository: RepositoryArgument,
    out: Annotated[
        Path | None, typer.Option(help="The file to write; its own name by default.")
    ] = None,
    file: FileOption = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit; the main branch by default.")
    ] = None,
    force: ForceOption = False,
) -> None:
    """Get an artifact from a repository of the hub; it is checked before it gets its name.

    Example:
      sp pull organisation/name --out clusters.st
    """
    from shareprefill.console import status
    from shareprefill.files import printable
    from shareprefill.hub.transfer import pull

    with status("talking to the hub"):
        artifact, path = pull(repository, out, file=file, revision=revision, force=force)
    typer.echo(
        f"{path}: made for {printable(artifact.model)}, {artifact.fingerprint.describe()}, "
        f"{artifact.heads} heads in all"
    )
