from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shareprefill.artifact import Policy
from shareprefill.clustering.evidence import GAMMAS, Measured
from shareprefill.clustering.policies import alone, share, total_cost
from shareprefill.config import ClusterConfig

CONFIG = ClusterConfig(target_recall=0.9)


def measured(recall: list[float], density: list[float], work: float) -> Measured:
    """One head a column; the same at every gamma below the last, where recall is whole."""
    found = torch.tensor(recall, dtype=torch.float64).expand(len(GAMMAS), -1).clone()
    computed = torch.tensor(density, dtype=torch.float64).expand(len(GAMMAS), -1).clone()
    return Measured(found, computed, work)


def evidence(
    sampled: list[float],
    slashes: list[float] | None = None,
    *,
    spread: float = 1.0,
    pairs: list[list[float]] | None = None,
    pivots: list[float] | None = None,
    distance: float = 0.0,
    pivot_rows: int = 32,
    sampled_recall: float = 1.0,
) -> Any:
    heads = len(sampled)
    covered = torch.tensor(pairs or [[0.0] * heads] * heads, dtype=torch.float64)
    return SimpleNamespace(
        heads=heads,
        sampled=measured([sampled_recall] * heads, sampled, 0.03),
        vertical_slash=measured([1.0] * heads, slashes or [2.0] * heads, 0.001),
        pivots=measured([1.0] * heads, pivots or sampled, 0.1),
        pairs=covered.expand(len(GAMMAS), -1, -1),
        spread=torch.full((heads,), spread),
        check_cost=0.025,
        pivot_rows=pivot_rows,
        distances=lambda _head, _pivot: [distance, distance],
    )


def test_each_head_takes_its_cheapest_policy() -> None:
    found = alone(evidence([0.2, 0.2, 1.2], [0.3, 0.1, 1.2]), CONFIG)
    assert [c.policy for c in found] == [Policy.SAMPLED, Policy.VERTICAL_SLASH, Policy.DENSE]
    assert [c.cost for c in found] == pytest.approx([0.335, 0.1325, 1.0])


def test_the_least_gamma_that_reaches_the_target_is_taken() -> None:
    facts = evidence([0.2])
    steps = len(GAMMAS)
    facts.sampled.recall[:, 0] = torch.linspace(0.5, 1.0, steps, dtype=torch.float64)
    facts.sampled.density[:, 0] = torch.linspace(0.1, 0.6, steps, dtype=torch.float64)
    (choice,) = alone(facts, CONFIG)
    g = int((facts.sampled.recall[:, 0] >= 0.9).nonzero()[0])
    assert choice.gamma == GAMMAS[g]
    assert choice.density == pytest.approx(facts.sampled.density[g, 0].item())


def test_a_head_that_misses_the_target_is_dense() -> None:
    (choice,) = alone(evidence([0.2], sampled_recall=0.89), CONFIG)
    assert (choice.policy, choice.recall, choice.cost) == (Policy.DENSE, 1.0, 1.0)


def test_vertical_slash_is_for_highly_sparse_heads() -> None:
    (choice,) = alone(evidence([0.5], [0.1], spread=0.2), CONFIG)
    assert choice.policy is Policy.SAMPLED


def shared(facts: Any, labels: list[int], layers: list[int], config: ClusterConfig = CONFIG) -> Any:
    singles = alone(facts, config)
    return share(torch.tensor(labels), torch.tensor(layers), singles, facts, config)


ALIKE = [[1.0] * 6] * 6


def test_heads_of_a_cluster_share_where_that_pays() -> None:
    facts = evidence([0.2] * 6, pairs=ALIKE)
    found = shared(facts, [0] * 6, [0, 0, 0, 1, 1, 1])
    assert [c.policy for c in found] == [Policy.PIVOT] + [Policy.SHARE] * 5
    assert {c.pivot for c in found} == {0}
    assert {c.fallback for c in found[1:]} == {Policy.SAMPLED}
    # Five heads save 2.5 * (0.03 - 0.01) each; the pivot costs 2.5 * (0.1 - 0.03) more than alone.
    assert total_cost(found) == pytest.approx(total_cost(alone(facts, CONFIG)) - 0.075 / 6)


@pytest.mark.parametrize(
    ("changes", "labels", "layers"),
    [
        ({"pairs": [[1.0] * 4] * 4, "sampled": [0.2] * 4}, [0] * 4, [0] * 4),
        ({"pairs": [[0.5] * 6] * 6}, [0] * 6, [0] * 6),
        ({"pairs": ALIKE}, [0, 1, 2, 3, 4, 5], [0] * 6),
        ({"pairs": ALIKE}, [0, 0, 0, 1, 1, 1], [0] * 6),
    ],
    ids=["too few", "unlike patterns", "singletons", "small clusters"],
)
def test_clusters_that_do_not_pay_are_not_shared(
    changes: dict[str, Any], labels: list[int], layers: list[int]
) -> None:
    facts = evidence(**{"sampled": [0.2] * 6, **changes})
    found = shared(facts, labels, layers)
    assert {c.policy for c in found} == {Policy.SAMPLED}


@pytest.mark.parametrize(("distance", "tau"), [(0.1, 0.2), (0.3, 0.345), (0.95, 1.0)])
def test_a_head_at_the_target_recall_gets_room_for_its_distance(
    distance: float, tau: float
) -> None:
    found = shared(evidence([0.2] * 6, pairs=ALIKE, distance=distance), [0] * 6, [0] * 6)
    assert [c.tau for c in found[1:]] == pytest.approx([tau] * 5)


def test_no_head_shares_a_later_layers_pattern() -> None:
    # Head 5 has the only pattern that the others could use, and it comes last.
    pairs = [[0.0] * 5 + [1.0]] * 6
    found = shared(evidence([0.2] * 6, pairs=pairs), [0] * 6, [0, 0, 0, 0, 0, 1])
    assert {c.policy for c in found} == {Policy.SAMPLED}
    found = shared(evidence([0.2] * 6, pairs=pairs), [0] * 6, [0] * 6)
    assert [c.policy for c in found] == [Policy.SHARE] * 5 + [Policy.PIVOT]


def test_the_least_size_is_kept() -> None:
    facts = evidence([0.2] * 6, pairs=ALIKE)
    config = ClusterConfig(target_recall=0.9, min_size=7)
    assert {c.policy for c in shared(facts, [0] * 6, [0] * 6, config)} == {Policy.SAMPLED}
