"""The policy of every head: the cheapest that reaches the target recall on held-out prompts.

With a budget or a bound of the KL divergence, the one that does least harm for its cost instead:
one price of harm holds for all heads, and is the one at which the budget or the bound is met. Every
head then works where one block more would save as much as in any other head: no policy at one
threshold does that. Harm is the KL divergence that a head's lost mass is predicted to cause.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shareprefill.artifact import Policy
from shareprefill.clustering.measurements import (
    GAMMAS,
    HeldOutMeasurements,
    PolicyCurve,
    predicted_cost,
    time_in_blocks,
)
from shareprefill.config import ClusterConfig
from shareprefill.errors import ConfigError

NO_HEAD = -1

# Prices of harm that are tried, in density: from "blocks are all that counts" to "harm is
# all that counts", be it lost mass, of about .1, or a head's share of a KL divergence. So close
# that a budget is spent to half a percent.
_PRICES = tuple(10 ** (-2 + 5 * step / 252) for step in range(605))
# Gammas that the heads of one pivot may cut its order at.
_LEVELS = 4
# Candidates for a pivot whose gains are made anew at a time.
_ANEW = 8
# Below it, a gain is rounding.
_LEAST_GAIN = 1e-9


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
        harm: Predicted KL divergence that its lost mass causes, in nats a position; the lost mass
            itself where no effects are known.
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
    harm: float = 0.0
    pivot: int = NO_HEAD
    fallback: Policy | None = None
    fallback_gamma: float = 1.0


@dataclass(frozen=True)
class Goal:
    """What choices are compared by: the less the better, infinite for what is not allowed.

    Attributes:
        target: Recall that a head must reach on every held-out prompt, at the least predicted time
            (so that a head that varies from prompt to prompt is given more, or shares with no
            other); None where harm has a price.
        price: Predicted time of one head, as a density of blocks, that a harm of 1 is worth: the
            Lagrange multiplier of the budget.
    """

    target: float | None = None
    price: float = 0.0

    def score(
        self, recall: Tensor, lowest: Tensor, density: Tensor, work: float, harm: Tensor | None
    ) -> Tensor:
        """Of choices with these measurements, float64 of their shape."""
        if self.target is not None:
            return torch.where(lowest >= self.target, predicted_cost(density, work), torch.inf)
        # Where nobody knows what lost mass does, all of it is alike.
        return time_in_blocks(density, work) + self.price * (1 - recall if harm is None else harm)

    def of(self, choice: Choice) -> float:
        """Of one choice that is allowed."""
        if self.target is None:
            return time_in_blocks(choice.density, choice.work) + self.price * choice.harm
        return choice.cost

    def mean(self, choices: list[Choice]) -> float:
        """Of choices that are allowed, the mean over heads."""
        return sum(map(self.of, choices)) / len(choices)


_DENSE = Choice(Policy.DENSE, 1.0, 1.0, 1.0, 1.0)


def choose(
    labels: Tensor,
    layers: Tensor,
    evidence: HeldOutMeasurements,
    config: ClusterConfig,
    scored: dict[Goal, Scored] | None = None,
) -> tuple[list[Choice], Goal]:
    """The choice of every head for a clustering.

    Args:
        labels: Cluster of every head, int64 `[K]`.
        layers: Layer of every head, int64 `[K]`.
        evidence: Measurements on held-out prompts.
        config: Target recall, budget or bound of the KL divergence, thresholds, and the least size
            of a sharing cluster.
        scored: What earlier calls with the same measurements found, which is the same for all
            clusterings; this one's is added.

    Returns:
        A choice for each of the K heads, and the goal that they are best by: with a budget or a
        bound, that of the price at which it is met.

    Raises:
        ConfigError: the budget is below what the blocks take that every pattern reads.
    """
    plans = _Plans(labels, layers, evidence, config, {} if scored is None else scored)
    bound, budget = config.max_kl, config.budget
    if bound is not None:
        if evidence.pair_harm is None:
            raise ConfigError(
                "max_kl needs effects of lost attention, which this calibration has not: run "
                "sp calibrate --fresh without --effect-tokens 0"
            )
        # The last price is of dense heads alone.
        return plans.first(lambda found: total_harm(found) <= bound)
    if budget is None:
        goal = Goal(target=config.target_recall)
        return plans.of(goal), goal
    cheapest = plans.of(Goal(price=_PRICES[0]))
    if mean_density(cheapest) > budget:
        raise ConfigError(
            f"budget = {budget} cannot be met: the fewest blocks that can be read are a "
            f"density of {mean_density(cheapest):.3f} on the held-out prompts; raise --budget"
        )
    return plans.last(lambda found: mean_density(found) <= budget)


def choose_by(
    goal: Goal,
    labels: Tensor,
    layers: Tensor,
    evidence: HeldOutMeasurements,
    config: ClusterConfig,
    scored: dict[Goal, Scored],
) -> list[Choice]:
    """The same by a goal that is known, so that clusterings compare at one price of harm.

    Args:
        goal: As `choose` returns it for another clustering.
        labels: As for `choose`.
        layers: As for `choose`.
        evidence: As for `choose`.
        config: As for `choose`.
        scored: As for `choose`.
    """
    return _Plans(labels, layers, evidence, config, scored).of(goal)


@dataclass(frozen=True, eq=False)
class Scored:
    """What heads would cost by a goal, whoever shares with whom.

    Attributes:
        singles: What every head would do alone.
        pivots: What it would do as a pivot.
        scores: What head h costs under pivot p's pattern at its best gamma, float64 `[K, K]`.
        gammas: The numbers of those gammas, int64 `[K, K]`.
    """

    singles: list[Choice]
    pivots: list[Choice]
    scores: Tensor
    gammas: Tensor


def _score(
    singles: list[Choice], evidence: HeldOutMeasurements, config: ClusterConfig, goal: Goal
) -> Scored:
    scores, gammas = _share_scores(evidence, goal)
    return Scored(singles, _pivot_choices(evidence, config, goal), scores, gammas)


@dataclass(frozen=True)
class _Plans:
    """The plans of one clustering, by goal."""

    labels: Tensor
    layers: Tensor
    evidence: HeldOutMeasurements
    config: ClusterConfig
    scored: dict[Goal, Scored]

    def of(self, goal: Goal) -> list[Choice]:
        scored = self.scored.get(goal)
        if scored is None:
            singles = alone(self.evidence, self.config, goal)
            scored = self.scored[goal] = _score(singles, self.evidence, self.config, goal)
        evidence, config = self.evidence, self.config
        return share(self.labels, self.layers, scored.singles, evidence, config, goal, scored)

    def last(self, holds: Callable[[list[Choice]], bool]) -> tuple[list[Choice], Goal]:
        """That of the highest price at which something holds that holds at the lowest."""
        low, high = 0, len(_PRICES) - 1
        found = self.of(Goal(price=_PRICES[low]))
        while low < high:
            middle = (low + high + 1) // 2
            tried = self.of(Goal(price=_PRICES[middle]))
            if holds(tried):
                low, found = middle, tried
            else:
                high = middle - 1
        return found, Goal(price=_PRICES[low])

    def first(self, holds: Callable[[list[Choice]], bool]) -> tuple[list[Choice], Goal]:
        """That of the lowest price at which something holds; every head dense if it never does."""
        low, high = 0, len(_PRICES)
        found = [_DENSE] * self.evidence.heads
        while low < high:
            middle = (low + high) // 2
            tried = self.of(Goal(price=_PRICES[middle]))
            if holds(tried):
                high, found = middle, tried
            else:
                low = middle + 1
        return found, Goal(price=_PRICES[min(high, len(_PRICES) - 1)])


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
    scored: Scored | None = None,
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
        scored: What that comes to, where it is known.

    Returns:
        A choice for each of the K heads.
    """
    goal = goal or Goal(target=config.target_recall)
    scored = scored or _score(singles, evidence, config, goal)
    choices, pivots, gammas = list(singles), scored.pivots, scored.gammas
    own = torch.tensor([goal.of(c) for c in singles], dtype=torch.float64, device="cpu")
    giving = torch.tensor([goal.of(c) for c in pivots], dtype=torch.float64, device="cpu")
    scores = torch.where(layers[:, None] >= layers[None, :], scored.scores, torch.inf)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero()[:, 0]
        if len(members) < config.min_size:
            continue
        among = scores[members][:, members]
        found = _locate_pivots(own[members], giving[members], among, config.min_size)
        for place, pivot in enumerate(found):
            if pivot < 0:
                continue
            h, p = int(members[place]), int(members[pivot])
            if h == p:
                choices[h] = pivots[h]
            else:
                choices[h] = _sharer(h, p, int(gammas[h, p]), singles[h], evidence)
    return _with_few_levels(choices, singles, evidence, goal)


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


def total_harm(choices: list[Choice]) -> float:
    """Predicted KL divergence from dense attention, in nats a position: those of heads add up."""
    return sum(c.harm for c in choices)


def mean_recall(choices: list[Choice]) -> float:
    """Mean attention mass inside the patterns of all heads."""
    return sum(c.recall for c in choices) / len(choices)


def _best(policy: Policy, measured: PolicyCurve, goal: Goal) -> list[Choice]:
    """The best gamma of every head; dense where none is allowed."""
    scores = goal.score(
        measured.recall, measured.worst_recall, measured.density, measured.work, measured.harm
    )
    best = scores.argmin(0)  # [K]
    recall, density = (
        table.gather(0, best[None])[0] for table in (measured.recall, measured.density)
    )
    harm = 1 - recall if measured.harm is None else measured.harm.gather(0, best[None])[0]
    cost, allowed = predicted_cost(density, measured.work), scores.min(0).values < torch.inf
    columns = (t.tolist() for t in (allowed, best, recall, density, cost, harm))
    return [
        Choice(policy, GAMMAS[g], r, d, c, measured.work, lost) if is_allowed else _DENSE
        for is_allowed, g, r, d, c, lost in zip(*columns, strict=True)
    ]


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
    best = torch.full_like(evidence.pairs[0], torch.inf)
    number = torch.zeros(best.shape, dtype=torch.int64, device="cpu")
    for g in range(len(GAMMAS)):
        score = _share_score(evidence, goal, g, slice(None), slice(None))
        better = score < best
        best, number = torch.where(better, score, best), torch.where(better, g, number)
    return best, number


def _share_score(
    evidence: HeldOutMeasurements,
    goal: Goal,
    g: int,
    heads: slice | list[int],
    pivots: slice | int,
) -> Tensor:
    """Score of heads under pivots' patterns at one gamma, float64 `[heads, pivots]`."""
    pairs, harm = evidence.pairs[g][heads, pivots], evidence.pair_harm
    return goal.score(
        pairs,
        evidence.worst_pairs[g][heads, pivots],
        evidence.pivots.density[g][pivots].expand_as(pairs),
        evidence.check_work,
        None if harm is None else harm[g][heads, pivots],
    )


def _locate_pivots(own: Tensor, giving: Tensor, scores: Tensor, min_size: int) -> list[int]:
    """Chooses pivots among heads, and the pivot of each head: greedy facility location.

    The pivot that saves most is taken, again and again, until none saves anything: it pays for its
    own map, and every head that is better off under its pattern than as it is saves the difference.
    A head may change to a later pivot. Pivots that are left with too few heads are given up.

    Args:
        own: What every head costs alone, `[K]`.
        giving: What every head costs as a pivot.
        scores: What head h costs under pivot p's pattern, `[K, K]`; infinite where it may not.
        min_size: Heads that a pivot needs, itself among them.

    Returns:
        For each head its pivot; itself for a pivot; -1 for none.
    """
    heads = len(own)
    barred = torch.zeros(heads, dtype=torch.bool, device="cpu")
    while True:
        cost, pivot = own.clone(), torch.full((heads,), -1, dtype=torch.int64, device="cpu")
        is_pivot = torch.zeros(heads, dtype=torch.bool, device="cpu")

        def gain(of: Tensor, cost: Tensor = cost, is_pivot: Tensor = is_pivot) -> Tensor:
            """What pivots `of` would save now. It only ever falls, as costs do."""
            savings = (cost[:, None] - scores[:, of]).clamp_(min=0)
            # Pivots read their own patterns whoever comes later.
            savings[is_pivot] = 0
            savings[of, torch.arange(len(of), device="cpu")] = 0
            return savings.sum(0) + cost[of] - giving[of]

        most = gain(torch.arange(heads, device="cpu"))
        most[barred] = -torch.inf
        is_new = torch.zeros(heads, dtype=torch.bool, device="cpu")
        while True:
            # Earlier gains are bounds: the largest are made anew until the best of all is new.
            if not bool(is_new.all()):
                old = most.masked_fill(is_new, -torch.inf)
                found = old.topk(min(_ANEW, heads)).indices
                found = found[~is_new[found]]
                known = most[found]
                most[found] = torch.where(known > -torch.inf, gain(found), known)
                is_new[found] = True
            best = int(most.argmax())
            if not most[best] > _LEAST_GAIN:
                break
            if not is_new[best]:
                continue
            takes = cost > scores[:, best]
            takes &= ~is_pivot
            takes[best] = False
            cost[takes], pivot[takes] = scores[takes, best], best
            cost[best], pivot[best], is_pivot[best] = giving[best], best, True
            most[best] = -torch.inf
            is_new[:] = False
        sizes = torch.bincount(pivot[pivot >= 0], minlength=heads)
        small = is_pivot & (sizes < min_size)
        if not bool(small.any()):
            return pivot.tolist()
        barred |= small


def _with_few_levels(
    choices: list[Choice], singles: list[Choice], evidence: HeldOutMeasurements, goal: Goal
) -> list[Choice]:
    """Lets the heads of a pivot cut its order at a few gammas alone: lists take memory.

    Greedy again: the gamma comes first at which all of them cost least, then those that save most.
    """
    sharers: dict[int, list[int]] = {}
    for h, choice in enumerate(choices):
        if choice.policy is Policy.SHARE:
            sharers.setdefault(choice.pivot, []).append(h)
    choices = list(choices)
    for pivot, heads in sharers.items():
        wanted = sorted({GAMMAS.index(choices[h].gamma) for h in heads})
        if len(wanted) <= _LEVELS:
            continue
        columns = [_share_score(evidence, goal, g, heads, pivot) for g in wanted]
        scores = torch.stack(columns)  # [gammas, heads]
        # The last gamma that is wanted serves all of them, where a target is to be reached.
        kept = [len(wanted) - 1] if goal.target is not None else []
        while len(kept) < _LEVELS:
            costs = [
                scores[[*kept, g]].min(0).values.sum().item() if g not in kept else torch.inf
                for g in range(len(wanted))
            ]
            kept.append(min(range(len(wanted)), key=costs.__getitem__))
        numbers = scores[kept].argmin(0).tolist()
        for h, number in zip(heads, numbers, strict=True):
            choices[h] = _sharer(h, pivot, wanted[kept[number]], singles[h], evidence)
    return choices


def _sharer(
    head: int, pivot: int, g: int, fallback: Choice, evidence: HeldOutMeasurements
) -> Choice:
    density = evidence.pivots.density[g, pivot].item()
    recall = evidence.pairs[g, head, pivot].item()
    harm = evidence.pair_harm
    return Choice(
        policy=Policy.SHARE,
        gamma=GAMMAS[g],
        recall=recall,
        harm=1 - recall if harm is None else harm[g, head, pivot].item(),
        density=density,
        cost=predicted_cost(density, evidence.check_work),
        work=evidence.check_work,
        pivot=pivot,
        fallback=fallback.policy,
        fallback_gamma=fallback.gamma,
    )
