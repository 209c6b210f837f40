"""The policy of every head: the cheapest one that reaches the target recall on held-out prompts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shareprefill.artifact import Policy
from shareprefill.clustering.evidence import GAMMAS, SPARSE_OVERHEAD, Evidence, Measured
from shareprefill.config import ClusterConfig

NO_HEAD = -1

# A head's own tau over its largest distance to the pivot on held-out prompts: room for what a few
# prompts did not show.
_TAU_MARGIN = 1.15


@dataclass(frozen=True)
class Choice:
    """What one head is to do, and what that gave on the held-out prompts.

    Attributes:
        policy: The head's policy.
        gamma: Attention mass its pattern covers.
        recall: Attention mass inside its pattern.
        density: Blocks computed over causal blocks.
        cost: Predicted time, density and selection work together, as a share of dense attention.
        pivot: Head whose pattern it shares; its own number for a pivot.
        fallback: For a sharing head, what it does where its check fails.
        fallback_gamma: Attention mass that the fallback's pattern covers.
        tau: For a sharing head, the distance to its pivot under which it shares.
    """

    policy: Policy
    gamma: float
    recall: float
    density: float
    cost: float
    pivot: int = NO_HEAD
    fallback: Policy | None = None
    fallback_gamma: float = 1.0
    tau: float = 0.0


_DENSE = Choice(Policy.DENSE, 1.0, 1.0, 1.0, 1.0)


def alone(evidence: Evidence, config: ClusterConfig) -> list[Choice]:
    """The best policy of every head that needs no other head: sampled, vertical-slash or dense.

    Vertical-slash is for heads that are highly sparse (delta) on every held-out prompt.

    Args:
        evidence: Measurements on held-out prompts.
        config: Target recall and delta.

    Returns:
        A choice for each of the K heads.
    """
    sampled = _cheapest(Policy.SAMPLED, evidence.sampled, config.target_recall)
    slashes = _cheapest(Policy.VERTICAL_SLASH, evidence.vertical_slash, config.target_recall)
    sparse = (evidence.spread > config.delta).tolist()
    return [
        min((_DENSE, s, *((v,) if ok else ())), key=lambda c: c.cost)
        for s, v, ok in zip(sampled, slashes, sparse, strict=True)
    ]


def share(
    labels: Tensor, layers: Tensor, singles: list[Choice], evidence: Evidence, config: ClusterConfig
) -> list[Choice]:
    """Lets the heads of a cluster share one pivot where that costs less than their own policies.

    The pivot is the head that saves most: it pays for its own map, and every head of its cluster
    that is in its layer or a later one and reaches the target recall under its pattern saves the
    difference to its own policy. A cluster that saves nothing has no pivot.

    Args:
        labels: Cluster of every head, int64 `[K]`.
        layers: Layer of every head, int64 `[K]`.
        singles: What every head would do alone.
        evidence: Measurements on held-out prompts.
        config: Target recall, tau, and the least size of a sharing cluster.

    Returns:
        A choice for each of the K heads.
    """
    choices = list(singles)
    pivots = _pivot_choices(evidence, config)
    costs = _share_costs(evidence, config)
    own = torch.tensor([c.cost for c in singles], dtype=torch.float64)
    for label in range(int(labels.max()) + 1):
        members = (labels == label).nonzero()[:, 0]
        if len(members) < config.min_size:
            continue
        found = _best_pivot(members, layers, own, costs, pivots)
        if found is None:
            continue
        pivot, candidates = found
        if len(candidates) + 1 >= config.min_size:
            choices[pivot] = pivots[pivot]
            for h in candidates:
                choices[h] = _sharer(h, pivot, costs[h, pivot].item(), singles[h], evidence, config)
    return choices


def total_cost(choices: list[Choice]) -> float:
    """Predicted cost of all heads, as a share of dense attention."""
    return sum(c.cost for c in choices) / len(choices)


def _cheapest(policy: Policy, measured: Measured, target: float) -> list[Choice]:
    """The least gamma that reaches the target, head by head; dense where none does."""
    choices = []
    for h in range(measured.recall.shape[1]):
        reached = (measured.recall[:, h] >= target).nonzero()[:, 0]
        if not len(reached):
            choices.append(_DENSE)
            continue
        g = int(reached[0])
        density = measured.density[g, h].item()
        found = measured.recall[g, h].item()
        choices.append(Choice(policy, GAMMAS[g], found, density, measured.cost[g, h].item()))
    return choices


def _pivot_choices(evidence: Evidence, config: ClusterConfig) -> list[Choice]:
    if evidence.pivot_rows == 0:
        # All rows are computed anyway: a pivot is dense, and its pattern is for the others.
        return [
            Choice(Policy.PIVOT, config.gamma, 1.0, 1.0, 1.0, pivot=h)
            for h in range(evidence.heads)
        ]
    found = _cheapest(Policy.PIVOT, evidence.pivots, config.target_recall)
    return [
        Choice(Policy.PIVOT, c.gamma, c.recall, c.density, c.cost, h) for h, c in enumerate(found)
    ]


def _share_costs(evidence: Evidence, config: ClusterConfig) -> Tensor:
    """Cost of head h under pivot p's pattern at the least gamma that does, float64 `[K, K]`."""
    reaches = evidence.pairs >= config.target_recall
    first = reaches.int().argmax(0)
    density = evidence.pivots.density[first, torch.arange(evidence.heads)[None, :]]
    cost = SPARSE_OVERHEAD * density + evidence.check_cost
    return torch.where(reaches.any(0), cost, torch.inf)


def _best_pivot(
    members: Tensor, layers: Tensor, own: Tensor, costs: Tensor, pivots: list[Choice]
) -> tuple[int, list[int]] | None:
    """The member that saves most as a pivot, and the members that would share with it."""
    savings = own[members][:, None] - costs[members][:, members]
    later = layers[members][:, None] >= layers[members][None, :]
    savings = torch.where(later, savings, 0.0).clamp(min=0)
    savings.fill_diagonal_(0)
    extra = torch.tensor([pivots[h].cost for h in members.tolist()]) - own[members]
    gains = savings.sum(0) - extra
    best = int(gains.argmax())
    if gains[best] <= 0:
        return None
    heads = members[savings[:, best] > 0].tolist()
    return int(members[best]), heads


def _sharer(
    head: int, pivot: int, cost: float, single: Choice, evidence: Evidence, config: ClusterConfig
) -> Choice:
    g = int((evidence.pairs[:, head, pivot] >= config.target_recall).nonzero()[0])
    density = evidence.pivots.density[g, pivot].item()
    farthest = max(evidence.distances(head, pivot))
    return Choice(
        policy=Policy.SHARE,
        gamma=GAMMAS[g],
        recall=evidence.pairs[g, head, pivot].item(),
        density=density,
        cost=cost,
        pivot=pivot,
        fallback=single.policy,
        fallback_gamma=single.gamma,
        tau=min(max(config.tau, _TAU_MARGIN * farthest), 1.0),
    )
