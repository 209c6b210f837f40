"""The patterns of a layer whose heads' policies were chosen offline.

Pivots come first, then every other head of the layer, so that heads of the pivot's own layer share
too. Heads that choose by themselves write their patterns where the layer's candidates lie; what
each head reads, and which heads must choose, is one choice between two rows of numbers that the
orders hold: as checks pass, and as they fail.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shareprefill.runtime.geometry import Geometry
from shareprefill.runtime.ops.block_selection import (
    covered_mass,
    js_distances,
    select_blocks,
    vertical_slash_blocks,
)
from shareprefill.runtime.ops.pooled_attention import pooled_attention
from shareprefill.runtime.orders import Choosing, LayerOrders
from shareprefill.runtime.plan import RuntimePlan
from shareprefill.runtime.policies.base import LayerInputs
from shareprefill.runtime.policies.estimating import Placing
from shareprefill.runtime.policies.sampled import sampled_maps, sampling_work
from shareprefill.runtime.policies.smoothed import smoothed_maps
from shareprefill.runtime.policies.vertical_slash import profile_work, profiles
from shareprefill.runtime.records import Choice, Decision
from shareprefill.runtime.state import ForwardState


class PlannedChoice:
    """The choice of one layer.

    Args:
        plan: What every head of the model is to do.
        orders: Of the layer.
        state: Pivots of the earlier layers in this forward pass; this layer's are added.
        inputs: Queries and keys.
    """

    def __init__(
        self, plan: RuntimePlan, orders: LayerOrders, state: ForwardState, inputs: LayerInputs
    ) -> None:
        self.plan, self.orders, self.state, self.inputs = plan, orders, state, inputs
        self.geometry: Geometry = inputs.geometry
        shape, device = (orders.n_candidates, *self.geometry.shape), self.geometry.device
        self.bitmap = torch.empty(shape, dtype=torch.bool, device=device)
        self._sound: list[tuple[int, Tensor]] = []
        # Where a head's candidate is not to be read, what it reads instead.
        self._instead: list[tuple[slice, Tensor]] = []

    def make(self, value: Tensor, out: Tensor) -> Choice:
        """Chooses.

        Args:
            value: `[G, Nk, Dv]`.
            out: `[H, Nq, Dv]`, which gets the output of pivots that are computed densely.
        """
        orders, inputs = self.orders, self.inputs
        works = [0.0, self._choose_pivots(value, out), 0.0]
        if len(orders.pairs):
            shared = self.bitmap[: len(orders.pairs)]
            torch.index_select(self.state.patterns, 0, orders.pairs, out=shared)
        asked, covered, shareable = orders.if_failed, None, None
        if len(orders.shares):
            covered, shareable = self._check_shares()
            passed = (covered >= orders.floor) & shareable
            asked = torch.where(passed[orders.position], orders.if_passed, orders.if_failed)
            works[2] = sampling_work(inputs, self.plan.check_rows)
        lines, sampled = orders.slash, orders.sampled
        works += [self._place(group, asked[group.asked]) for group in orders.others]
        taken = None
        if lines is not None:
            taken = self._place_lines(lines, asked[lines.asked])
            works.append(profile_work(inputs))
            if self.plan.guarded:
                assert sampled is not None
                if covered is None:
                    asked = asked.clone()
                # Of the heads that are asked for rows, those of `lines` come first.
                asked[sampled.asked][: len(lines)].masked_fill_(taken, -1)
        refused = orders.everything
        if sampled is not None:
            places = self._place_sampled(sampled, asked[sampled.asked])
            works.append(sampling_work(inputs, self.plan.sample_rows))
            if self.plan.guarded and lines is not None:
                refused = places[: len(lines)]
        if lines is not None and taken is not None:
            places = torch.where(taken, self._numbers_of(lines), refused)
            self._instead.append((lines.slots, places))
        decision = Decision(
            asked=asked,
            works=tuple(works),
            covered=covered,
            shareable=shareable,
            sound=tuple(self._sound),
        )
        return Choice(self.bitmap, self._read(asked[: orders.n_heads]), decision)

    def _choose_pivots(self, value: Tensor, out: Tensor) -> float:
        """Pivots' patterns: from all rows, with the dense output in the same pass, or from samples.

        Returns:
            Work of one pivot's choice.
        """
        orders, inputs, rows = self.orders, self.inputs, self.plan.pivot_rows
        heads, work = orders.pivots.index, 0.0
        if len(heads):
            if rows:
                maps = smoothed_maps(inputs, heads, rows)
                work = sampling_work(inputs, rows)
            else:
                dense, maps = pooled_attention(
                    inputs.query,
                    inputs.key,
                    value,
                    block_size=self.geometry.block_size,
                    scale=inputs.scale,
                    heads=heads,
                    softcap=inputs.softcap,
                    sinks=inputs.sinks,
                )
                assert dense is not None
                out.index_copy_(0, heads, dense)
            if len(orders.new_gammas):
                self.state.keep_planned(orders, maps)
        self.state.exchange_planned(orders)
        return work

    def _check_shares(self) -> tuple[Tensor, Tensor]:
        """What each sharing head's pivot's pattern has of its sampled rows, and if it may be read.

        A head's own map that is not finite covers NaN, as every row's own block is in a pattern.
        """
        orders, state = self.orders, self.state
        maps = sampled_maps(self.inputs, orders.shares.index, self.plan.check_rows)
        covered = covered_mass(maps, state.patterns, orders.share_pairs)
        return covered, state.sound[orders.share_pairs]

    def _place(self, group: Choosing, heads: Tensor) -> float:
        """Patterns of a policy that this module has no rule for.

        Returns:
            Work of the choice for one head.
        """
        inputs, geometry = self.inputs, self.geometry
        selector, out = self.plan.selectors[group.code], self.bitmap[group.slots]
        if isinstance(selector, Placing):
            sound = selector.place(inputs, heads, group.gamma, out)
            self._sound.append((group.slots.start, sound))
            return selector.work(inputs)
        chosen = selector.select(inputs, heads, group.gamma)
        torch.logical_or(chosen.pattern, geometry.always, out=out).logical_and_(geometry.causal)
        self._read_if(_are_finite(inputs)[group.index], group)
        return chosen.work

    def _place_lines(self, group: Choosing, heads: Tensor) -> Tensor:
        """Vertical-slash patterns.

        Returns:
            bool `[S]`: the heads that take theirs.
        """
        vertical, slash = profiles(self.inputs, heads)
        out = self.bitmap[group.slots]
        vertical_slash_blocks(vertical, slash, group.gamma, out=out, **self.geometry.reads)
        if not self.plan.guarded:
            return _are_sound(vertical)
        # A spread that is not a number is above nothing: its head is refused, and found out then.
        index = self.orders.no_index[: len(group)]
        return js_distances(vertical[:, None], self.geometry.uniform, index) > self.plan.delta

    def _place_sampled(self, group: Choosing, heads: Tensor) -> Tensor:
        """Row-sampled patterns.

        Returns:
            What each head reads, int64 `[S]`.
        """
        maps = sampled_maps(self.inputs, heads, self.plan.sample_rows)
        select_blocks(maps, group.gamma, out=self.bitmap[group.slots], **self.geometry.reads)
        return self._read_if(_are_sound(maps.flatten(1)), group)

    def _read_if(self, sound: Tensor, group: Choosing) -> Tensor:
        """Lets heads read their own patterns where those are sound, and every block elsewhere."""
        places = torch.where(sound, self._numbers_of(group), self.orders.everything)
        self._instead.append((group.slots, places))
        return places

    def _numbers_of(self, group: Choosing) -> Tensor:
        """The numbers of a group's candidates, int64 `[S]`."""
        return self.orders.identity[group.slots]

    def _read(self, pattern: Tensor) -> Tensor:
        """What heads read in the end."""
        if not self._instead:
            return pattern
        end, parts = 0, []
        for slots, places in sorted(self._instead, key=lambda part: part[0].start):
            parts += [self.orders.identity[end : slots.start], places]
            end = slots.stop
        return torch.cat([*parts, self.orders.identity[end:]])[pattern]


def _are_sound(masses: Tensor) -> Tensor:
    """Whether masses `[S, n]`, none negative, hold numbers only, bool `[S]`."""
    return masses.sum(-1) < math.inf


def _are_finite(inputs: LayerInputs) -> Tensor:
    """Whether the queries and keys of heads hold numbers only, bool `[H]`."""
    query, key = (t.sum((1, 2), dtype=torch.float32) for t in (inputs.query, inputs.key))
    return (query.view(len(key), -1) + key[:, None]).flatten().abs() < math.inf
