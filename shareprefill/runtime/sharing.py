"""The attention of one layer with shared sparse patterns: SharePrefill, and the planned policies.

Pivots come first, then every other head of the layer, so that heads of the pivot's own layer share
too. A shared pattern is not copied: heads point at one list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shareprefill.artifact import Policy
from shareprefill.runtime.crossover import crossover_density
from shareprefill.runtime.interface import causal_attention
from shareprefill.runtime.ops.block_sparse_attention import block_sparse_attention
from shareprefill.runtime.ops.blocks import BlockLists
from shareprefill.runtime.ops.pooled_attention import pooled_attention
from shareprefill.runtime.ops.vertical_slash import vertical_slash_profile
from shareprefill.runtime.patterns import (
    cumulative_pattern,
    distance_to_uniform,
    js_distance,
    recall,
    vertical_slash_pattern,
)
from shareprefill.runtime.plan import HeadPlan, RuntimePlan
from shareprefill.runtime.state import ForwardState


@dataclass(frozen=True)
class LayerRecord:
    """What one layer did with one sequence (or one chunk of it).

    Attributes:
        layer: Layer index.
        policies: Policy that every head took.
        distances: JS distance of every sharing candidate to its pivot; NaN for other heads.
        blocks: Blocks computed by every head.
        causal: Causal blocks of one head.
        work: Selection work of every head, as a share of its dense attention's operations.
        recall: Attention mass inside every head's pattern `[H]`, float32, where asked for.
    """

    layer: int
    policies: tuple[Policy, ...]
    distances: tuple[float, ...]
    blocks: tuple[int, ...]
    causal: int
    work: tuple[float, ...]
    recall: Tensor | None


class LayerPass:
    """One layer's heads on one sequence: selects a pattern for every head, then computes them.

    Args:
        plan: What every head of the model is to do.
        layer: Layer index.
        state: Pivots of the earlier layers in this forward pass; this layer's are added.
        query: `[H, Nq, D]`.
        key: `[G, Nk, D]`; query row i is at position Nk - Nq + i.
        value: `[G, Nk, Dv]`.
        scale: Factor on the logits.
    """

    def __init__(
        self,
        plan: RuntimePlan,
        layer: int,
        state: ForwardState,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
    ) -> None:
        self.plan, self.layer, self.state = plan, layer, state
        self.query, self.key, self.value, self.scale = query, key, value, scale
        self.heads: tuple[HeadPlan, ...] = plan.layers[layer]
        n_heads = len(self.heads)
        self.geometry = state.geometry
        self.policies: list[Policy] = [Policy.DENSE] * n_heads
        self.distances: list[float] = [float("nan")] * n_heads
        self.work: list[float] = [0.0] * n_heads
        # Pattern of every sparse head; heads that share hold the same tensor.
        self.patterns: dict[int, Tensor] = {}
        self.blocks: list[int] = [self.geometry.causal_count] * n_heads
        self.out = query.new_empty((n_heads, query.shape[1], value.shape[-1]))
        self.computed: set[int] = set()

    def run(self, *, measure_recall: bool = False) -> tuple[Tensor, LayerRecord]:
        """Selects and computes.

        Args:
            measure_recall: Also compute the exact map of every head (as much work as dense
                attention) and with it the recall of its pattern.

        Returns:
            The output `[H, Nq, Dv]`, and what was done.
        """
        if self.plan.online:
            self._select_online()
        else:
            self._select_planned()
        self._compute()
        return self.out, self._record(measure_recall)

    def _select_planned(self) -> None:
        planned = {policy: self._having(policy) for policy in Policy}
        self._select_pivots(planned[Policy.PIVOT])
        failed = self._select_shares(planned[Policy.SHARE])
        slashes = [h for h in failed if self.heads[h].fallback == Policy.VERTICAL_SLASH]
        refused = self._select_vertical_slash(planned[Policy.VERTICAL_SLASH] + slashes)
        sampled = [h for h in failed if self.heads[h].fallback == Policy.SAMPLED]
        self._select_sampled(sorted(planned[Policy.SAMPLED] + sampled + refused))

    def _having(self, policy: Policy) -> list[int]:
        return [h for h, head in enumerate(self.heads) if head.policy == policy]

    def _select_pivots(self, heads: list[int]) -> None:
        """Pivots' maps: from all rows, with the dense output in the same pass, or from samples."""
        if not heads:
            return
        index = self.geometry.index(heads)
        if self.plan.pivot_rows == 0:
            out, maps = pooled_attention(
                self.query,
                self.key,
                self.value,
                block_size=self.plan.block_size,
                scale=self.scale,
                heads=index,
            )
            assert out is not None
            self.out[index] = out
            self.computed.update(heads)
        else:
            maps = self._sampled_maps(heads, self.plan.pivot_rows)
        self.state.add_pivots([self.heads[h].head for h in heads], maps)
        for h in heads:
            self.policies[h] = Policy.PIVOT
            if h not in self.computed:
                self.patterns[h] = self.state.pattern(self.heads[h].head, self.heads[h].gamma)

    def _select_shares(self, heads: list[int]) -> list[int]:
        """Heads that look like their pivot take its pattern; the others are returned."""
        if not heads:
            return []
        maps = self._sampled_maps(heads, self.plan.check_rows)
        pivots = torch.stack([self.state.maps[self.heads[h].pivot] for h in heads])
        distances = js_distance(maps, pivots).mean(-1).tolist()
        failed = []
        for h, distance in zip(heads, distances, strict=True):
            self.distances[h] = distance
            if distance < self.heads[h].tau:
                self.policies[h] = Policy.SHARE
                self.patterns[h] = self.state.pattern(self.heads[h].pivot, self.heads[h].gamma)
            else:
                failed.append(h)
        return failed

    def _select_vertical_slash(self, heads: list[int]) -> list[int]:
        """Highly sparse heads take their vertical-slash pattern; the others are returned."""
        if not heads:
            return []
        vertical, slash = self._profiles(heads)
        sparse = [True] * len(heads)
        if self.plan.guarded:
            last = vertical[:, None, :]
            spread = distance_to_uniform(last, self.geometry.causal[-1:])
            sparse = (spread > self.plan.delta).tolist()
        patterns = self._vertical_slash(vertical, slash, self._gammas(heads))
        for h, pattern, taken in zip(heads, patterns, sparse, strict=True):
            if taken:
                self.policies[h] = Policy.VERTICAL_SLASH
                self.patterns[h] = pattern
        return [h for h, taken in zip(heads, sparse, strict=True) if not taken]

    def _select_sampled(self, heads: list[int]) -> None:
        if not heads:
            return
        maps = self._sampled_maps(heads, self.plan.sample_rows)
        patterns = cumulative_pattern(maps, self._gammas(heads)[:, None])
        for h, pattern in zip(heads, patterns, strict=True):
            self.policies[h] = Policy.SAMPLED
            self.patterns[h] = pattern

    def _select_online(self) -> None:
        """SharePrefill's rule (arXiv 2505.19578, section 3), head by head in order.

        On the last query block's distribution: a highly sparse head takes a vertical-slash
        pattern; the first other head of a cluster is computed densely and gives its pattern; a
        later one shares it where it looks alike, and takes a vertical-slash pattern where not.
        """
        every = list(range(len(self.heads)))
        vertical, slash = self._profiles(every)
        spread = distance_to_uniform(vertical[:, None, :], self.geometry.causal[-1:]).tolist()
        rest = []
        for h, head in enumerate(self.heads):
            if spread[h] > self.plan.delta or head.cluster < 0:
                rest.append(h)
                continue
            if head.cluster not in self.state.of_cluster:
                self.state.of_cluster[head.cluster] = head.head
                self._select_pivots([h])
                continue
            pivot = self.state.of_cluster[head.cluster]
            distance = js_distance(vertical[h], self.state.maps[pivot][-1]).item()
            self.distances[h] = distance
            if distance < head.tau:
                self.policies[h] = Policy.SHARE
                self.patterns[h] = self.state.pattern(pivot, head.gamma)
            else:
                rest.append(h)
        if rest:
            patterns = self._vertical_slash(vertical[rest], slash[rest], self._gammas(rest))
            for h, pattern in zip(rest, patterns, strict=True):
                self.policies[h] = Policy.VERTICAL_SLASH
                self.patterns[h] = pattern

    def _gammas(self, heads: Sequence[int]) -> Tensor:
        """Mass to cover, `[S]`: a head whose check failed has the fallback's."""
        plans = [self.heads[h] for h in heads]
        values = [p.fallback_gamma if p.policy is Policy.SHARE else p.gamma for p in plans]
        return torch.tensor(values, device=self.query.device)

    def _vertical_slash(self, vertical: Tensor, slash: Tensor, gamma: Tensor) -> Tensor:
        return vertical_slash_pattern(
            vertical, slash, gamma, self.query.shape[1], self.key.shape[1], self.plan.block_size
        )

    def _profiles(self, heads: list[int]) -> tuple[Tensor, Tensor]:
        # The last rows read all keys, twice as many as a row does on average.
        rows = min(self.plan.block_size, self.query.shape[1])
        self._charge(heads, 2 * rows / self.query.shape[1])
        return vertical_slash_profile(
            self.query,
            self.key,
            block_size=self.plan.block_size,
            scale=self.scale,
            heads=self.geometry.index(heads),
        )

    def _sampled_maps(self, heads: list[int], rows: int) -> Tensor:
        chosen = self.geometry.rows(rows)
        self._charge(heads, chosen.numel() / self.query.shape[1])
        _, maps = pooled_attention(
            self.query,
            self.key,
            rows=chosen,
            block_size=self.plan.block_size,
            scale=self.scale,
            heads=self.geometry.index(heads),
        )
        return maps

    def _charge(self, heads: Sequence[int], rows: float) -> None:
        """Books selection work: `rows` of a head's query rows, logits alone (half the products)."""
        for h in heads:
            self.work[h] += rows / 2

    def _compute(self) -> None:
        bitmap, pattern = self._distinct()
        dense = [
            h for h in range(len(self.heads)) if h not in self.patterns and h not in self.computed
        ]
        if dense:
            groups = len(self.heads) // self.key.shape[0]
            index = self.geometry.index(dense)
            self.out[index] = causal_attention(
                self.query[index],
                self.key[index // groups],
                self.value[index // groups],
                scale=self.scale,
            )
        if self.patterns:
            lists = BlockLists.from_bitmap(bitmap, pattern, self.plan.block_size)
            block_sparse_attention(
                self.query, self.key, self.value, lists, scale=self.scale, out=self.out
            )

    def _distinct(self) -> tuple[Tensor, Tensor]:
        """The distinct patterns with the blocks that are always read, and each head's index.

        Heads whose pattern would take longer than dense attention lose it, and are dense.
        """
        order = {id(tensor): tensor for tensor in self.patterns.values()}
        numbers = {name: number for number, name in enumerate(order)}
        geometry = self.geometry
        bitmap = geometry.always[:0, None]
        if order:
            bitmap = (torch.stack(list(order.values())) | geometry.always) & geometry.causal
        counts = bitmap.sum((1, 2)).tolist()
        most = self._max_density() * geometry.causal_count
        pattern = [-1] * len(self.heads)
        for h, tensor in list(self.patterns.items()):
            number = numbers[id(tensor)]
            if counts[number] > most:
                del self.patterns[h]
                if self.policies[h] is not Policy.PIVOT:
                    self.policies[h] = Policy.DENSE
            else:
                self.patterns[h] = bitmap[number]
                self.blocks[h] = counts[number]
                pattern[h] = number
        return bitmap, torch.tensor(pattern, device=self.query.device)

    def _max_density(self) -> float:
        if self.plan.max_density is not None:
            return self.plan.max_density
        return crossover_density(self.query.device.type)

    def _record(self, measure_recall: bool) -> LayerRecord:
        covered = None
        if measure_recall:
            _, maps = pooled_attention(
                self.query, self.key, block_size=self.plan.block_size, scale=self.scale
            )
            everything = torch.ones_like(self.geometry.causal)
            kept = [self.patterns.get(h, everything) for h in range(len(self.heads))]
            covered = recall(maps, torch.stack(kept))
        return LayerRecord(
            layer=self.layer,
            policies=tuple(self.policies),
            distances=tuple(self.distances),
            blocks=tuple(self.blocks),
            causal=self.geometry.causal_count,
            work=tuple(self.work),
            recall=covered,
        )
