"""`sp doctor`: what works here and what does not."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from shareprefill.commands.options import JsonOption, RemoteCodeOption

if TYPE_CHECKING:
    from shareprefill.doctor import Check


def doctor_command(
    model: Annotated[
        str | None,
        typer.Option(help="Print instead what a session does with each layer of this model."),
    ] = None,
    trust_remote_code: RemoteCodeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Print versions and the device, and what works here and what does not.

    Examples:
      sp doctor
      sp doctor --model Qwen/Qwen3-8B
    """
    from shareprefill.console import status
    from shareprefill.doctor import diagnose, diagnose_model

    with status("checking"):
        if model is None:
            checks = diagnose()
        else:
            checks = diagnose_model(model, trust_remote_code=trust_remote_code)
    if as_json:
        typer.echo(json.dumps([asdict(check) for check in checks], indent=1))
    else:
        show_checks(checks)
    if any(check.broken for check in checks):
        raise typer.Exit(1)


def show_checks(checks: list[Check]) -> None:
    """What `sp doctor` found."""
    from shareprefill.console import show_table

    rows = [(check.name, check.state, check.detail) for check in checks]
    show_table("sp doctor", ("what", "state", "detail"), rows, prose=("state", "detail"))
