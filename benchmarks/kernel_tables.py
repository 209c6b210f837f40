"""Rows of bench_kernels.py, the ratios that they give, and their tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from goals import (
    FP8_TO_OWN,
    OWN_TO_FA4,
    OWN_TO_FLEX,
    POOLED_ALL,
    POOLED_ROWS,
    Comparison,
    Goal,
    compare,
    comparison_table,
)
from kernel_cases import FlashAttention4, Flex
from provenance import summary

SAMPLED = 8
FA4, FLEX = FlashAttention4.name, Flex.name
DENSE, SPARSE, POOLED, ROWS = "dense", "block sparse", "pooled, all rows", f"pooled, {SAMPLED} rows"
OUTPUT_AND_MAP, MAP = "output and map", "map"
# A kernel's name, its median and its device time in milliseconds.
Timed = tuple[str, float, float | None]
# FlashAttention-4 behind our interface is not a kernel of our own.
OWN = ("impl=triton", "impl=hopper", "impl=blockwise")
FP8 = "precision=fp8"


@dataclass(frozen=True)
class Row:
    """One measurement, or why it is missing."""

    tokens: int
    task: str
    name: str
    density: float
    wanted: float
    missing: str | None = None
    ms: float | None = None
    device_ms: float | None = None
    host_ms: float | None = None
    tflops: float | None = None
    floor_ms: float | None = None
    bound: str | None = None
    first_call_ms: float | None = None
    difference: float | None = None


LINE = "{:>7}  {:<17} {:<24} {:>7} {:>9} {:>9} {:>8} {:>8} {:>9} {:<12} {:>9} {:>9}"
HEAD = LINE.format(
    "tokens",
    "task",
    "kernel",
    "density",
    "ms",
    "device ms",
    "host ms",
    "TFLOP/s",
    "floor ms",
    "bound by",
    "first ms",
    "off by",
)


def line(row: Row) -> str:
    """A row for the terminal."""
    if row.missing is not None:
        start = LINE.format(row.tokens, row.task, row.name, f"{row.density:.3f}", *[""] * 8)
        return f"{start.rstrip()}  missing: {row.missing}"
    return LINE.format(
        row.tokens,
        row.task,
        row.name,
        f"{row.density:.3f}",
        f"{row.ms:.3f}",
        "" if row.device_ms is None else f"{row.device_ms:.3f}",
        "" if row.host_ms is None else f"{row.host_ms:.3f}",
        f"{row.tflops:.3g}",
        f"{row.floor_ms:.3f}",
        row.bound,
        f"{row.first_call_ms:.0f}",
        "" if row.difference is None else f"{row.difference:.1e}",
    )


def ratios(rows: list[Row], densities: Sequence[float]) -> list[Comparison]:
    """The comparisons that the project is measured by, one for each length and density."""
    found: list[Comparison] = []
    for tokens in dict.fromkeys(row.tokens for row in rows):
        of_length = [row for row in rows if row.tokens == tokens and row.ms is not None]

        def fastest(
            task: str,
            names: Sequence[str],
            wanted: float | None = None,
            rows: list[Row] = of_length,
        ) -> Timed | None:
            known = [
                (row.name, row.ms, row.device_ms)
                for row in rows
                if row.task == task
                and row.name in names
                and row.ms is not None
                and wanted in (None, row.wanted)
            ]
            return min(known, key=lambda row: row[1], default=None)

        def add(
            what: str,
            one: Timed | None,
            other: Timed | None,
            goal: Goal | None = None,
            tokens: int = tokens,
        ) -> None:
            found.append(compare(tokens, what, one, other, goal))

        dense = {row.name for row in of_length if row.task == DENSE}
        sdpa = fastest(DENSE, [name for name in dense if name != FA4])
        fa4_dense = fastest(DENSE, (FA4,))
        for wanted in (*densities, 1.0):
            own = fastest(SPARSE, OWN, wanted)
            theirs = fastest(SPARSE, (FA4,), wanted)
            flex = fastest(SPARSE, (FLEX,), wanted)
            # A pattern that leaves nothing out is no goal, but tells what sparsity costs.
            goals = (OWN_TO_FA4, OWN_TO_FLEX) if wanted < 1.0 else (None, None)
            add(f"own block sparse, d {wanted:g} / {FA4}", own, theirs, goals[0])
            add(f"own block sparse, d {wanted:g} / {FLEX}", own, flex, goals[1])
            add(f"own block sparse, d {wanted:g} / SDPA", own, sdpa)
            add(f"own block sparse, d {wanted:g} / {FA4} dense", own, fa4_dense)
            if small := fastest(SPARSE, (FP8,), wanted):
                add(f"FP8 block sparse, d {wanted:g} / own", small, own, FP8_TO_OWN.get(wanted))
        add(f"{POOLED} / SDPA", fastest(POOLED, (OUTPUT_AND_MAP,)), sdpa, POOLED_ALL)
        add(f"{ROWS} / SDPA", fastest(ROWS, (MAP,)), sdpa, POOLED_ROWS)
    return found


def markdown(facts: dict[str, object], rows: list[Row], found: list[Comparison]) -> str:
    """The tables of docs/performance.md."""
    lines = [
        summary(facts),
        f"{facts['dtype']}, {facts['heads']} query and {facts['kv_heads']} KV heads, "
        f"D={facts['head_dim']}, block {facts['block_size']}; `do_bench` medians, in brackets of "
        "the device alone.",
        "",
        "**Ratios.** Own: the fastest of our kernels.",
        "",
        *comparison_table(found),
        "",
        "**Times**, ms (TFLOP/s over the computed blocks):",
        "",
        *_times(rows),
        "",
        "**What bounds them.** The least time that the device's measured rates allow, over the "
        "time taken:",
        "",
        *_roofline(rows),
    ]
    missing = dict.fromkeys((r.name, r.missing) for r in rows if r.missing is not None)
    if missing:
        lines += ["", "Missing:", "", *(f"- {name}: {reason}" for name, reason in missing)]
    return "\n".join(lines) + "\n"


def _times(rows: list[Row]) -> list[str]:
    def cell(row: Row) -> str:
        device = "" if row.device_ms in (None, row.ms) else f" [{row.device_ms:.3f}]"
        return f"{row.ms:.3f}{device} ({row.tflops:.0f})"

    return _grid(rows, cell)


def _roofline(rows: list[Row]) -> list[str]:
    def cell(row: Row) -> str:
        assert row.ms is not None
        assert row.floor_ms is not None
        return f"{row.floor_ms / row.ms:.2f} of {row.bound}"

    return _grid(rows, cell)


def _grid(rows: list[Row], cell: Callable[[Row], str]) -> list[str]:
    """A row for each kernel and density that was timed, a column for each length."""
    lengths = list(dict.fromkeys(row.tokens for row in rows))
    lines = [
        "| " + " | ".join(["task", "kernel", "d", *map(str, lengths)]) + " |",
        "|" + " --- |" * (len(lengths) + 3),
    ]
    timed = [row for row in rows if row.missing is None]
    keys = dict.fromkeys((row.task, row.name, round(row.wanted, 4)) for row in timed)
    for task, name, wanted in keys:
        cells = []
        for tokens in lengths:
            row = next(
                (
                    row
                    for row in rows
                    if (row.tokens, row.task, row.name, round(row.wanted, 4))
                    == (tokens, task, name, wanted)
                ),
                None,
            )
            cells.append("" if row is None else "missing" if row.missing else cell(row))
        lines.append("| " + " | ".join([task, name, f"{wanted:g}", *cells]) + " |")
    return lines
