"""`sp tune`: from which length on sharing is faster on this machine, for sessions and vLLM."""

from __future__ import annotations

import json
import statistics
from typing import TYPE_CHECKING, Any

import typer

from shareprefill.bench.config import TuneConfig
from shareprefill.commands.options import JsonOption, lengths_option, options_of

if TYPE_CHECKING:
    from shareprefill.bench.timings import Tuning


@options_of(TuneConfig, lengths=lengths_option)
def tune_command(options: dict[str, Any], as_json: JsonOption = False) -> None:
    """Measure from which prompt length on sharing is faster here, and write it down.

    Sessions and vLLM read it where min_tokens is not set. Dense attention is that of vLLM's own
    backend where vLLM is installed, else that of transformers: each has an entry of its own.

    Example:
      sp tune --lengths 4K,8K,16K
    """
    from shareprefill.bench.tuning import run_tuning
    from shareprefill.console import status

    with status("measuring"):
        found = run_tuning(TuneConfig(**options))
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=1))
    else:
        show_tuning(found)
    if found.tokens is None:
        raise typer.Exit(1)


def show_tuning(found: Tuning) -> None:
    """The lengths, and what follows from them."""
    from shareprefill.console import show_line, show_table

    columns = ("tokens", "dense, s", "shared, s", "speed-up", "spread", "density")
    rows = [
        (
            f"{timing.tokens}",
            f"{statistics.median(timing.dense_s):.3f}",
            f"{statistics.median(timing.shared_s):.3f}",
            f"{timing.speedup:.2f}",
            f"{timing.spread:.1%}",
            f"{timing.density:.3f}",
        )
        for timing in found.timings
    ]
    show_table(f"{found.source}, dense: {found.backend}", columns, rows)
    if found.tokens is None:
        show_line(
            "Sharing is not faster at the longest of these lengths: nothing was written. Name "
            "longer ones, or set min_tokens."
        )
    else:
        show_line(
            f"From {found.least_tokens} tokens on prompts run sparse: written to {found.table}"
        )
