"""The policy of every head: the cheapest that reaches the target recall on held-out prompts.

With a budget, the one that gives most recall for its cost instead: one price of recall holds for
all heads, and is the one at which their mean density meets the budget. Every head then works where
one block more would gain as much as in any other head: no policy at one threshold does that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shareprefill.artifact import Policy
from shareprefill.clustering.measurements import (
    GAMMAS,
    HeldOutMeasurements,
    PolicyCurve,
    predicted_cost,
)
from shareprefill.config import ClusterConfig
from shareprefill.errors import ConfigError

NO_HEAD = -1

# Prices of recall that are tried for a budget, in effective density: from "blocks are all that
# counts" to "recall is all that counts".
_RECALL_PRICES = tuple(10 ** (-2 + 5 * step / 63) for step in range(64))


@dataclass(frozen=True)
class Choice:
    """What one head is to do, and what that gave on the held-out prompts.

    Attributes:
        policy: The head's policy.
        gamma: Attention mass its pattern covers.
        recall: Attention mass inside its pattern.
        density: Blocks computed over causal blocks.
        cost: Predicted time, density and selection work together, as a share of dense attention.
        work: Selection work, as a share of dense attention's operations.
        pivot: Head whose pattern it shares; its own number for a pivot.
        fallback: For a sharing head, what it does where its check fails.
        fallback_gamma: Attention mass that the fallback's pattern covers.
    """

    policy: Policy
    gamma: float
    recall: float
    density: float
    cost: float
    work: float = 0.0
    pivot: int = NO_HEAD
    fallback: Policy | None = None
    fallback_gamma: float = 1.0


@dataclass(frozen=True)
class Goal:
    """What choices are compared by: the less the better, infinite for what is not allowed.

    Attributes:
        target: Recall that a head must reach on every held-out prompt, at the least predicted time
            (so that a head that varies from prompt to prompt is given more, or shares with no
            other); None where recall has a price.
        recall_price: Effective density (blocks and selection work) that a recall of 1 is worth:
            the Lagrange multiplier of the budget.
    """

    target: float | None = None
    recall_price: float = 0.0

    def score(self, recall: Tensor, lowest: Tensor, density: Tensor, work: float) -> Tensor:
        """Of choices with these recalls, density and selection work, float64 of their shape."""
        if self.target is None:
            return density + work - self.recall_price * recall
        return torch.where(lowest >= self.target, predicted_cost(density, work), torch.inf)

    def of(self, choice: Choice) -> float:
        """Of one choice that is allowed."""
        if self.target is None:
            return choice.density + choice.work - self.recall_price * choice.recall
        return choice.cost


_DENSE = Choice(Policy.DENSE, 1.0, 1.0, 1.0, 1.0)


def choose(
    labels: Tensor, layers: Tensor, evidence: HeldOutMeasurements, config: ClusterConfig
) -> list[Choice]:
    """The choice of every head for a clustering.

    Args:
        labels: Cluster of every head, int64 `[K]`.
        layers: Layer of every head, int64 `[K]`.
        evidence: Measurements on held-out prompts.
        config: Target recall or budget, thresholds, and the least size of a sharing cluster.

    Returns:
        A choice for each of the K heads.

    Raises:
        ConfigError: the budget is below what the blocks take that every pattern reads.
    """
    if config.budget is None:
        return _choose(labels, layers, evidence, config, Goal(target=config.target_recall))
    low, high = 0, len(_RECALL_PRICES) - 1
    found = _choose(labels, layers, evidence, config, Goal(recall_price=_RECALL_PRICES[low]))
    if mean_density(found) > config.budget:
        raise ConfigError(
            f"budget = {config.budget} cannot be met: the fewest blocks that can be read are a "
            f"density of {mean_density(found):.3f} on the held-out prompts; raise --budget"
        )
    while low < high:
        middle = (low + high + 1) // 2
        tried = _choose(labels, layers, evidence, config, Goal(recall_price=_RECALL_PRICES[middle]))
        if mean_density(tried) <= config.budget:
            low, found = middle, tried
        else:
            high = middle - 1
    return found


def _choose(
    labels: Tensor, layers: Tensor, evidence: HeldOutMeasurements, config: ClusterConfig, goal: Goal
) -> list[Choice]:
    singles = alone(evidence, config, goal)
    return share(labels, layers, singles, evidence, config, goal)


def alone(
    evidence: HeldOutMeasurements,
    config: ClusterConfig,
    goal: Goal | None = None,
) -> list[Choice]:
    """The best policy of every head that needs no other head.

    Vertical-slash is for heads that are highly sparse (delta) on every held-out prompt.

    Args:
        evidence: Measurements on held-out prompts.
        config: Delta, and the target recall where no goal is given.
        goal: What choices are compared by.

    Returns:
        A choice for each of the K heads.
    """
    goal = goal or Goal(target=config.target_recall)
    best = [_DENSE] * evidence.heads
    sparse = (evidence.distance_to_uniform > config.delta).tolist()
    for policy, measured in evidence.alone.items():
        for h, choice in enumerate(_best(policy, measured, goal)):
            allowed = policy is not Policy.VERTICAL_SLASH or sparse[h]
            if allowed and goal.of(choice) < goal.of(best[h]):
                best[h] = choice
    return best


def share(
    labels: Tensor,
    layers: Tensor,
    singles: list[Choice],
    evidence: HeldOutMeasurements,
    config: ClusterConfig,
    goal: Goal | None = None,
) -> list[Choice]:
    """Lets the heads of a cluster share pivots where that is better than their own policies.

    A pivot is the head that saves most: it pays for its own map, and every head of its cluster that
    is in its layer or a later one, and is better off under its pattern, saves the difference to its
    own policy. The heads that are left may have a further pivot, as those of distant layers do. A
    cluster that saves nothing has none.

    Args:
        labels: Cluster of every head, int64 `[K]`.
        layers: Layer of every head, int64 `[K]`.
        singles: What every head would do alone.
        evidence: Measurements on held-out prompts.
        config: The least size of a sharing cluster.
        goal: What choices are compared by.

    Returns:
        A choice for each of the K heads.
    """
    goal = goal or Goal(target=config.target_recall)
    choices = list(singles)
    pivots = _pivot_choices(evidence, config, goal)
    scores, gammas = _share_scores(evidence, goal)
    own = torch.tensor([goal.of(c) for c in singles], dtype=torch.float64, device="cpu")
    extra = torch.tensor([goal.of(c) for c in pivots], dtype=torch.float64, device="cpu") - own
    for label in range(int(labels.max()) + 1):
        left = (labels == label).nonzero()[:, 0]
        while len(left) >= config.min_size:
            found = _best_pivot(left, layers, own, extra, scores)
            if found is None or len(found[1]) + 1 < config.min_size:
                break
            pivot, heads = found
            choices[pivot] = pivots[pivot]
            for h in heads:
                choices[h] = _sharer(h, pivot, int(gammas[h, pivot]), singles[h], evidence)
            taken = torch.tensor([pivot, *heads], device="cpu")
            left = left[~torch.isin(left, taken)]
    return choices


def slacks(
    choices: list[Choice], evidence: HeldOutMeasurements, config: ClusterConfig
) -> list[float]:
    """How much less than gamma a head's check may cover of its pivot's pattern, 0 without a pivot.

    The check is there to find prompts that are unlike calibration, not to refuse what was measured:
    it passes on every held-out prompt, with `config.slack` to spare.
    """
    found = [0.0] * len(choices)
    for h, choice in enumerate(choices):
        if choice.policy is Policy.SHARE:
            least = evidence.least_covered(h, choice.pivot, choice.gamma)
            found[h] = min(max(choice.gamma - least + config.slack, -1.0), 1.0)
    return found


def total_cost(choices: list[Choice]) -> float:
    """Predicted cost of all heads, as a share of dense attention."""
    return sum(c.cost for c in choices) / len(choices)


def mean_density(choices: list[Choice]) -> float:
    """Blocks computed by all heads, as a share of their causal blocks."""
    return sum(c.density for c in choices) / len(choices)


def mean_recall(choices: list[Choice]) -> float:
    """Mean attention mass inside the patterns of all heads."""
    return sum(c.recall for c in choices) / len(choices)


def _best(policy: Policy, measured: PolicyCurve, goal: Goal) -> list[Choice]:
    """The best gamma of every head; dense where none is allowed."""
    scores = goal.score(measured.recall, measured.worst_recall, measured.density, measured.work)
    best = scores.argmin(0)
    choices = []
    for h, g in enumerate(best.tolist()):
        if scores[g, h] == torch.inf:
            choices.append(_DENSE)
            continue
        found, density, cost = (
            table[g, h].item() for table in (measured.recall, measured.density, measured.cost)
        )
        choices.append(Choice(policy, GAMMAS[g], found, density, cost, measured.work))
    return choices


def _pivot_choices(
    evidence: HeldOutMeasurements, config: ClusterConfig, goal: Goal
) -> list[Choice]:
    if evidence.pivot_rows == 0:
        # All rows are computed anyway: a pivot is dense, and its pattern is for the others.
        return [
            Choice(Policy.PIVOT, config.gamma, 1.0, 1.0, 1.0, pivot=h)
            for h in range(evidence.heads)
        ]
    found = _best(Policy.PIVOT, evidence.pivots, goal)
    return [replace(c, policy=Policy.PIVOT, pivot=h) for h, c in enumerate(found)]


def _share_scores(evidence: HeldOutMeasurements, goal: Goal) -> tuple[Tensor, Tensor]:
    """Score of head h under pivot p's pattern at its best gamma, and that gamma's number.

    Returns:
        float64 and int64 `[K, K]`.
    """
    density = evidence.pivots.density
    best = torch.full_like(evidence.pairs[0], torch.inf)
    number = torch.zeros(best.shape, dtype=torch.int64, device="cpu")
    for g in range(len(GAMMAS)):
        score = goal.score(
            evidence.pairs[g],
            evidence.worst_pairs[g],
            density[g].expand_as(best),
            evidence.check_work,
        )
        better = score < best
        best, number = torch.where(better, score, best), torch.where(better, g, number)
    return best, number


def _best_pivot(
    members: Tensor, layers: Tensor, own: Tensor, extra: Tensor, scores: Tensor
) -> tuple[int, list[int]] | None:
    """The member that saves most as a pivot, and the members that would share with it."""
    savings = own[members][:, None] - scores[members][:, members]
    later = layers[members][:, None] >= layers[members][None, :]
    savings = torch.where(later, savings, 0.0).clamp(min=0)
    savings.fill_diagonal_(0)
    gains = savings.sum(0) - extra[members]
    best = int(gains.argmax())
    if not gains[best] > 0:
        return None
    heads = members[savings[:, best] > 0].tolist()
    return int(members[best]), heads


def _sharer(
    head: int, pivot: int, g: int, fallback: Choice, evidence: HeldOutMeasurements
) -> Choice:
    density = evidence.pivots.density[g, pivot].item()
    return Choice(
        policy=Policy.SHARE,
        gamma=GAMMAS[g],
        recall=evidence.pairs[g, head, pivot].item(),
        density=density,
        cost=predicted_cost(density, evidence.check_work),
        work=evidence.check_work,
        pivot=pivot,
        fallback=fallback.policy,
        fallback_gamma=fallback.gamma,
    )
