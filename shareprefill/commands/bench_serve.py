"""`sp bench-serve`: a vLLM server under load, dense and shared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shareprefill.bench.config import ServeBenchConfig
from shareprefill.commands.options import (
    ForceOption,
    JsonOption,
    lengths_option,
    options_of,
    repeated,
    require_same,
    required,
)

if TYPE_CHECKING:
    from shareprefill.bench.serving import ServeRow


@options_of(
    ServeBenchConfig,
    lengths=lengths_option,
    rates=repeated("--rate"),
    model=required("The served model, a folder or a hub id."),
)
def bench_serve_command(
    options: dict[str, Any],
    plot: Annotated[Path | None, typer.Option(help="Also draw the rows into this SVG.")] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Send load to a vLLM server that runs with the plug-in, dense and shared.

    It runs vLLM's own benchmark (vllm bench serve) once for every length, rate and kind. Where it
    is stopped, or a load fails, the table has those that ended.

    Example:
      sp bench-serve --model MODEL --lengths 8K,32K --rate 0.5 --rate 1 --plot load.svg
    """
    from shareprefill.bench.serving import KINDS, draw, run_serve_bench
    from shareprefill.console import note, progress
    from shareprefill.files import atomic_write_bytes
    from shareprefill.report.drawing import figure_file, figure_style
    from shareprefill.report.marks import LOAD, mark_of

    if plot is not None:
        require_same(plot, LOAD, options["model"], force=force)
    config = ServeBenchConfig(**options)
    rows: list[ServeRow] = []
    try:
        with progress("loads") as advance:
            total = len(config.lengths) * len(config.rates) * len(KINDS)
            advance(0, total)
            for row in run_serve_bench(config):
                rows.append(row)
                note(f"{row.tokens} tokens, {row.rate:g} requests/s, {row.attention}")
                advance(len(rows), total)
    finally:
        # Also of a load that failed or was stopped: minutes were spent on each of these.
        if as_json and rows:
            typer.echo(json.dumps([row.to_dict() for row in rows], indent=1))
        elif rows:
            show_rows(config.model, rows)
    if any(row.sparse_rows is None for row in rows):
        note(
            "the server shows no counters, so whether shared prompts were sparse is not known: "
            "start it with PROMETHEUS_MULTIPROC_DIR naming an empty folder (docs/vllm.md)"
        )
    if plot is not None:
        with figure_style():
            mark = mark_of(LOAD, config.model)
            atomic_write_bytes(plot, figure_file(draw(rows), "svg", mark))


def show_rows(model: str, rows: list[ServeRow]) -> None:
    """The loads as a table."""
    from shareprefill.console import show_table

    columns = (
        *("tokens", "requests/s", "attention", "first token, s", "p99, s"),
        *("between tokens, ms", "p99, ms", "ended/s", "tokens/s"),
    )
    cells = [
        (
            f"{row.tokens}",
            f"{row.rate:g}",
            row.attention,
            f"{row.first_token_ms / 1000:.3f}",
            f"{row.first_token_p99_ms / 1000:.3f}",
            f"{row.between_tokens_ms:.1f}",
            f"{row.between_tokens_p99_ms:.1f}",
            f"{row.requests_per_s:.2f}",
            f"{row.output_tokens_per_s:.1f}",
        )
        for row in rows
    ]
    show_table(f"{model} in vLLM", columns, cells, less_important=("ended/s", "p99, ms", "p99, s"))
