"""The rows of a bench as a table of Markdown."""

from __future__ import annotations

from shareprefill.bench.measure import SHARE, BenchResult, BenchRow

_COLUMNS = (
    *("tokens", "attention", "first token, s", "speed-up", "peak GiB", "density", "selection"),
    "chunk",
)


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
