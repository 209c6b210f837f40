from __future__ import annotations

from dataclasses import replace

import pytest

from shareprefill.evaluation.frontier import knee, pareto, reached
from shareprefill.evaluation.statistics import Estimate
from tests.support.evaluations import made_cell, made_evaluation


def test_pareto_keeps_what_no_other_point_beats() -> None:
    points = [(0.5, 0.9), (0.2, 0.7), (0.4, 0.6), (0.2, 0.5), (0.6, 0.9)]
    assert pareto(points) == [1, 0]
    assert pareto([]) == []


def test_knee_is_the_point_farthest_above_the_chord() -> None:
    # On the curve 1 - (1 - x)^2, slope one lies at x = 1/2.
    points = [(x / 10, 1 - (1 - x / 10) ** 2) for x in range(11)]
    assert points[knee(points) or 0][0] == 0.5
    # Scale and place of the axes, and the order of the points, make no difference.
    moved = [(300 * x + 7, 0.9 + y / 50) for x, y in reversed(points)]
    assert knee(moved) == 10 - 5


@pytest.mark.parametrize(
    "points",
    [
        [(0.1, 0.5), (0.9, 1.0)],
        [(x / 10, x / 10) for x in range(11)],
        [(x / 10, (x / 10) ** 2) for x in range(11)],
        [(0.1, 0.5), (0.2, 0.5), (0.3, 0.5)],
    ],
    ids=["two points", "straight", "bent the other way", "flat"],
)
def test_no_knee(points: list[tuple[float, float]]) -> None:
    assert knee(points) is None


def test_policies_at_equal_recall() -> None:
    cells = []
    for policy, work, density in (("oracle", 0.5, 0.2), ("sampled", 0.03, 0.2), ("flat", 0.0, 0.1)):
        for gamma, recall in ((0.8, 0.93), (0.9, 0.97)):
            cell = made_cell(policy=policy, settings={"gamma": gamma})
            top = 0.94 if policy == "flat" else recall
            extra = 0.2 if recall > 0.95 else 0.0
            cells.append(
                replace(
                    cell,
                    recall=Estimate(top),
                    density=Estimate(density + extra),
                    selection_work=Estimate(work),
                )
            )
    found = {point.policy: point for point in reached(made_evaluation(cells), 0.95)}
    assert set(found) == {"oracle", "sampled"}
    assert found["oracle"].density == pytest.approx(0.3)
    assert found["oracle"].to_oracle is None
    assert found["sampled"].effective_density == pytest.approx(0.33)
    assert found["sampled"].to_oracle == pytest.approx(1.1)
