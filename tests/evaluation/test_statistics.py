from __future__ import annotations

import random

import pytest
import torch

from shareprefill.evaluation.statistics import (
    Estimate,
    bootstrap,
    median,
    paired_difference,
    wilson,
    worst_heads,
)


@pytest.mark.parametrize(
    ("right", "prompts", "low", "high"),
    # Solutions of (p - share)^2 = z^2 p (1 - p) / prompts, by hand.
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (1, 1, 0.2065, 1.0)],
)
def test_wilson(right: int, prompts: int, low: float, high: float) -> None:
    found = wilson(right, prompts)
    assert found.value == right / prompts
    assert found.low == pytest.approx(low, abs=1e-4)
    assert found.high == pytest.approx(high, abs=1e-4)


def test_a_bootstrap_of_many_values_is_the_normal_interval() -> None:
    values = torch.randn(400, dtype=torch.float64) * 3 + 7
    found = bootstrap(values)
    half = 1.96 * values.std().item() / 20
    assert found.value == pytest.approx(values.mean().item())
    assert found.low == pytest.approx(found.value - half, abs=0.15 * half)
    assert found.high == pytest.approx(found.value + half, abs=0.15 * half)
    assert bootstrap(values) == found


def test_a_bootstrap_of_the_median_and_of_one_value() -> None:
    assert bootstrap([1.0, 2.0, 900.0], median).value == 2
    assert bootstrap([3.0]) == Estimate(3.0)
    assert bootstrap([3.0, 3.0]) == Estimate(3.0, 3.0, 3.0)


def test_worst_heads_are_those_of_the_mean_over_prompts() -> None:
    recalls = torch.full((4, 40), 0.9)
    recalls[:, 3] = torch.tensor([0.2, 0.4, 0.6, 0.8])
    recalls[:, 30] = 0.6
    # A single bad prompt does not make a head one of the worst two.
    recalls[0, 7] = 0.1
    found = bootstrap(recalls, worst_heads)
    assert found.value == pytest.approx((0.5 + 0.6) / 2)
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.value < found.high


def test_paired_difference_where_all_agree() -> None:
    found = paired_difference([1.0] * 20, [1.0] * 20)
    low = wilson(20, 20).low
    assert low is not None
    assert found.value == 0
    assert found.low == pytest.approx(-(1 - low))
    assert found.high == pytest.approx(1 - low)


def test_paired_difference_covers_the_truth_and_uses_the_pairs() -> None:
    rng = random.Random(5)
    covered, narrower = 0, 0
    for _ in range(300):
        pairs = []
        for _ in range(40):
            dense = rng.random() < 0.7
            ours = dense if rng.random() < 0.9 else rng.random() < 0.3
            pairs.append((float(ours), float(dense)))
        ours, dense = zip(*pairs, strict=True)
        found = paired_difference(ours, dense)
        assert found.low is not None
        assert found.high is not None
        truth = 0.1 * (0.3 - 0.7)
        covered += found.low <= truth <= found.high
        shuffled = paired_difference(ours, rng.sample(dense, len(dense)))
        assert shuffled.low is not None
        assert shuffled.high is not None
        narrower += found.high - found.low < shuffled.high - shuffled.low
    assert covered >= 0.92 * 300
    assert narrower >= 0.95 * 300
