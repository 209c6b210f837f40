"""`sp bench`: time to first token and memory, dense against shared sparse attention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shareprefill.bench.config import BenchConfig
from shareprefill.commands.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    RemoteCodeOption,
    parse_lengths,
)

if TYPE_CHECKING:
    from shareprefill.bench.measure import BenchResult

# Defaults are read off the configuration, where alone they live.
_BENCH = BenchConfig()
_LENGTHS = ",".join(map(str, _BENCH.lengths))


def bench_command(
    lengths: Annotated[
        str, typer.Option(help="Tokens of the prompts, with commas between them; 128K is 131072.")
    ] = _LENGTHS,
    shape: Annotated[
        str,
        typer.Option(help="Random weights of a shape: llama-3.1-8b, llama-3.2-1b, llama-3.1-70b."),
    ] = _BENCH.shape,
    model: Annotated[
        str | None, typer.Option(help="A model to load instead, with --artifact.")
    ] = _BENCH.model,
    artifact: Annotated[Path | None, typer.Option(help="Artifact of the model.")] = None,
    layers: Annotated[
        int | None, typer.Option(help="Layers of the shape; fewer let longer prompts fit.")
    ] = _BENCH.layers,
    density: Annotated[
        float, typer.Option(help="Share of the blocks that a shape's patterns cover, about.")
    ] = _BENCH.density,
    chunk: Annotated[
        int | None,
        typer.Option(help="Tokens at a time, 0 for all at once; by default what memory allows."),
    ] = _BENCH.chunk,
    dense: Annotated[bool, typer.Option(help="Time dense attention too.")] = _BENCH.dense,
    device: DeviceOption = _BENCH.device,
    dtype: DtypeOption = _BENCH.dtype,
    trust_remote_code: RemoteCodeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Time prefills of several lengths, dense and with shared sparse patterns."""
    from shareprefill.artifact import load_artifact
    from shareprefill.bench.measure import run_bench

    config = BenchConfig(
        lengths=parse_lengths(lengths),
        shape=shape,
        model=model,
        layers=layers,
        density=density,
        chunk=chunk,
        dense=dense,
        device=device,
        dtype=dtype,
    )
    result = run_bench(
        config,
        None if artifact is None else load_artifact(artifact),
        trust_remote_code=trust_remote_code,
        progress=lambda row: typer.echo(f"{row.tokens} {row.attention}", err=True),
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
