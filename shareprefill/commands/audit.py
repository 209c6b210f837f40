"""`sp audit`: a page about an artifact."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from shareprefill.commands.options import JsonOption, require_same
from shareprefill.commands.verdicts import judge_artifact

PAGE = Path("audit.html")


def audit_command(
    artifact: Annotated[Path, typer.Argument(help="An artifact.")] = Path("clusters.st"),
    calibration: Annotated[
        Path | None,
        typer.Option(help="The calibration folder that it was made from, for the maps."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The page to write; audit.html by default, none with --json."),
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace a file that is no such page, or another model's."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a page about an artifact: clusters, maps, distances, stability, recall and density.

    Example:
      sp audit clusters.st --calibration artifacts/sp-tiny/calibration --out audit.html
    """
    from shareprefill.artifact import load_artifact
    from shareprefill.audit.findings import examine, to_dict
    from shareprefill.console import note, status
    from shareprefill.files import atomic_write_text, locked_output, printable
    from shareprefill.report.marks import AUDIT

    loaded = load_artifact(artifact)
    path = out or (None if as_json else PAGE)
    if path is not None:
        require_same(path, AUDIT, loaded.model, force=force)
    with status("auditing"), nullcontext() if path is None else locked_output(path):
        findings = examine(loaded, calibration)
        if path is not None:
            from shareprefill.audit.page import build_page

            doubts = judge_artifact(loaded, artifact).warnings
            atomic_write_text(path, build_page(findings, doubts).html())
    for warning in findings.warnings:
        note(f"sp: warning: {warning}")
    if findings.missing:
        note(f"sp: without maps, as {findings.missing}: name the folder with --calibration")
    if as_json:
        typer.echo(json.dumps(to_dict(findings), indent=1, allow_nan=False))
    else:
        typer.echo(
            f"{printable(path)}: {findings.heads.count} heads, "
            f"{len(findings.heads.sizes())} clusters, {findings.noise.share:.0%} noise"
        )
