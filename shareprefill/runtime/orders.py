"""A layer's part of the plan as tensors on its device: made once, read by every prefill."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from shareprefill.artifact import Policy
from shareprefill.runtime.plan import HeadPlan, RuntimePlan


@dataclass(frozen=True)
class Group:
    """Heads of a layer that do the same.

    Attributes:
        index: Query heads in the layer, int64 `[S]`.
        gamma: Attention mass that the pattern of each covers, float32 `[S]`.
    """

    index: Tensor
    gamma: Tensor

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True)
class Choosing(Group):
    """Heads that may choose a pattern of their own by one policy.

    Attributes:
        code: Number of the policy.
        slots: Where their patterns are among the layer's candidates.
        asked: Where they are in `LayerOrders.if_failed`: a head, or -1 where none need choose.
    """

    code: int
    slots: slice
    asked: slice


@dataclass(frozen=True)
class LayerOrders:
    """What the heads of one layer are to do.

    The candidate patterns of a layer are, in this order: shared ones, one for each head of `own`
    (smoothed and other policies, then `slash`, then `sampled`), and as number P, which is in no
    bitmap, every causal block. With policy `share` they are its clusters', one a head, and P.

    Attributes:
        n_heads: Query heads.
        codes: Planned policy of every head, int64 `[H]`.
        dense: Heads computed densely.
        pivots: Heads that give patterns to others.
        new: The patterns (pivot and gamma) that they give, in the forward pass's; in `new_pivots`
            the position of each one's pivot in `pivots`, None where they are the same, and in
            `new_gammas` the mass.
        of_layer: The patterns of all pivots of the layer, also of those of other processes.
        pairs: The patterns that heads of this layer read, int64 places in the forward pass's.
        shares: Heads that share.
        share_pairs: Their pivots' patterns, int64 `[S]` places in the forward pass's.
        floor: The mass inside the pattern from which on each shares, float32 `[S]`.
        position: For every entry of the following two the position of its head in `shares`; any
            where the head does not share.
        if_passed: int64 `[H + T]`: the candidate that each head reads (-1: none, its output is
            there), and the heads that the groups of `own` are asked for, where checks pass.
        if_failed: The same where checks fail.
        others: Heads that choose by themselves, and by policies without an entry of their own.
        slash: Those that may take a vertical-slash pattern; None for none.
        sampled: Those that may take a row-sampled one; first those of `slash`, in its order, where
            it refuses heads that are not highly sparse.
        identity: Every candidate's own number and P's, then -1, which is what -1 reads: int64
            `[P + 2]`.
        labels: The policy that a head has that reads a candidate, int64 `[P + 1]`.
        reads_lists: Whether any head may read a candidate.
        is_dense: Whether all heads are dense by plan.
        no_index: Zeros, int64 `[H]`.
        clusters: Policy `share`: the clusters of the layer's heads, int64 `[C]`; `members`, bool
            `[C, heads of all processes]`; and `cluster_of`, each head's position in `clusters`.
        gamma: Attention mass of every head, float32 `[H]`.
    """

    n_heads: int
    codes: Tensor
    dense: Group
    pivots: Group
    new: slice
    new_pivots: Tensor | None
    new_gammas: Tensor
    of_layer: slice
    pairs: Tensor
    shares: Group
    share_pairs: Tensor
    floor: Tensor
    position: Tensor
    if_passed: Tensor
    if_failed: Tensor
    others: tuple[Choosing, ...]
    slash: Choosing | None
    sampled: Choosing | None
    identity: Tensor
    labels: Tensor
    reads_lists: bool
    is_dense: bool
    no_index: Tensor
    clusters: Tensor
    members: Tensor
    cluster_of: Tensor
    gamma: Tensor

    @cached_property
    def own(self) -> tuple[Choosing, ...]:
        """All groups of heads that choose by themselves."""
        return (*self.others, *(group for group in (self.slash, self.sampled) if group is not None))

    @property
    def n_candidates(self) -> int:
        """Candidate patterns P that are in a bitmap."""
        return len(self.identity) - 2

    @property
    def everything(self) -> Tensor:
        """The number of the pattern of every causal block, int64 `[1]`."""
        return self.identity[-2:-1]


# The policies that the layer pass has rules of its own for.
_BUILT_IN = frozenset(
    (Policy.DENSE, Policy.PIVOT, Policy.SHARE, Policy.SAMPLED, Policy.VERTICAL_SLASH)
)


class Orders:
    """The orders of all layers, by layer and device.

    Args:
        plan: What every head of the model is to do.
        heads: The query heads of every layer that this process holds; None for all of them.
    """

    def __init__(self, plan: RuntimePlan, heads: range | None = None) -> None:
        self.plan = plan
        self.heads = range(len(plan.layers[0])) if heads is None else heads
        self._made: dict[tuple[int, torch.device], LayerOrders] = {}

    @cached_property
    def pairs(self) -> dict[tuple[int, float], int]:
        """(Pivot, gamma) of every pattern that a head of any process reads -> its place.

        By pivot, so that those of a layer, and of a process's heads in it, follow each other.
        """
        plans = (plan for layer in self.plan.layers if not self.plan.online for plan in layer)
        found = {pair for plan in plans if (pair := self.pair_of(plan)) is not None}
        return {pair: place for place, pair in enumerate(sorted(found))}

    @property
    def n_clusters(self) -> int:
        """Clusters of the model."""
        return 1 + max(plan.cluster for layer in self.plan.layers for plan in layer)

    def of(self, layer: int, device: torch.device) -> LayerOrders:
        """The orders of one layer on a device.

        Args:
            layer: Layer index.
            device: Where the layer's tensors are.
        """
        key = (layer, device)
        made = self._made.get(key)
        if made is None:
            made = self._made[key] = _Layer(self, layer, device).orders()
        return made

    def pair_of(self, plan: HeadPlan) -> tuple[int, float] | None:
        """The pivot and gamma of the pattern that a head reads, where it is a pivot's."""
        if plan.policy == Policy.SHARE:
            return plan.pivot, plan.gamma
        if plan.policy == Policy.PIVOT and self.plan.pivot_rows > 0:
            return plan.head, plan.gamma
        return None


class _Layer:
    """Makes the orders of one layer."""

    def __init__(self, orders: Orders, layer: int, device: torch.device) -> None:
        self.all, self.device = orders, device
        self.every = orders.plan.layers[layer]
        self.heads = [self.every[h] for h in orders.heads]
        self.online = orders.plan.online
        self.shares = self._having(lambda plan: plan.policy == Policy.SHARE)
        keys = (orders.pair_of(plan) for plan in (() if self.online else self.heads))
        self.read = sorted({orders.pairs[key] for key in keys if key is not None})
        self.clusters = sorted({plan.cluster for plan in self.every if plan.cluster >= 0})
        # Candidates, and for each policy the one of each head.
        self.labels: list[int] = [int(Policy.SHARE)] * len(self.read)
        self.slots: dict[int, dict[int, int]] = {}
        # Heads of the groups, after each other.
        self.asked: list[int] = []

    def orders(self) -> LayerOrders:
        """The orders."""
        plan = self.all.plan
        slash = self._having(lambda p: Policy.VERTICAL_SLASH in (p.policy, p.fallback))
        refused = slash if plan.guarded else []
        sampled = self._having(lambda p: Policy.SAMPLED in (p.policy, p.fallback))
        sampled = [*refused, *(h for h in sampled if h not in refused)]
        others = {code for p in self.heads for code in (p.policy, p.fallback)} - _BUILT_IN
        own: list[Choosing] = []
        for code in sorted(others):
            chosen = self._having(lambda p, code=code: code in (p.policy, p.fallback))
            own.extend(self._choosing(code, chosen))
        with_slash = self._choosing(Policy.VERTICAL_SLASH, slash)
        with_sampled = self._choosing(Policy.SAMPLED, sampled)
        if self.online:
            self.labels = [int(Policy.SHARE)] * len(self.clusters)
            self.labels += [int(Policy.VERTICAL_SLASH)] * len(self.heads)
        pivots = self._having(lambda plan: plan.policy == Policy.PIVOT)
        dense = self._having(lambda plan: plan.policy == Policy.DENSE)
        pairs = self.all.pairs
        here = [p.head for p in self.every if p.policy == Policy.PIVOT]
        givers = {self.heads[h].head: position for position, h in enumerate(pivots)}
        new = [pair for pair in pairs if pair[0] in givers]
        new_pivots = [givers[pivot] for pivot, _ in new]
        passed, failed = self._places(fails=False), self._places(fails=True)
        position = {cluster: number for number, cluster in enumerate(self.clusters)}
        return LayerOrders(
            n_heads=len(self.heads),
            codes=self._integers(int(plan.policy) for plan in self.heads),
            dense=self._group(dense),
            pivots=self._group(pivots),
            new=_run(pairs[pair] for pair in new),
            new_pivots=None if new_pivots == [*range(len(pivots))] else self._integers(new_pivots),
            new_gammas=self._numbers(gamma for _, gamma in new),
            of_layer=_run(place for pair, place in pairs.items() if pair[0] in here),
            pairs=self._integers(self.read),
            shares=self._group(self.shares),
            share_pairs=self._integers(self._pair(h) for h in self.shares),
            floor=self._numbers(self.heads[h].floor for h in self.shares),
            position=self._integers(
                self.shares.index(h) if h in self.shares else 0
                for h in (*range(len(self.heads)), *self.asked)
            ),
            if_passed=self._integers(
                passed + [-1 if h in self.shares else h for h in self.asked],
            ),
            if_failed=self._integers(failed + self.asked),
            others=tuple(own),
            slash=next(iter(with_slash), None),
            sampled=next(iter(with_sampled), None),
            identity=self._integers([*range(len(self.labels) + 1), -1]),
            labels=self._integers([*self.labels, int(Policy.DENSE)]),
            reads_lists=self.online or max(passed + failed) >= 0,
            is_dense=len(dense) == len(self.heads),
            no_index=self._integers([0] * len(self.heads)),
            clusters=self._integers(self.clusters),
            members=torch.tensor(
                [[p.cluster == c for p in self.every] for c in self.clusters],
                dtype=torch.bool,
                device=self.device,
            ).view(len(self.clusters), len(self.every)),
            cluster_of=self._integers(position.get(plan.cluster, -1) for plan in self.heads),
            gamma=self._numbers(plan.gamma for plan in self.heads),
        )

    def _having(self, test: Callable[[HeadPlan], bool]) -> list[int]:
        return [] if self.online else [h for h, plan in enumerate(self.heads) if test(plan)]

    def _pair(self, h: int) -> int:
        pair = self.all.pair_of(self.heads[h])
        assert pair is not None
        return self.all.pairs[pair]

    def _places(self, *, fails: bool) -> list[int]:
        """The candidate that each head reads."""
        places: list[int] = []
        for h, plan in enumerate(() if self.online else self.heads):
            code = plan.fallback if fails and plan.policy == Policy.SHARE else plan.policy
            if code == Policy.DENSE:
                places.append(len(self.labels))
            elif code in (Policy.PIVOT, Policy.SHARE):
                is_read = self.all.pair_of(plan) is not None
                places.append(self.read.index(self._pair(h)) if is_read else -1)
            else:
                places.append(self.slots[code][h])
        return places

    def _choosing(self, code: int, chosen: Sequence[int]) -> list[Choosing]:
        """The group of heads with a policy, where there are any, with candidates of their own."""
        if not chosen:
            return []
        first = len(self.labels)
        self.slots[code] = {h: first + place for place, h in enumerate(chosen)}
        self.labels += [int(code)] * len(chosen)
        start = len(self.heads) + len(self.asked)
        self.asked += chosen
        group = self._group(chosen)
        slots, asked = slice(first, first + len(chosen)), slice(start, start + len(chosen))
        return [Choosing(group.index, group.gamma, int(code), slots, asked)]

    def _group(self, chosen: Sequence[int]) -> Group:
        plans = [self.heads[h] for h in chosen]
        gammas = (p.fallback_gamma if p.policy == Policy.SHARE else p.gamma for p in plans)
        return Group(self._integers(chosen), self._numbers(gammas))

    def _integers(self, values: Iterable[int]) -> Tensor:
        return torch.tensor([*values], dtype=torch.int64, device=self.device)

    def _numbers(self, values: Iterable[float]) -> Tensor:
        return torch.tensor([*values], dtype=torch.float32, device=self.device)


def _run(places: Iterable[int]) -> slice:
    """Places that follow each other, as a slice."""
    found = [*places]
    if not found:
        return slice(0, 0)
    assert found == [*range(found[0], found[0] + len(found))]
    return slice(found[0], found[0] + len(found))
