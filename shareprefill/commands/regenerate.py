"""The command `sp regenerate`."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shareprefill.commands.options import JsonOption, RemoteCodeOption, require_own

if TYPE_CHECKING:
    from shareprefill.regeneration.outcomes import Outcome

WORK = Path("artifacts") / "regenerated"


def regenerate_command(
    models: Annotated[Path, typer.Argument(help="The file of models, as docs/regenerate.md says.")],
    only: Annotated[
        list[str] | None, typer.Option(help="Only the model of this name. May be repeated.")
    ] = None,
    shard: Annotated[
        str | None, typer.Option(help="i/n: every n-th model from the i-th on, for parallel jobs.")
    ] = None,
    update: Annotated[
        bool, typer.Option("--update", help="Write the artifacts that differ or are missing.")
    ] = False,
    work: Annotated[
        Path, typer.Option(help="Folder of calibrations, artifacts and outcomes.")
    ] = WORK,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Keep nothing of an earlier run of these models.")
    ] = False,
    listed: Annotated[
        bool, typer.Option("--list", help="Print the names as a JSON array, and do nothing else.")
    ] = False,
    summary: Annotated[
        Path | None, typer.Option(help="Also write the table as Markdown to this file.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a file that is no such table with the summary.")
    ] = False,
    trust_remote_code: RemoteCodeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make the artifacts of a file of models anew, and compare them with the committed ones.

    Examples:
      sp regenerate models.toml --update
      sp regenerate models.toml --only small --json
    """
    from shareprefill.console import is_quiet
    from shareprefill.files import atomic_write_text, locked_output
    from shareprefill.regeneration.jobs import load_jobs, select_jobs

    if listed:
        jobs = select_jobs(load_jobs(models), only or (), shard)
        typer.echo(json.dumps([job.name for job in jobs]))
        return
    from shareprefill.regeneration.outcomes import to_json, to_markdown
    from shareprefill.regeneration.pipeline import regenerate

    if summary is not None:
        require_own(summary, (to_markdown([]).encode(),), force=force)
    # Now, not after hours: whether the file can be written.
    with nullcontext() if summary is None else locked_output(summary):
        outcomes = regenerate(
            models,
            work,
            only=only or (),
            shard=shard,
            update=update,
            fresh=fresh,
            trust_remote_code=trust_remote_code,
            quiet=is_quiet(),
        )
    if summary is not None:
        atomic_write_text(summary, to_markdown(outcomes))
    if as_json:
        typer.echo(to_json(outcomes))
    else:
        show_outcomes(outcomes)
    if any(outcome.failed for outcome in outcomes):
        raise typer.Exit(1)


def show_outcomes(outcomes: list[Outcome]) -> None:
    """The table, and below it why models are not equal."""
    from shareprefill.console import show_line, show_table
    from shareprefill.files import printable
    from shareprefill.regeneration.outcomes import HEADINGS, LESS_IMPORTANT

    rows = [outcome.cells() for outcome in outcomes]
    show_table("regenerated artifacts", HEADINGS, rows, less_important=LESS_IMPORTANT)
    for outcome in outcomes:
        for line in outcome.lines:
            show_line(f"{outcome.name}: {outcome.status}: {printable(line, 1000)}")
