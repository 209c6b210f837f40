"""SharePrefill's own rule: pivots are found at run time (`--policy shareprefill`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shareprefill.artifact import Policy
from shareprefill.runtime.geometry import Geometry
from shareprefill.runtime.ops.block_selection import (
    js_distances,
    select_blocks,
    vertical_slash_blocks,
)
from shareprefill.runtime.ops.pages import Tokens
from shareprefill.runtime.ops.pooled_attention import pooled_attention
from shareprefill.runtime.policies.base import LayerInputs
from shareprefill.runtime.policies.vertical_slash import VerticalSlash, profiles
from shareprefill.runtime.rules.base import (
    Exchange,
    LayerPlan,
    LayerRule,
    LayerSelection,
    Overhead,
    PolicyTaken,
    integers,
    numbers,
)


@dataclass(frozen=True, eq=False)
class ClusteredLayer(LayerPlan):
    """One layer's part of the plan. Its patterns are its clusters', then one a head.

    Attributes:
        heads: 0 .. H-1, int64 `[H]`.
        clusters: The clusters of the layer's heads, int64 `[C]`.
        members: bool `[C, heads of all processes]`.
        cluster_of: Each head's position in `clusters`, int64 `[H]`; -1 for none.
        cluster_gamma: Attention mass that the clusters' patterns cover, float32 `[C]`.
        gamma: Attention mass that the heads' own patterns cover, float32 `[H]`.
        by_pattern: The policy of a head that reads a pattern, int64 `[P + 1]`.
        dense_id: The number of the pattern of every causal block, int64 `[1]`.
        no_index: Zeros, int64 `[H]`.
    """

    heads: Tensor
    clusters: Tensor
    members: Tensor
    cluster_of: Tensor
    cluster_gamma: Tensor
    gamma: Tensor
    by_pattern: Tensor
    dense_id: Tensor
    no_index: Tensor


class ElectedPivots:
    """The pivots of one sequence that were found so far.

    Args:
        geometry: Of the sequence.
        n_clusters: Clusters of the model.

    Attributes:
        maps: Their exact maps, float32 `[clusters, n_q, n_k]`; zeros for the other clusters.
        elected: Clusters that have a pivot, bool `[clusters]`.
    """

    def __init__(self, geometry: Geometry, n_clusters: int) -> None:
        shape, device = (n_clusters, *geometry.shape), geometry.device
        self.maps = torch.zeros(shape, dtype=torch.float32, device=device)
        self.elected = torch.zeros(n_clusters, dtype=torch.bool, device=device)

    def to(self, device: torch.device) -> ElectedPivots:
        """The same on another device."""
        moved = ElectedPivots.__new__(ElectedPivots)
        moved.maps, moved.elected = self.maps.to(device), self.elected.to(device)
        return moved


class SharePrefillRule(LayerRule[ClusteredLayer, ElectedPivots]):
    """SharePrefill's rule (arXiv 2505.19578, section 3), heads in ascending order.

    On the last query block's distribution: a highly sparse head takes a vertical-slash pattern; the
    first other head of a cluster is computed densely and gives its pattern; a later one shares it
    where it looks alike, and takes a vertical-slash pattern where not.
    """

    def make_layer(self, index: int, device: torch.device) -> ClusteredLayer:
        """Makes a layer's plan."""
        every = self.plan.layers[index]
        mine = [every[h] for h in self.heads]
        clusters = sorted({plan.cluster for plan in every if plan.cluster >= 0})
        position = {cluster: number for number, cluster in enumerate(clusters)}
        members = [[plan.cluster == c for plan in every] for c in clusters]
        n_clusters, n_heads = len(clusters), len(mine)
        shared, own = int(Policy.SHARE), int(Policy.VERTICAL_SLASH)
        by_pattern = [shared] * n_clusters + [own] * n_heads + [int(Policy.DENSE)]
        return ClusteredLayer(
            n_heads=n_heads,
            dense=integers([], device),
            is_dense=False,
            reads_patterns=True,
            heads=torch.arange(n_heads, device=device),
            clusters=integers(clusters, device),
            members=torch.tensor(members, dtype=torch.bool, device=device).view(-1, len(every)),
            cluster_of=integers((position.get(plan.cluster, -1) for plan in mine), device),
            # The paper has one gamma.
            cluster_gamma=numbers([mine[0].gamma] * n_clusters, device),
            gamma=numbers((plan.gamma for plan in mine), device),
            by_pattern=integers(by_pattern, device),
            dense_id=integers([n_clusters + n_heads], device),
            no_index=integers([0] * n_heads, device),
        )

    def new_pivots(self, geometry: Geometry) -> ElectedPivots:
        """No cluster has a pivot yet."""
        clusters = (plan.cluster for layer in self.plan.layers for plan in layer)
        return ElectedPivots(geometry, 1 + max(clusters))

    def select(
        self, layer: ClusteredLayer, pivots: ElectedPivots, inputs: LayerInputs, value: Tokens
    ) -> LayerSelection:
        """Elects pivots, then lets the other heads share or take their own pattern."""
        geometry, n_clusters = inputs.geometry, len(layer.clusters)
        vertical, slash = profiles(inputs, layer.heads)
        spread = js_distances(vertical[:, None], geometry.uniform, layer.no_index)
        clustered = (layer.cluster_of >= 0) & (spread <= self.plan.delta)
        is_pivot = self._elect(layer, pivots, clustered)
        output, maps = pooled_attention(
            inputs.query,
            inputs.keys,
            value,
            block_size=geometry.block_size,
            scale=inputs.scale,
            heads=torch.where(is_pivot, layer.heads, -1),
            softcap=inputs.softcap,
            sinks=inputs.sinks,
        )
        assert output is not None
        self._keep(layer, pivots, is_pivot, maps)
        candidates = clustered & ~is_pivot
        shared = pivots.maps[layer.clusters]
        patterns = torch.empty(
            (n_clusters + layer.n_heads, *geometry.shape), dtype=torch.bool, device=geometry.device
        )
        select_blocks(shared, layer.cluster_gamma, out=patterns[:n_clusters], **geometry.reads)
        vertical_slash_blocks(
            vertical, slash, layer.gamma, out=patterns[n_clusters:], **geometry.reads
        )
        of_cluster = layer.cluster_of.clamp(min=0)
        distances = torch.full_like(spread, torch.nan)
        if n_clusters:
            distances = js_distances(vertical[:, None], shared[:, -1:].contiguous(), of_cluster)
            candidates = candidates & shared.flatten(1).sum(-1).isfinite()[of_cluster]
        passed = candidates & (distances < self.plan.tau)
        is_finite = vertical.sum(-1).isfinite()
        read = torch.where(is_finite, layer.heads + n_clusters, layer.dense_id)
        read = torch.where(passed, of_cluster, read)
        by_head = torch.where(is_pivot, int(Policy.PIVOT), int(Policy.VERTICAL_SLASH))
        return LayerSelection(
            own=patterns,
            head_to_pattern=torch.where(is_pivot, -1, read),
            output=output,
            policy_taken=PolicyTaken(by_head, layer.by_pattern),
            overhead=(Overhead(layer.heads, VerticalSlash().work(inputs)),),
            distances=torch.where(candidates, distances, torch.nan),
        )

    def _elect(self, layer: ClusteredLayer, pivots: ElectedPivots, willing: Tensor) -> Tensor:
        """The first willing head of every cluster that has no pivot yet, bool `[H]`."""
        willing = self._of_all_heads(layer, willing)
        candidates = layer.members & willing
        new = candidates.any(-1) & ~pivots.elected[layer.clusters]
        first = candidates.int().argmax(-1)
        places = torch.arange(len(willing), device=willing.device)
        chosen = ((places == first[:, None]) & new[:, None]).any(0)
        return chosen[self._mine]

    def _keep(
        self, layer: ClusteredLayer, pivots: ElectedPivots, is_pivot: Tensor, maps: Tensor
    ) -> None:
        """Keeps the maps `[H, n_q, n_k]` of the heads that are pivots."""
        if not len(layer.clusters):
            return
        won = layer.members[:, self._mine] & is_pivot
        found = maps[won.int().argmax(-1)]
        found = torch.where(won.any(-1)[:, None, None], found, 0.0)
        new = _summed(won.any(-1), self.exchange)
        if self.exchange is not None:
            self.exchange.sum(found)
        old = pivots.maps[layer.clusters]
        pivots.maps[layer.clusters] = torch.where(new[:, None, None], found, old)
        pivots.elected[layer.clusters] |= new

    @property
    def _mine(self) -> slice:
        return slice(self.heads.start, self.heads.stop)

    def _of_all_heads(self, layer: ClusteredLayer, mine: Tensor) -> Tensor:
        if self.exchange is None:
            return mine
        every = mine.new_zeros(layer.members.shape[1])
        every[self._mine] = mine
        return _summed(every, self.exchange)


def _summed(flags: Tensor, exchange: Exchange | None) -> Tensor:
    """Flags that are set in any process, bool."""
    if exchange is None:
        return flags
    counts = flags.int()
    exchange.sum(counts)
    return counts.bool()
