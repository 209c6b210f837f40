"""A layer's part of the plan as tensors on its device: made once, read by every prefill."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
class LayerOrders:
    """What the heads of one layer are to do.

    A position of -1 stands for "none": it reads the last entry of a list that has one more entry
    for this.

    Attributes:
        n_heads: Query heads.
        codes: Planned policy of every head, int64 `[H]`.
        dense: Heads computed densely.
        pivots: Heads that give patterns to others.
        new_pairs: The patterns (pivot and gamma) that they give, int64 `[N]` places; and in
            `new_pivots` the position of each one's pivot in `pivots`, in `new_gammas` its mass.
        layer_pairs: The patterns of all pivots of the layer, int64 places, also of those that other
            processes compute.
        pairs: The patterns that heads of this layer read, int64 places.
        pivot_pairs: The pivots' own patterns, positions in `pairs`; None where pivots are dense.
        shares: Heads that share, with `share_pairs` (positions in `pairs`) and `floor`, the mass
            inside the pattern from which on each shares, float32 `[S]`.
        slash: Heads that may take a vertical-slash pattern; `slash_share` is their position in
            `shares`, where that is what they fall back to.
        selected: For every other policy its code, the heads that may take it, and as above their
            positions in `shares`.
        sampled: Heads that may take a row-sampled pattern, likewise with `sampled_share`, and
            `sampled_slash`, their position in `slash`, where they are what it refuses.
        clusters: Policy `share`: the clusters of the layer's heads, int64 `[C]`; `members`, bool
            `[C, heads of all processes]`; and `cluster_of`, each head's position in `clusters`.
        gamma: Attention mass of every head, float32 `[H]`.
    """

    n_heads: int
    codes: Tensor
    dense: Group
    pivots: Group
    new_pairs: Tensor
    new_pivots: Tensor
    new_gammas: Tensor
    layer_pairs: Tensor
    pairs: Tensor
    pivot_pairs: Tensor | None
    shares: Group
    share_pairs: Tensor
    floor: Tensor
    slash: Group
    slash_share: Tensor
    selected: tuple[tuple[int, Group, Tensor], ...]
    sampled: Group
    sampled_share: Tensor
    sampled_slash: Tensor
    clusters: Tensor
    members: Tensor
    cluster_of: Tensor
    gamma: Tensor


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
        self._layers = [[layer[h] for h in self.heads] for layer in plan.layers]
        self._made: dict[tuple[int, torch.device], LayerOrders] = {}

    @cached_property
    def pairs(self) -> dict[tuple[int, float], int]:
        """(Pivot, gamma) of every pattern that a head of any process reads -> its place."""
        found: dict[tuple[int, float], int] = {}
        for layer in self.plan.layers if not self.plan.online else ():
            for plan in layer:
                key = self._pair_of(plan)
                if key is not None:
                    found.setdefault(key, len(found))
        return found

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
        if key not in self._made:
            self._made[key] = self._make(layer, device)
        return self._made[key]

    def _pair_of(self, plan: HeadPlan) -> tuple[int, float] | None:
        """The pivot and gamma of the pattern that a head reads, where it is a pivot's."""
        if plan.policy == Policy.SHARE:
            return plan.pivot, plan.gamma
        if plan.policy == Policy.PIVOT and self.plan.pivot_rows > 0:
            return plan.head, plan.gamma
        return None

    def _make(self, layer: int, device: torch.device) -> LayerOrders:
        heads, every = self._layers[layer], self.plan.layers[layer]
        online = self.plan.online

        def having(test: Callable[[HeadPlan], bool]) -> list[int]:
            return [] if online else [h for h, plan in enumerate(heads) if test(plan)]

        def integers(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        def group(chosen: Sequence[int]) -> Group:
            gammas = [
                heads[h].fallback_gamma if heads[h].policy == Policy.SHARE else heads[h].gamma
                for h in chosen
            ]
            return Group(integers(chosen), torch.tensor(gammas, device=device))

        pivots = having(lambda p: p.policy == Policy.PIVOT)
        shares = having(lambda p: p.policy == Policy.SHARE)
        slash = having(lambda p: Policy.VERTICAL_SLASH in (p.policy, p.fallback))
        refused = slash if self.plan.guarded else []
        sampled = sorted(
            {*having(lambda p: Policy.SAMPLED in (p.policy, p.fallback)), *refused},
        )
        keys = {h: self._pair_of(heads[h]) for h in pivots + shares}
        read = sorted({self.pairs[key] for key in keys.values() if key is not None})
        place = {pair: position for position, pair in enumerate(read)}
        here = {p.head for p in every if p.policy == Policy.PIVOT}
        givers = {heads[h].head: position for position, h in enumerate(pivots)}
        new = [(pair, key) for key, pair in self.pairs.items() if key[0] in givers]
        clusters = sorted({p.cluster for p in every if p.cluster >= 0})
        position = {cluster: number for number, cluster in enumerate(clusters)}
        others = {code for p in heads for code in (p.policy, p.fallback)} - _BUILT_IN
        selected = {
            code: having(lambda p, code=code: code in (p.policy, p.fallback))
            for code in sorted(others)
        }

        def pair_of(h: int) -> int:
            key = keys[h]
            assert key is not None
            return place[self.pairs[key]]

        def positions(chosen: Sequence[int], among: Sequence[int]) -> Tensor:
            return integers([among.index(h) if h in among else -1 for h in chosen])

        return LayerOrders(
            n_heads=len(heads),
            codes=integers([int(p.policy) for p in heads]),
            dense=group(having(lambda p: p.policy == Policy.DENSE)),
            pivots=group(pivots),
            new_pairs=integers([pair for pair, _ in new]),
            new_pivots=integers([givers[pivot] for _, (pivot, _) in new]),
            new_gammas=torch.tensor([gamma for _, (_, gamma) in new], device=device),
            layer_pairs=integers([pair for key, pair in self.pairs.items() if key[0] in here]),
            pairs=integers(read),
            pivot_pairs=None if self.plan.pivot_rows == 0 else integers([*map(pair_of, pivots)]),
            shares=group(shares),
            share_pairs=integers([*map(pair_of, shares)]),
            floor=torch.tensor([heads[h].floor for h in shares], device=device),
            slash=group(slash),
            slash_share=positions(slash, shares),
            selected=tuple(
                (code, group(chosen), positions(chosen, shares))
                for code, chosen in selected.items()
            ),
            sampled=group(sampled),
            sampled_share=positions([-1 if h in refused else h for h in sampled], shares),
            sampled_slash=positions(sampled, refused),
            clusters=integers(clusters),
            members=torch.tensor(
                [[p.cluster == c for p in every] for c in clusters],
                dtype=torch.bool,
                device=device,
            ).view(len(clusters), len(every)),
            cluster_of=integers([position.get(p.cluster, -1) for p in heads]),
            gamma=torch.tensor([p.gamma for p in heads], device=device),
        )
