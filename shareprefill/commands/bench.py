"""`sp bench`: time to first token and memory, dense against shared sparse attention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shareprefill.bench.config import BenchConfig
from shareprefill.commands.options import (
    JsonOption,
    RemoteCodeOption,
    lengths_option,
    options_of,
)

if TYPE_CHECKING:
    from shareprefill.bench.measure import BenchResult


@options_of(BenchConfig, lengths=lengths_option)
def bench_command(
    options: dict[str, Any],
    artifact: Annotated[Path | None, typer.Option(help="Artifact of the model.")] = None,
    trust_remote_code: RemoteCodeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Time prefills of several lengths, dense and with shared sparse patterns.

    Examples:
      sp bench --shape llama-3.2-1b --layers 2 --lengths 8K
      sp bench --model sp-tiny --artifact clusters.st --lengths 4K,8K
    """
    from shareprefill.artifact import load_artifact
    from shareprefill.bench.measure import run_bench
    from shareprefill.console import note, status

    config = BenchConfig(**options)
    with status("measuring"):
        result = run_bench(
            config,
            None if artifact is None else load_artifact(artifact),
            trust_remote_code=trust_remote_code,
            progress=lambda row: note(f"{row.tokens} {row.attention}"),
        )
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=1))
    else:
        show_bench(result)


def show_bench(result: BenchResult) -> None:
    """What was measured, the rows, and the notes."""
    from shareprefill.bench.table import COLUMNS, LESS_IMPORTANT, table_rows
    from shareprefill.console import show_line, show_table

    title = f"{result.model}, {result.dtype}, {result.device}"
    show_table(title, COLUMNS, table_rows(result), less_important=LESS_IMPORTANT)
    for note in result.notes:
        show_line(f"- {note}")
