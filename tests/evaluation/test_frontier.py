from __future__ import annotations

from dataclasses import replace

import pytest

from shareprefill.evaluation.frontier import at_density, knee, pareto, reached
from shareprefill.evaluation.statistics import Estimate
from tests.support.evaluations import made_cell, made_evaluation, perplexity_cells


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


def test_numbered_artifacts_are_a_line_for_each_name() -> None:
    cells = [
        made_cell(settings={"artifact": name}, recall=Estimate(recall), density=Estimate(density))
        for name, recall, density in (
            ("budget-20", 0.93, 0.18),
            ("recall-95", 0.97, 0.4),
            ("budget-30", 0.97, 0.28),
            ("recall-90", 0.93, 0.2),
            ("plain", 0.91, 0.7),
        )
    ]
    found = {point.policy: point.density for point in reached(made_evaluation(cells), 0.95)}
    assert found == {"auto, budget": pytest.approx(0.23), "auto, recall": pytest.approx(0.3)}


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


def test_policies_at_equal_density() -> None:
    cells = []
    for policy, work, kl in (("oracle", 0.5, 0.02), ("sampled", 0.05, 0.04)):
        for density, factor in ((0.1, 3.0), (0.3, 1.0)):
            own = {"density": Estimate(density), "selection_work": Estimate(work)}
            own |= {"policy": policy, "settings": {"gamma": density}, "kl": Estimate(factor * kl)}
            cells.append(made_cell(**own, top1_agreement=Estimate(1 - factor * kl)))
            cells.append(perplexity_cells(**own)[1])
    found = at_density(made_evaluation(cells), 0.25)
    oracle, sampled, *readings = found
    # The oracle's own work does not count.
    assert (oracle.policy, oracle.kl_to_oracle) == ("oracle", None)
    assert oracle.kl == pytest.approx(0.25 * 0.06 + 0.75 * 0.02)
    assert sampled.kl == pytest.approx(0.5 * 0.12 + 0.5 * 0.04)
    assert sampled.kl_to_oracle == pytest.approx(0.08 / 0.03)
    assert sampled.top1_agreement == pytest.approx(0.92)
    assert (sampled.effective_density, sampled.recall) == (0.25, pytest.approx(0.95))
    # A difference of scores is no change of perplexity.
    assert sampled.perplexity_change is None
    assert [point.perplexity_change for point in readings] == [pytest.approx(0.015)] * 2
    assert at_density(made_evaluation(cells), 0.4) == []
    assert at_density(made_evaluation(cells), 0.05) == []
    assert at_density(made_evaluation(cells[:1]), 0.1) == []
