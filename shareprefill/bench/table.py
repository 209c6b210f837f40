"""The rows of a bench as a table of Markdown, and its lengths as a user writes them."""

from __future__ import annotations

import re

from shareprefill.bench.measure import SHARE, BenchResult, BenchRow
from shareprefill.errors import ConfigError

_COLUMNS = (
    *("tokens", "attention", "first token, s", "speed-up", "peak GiB", "density", "selection"),
    "chunk",
)
_UNITS = {"": 1, "k": 1024, "m": 1024**2}


def parse_lengths(text: str) -> tuple[int, ...]:
    """`8K,131072,1M` as tokens.

    Raises:
        ConfigError: a part is no length.

    >>> parse_lengths("8K, 1000")
    (8192, 1000)
    """
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)([kKmM]?)\s*", part)
        if match is None or int(match[1]) == 0:
            raise ConfigError(
                f"lengths = {text!r} is not allowed: give numbers with commas between them, like "
                "8K,131072"
            )
        found.append(int(match[1]) * _UNITS[match[2].lower()])
    return tuple(found)


def table(result: BenchResult) -> str:
    """A bench in Markdown: what was measured, the rows, and the notes."""
    lines = [
        f"{result.model}, {result.dtype}, {result.device}",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        f"|{' --- |' * len(_COLUMNS)}",
        *(_line(result, row) for row in result.rows),
        "",
        *(f"- {note}" for note in result.notes),
    ]
    return "\n".join(lines)


def _line(result: BenchResult, row: BenchRow) -> str:
    speedup = result.speedup(row.tokens) if row.attention == SHARE else None
    cells = (
        f"{row.tokens}",
        row.attention,
        f"{row.ttft_s:.3f}",
        "" if speedup is None else f"{speedup:.2f}",
        "" if row.peak_gib is None else f"{row.peak_gib:.1f}",
        f"{row.density:.3f}",
        f"{row.selection_work:.4f}",
        "all" if row.chunk == 0 else f"{row.chunk}",
    )
    return f"| {' | '.join(cells)} |"
