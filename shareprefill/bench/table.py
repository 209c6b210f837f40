"""The rows of a bench as a table of texts."""

from __future__ import annotations

from shareprefill.bench.measure import SHARE, BenchResult, BenchRow

COLUMNS = (
    *("tokens", "attention", "first token, s", "new length, s", "speed-up", "peak GiB", "density"),
    *("selection", "chunk"),
)
LESS_IMPORTANT = ("chunk", "selection", "density", "peak GiB")
"""Columns that a narrow terminal goes without, the least important first."""


def table_rows(result: BenchResult) -> list[tuple[str, ...]]:
    """A bench's rows, in the order of `COLUMNS`."""
    return [_cells(result, row) for row in result.rows]


def _cells(result: BenchResult, row: BenchRow) -> tuple[str, ...]:
    speedup = result.speedup(row.tokens) if row.attention == SHARE else None
    return (
        f"{row.tokens}",
        row.attention,
        f"{row.ttft_s:.3f}",
        "-" if row.first_s is None else f"{row.first_s:.3f}",
        "-" if speedup is None else f"{speedup:.2f}",
        "-" if row.peak_gib is None else f"{row.peak_gib:.1f}",
        f"{row.density:.3f}",
        f"{row.selection_work:.4f}",
        "all" if row.chunk == 0 else f"{row.chunk}",
    )
