"""The commands `sp push` and `sp pull`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RepositoryArgument = Annotated[str, typer.Argument(help="organisation/name.")]
FileOption = Annotated[str | None, typer.Option("--file", help="Its name in the repository.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace what is there.")]


def push_command(
    artifact: Annotated[Path, typer.Argument(help="An artifact.")],
    repository: RepositoryArgument,
    file: FileOption = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make a missing repository private.")
    ] = False,
    force: ForceOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the model card, and send nothing.")
    ] = False,
) -> None:
    """Put an artifact into a repository of the hub, with a model card."""
    from shareprefill.hub.sharing import push

    found = push(artifact, repository, file=file, private=private, force=force, dry_run=dry_run)
    if found.address is None:
        typer.echo(found.card, nl=False)
        typer.echo(
            f"{found.repository} would get {found.file} and README.md; nothing was sent", err=True
        )
    else:
        typer.echo(f"{artifact}: pushed as {found.file}, {found.address}")


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
    """Get an artifact from a repository of the hub; it is checked before it gets its name."""
    from shareprefill.files import printable
    from shareprefill.hub.sharing import pull

    artifact, path = pull(repository, out, file=file, revision=revision, force=force)
    typer.echo(
        f"{path}: made for {printable(artifact.model)}, {artifact.fingerprint.describe()}, "
        f"{artifact.heads} heads in all"
    )
