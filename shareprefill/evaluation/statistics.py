"""Means with 95 % intervals over prompts.

SciPy's intervals, but for Newcombe's of a paired difference, which it does not have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
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


def mean(values: Array) -> Array:
    """Means of resamples `[R, P]`: `[R]`."""
    return values.mean(1)


def median(values: Array) -> Array:
    """Medians of resamples `[R, P]` (the mean of the middle two): `[R]`."""
    return np.median(values, axis=1)


def worst_heads(values: Array) -> Array:
    """Mean over the worst 5 % of heads, at least one, of resamples `[R, P, K]`: `[R]`."""
    heads = values.mean(1)  # [R, K]
    worst = max(1, heads.shape[1] // 20)
    return np.partition(heads, worst - 1, axis=1)[:, :worst].mean(1)


def bootstrap(values: ArrayLike, statistic: Callable[[Array], Array] = mean) -> Estimate:
    """A statistic with its percentile bootstrap interval (Efron, 1979) over prompts.

    The resamples are drawn with a fixed seed: equal values give equal intervals.

    Args:
        values: One value, or one row of values, for every prompt: `[P]` or `[P, ...]`.
        statistic: Of resamples of prompts, `[R, P, ...]` to `[R]`.
    """
    from scipy import stats

    data = np.asarray(values, dtype=np.float64)
    assert len(data) > 0
    value = float(statistic(data[None])[0])
    if len(data) < 2:
        return Estimate(value)

    def of_prompts(prompts: NDArray[np.int64], axis: int) -> Array:
        # Whole rows are drawn: a prompt's heads stay together. SciPy asks for one draw, too.
        found = statistic(data[np.atleast_2d(prompts)])
        return found if prompts.ndim == 2 else found[0]

    interval = stats.bootstrap(
        (np.arange(len(data)),),
        of_prompts,
        n_resamples=_RESAMPLES,
        # In pieces where rows may be a thousand heads long.
        batch=_RESAMPLES if data.ndim == 1 else 100,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high))


def wilson(right: float, prompts: int) -> Estimate:
    """A share of right answers with its score interval (Wilson, 1927).

    Args:
        right: Right answers, a whole number.
        prompts: All answers, at least one.
    """
    from scipy import stats

    interval = stats.binomtest(int(right), prompts).proportion_ci(method="wilson")
    return Estimate(right / prompts, float(interval.low), float(interval.high))


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
