from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from shareprefill.artifact import Policy
from shareprefill.clustering.assignment import (
    _locate_pivots,
    alone,
    choose,
    mean_density,
    share,
    slacks,
    total_cost,
)
from shareprefill.clustering.measurements import GAMMAS, PolicyCurve
from shareprefill.config import ClusterConfig
from shareprefill.errors import ConfigError

CONFIG = ClusterConfig(target_recall=0.9)


def measured(recall: list[float], density: list[float], work: float) -> PolicyCurve:
    """One head a column; the same at every gamma below the last, where recall is whole."""
    found = torch.tensor(recall, dtype=torch.float64).expand(len(GAMMAS), -1).clone()
    computed = torch.tensor(density, dtype=torch.float64).expand(len(GAMMAS), -1).clone()
    return PolicyCurve(found, found, computed, work)


def evidence(
    sampled: list[float],
    slashes: list[float] | None = None,
    *,
    distance_to_uniform: float = 1.0,
    pairs: list[list[float]] | None = None,
    pivots: list[float] | None = None,
    checked: float = 1.0,
    pivot_rows: int = 32,
    sampled_recall: float = 1.0,
) -> Any:
    heads = len(sampled)
    covered = torch.tensor(pairs or [[0.0] * heads] * heads, dtype=torch.float64)
    of_sampled = measured([sampled_recall] * heads, sampled, 0.03)
    of_slashes = measured([1.0] * heads, slashes or [2.0] * heads, 0.001)
    return SimpleNamespace(
        heads=heads,
        sampled=of_sampled,
        alone={Policy.SAMPLED: of_sampled, Policy.VERTICAL_SLASH: of_slashes},
        pivots=measured([1.0] * heads, pivots or sampled, 0.1),
        pairs=covered.expand(len(GAMMAS), -1, -1),
        worst_pairs=covered.expand(len(GAMMAS), -1, -1),
        pair_harm=None,
        distance_to_uniform=torch.full((heads,), distance_to_uniform),
        check_work=0.01,
        pivot_rows=pivot_rows,
        least_covered=lambda _head, _pivot, _gamma: checked,
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
    (choice,) = alone(evidence([0.5], [0.1], distance_to_uniform=0.2), CONFIG)
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


@pytest.mark.parametrize(
    ("config", "checked", "over"), [(0.04, 1.0, 0.04), (0.04, 0.5, 0.54), (0.2, 0.9, 0.3)]
)
def test_a_check_passes_on_held_out_prompts_with_room_to_spare(
    config: float, checked: float, over: float
) -> None:
    facts = evidence([0.2] * 6, pairs=ALIKE, checked=checked)
    found = shared(facts, [0] * 6, [0] * 6)
    # gamma - slack, from which on a head shares, is `config` below what was covered.
    wanted = [0.0] + [c.gamma - 1 + over for c in found[1:]]
    assert slacks(found, facts, ClusterConfig(slack=config)) == pytest.approx(wanted)


def test_slacks_stay_in_their_range() -> None:
    facts = evidence([0.2] * 6, pairs=ALIKE, checked=0.0)
    found = [replace(c, gamma=0.99) for c in shared(facts, [0] * 6, [0] * 6)]
    assert slacks(found, facts, ClusterConfig(slack=0.5)) == [0.0] + [1.0] * 5


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


def curves(heads: int, seed: int, *, noise: float = 0.0) -> Any:
    """Evidence of heads that are sparse to different degrees, and of two policies of unlike cost.

    Recall grows with density as `1 - (1 - d)^s`, s the head's own sparsity; the second policy is
    off by a factor that differs from head to head.
    """
    chance = torch.Generator().manual_seed(seed)
    gammas = torch.tensor(GAMMAS, dtype=torch.float64)[:, None]
    sharpness = 2 + 30 * torch.rand(heads, generator=torch.Generator().manual_seed(1))
    density = 1 - (1 - gammas) ** (1 / sharpness)
    jitter = 1 + noise * torch.randn(2, heads, generator=chance).double()
    skill = 0.5 + 0.7 * torch.rand(heads, generator=torch.Generator().manual_seed(2)).double()
    found = []
    for factor, work in ((torch.ones(heads).double(), 0.03), (skill, 0.002)):
        recall = 1 - (1 - density) ** (sharpness * factor * jitter[len(found)])
        found.append(PolicyCurve(recall, recall, density, work))
    none = torch.zeros(len(GAMMAS), heads, heads).double()
    return SimpleNamespace(
        heads=heads,
        sampled=found[0],
        alone=dict(zip((Policy.SAMPLED, Policy.VERTICAL_SLASH), found, strict=True)),
        pivots=found[0],
        pairs=none,
        worst_pairs=none,
        pair_harm=None,
        distance_to_uniform=torch.ones(heads),
        check_work=0.01,
        pivot_rows=32,
    )


def chosen(facts: Any, **options: Any) -> list[Any]:
    every = torch.arange(facts.heads)
    return choose(every, torch.zeros(facts.heads), facts, ClusterConfig(**options))[0]


@pytest.mark.parametrize("budget", [0.05, 0.1, 0.2])
def test_a_budget_is_met_and_used(budget: float) -> None:
    found = chosen(curves(200, 0), budget=budget)
    assert 0.97 * budget < mean_density(found) <= budget


@pytest.mark.parametrize("budget", [0.05, 0.1, 0.2])
def test_no_single_policy_does_better_with_the_budget_on_other_prompts(budget: float) -> None:
    calibration, unseen = curves(200, 0, noise=0.1), curves(200, 1, noise=0.1)
    found = chosen(calibration, budget=budget)
    recalls, effective = [], []
    for h, choice in enumerate(found):
        measured = unseen.alone[choice.policy]
        g = GAMMAS.index(choice.gamma)
        recalls.append(measured.recall[g, h])
        effective.append(measured.density[g, h] + measured.work)
    recall, cost = torch.stack(recalls).mean(), torch.stack(effective).mean()
    for measured in unseen.alone.values():
        single = (measured.density.mean(1) + measured.work).numpy()
        best = np.interp(cost.item(), single, measured.recall.mean(1).numpy())
        assert recall > best + 0.005


def test_a_budget_below_what_is_always_read_is_refused() -> None:
    facts = evidence([0.2, 0.3])
    with pytest.raises(ConfigError, match=r"budget = 0\.1 cannot be met.* density of 0\.250"):
        chosen(facts, budget=0.1)


def test_the_prompt_of_the_lowest_recall_decides() -> None:
    facts = evidence([0.2])
    facts.alone[Policy.SAMPLED] = replace(
        facts.sampled, worst_recall=torch.full_like(facts.sampled.recall, 0.89)
    )
    facts.alone.pop(Policy.VERTICAL_SLASH)
    assert alone(facts, CONFIG)[0].policy is Policy.DENSE
    assert alone(facts, ClusterConfig(target_recall=0.88))[0].policy is Policy.SAMPLED


def test_a_cluster_may_have_several_pivots() -> None:
    """Two kinds of heads in one cluster: each shares the pattern of its own kind."""
    kinds = torch.arange(12) % 2
    pairs = (kinds[:, None] == kinds[None, :]).double().tolist()
    found = shared(evidence([0.2] * 12, pairs=pairs), [0] * 12, [0] * 12)
    pivots = [h for h, c in enumerate(found) if c.policy is Policy.PIVOT]
    assert sorted(int(kinds[p]) for p in pivots) == [0, 1]
    assert all(kinds[c.pivot] == kinds[h] for h, c in enumerate(found))


@pytest.mark.parametrize("policy", [Policy.SMOOTHED, Policy.VERTICAL_SLASH, Policy.DENSE])
def test_a_failed_check_falls_back_to_what_the_head_would_do_alone(policy: Policy) -> None:
    facts = evidence([1.5] * 6, pairs=ALIKE, pivots=[0.2] * 6)
    if policy is not Policy.DENSE:
        facts.alone[policy] = replace(facts.sampled, density=0.2 * facts.sampled.density)
    # Its own pattern needs another gamma than the pivot's.
    pairs = facts.pairs.clone()
    pairs[:5] = 0.0
    facts.pairs = facts.worst_pairs = pairs
    found = shared(facts, [0] * 6, [0] * 6)
    assert [c.policy for c in found] == [Policy.PIVOT] + [Policy.SHARE] * 5
    assert {c.fallback for c in found[1:]} == {policy}
    assert {c.gamma for c in found[1:]} == {GAMMAS[5]}
    own = alone(facts, CONFIG)[1].gamma
    assert {c.fallback_gamma for c in found[1:]} == {own} != {GAMMAS[5]}


def test_a_budget_counts_blocks_not_time() -> None:
    """A pattern that takes longer than dense attention is still fewer blocks."""
    facts = evidence([0.8], [2.0], sampled_recall=0.99)
    (choice,) = chosen(facts, budget=0.85)
    assert (choice.policy, choice.density) == (Policy.SAMPLED, pytest.approx(0.8))
    assert choice.cost > 1


def test_pivots_are_placed_for_all_heads_at_once() -> None:
    """A head that took the first pivot turns to a later one that serves it better."""
    facts = evidence([0.3] * 7, pairs=[[1.0] * 7] * 7, pivots=[0.2, 0.05, *[0.3] * 5])
    # Under pivot 1 only heads 1 to 3 keep their recall.
    facts.pairs = facts.pairs.clone()
    facts.pairs[:, [0, 4, 5, 6], 1] = 0.0
    facts.worst_pairs = facts.pairs
    found = shared(facts, [0] * 7, [0] * 7)
    assert [c.pivot for c in found] == [0, 1, 1, 1, 0, 0, 0]


def test_the_heads_of_a_pivot_cut_its_order_at_few_gammas() -> None:
    heads = 14
    facts = evidence([0.9] * heads, pairs=[[0.0] * heads] * heads)
    gammas = len(GAMMAS)
    recall = torch.zeros(gammas, heads, heads, dtype=torch.float64)
    for h in range(heads):  # Each reaches the target at a gamma of its own.
        recall[h:, h, 0] = 1.0
    facts.pairs = facts.worst_pairs = recall
    density = torch.linspace(0.05, 0.3, gammas, dtype=torch.float64)
    facts.pivots.density[:] = density[:, None]
    found = shared(facts, [0] * heads, [0] * heads)
    sharers = [c for c in found if c.policy is Policy.SHARE]
    assert len(sharers) == heads - 1
    assert len({c.gamma for c in sharers}) == 4
    assert all(c.recall == 1.0 for c in sharers)


def harmful(heads: int) -> Any:
    """Evidence of heads that are alike but for the effect of what they lose."""
    facts = curves(heads, 0)
    effect = torch.logspace(-3, 0, heads, dtype=torch.float64)
    for policy, curve in facts.alone.items():
        facts.alone[policy] = replace(curve, harm=effect * (1 - curve.recall) ** 2)
    facts.pivots = facts.sampled = facts.alone[Policy.SAMPLED]
    facts.pair_harm = facts.pairs
    facts.pairs = facts.worst_pairs = torch.zeros_like(facts.pairs)
    facts.pair_harm = torch.full_like(facts.pairs, 9.0)
    return facts


def test_a_budget_goes_where_lost_mass_does_most_harm() -> None:
    facts = harmful(60)
    by_effect = chosen(facts, budget=0.15)
    facts_of_recall = curves(60, 0)
    by_recall = chosen(facts_of_recall, budget=0.15)
    assert mean_density(by_effect) <= 0.15

    def harm(choices: list[Any]) -> float:
        tables = ((facts.alone[c.policy].harm, GAMMAS.index(c.gamma)) for c in choices)
        return sum(table[g, h].item() for h, (table, g) in enumerate(tables))

    assert harm(by_effect) < 0.7 * harm(by_recall)
    recall = [sum(c.recall for c in found[40:]) for found in (by_effect, by_recall)]
    assert recall[0] > recall[1]


@pytest.mark.parametrize("bound", [1.0, 0.1, 0.01])
def test_a_bound_of_the_divergence_is_kept_with_few_blocks(bound: float) -> None:
    found = chosen(harmful(60), max_kl=bound)
    assert 0.5 * bound < sum(c.harm for c in found) <= bound
    # A budget of as many blocks does no better.
    budget = chosen(harmful(60), budget=mean_density(found) + 1e-9)
    assert sum(c.harm for c in budget) == pytest.approx(sum(c.harm for c in found), rel=0.05)


def test_a_bound_that_no_pattern_keeps_makes_heads_dense() -> None:
    assert {c.policy for c in chosen(harmful(5), max_kl=1e-30)} == {Policy.DENSE}


def test_a_bound_without_effects_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_kl needs effects"):
        chosen(curves(5, 0), max_kl=0.1)


@pytest.mark.parametrize("min_size", [2, 4])
def test_pivots_are_those_of_the_plain_greedy_rule(min_size: int) -> None:
    """Gains that are made anew a few at a time choose as if all of them were."""
    heads = 40
    own = torch.rand(heads, dtype=torch.float64) + 0.2
    giving = own * (0.9 + 0.3 * torch.rand(heads, dtype=torch.float64))
    scores = torch.rand(heads, heads, dtype=torch.float64) + 0.15
    scores = torch.where(torch.rand(heads, heads) < 0.3, torch.inf, scores)
    costs, table, giving_of = own.tolist(), scores.tolist(), giving.tolist()
    barred: set[int] = set()
    while True:
        cost, pivot = list(costs), [-1] * heads

        def saves(
            p: int,
            cost: list[float] = cost,
            pivot: list[int] = pivot,
            barred: set[int] = barred,
        ) -> float:
            if p in barred or pivot[p] == p:
                return -1.0
            others = (h for h in range(heads) if h != p and pivot[h] != h)
            return sum(max(cost[h] - table[h][p], 0) for h in others) + cost[p] - giving_of[p]

        while saves(best := max(range(heads), key=saves)) > 1e-9:
            for h in range(heads):
                if h != best and pivot[h] != h and table[h][best] < cost[h]:
                    cost[h], pivot[h] = table[h][best], best
            cost[best], pivot[best] = giving_of[best], best
        small = {p for p in set(pivot) - {-1} if pivot.count(p) < min_size}
        if not small:
            break
        barred |= small
    found = _locate_pivots(own, giving, scores, min_size)
    assert found == pivot
    assert len(set(found)) > 3
