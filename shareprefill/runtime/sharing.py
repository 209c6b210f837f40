"""The attention of one layer with shared sparse patterns: SharePrefill, and the planned policies.

Pivots come first, then every other head of the layer, so that heads of the pivot's own layer share
too. All decisions are made on the device, for all heads at once: nothing here waits for it. A
shared pattern is not copied: heads point at one list.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shareprefill.artifact import Policy
from shareprefill.errors import DataError
from shareprefill.runtime.crossover import crossover
from shareprefill.runtime.interface import causal_attention
from shareprefill.runtime.ops.block_sparse_attention import block_sparse_attention
from shareprefill.runtime.ops.implementations import has_fast_kernel
from shareprefill.runtime.ops.pooled_attention import pooled_attention
from shareprefill.runtime.ops.selection import (
    covered_mass,
    js_distances,
    list_blocks,
    select_blocks,
    vertical_slash_blocks,
)
from shareprefill.runtime.ops.vertical_slash import vertical_slash_profile
from shareprefill.runtime.orders import LayerOrders
from shareprefill.runtime.patterns import distance_to_uniform
from shareprefill.runtime.pivots import pivot_estimate, pivot_patterns
from shareprefill.runtime.plan import RuntimePlan
from shareprefill.runtime.policies.base import LayerInputs
from shareprefill.runtime.state import ForwardState

# The first candidate pattern holds every causal block.
_FULL = 0


@dataclass(frozen=True)
class LayerRecord:
    """What one layer did with one sequence (or one chunk of it), on the layer's device.

    Attributes:
        layer: Layer index.
        policies: Number of the policy that every head took, int64 `[H]`: a `Policy`, or one of the
            plan's further ones.
        covered: Attention mass of every sharing head's sampled rows inside its pivot's pattern,
            float32 `[H]`; NaN for other heads, and where a pivot's pattern rests on NaN or Inf.
        distances: With policy `share`, JS distance of every candidate to its pivot, float32 `[H]`;
            NaN for other heads.
        blocks: Blocks computed by every head, int64 `[H]`.
        causal: Causal blocks of one head.
        work: Selection work of every head, float32 `[H]`, as a share of its dense attention's
            operations.
        recall: Attention mass inside every head's pattern, float32 `[H]`, where asked for.
    """

    layer: int
    policies: Tensor
    covered: Tensor
    distances: Tensor
    blocks: Tensor
    causal: int
    work: Tensor
    recall: Tensor | None


class LayerPass:
    """One layer's heads on one sequence: chooses a pattern for every head, then computes them.

    Args:
        plan: What every head of the model is to do.
        layer: Layer index.
        state: Pivots of the earlier layers in this forward pass; this layer's are added.
        inputs: Queries and keys.
        value: `[G, Nk, Dv]`.
    """

    def __init__(
        self, plan: RuntimePlan, layer: int, state: ForwardState, inputs: LayerInputs, value: Tensor
    ) -> None:
        self.plan, self.layer, self.state = plan, layer, state
        self.inputs, self.value = inputs, value
        self.geometry = inputs.geometry
        query = inputs.query
        self.orders: LayerOrders = state.orders.of(layer, query.device)
        heads = self.orders.n_heads
        # Tokens first, as the model reads it: its transposition is no copy then.
        self.out = query.new_empty((query.shape[1], heads, value.shape[-1])).transpose(0, 1)
        self.policies = self.orders.codes.clone()
        self.covered = query.new_full((heads,), torch.nan, dtype=torch.float32)
        self.distances = self.covered.clone()
        self.work = query.new_zeros((heads,), dtype=torch.float32)
        # Candidate patterns, every causal block first, and which of them every head reads; -1: its
        # output is dense.
        self._bitmaps: list[Tensor] = [self.geometry.causal[None]]
        self.bitmap = self._bitmaps[0]
        self.pattern = torch.full_like(self.policies, -1)
        self.blocks = torch.full_like(self.policies, self.geometry.causal_count)

    def run(self, *, measure_recall: bool = False) -> tuple[Tensor, LayerRecord]:
        """Chooses and computes.

        Args:
            measure_recall: Also compute the exact map of every head (as much work as dense
                attention) and with it the recall of its pattern.

        Returns:
            The output `[H, Nq, Dv]`, and what was done.
        """
        if self.plan.refuse_nonfinite:
            self._refuse_nonfinite()
        self.choose()
        self.compute()
        return self.out, self._record(measure_recall)

    def choose(self) -> None:
        """Chooses the patterns; pivots that are computed densely have their output then."""
        if self.plan.online:
            self._choose_online()
        else:
            self._choose_planned()
        self.bitmap = torch.cat(self._bitmaps)
        self._leave_dense_what_is_too_dense()

    def _choose_planned(self) -> None:
        self._choose_pivots()
        passed = self._choose_shares()
        refused = self._choose_vertical_slash(passed)
        for code, group, share in self.orders.selected:
            active = ~passed[share]
            heads = torch.where(active, group.index, -1)
            chosen = self.plan.selectors[code].select(self.inputs, heads, group.gamma)
            sound = self._is_finite(group.index)
            self._add(group.index, self._with_always(chosen.pattern), active, code, sound)
            self.work[group.index] += torch.where(active, chosen.work, 0.0)
        self._choose_sampled(passed, refused)

    def _choose_pivots(self) -> None:
        """Pivots' maps: from all rows, with the dense output in the same pass, or from samples."""
        orders, rows, causal = self.orders, self.plan.pivot_rows, self.geometry.causal
        group = orders.pivots
        if len(group):
            if rows == 0:
                out, maps = self._pooled(group.index, with_output=True)
                assert out is not None
                self.out[group.index] = out
            else:
                maps = self._sampled_maps(group.index, rows)
            estimate = pivot_estimate(maps, causal, rows)[orders.new_pivots]
            patterns = pivot_patterns(estimate, orders.new_gammas, self.geometry.always, causal)
            self.state.keep_planned(orders, patterns, _are_sound(maps)[orders.new_pivots])
        self.state.exchange_planned(orders)

    def _choose_shares(self) -> Tensor:
        """Heads take their pivot's pattern where it covers enough of their sampled rows' mass.

        Returns:
            bool `[S + 1]`: the sharing heads that do; the last one False.
        """
        orders, state = self.orders, self.state
        shares = orders.shares
        offset = self._offset()
        if len(orders.pairs):
            self._bitmaps.append(state.patterns[orders.pairs])
        if orders.pivot_pairs is not None and len(orders.pivots):
            sound = state.are_sound(orders.pairs[orders.pivot_pairs])
            places = torch.where(sound, orders.pivot_pairs + offset, _FULL)
            self.pattern[orders.pivots.index] = places
        if not len(shares):
            return self.policies.new_zeros(1, dtype=torch.bool)
        maps = self._sampled_maps(shares.index, self.plan.check_rows)
        pairs = orders.pairs[orders.share_pairs]
        # A head's own map that is not finite covers NaN, as every row's own block is in a pattern.
        covered = covered_mass(maps, state.patterns, pairs)
        covered = torch.where(state.are_sound(pairs), covered, torch.nan)
        passed = covered >= orders.floor
        self.covered[shares.index] = covered
        # A head that fails is dense unless its fallback is chosen below.
        self.pattern[shares.index] = torch.where(passed, orders.share_pairs + offset, _FULL)
        return torch.cat([passed, passed.new_zeros(1)])

    def _choose_vertical_slash(self, passed: Tensor) -> Tensor:
        """Highly sparse heads take their vertical-slash pattern.

        Returns:
            bool `[S + 1]`: heads that it is refused to; the last one True.
        """
        group = self.orders.slash
        if not len(group):
            return passed.new_ones(1)
        active = ~passed[self.orders.slash_share]
        heads = torch.where(active, group.index, -1)
        vertical, slash = self._profiles(heads)
        taken = active
        if self.plan.guarded:
            taken = active & (self._spread(vertical) > self.plan.delta)
        pattern = self._vertical_slash(vertical, slash, group.gamma)
        # A spread that is not a number is above nothing: its head is refused, and found out then.
        self._add(group.index, pattern, taken, Policy.VERTICAL_SLASH, _are_sound(vertical))
        return torch.cat([active & ~taken, taken.new_ones(1)])

    def _choose_sampled(self, passed: Tensor, refused: Tensor) -> None:
        group = self.orders.sampled
        if not len(group):
            return
        active = ~passed[self.orders.sampled_share] & refused[self.orders.sampled_slash]
        maps = self._sampled_maps(torch.where(active, group.index, -1), self.plan.sample_rows)
        pattern = self._select(maps, group.gamma)
        self._add(group.index, pattern, active, Policy.SAMPLED, _are_sound(maps))

    def _choose_online(self) -> None:
        """SharePrefill's rule (arXiv 2505.19578, section 3), heads in ascending order.

        On the last query block's distribution: a highly sparse head takes a vertical-slash
        pattern; the first other head of a cluster is computed densely and gives its pattern; a
        later one shares it where it looks alike, and takes a vertical-slash pattern where not.
        """
        orders, state = self.orders, self.state
        every = torch.arange(orders.n_heads, device=self.policies.device)
        vertical, slash = self._profiles(every)
        spread = self._spread(vertical)
        clustered = (orders.cluster_of >= 0) & (spread <= self.plan.delta)
        is_pivot = state.elect(orders, clustered)
        out, maps = self._pooled(torch.where(is_pivot, every, -1), with_output=True)
        assert out is not None
        self.out = out
        state.keep_elected(orders, is_pivot, maps)
        candidates = clustered & ~is_pivot
        clusters = state.maps[orders.clusters]
        offset = self._offset()
        self._bitmaps.append(self._select(clusters, orders.gamma[:1].expand(len(clusters))))
        of_cluster = orders.cluster_of.clamp(min=0)
        distances = spread.new_full(spread.shape, torch.nan)
        if len(clusters):
            distances = js_distances(vertical[:, None], clusters[:, -1:].contiguous(), of_cluster)
            candidates = candidates & _are_sound(clusters)[of_cluster]
        passed = candidates & (distances < self.plan.tau)
        self.distances = torch.where(candidates, distances, torch.nan)
        self.policies.fill_(int(Policy.VERTICAL_SLASH))
        pattern = self._vertical_slash(vertical, slash, orders.gamma)
        self._add(every, pattern, sound=_are_sound(vertical))
        self.pattern = torch.where(is_pivot, -1, self.pattern)
        self.pattern = torch.where(passed, of_cluster + offset, self.pattern)
        self.policies = torch.where(passed, int(Policy.SHARE), self.policies)
        self.policies = torch.where(is_pivot, int(Policy.PIVOT), self.policies)

    def _offset(self) -> int:
        return sum(len(bitmap) for bitmap in self._bitmaps)

    def _add(
        self,
        heads: Tensor,
        bitmap: Tensor,
        taken: Tensor | None = None,
        policy: int | None = None,
        sound: Tensor | None = None,
    ) -> None:
        """Gives heads `[S]` a pattern each, bool `[S, n_q, n_k]`.

        Args:
            heads: Query heads.
            bitmap: Their patterns.
            taken: bool `[S]`: heads that take it; None for all.
            policy: Number of the policy that they then have; None for the planned one.
            sound: bool `[S]`: where it is False, the pattern rests on NaN or Inf, and the head
                reads every causal block instead.
        """
        places = torch.arange(len(bitmap), device=bitmap.device) + self._offset()
        self._bitmaps.append(bitmap)
        if sound is not None:
            places = torch.where(sound, places, _FULL)
        if taken is not None:
            places = torch.where(taken, places, self.pattern[heads])
        self.pattern[heads] = places
        if policy is not None:
            chosen = self.policies.new_full(heads.shape, policy)
            if taken is not None:
                chosen = torch.where(taken, chosen, self.policies[heads])
            self.policies[heads] = chosen

    def _select(self, maps: Tensor, gamma: Tensor) -> Tensor:
        geometry = self.geometry
        return select_blocks(
            maps,
            gamma,
            n_query=geometry.n_query,
            n_key=geometry.n_key,
            block_size=geometry.block_size,
            sink_blocks=self.plan.sink_blocks,
            local_blocks=self.plan.local_blocks,
        )

    def _vertical_slash(self, vertical: Tensor, slash: Tensor, gamma: Tensor) -> Tensor:
        geometry = self.geometry
        return vertical_slash_blocks(
            vertical,
            slash,
            gamma,
            n_query=geometry.n_query,
            n_key=geometry.n_key,
            block_size=geometry.block_size,
            sink_blocks=self.plan.sink_blocks,
            local_blocks=self.plan.local_blocks,
        )

    def _with_always(self, pattern: Tensor) -> Tensor:
        return (pattern | self.geometry.always) & self.geometry.causal

    def _spread(self, vertical: Tensor) -> Tensor:
        return distance_to_uniform(vertical[:, None, :], self.geometry.causal[-1:])

    def _profiles(self, heads: Tensor) -> tuple[Tensor, Tensor]:
        # The last rows read all keys, twice as many as a row does on average.
        rows = min(self.geometry.block_size, self.geometry.n_query)
        self._charge(heads, 2 * rows)
        inputs = self.inputs
        return vertical_slash_profile(
            inputs.query,
            inputs.key,
            block_size=self.geometry.block_size,
            scale=inputs.scale,
            heads=heads,
            softcap=inputs.softcap,
        )

    def _sampled_maps(self, heads: Tensor, rows: int) -> Tensor:
        chosen = self.geometry.rows(rows)
        self._charge(heads, chosen.numel())
        return self._pooled(heads, rows=chosen)[1]

    def _pooled(
        self, heads: Tensor | None, *, rows: Tensor | None = None, with_output: bool = False
    ) -> tuple[Tensor | None, Tensor]:
        inputs = self.inputs
        return pooled_attention(
            inputs.query,
            inputs.key,
            self.value if with_output else None,
            rows=rows,
            block_size=self.geometry.block_size,
            scale=inputs.scale,
            heads=heads,
            softcap=inputs.softcap,
            sinks=inputs.sinks,
        )

    def _charge(self, heads: Tensor, rows: int) -> None:
        """Books selection work: query rows of a head, logits alone (half the products)."""
        work = rows / self.geometry.n_query / 2
        self.work.index_add_(0, heads.clamp(min=0), torch.where(heads >= 0, work, 0.0))

    def compute(self) -> None:
        """Computes all heads that have no output yet."""
        dense = self.orders.dense.index
        if not self.inputs.is_plain or self._has_fast_kernel():
            # SDPA knows neither soft-capping nor sinks, and wants copies of some of the heads.
            self.pattern.index_fill_(0, dense, _FULL)
            dense = dense[:0]
        elif self.policies.device.type == "cpu":
            # Its values may be read at no cost, and its sparse blocks cost more than dense ones.
            full = self.pattern == _FULL
            dense = torch.cat([dense, full.nonzero()[:, 0]])
            self.pattern[full] = -1
        if len(dense):
            self._compute_dense(dense)
        if len(dense) < self.orders.n_heads:
            geometry = self.geometry
            lists = list_blocks(
                self.bitmap,
                self.pattern,
                geometry.block_size,
                n_query=geometry.n_query,
                n_key=geometry.n_key,
            )
            block_sparse_attention(
                self.inputs.query,
                self.inputs.key,
                self.value,
                lists,
                scale=self.inputs.scale,
                softcap=self.inputs.softcap,
                sinks=self.inputs.sinks,
                out=self.out,
            )

    def _has_fast_kernel(self) -> bool:
        """Whether dense heads may read every causal block in the other heads' launch."""
        inputs = self.inputs
        return 0 < len(self.orders.dense.index) < self.orders.n_heads and has_fast_kernel(
            inputs.query, inputs.key, self.value, self.geometry.block_size
        )

    def _leave_dense_what_is_too_dense(self) -> None:
        """Heads whose pattern would take longer than dense attention read every causal block."""
        causal = self.geometry.causal_count
        counts = self.bitmap.flatten(1).sum(-1)
        over = (counts > self._max_density() * causal)[self.pattern] & (self.pattern >= 0)
        self.pattern = torch.where(over, _FULL, self.pattern)
        is_dense = (self.pattern == _FULL) & (self.policies != int(Policy.PIVOT))
        self.policies = torch.where(is_dense, int(Policy.DENSE), self.policies)
        self.blocks = torch.where(self.pattern >= 0, counts[self.pattern], causal)

    def _compute_dense(self, heads: Tensor) -> None:
        inputs = self.inputs
        if len(heads) == self.orders.n_heads:
            self.out = causal_attention(inputs.query, inputs.key, self.value, scale=inputs.scale)
            return
        group = heads // (self.orders.n_heads // inputs.key.shape[0])
        self.out[heads] = causal_attention(
            inputs.query[heads], inputs.key[group], self.value[group], scale=inputs.scale
        )

    def _is_finite(self, heads: Tensor) -> Tensor:
        """Whether the queries and keys of heads hold numbers only, bool `[S]`."""
        query, key = (
            tensor.sum((1, 2), dtype=torch.float32).isfinite()
            for tensor in (self.inputs.query, self.inputs.key)
        )
        return (query & key.repeat_interleave(len(query) // len(key)))[heads]

    def _refuse_nonfinite(self) -> None:
        named = {"query": self.inputs.query, "key": self.inputs.key, "value": self.value}
        for name, tensor in named.items():
            heads = (~tensor.isfinite().flatten(1).all(-1)).nonzero()[:, 0].tolist()
            if heads:
                raise DataError(
                    f"layer {self.layer} has NaN or Inf in the {name} of heads {heads}: look for "
                    "an overflow in the model's weights or dtype, or set nonfinite='dense'"
                )

    def _max_density(self) -> float:
        if self.plan.max_density is not None:
            return self.plan.max_density
        return crossover(self.out.device).density

    def _record(self, measure_recall: bool) -> LayerRecord:
        covered = None
        if measure_recall:
            _, maps = self._pooled(None)
            covered = covered_mass(maps, self.bitmap, self.pattern)
        return LayerRecord(
            layer=self.layer,
            policies=self.policies,
            covered=self.covered,
            distances=self.distances,
            blocks=self.blocks,
            causal=self.geometry.causal_count,
            work=self.work,
            recall=covered,
        )


def _are_sound(maps: Tensor) -> Tensor:
    """Whether maps `[S, ...]` hold numbers only, bool `[S]`."""
    return maps.flatten(1).sum(-1).isfinite()
