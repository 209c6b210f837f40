"""Rows of bench_layer.py, the ratios that they give, and their tables."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from goals import CHOICE, LAYER, Comparison, compare, comparison_table
from kernel_cases import FlashAttention4
from layer_cases import Facts
from provenance import summary

# Attention of all heads in FP8, among implementations.
FP8 = "fp8"
COLUMNS = (
    *("tokens", "plan", "impl", "density", "recall (worst head)", "sharing", "eager"),
    *("stream", "device", "graph", "choice", "host", "launches"),
)


@dataclass(frozen=True)
class LayerTime:
    """Milliseconds of a layer; None where a kind of time is not there.

    Attributes:
        eager: Host and device, one layer at a time.
        stream: The same, of one of several layers that follow each other.
        device: The device alone.
        graph: In a CUDA graph.
        choice: All but attention, on the device alone.
        host: The host alone.
        launches: Kernels, copies and fills of one layer.
    """

    eager: float
    stream: float
    device: float | None
    graph: float | None
    choice: float
    host: float | None
    launches: int | None


@dataclass(frozen=True)
class Row:
    """One plan with one implementation at one length, or why it is missing."""

    tokens: int
    plan: str
    impl: str
    gammas: dict[str, float]
    facts: Facts
    time: LayerTime | None = None
    missing: str | None = None


@dataclass(frozen=True)
class Dense:
    """Dense attention at one length: median and device time by kernel, or why it is missing."""

    tokens: int
    sdpa: str
    times: dict[str, tuple[float, float | None]]
    missing: dict[str, str]


def comparisons(dense: list[Dense], rows: list[Row]) -> list[Comparison]:
    """What the project is measured by, for every plan, of its best implementation and of FP8."""
    found = []
    for known in dense:
        tokens = known.tokens
        kinds = dict.fromkeys((row.plan, row.impl == FP8) for row in rows)
        for name, in_fp8 in kinds:
            plan = f"{name} in FP8" if in_fp8 else name
            kind = (tokens, name, in_fp8)
            timed = [r for r in rows if (r.tokens, r.plan, r.impl == FP8) == kind and r.time]
            best = min(timed, key=lambda r: _device(r.time), default=None)
            sdpa = known.times.get(known.sdpa)
            choice = None
            if best is not None and best.time is not None:
                choice = (plan, best.time.choice, None)
            found.append(
                compare(
                    tokens,
                    f"{plan}: all but attention / SDPA",
                    choice,
                    None if sdpa is None else (known.sdpa, sdpa[1] or sdpa[0], None),
                    CHOICE,
                )
            )
            for name in (FlashAttention4.name, "SDPA"):
                other = known.times.get(known.sdpa if name == "SDPA" else name)
                for kind in ("device", "stream"):
                    found.append(_gain(known, plan, best, name, other, kind))
    return found


def _gain(
    known: Dense,
    plan: str,
    best: Row | None,
    name: str,
    other: tuple[float, float | None] | None,
    kind: str,
) -> Comparison:
    """Speed-up over a dense kernel times density: 1 is what the skipped blocks are worth."""
    where = "the device alone" if kind == "device" else "eager, layer after layer"
    layer = reference = None
    if best is not None and best.time is not None and other is not None:
        taken = _device(best.time) if kind == "device" else best.time.stream
        layer = (f"{plan}, {best.impl}", taken, None)
        theirs = other[0] if kind == "stream" else other[1] or other[0]
        reference = (name, theirs * best.facts.density, None)
    return compare(
        known.tokens,
        f"{plan}: speed-up over {name} dense x density, {where}",
        reference,
        layer,
        LAYER if name == FlashAttention4.name else None,
    )


def _device(time: LayerTime | None) -> float:
    assert time is not None
    return time.stream if time.device is None else time.device


def markdown(
    facts: dict[str, object], dense: list[Dense], rows: list[Row], found: list[Comparison]
) -> str:
    """The tables of docs/performance.md."""
    lines = [
        summary(facts),
        "bf16, 32 query and 8 KV heads, D=128, block 128, structured inputs "
        "(`benchmarks/layer_cases.py`).",
        "",
        *comparison_table(found),
        "",
        "Times in ms:",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + " --- |" * len(COLUMNS),
    ]
    for row in rows:
        known = row.facts
        cells = [row.tokens, row.plan, row.impl, f"{known.density:.3f}"]
        cells += [f"{known.recall:.3f} ({known.worst_recall:.3f})", f"{known.sharing:.2f}"]
        if row.time is None:
            cells += ["missing", *[""] * 6]
        else:
            cells += [
                "" if v is None else v if isinstance(v, int) else f"{v:.3f}"
                for v in asdict(row.time).values()
            ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "Dense, ms:", ""]
    for known in dense:
        named = [f"{name} {ms:.3f}" for name, (ms, _) in known.times.items()]
        named += [f"{name} missing: {why}" for name, why in known.missing.items()]
        lines.append(f"- {known.tokens}: {'; '.join(named)}")
    missing = dict.fromkeys((r.impl, r.missing) for r in rows if r.missing is not None)
    lines += [f"- {impl} missing: {reason}" for impl, reason in missing]
    return "\n".join(lines) + "\n"
