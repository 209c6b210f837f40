"""Means with 95 % intervals over prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# The 97.5 % quantile of the standard normal distribution.
_Z = 1.959963984540054
_RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval over prompts; no interval of fewer than two prompts.

    Attributes:
        value: The figure.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    value: float
    low: float | None = None
    high: float | None = None

    def to_dict(self) -> dict[str, float | None]:
        """The fields, JSON-ready."""
        return {"value": self.value, "low": self.low, "high": self.high}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Estimate:
        """The inverse of `to_dict`."""
        return cls(**values)


def mean(values: Tensor) -> Tensor:
    """Means of resamples `[R, P]`: `[R]`."""
    return values.mean(1)


def median(values: Tensor) -> Tensor:
    """Medians of resamples `[R, P]` (the mean of the middle two): `[R]`."""
    return values.quantile(0.5, dim=1)


def worst_heads(values: Tensor) -> Tensor:
    """Mean over the worst 5 % of heads, at least one, of resamples `[R, P, K]`: `[R]`."""
    heads = values.mean(1)
    return heads.topk(max(1, heads.shape[1] // 20), dim=1, largest=False).values.mean(1)


def bootstrap(
    values: Sequence[float] | Tensor, statistic: Callable[[Tensor], Tensor] = mean
) -> Estimate:
    """A statistic with its percentile bootstrap interval (Efron, 1979) over prompts.

    The resamples are drawn with a fixed seed: equal values give equal intervals.

    Args:
        values: One value, or one row of values, for every prompt: `[P]` or `[P, ...]`.
        statistic: Of resamples of prompts, `[R, P, ...]` to `[R]`.
    """
    data = torch.as_tensor(values, dtype=torch.float64)
    assert len(data) > 0
    value = statistic(data[None]).item()
    if len(data) < 2:
        return Estimate(value)
    chosen = torch.randint(
        len(data), (_RESAMPLES, len(data)), generator=torch.Generator().manual_seed(0)
    )
    # In pieces: rows may be a thousand heads long.
    found = torch.cat([statistic(data[piece]) for piece in chosen.split(100)])
    low, high = found.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(value, low, high)


def wilson(right: float, prompts: int) -> Estimate:
    """A share of right answers with its score interval (Wilson, 1927).

    Args:
        right: Right answers.
        prompts: All answers, at least one.
    """
    share = right / prompts
    spread = _Z**2 / prompts
    middle = (share + spread / 2) / (1 + spread)
    half = _Z / (1 + spread) * math.sqrt(share * (1 - share) / prompts + spread / (4 * prompts))
    return Estimate(share, max(0.0, middle - half), min(1.0, middle + half))


def paired_difference(ours: Sequence[float], dense: Sequence[float]) -> Estimate:
    """Difference of two shares of right answers to the same prompts.

    The interval is Newcombe's (1998, Statistics in Medicine 17, method 10): Wilson's of each share,
    joined with the correlation of the pairs. Unlike a bootstrap's it is not empty where all answers
    agree.

    Args:
        ours: 0 or 1 for every prompt.
        dense: The same of the other answers.
    """
    prompts = len(ours)
    pairs = list(zip(ours, dense, strict=True))
    both, only_ours, only_dense = (pairs.count(pair) for pair in ((1, 1), (1, 0), (0, 1)))
    neither = prompts - both - only_ours - only_dense
    first, second = wilson(both + only_ours, prompts), wilson(both + only_dense, prompts)
    assert first.low is not None
    assert first.high is not None
    assert second.low is not None
    assert second.high is not None
    sums = (both + only_ours) * (only_dense + neither) * (both + only_dense) * (only_ours + neither)
    excess = both * neither - only_ours * only_dense
    if excess > 0:  # the continuity correction of Newcombe's method
        excess = max(excess - prompts / 2, 0)
    correlation = excess / math.sqrt(sums) if sums else 0.0

    def joined(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one**2 - 2 * correlation * one * other + other**2))

    value = first.value - second.value
    below = joined(first.value - first.low, second.high - second.value)
    above = joined(first.high - first.value, second.value - second.low)
    return Estimate(value, max(-1.0, value - below), min(1.0, value + above))
