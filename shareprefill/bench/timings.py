"""Prefills of several lengths, dense and shared in turns, and what follows from them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shareprefill.runtime.crossover import LayerSizes


@dataclass(frozen=True)
class Timing:
    """Prefills of one length.

    Attributes:
        tokens: Of the prompt.
        dense_s: Seconds of each dense prefill.
        shared_s: Seconds of each with shared patterns, taken in turns with those.
        density: Computed blocks over causal blocks.
    """

    tokens: int
    dense_s: tuple[float, ...]
    shared_s: tuple[float, ...]
    density: float

    @property
    def speedup(self) -> float:
        """The median of dense prefills over that of shared ones."""
        return statistics.median(self.dense_s) / statistics.median(self.shared_s)

    @property
    def spread(self) -> float:
        """Slowest less fastest over the median, of the kind that varies more."""
        kinds = (self.dense_s, self.shared_s)
        return max((max(times) - min(times)) / statistics.median(times) for times in kinds)


@dataclass(frozen=True)
class Tuning:
    """What was measured.

    Attributes:
        backend: What computed dense attention: `SDPA`, or a vLLM backend's name.
        source: What was measured, in words.
        timings: By length.
        sizes: Of a layer; None where what was measured holds whatever the layers.
        host_ms: See `BenchResult`; None where it was not measured.
        table: The file that the crossover went into; None where nothing was faster.
        least_tokens: From which on prompts of what was measured run sparse by that table: longer
            ones than were faster where the host takes longer for lengths that it has not seen.
    """

    backend: str
    source: str
    timings: tuple[Timing, ...]
    sizes: LayerSizes | None = None
    host_ms: float | None = None
    table: Path | None = None
    least_tokens: int | None = None

    @property
    def tokens(self) -> int | None:
        """The least of the lengths from which on sharing is faster; None for none of them."""
        return crossover_of(self.timings)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        rows = rows_of(self.timings)
        table = None if self.table is None else str(self.table)
        return {"tokens": self.tokens, **asdict(self), "timings": rows, "table": table}


def crossover_of(timings: Sequence[Timing]) -> int | None:
    """The least length from which on every median of shared prefills is under the dense one's.

    >>> crossover_of([Timing(2048, (1.0,), (1.2,), 0.5), Timing(4096, (3.0,), (2.0,), 0.3)])
    4096
    """
    found = None
    for timing in sorted(timings, key=lambda timing: -timing.tokens):
        if timing.speedup <= 1:
            break
        found = timing.tokens
    return found


def rows_of(timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """Timings as JSON-ready values, with what follows from them."""
    return [
        asdict(timing) | {"speedup": timing.speedup, "spread": timing.spread} for timing in timings
    ]
