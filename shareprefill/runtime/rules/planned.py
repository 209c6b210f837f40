"""The rule for heads whose policies were chosen offline.

Pivots come first, then every other head of the layer, so that heads of the pivot's own layer share
too. All patterns of a layer lie in one bitmap, into which the operators write:

    shared ones | one for each head that may choose by itself, group by group

and the pattern with the number P, which is in no bitmap, is every causal block. The host does not
know which checks pass. So the plan says for every head which pattern it reads as checks pass and as
they fail, and likewise which heads each group is asked for; the check chooses between the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from shareprefill.artifact import Policy
from shareprefill.runtime.geometry import Geometry
from shareprefill.runtime.ops.block_selection import (
    covered_mass,
    head_blocks,
    js_distances,
    vertical_slash_blocks,
)
from shareprefill.runtime.ops.pages import Tokens
from shareprefill.runtime.ops.pooled_attention import pooled_attention
from shareprefill.runtime.plan import HeadPlan
from shareprefill.runtime.policies.base import (
    InPlacePolicy,
    LayerInputs,
    SelectionPolicy,
    check_pattern,
)
from shareprefill.runtime.policies.sampled import Sampled, sampled_maps, sampling_work
from shareprefill.runtime.policies.smoothed import Smoothed, line_weights
from shareprefill.runtime.policies.vertical_slash import VerticalSlash, profile_work, profiles
from shareprefill.runtime.rules.base import (
    Coverage,
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
class PivotHeads:
    """The pivots of a layer, and the patterns that they give.

    A pattern is a pivot's map cut at one gamma: heads of unlike gammas read unlike patterns of one
    pivot. Its number is that in the whole forward pass (`PlannedRule.pivot_patterns`).

    Attributes:
        heads: The pivots that this process holds, int64 `[S]`.
        given: Numbers of the patterns that they give.
        giver: For each of these the position of its pivot in `heads`, int64; None where they are
            the same.
        gamma: For each of these the share of the pivot's mass that it covers, float32.
        given_by_all: Numbers of the patterns that pivots of the layer give in any process.
    """

    heads: Tensor
    given: slice
    giver: Tensor | None
    gamma: Tensor
    given_by_all: slice


@dataclass(frozen=True, eq=False)
class SharingHeads:
    """The heads of a layer that share.

    Attributes:
        heads: int64 `[S]`.
        pattern_of_head: The number of the pattern that each shares, int64 `[S]`.
        place_of_pattern: Where that is in `PlannedLayer.shared`, int64 `[S]`.
        min_coverage: The mass inside that pattern from which on it shares, float32 `[S]`.
    """

    heads: Tensor
    pattern_of_head: Tensor
    place_of_pattern: Tensor
    min_coverage: Tensor


@dataclass(frozen=True, eq=False)
class OwnPatterns:
    """Heads of a layer that may choose a pattern by themselves, by one policy.

    Attributes:
        heads: int64 `[S]`.
        gamma: Attention mass that the pattern of each covers, float32 `[S]`.
        policy: Number of the policy.
        rows: Where their patterns lie in the layer's bitmap.
        pattern_ids: The numbers of these patterns, int64 `[S]`.
        requested: Where they are in `PlannedLayer.on_fail`: a head, or -1 where none is needed.
    """

    heads: Tensor
    gamma: Tensor
    policy: int
    rows: slice
    pattern_ids: Tensor
    requested: slice


@dataclass(frozen=True, eq=False)
class PlannedLayer(LayerPlan):
    """One layer's part of the plan.

    Attributes:
        by_head: Planned policy of every head, int64 `[H]`.
        by_pattern: The policy of a head that reads a pattern, int64 `[P + 1]`.
        pivots: The pivots.
        shared: The pivots' patterns that heads of this layer read, int64: the first patterns of
            the layer, by their numbers in the forward pass.
        sharing: The heads that share; None for none.
        check_of: For every entry of the next two the position of its head in `sharing`; any where
            the head does not share, int64 `[H + T]`.
        on_pass: The pattern that each head reads (-1: none, its output is there), and the T heads
            that the groups of own patterns are asked for, where checks pass: int64 `[H + T]`.
        on_fail: The same where checks fail.
        own: Heads that choose by themselves, group by group.
        sparse: Heads that may take a vertical-slash pattern while they are highly sparse; and those
            that may take a row-sampled one, first the former, in their order. None for none, and
            where vertical-slash patterns are for all heads: then both groups are in `own`.
        n_patterns: Patterns P in the bitmap.
        pattern_ids: Every pattern's own number and P, then -1, which is what -1 reads: int64
            `[P + 2]`.
        dense_id: The number of the pattern of every causal block, int64 `[1]`.
        no_index: Zeros, int64 `[H]`.
    """

    by_head: Tensor
    by_pattern: Tensor
    pivots: PivotHeads
    shared: Tensor
    sharing: SharingHeads | None
    check_of: Tensor
    on_pass: Tensor
    on_fail: Tensor
    own: tuple[OwnPatterns, ...]
    sparse: tuple[OwnPatterns, OwnPatterns] | None
    n_patterns: int
    pattern_ids: Tensor
    dense_id: Tensor
    no_index: Tensor


class PivotPatterns:
    """The patterns that the pivots of one sequence gave so far.

    Args:
        geometry: Of the sequence.
        n_patterns: Patterns that heads of any layer read.

    Attributes:
        patterns: bool `[n_patterns, n_q, n_k]`; anything where `is_finite` is False.
        is_finite: Whether patterns may be shared, bool `[n_patterns]`. Not one that rests on NaN or
            Inf, and not one whose pivot is of a later layer.
    """

    def __init__(self, geometry: Geometry, n_patterns: int) -> None:
        shape, device = (n_patterns, *geometry.shape), geometry.device
        self.geometry = geometry
        self.patterns = torch.empty(shape, dtype=torch.bool, device=device)
        self.is_finite = torch.zeros(n_patterns, dtype=torch.bool, device=device)

    def to(self, device: torch.device) -> PivotPatterns:
        """The same on another device."""
        moved = PivotPatterns(self.geometry.to(device), 0)
        moved.patterns, moved.is_finite = self.patterns.to(device), self.is_finite.to(device)
        return moved

    def keep(self, pivots: PivotHeads, maps: Tensor) -> None:
        """Cuts and keeps the patterns that this process's pivots of a layer give.

        Each covers gamma of its pivot's whole mass, and has the blocks that are always read.

        Args:
            pivots: Of the layer.
            maps: Their maps, in any scale, float32 `[S, n_q, n_k]`.
        """
        if len(pivots.gamma):
            given, reads = pivots.given, self.geometry.reads
            _, is_finite = head_blocks(
                maps, pivots.gamma, pivots.giver, out=self.patterns[given], **reads
            )
            self.is_finite[given] = is_finite

    def fill_in(self, pivots: PivotHeads, exchange: Exchange) -> None:
        """Fills in the patterns that other processes' pivots of a layer give."""
        every, mine = pivots.given_by_all, pivots.given
        if every.start == every.stop:
            return
        # Every pattern comes from one process, and is empty in the others.
        start, stop = (mine.start, mine.stop) if mine.start < mine.stop else (every.stop,) * 2
        for kept in (self.patterns, self.is_finite):
            kept[every.start : start] = False
            kept[stop : every.stop] = False
            exchange.sum(kept[every].view(torch.uint8))


class PlannedRule(LayerRule[PlannedLayer, PivotPatterns]):
    """Every head does what its plan says; a sharing head first checks its pivot's pattern."""

    @cached_property
    def _rows_to_copy(self) -> dict[Tensor, tuple[int, Tensor]]:
        """For each layer's `shared`: query blocks, and `rows_to_copy` of them."""
        return {}

    @cached_property
    def selectors(self) -> dict[int, SelectionPolicy]:
        """What chooses the patterns of heads that choose by themselves, by policy."""
        built_in: dict[int, SelectionPolicy] = {
            int(Policy.SAMPLED): Sampled(self.plan.sample_rows),
            int(Policy.VERTICAL_SLASH): VerticalSlash(),
            int(Policy.SMOOTHED): self._smoothed(Smoothed.rows),
        }
        return {**built_in, **self.plan.selectors}

    @cached_property
    def estimator(self) -> Smoothed:
        """What pivots' maps are estimated by, where they are not exact."""
        return self._smoothed(self.plan.pivot_rows)

    def _smoothed(self, rows: int) -> Smoothed:
        return Smoothed(rows, line_weights(self.plan.estimator, rows))

    @cached_property
    def pivot_patterns(self) -> dict[tuple[int, float], int]:
        """(Pivot, gamma) of every pattern that a head of any process reads -> its number.

        By pivot, so that those of a layer, and of a process's heads in it, follow each other.
        """
        plans = (plan for layer in self.plan.layers for plan in layer)
        found = {key for plan in plans if (key := self.pivot_pattern(plan)) is not None}
        return {key: number for number, key in enumerate(sorted(found))}

    def pivot_pattern(self, plan: HeadPlan) -> tuple[int, float] | None:
        """The pivot and gamma of the pattern that a head reads, where it is a pivot's."""
        if plan.policy == Policy.SHARE:
            return plan.pivot, plan.gamma
        if plan.policy == Policy.PIVOT and self.plan.pivot_rows > 0:
            return plan.head, plan.gamma
        return None

    def make_layer(self, index: int, device: torch.device) -> PlannedLayer:
        """Makes a layer's plan."""
        return _LayerMaker(self, index, device).make()

    def new_pivots(self, geometry: Geometry) -> PivotPatterns:
        """Room for the patterns of all pivots."""
        return PivotPatterns(geometry, len(self.pivot_patterns))

    def rows_to_copy(self, layer: PlannedLayer, geometry: Geometry) -> Tensor:
        """The rows of pivots' patterns that a layer copies, by their numbers in all patterns.

        First those that its check looks at, pattern by pattern, where that is not all of them; then
        all rows of its patterns. So one launch copies both. They are the same for every prompt of a
        length: the last length's are kept.
        """
        n_q = geometry.shape[0]
        kept = self._rows_to_copy.get(layer.shared)
        if kept is None or kept[0] != n_q:
            starts = layer.shared[:, None] * n_q
            every = starts + torch.arange(n_q, device=starts.device)
            parts = [every]
            if len(geometry.checked) < n_q:
                parts.insert(0, starts + geometry.checked)
            kept = n_q, torch.cat([rows.flatten() for rows in parts])
            self._rows_to_copy[layer.shared] = kept
        return kept[1]

    def select(
        self, layer: PlannedLayer, pivots: PivotPatterns, inputs: LayerInputs, value: Tokens
    ) -> LayerSelection:
        """Pivots, then the check of the sharing heads, then the heads that choose themselves."""
        patterns, checked, copied = _room(layer, inputs.geometry)
        heads, n_query, _ = inputs.query.shape
        # Tokens come first in memory, as the model reads it: its transposition is no copy then.
        output = inputs.query.new_empty((n_query, heads, value.shape[-1])).transpose(0, 1)
        steps = _Steps(self, layer, pivots, inputs, patterns, checked)
        steps.choose_pivots(value, output)
        if len(layer.shared):
            rows = self.rows_to_copy(layer, inputs.geometry)
            torch.index_select(pivots.patterns.flatten(0, 1), 0, rows, out=copied)
        requested, coverage = steps.check()
        for group in layer.own:
            steps.choose(group, requested)
        if layer.sparse is not None:
            requested = steps.choose_sparse(*layer.sparse, requested)
        return LayerSelection(
            patterns=patterns,
            head_to_pattern=steps.read(requested[: layer.n_heads]),
            output=output,
            policy_taken=PolicyTaken(layer.by_head, layer.by_pattern, tuple(steps.is_finite)),
            overhead=tuple(steps.overhead),
            coverage=coverage,
        )


def _room(layer: PlannedLayer, geometry: Geometry) -> tuple[Tensor, Tensor, Tensor]:
    """Room for a layer's patterns, in front of which are the rows for its check.

    Returns:
        The patterns bool `[P, n_q, n_k]`; for each shared pattern the rows that the check looks at,
        bool `[S, m, n_k]`; and all rows of either that are copied, bool `[R, n_k]`.
    """
    n_shared, n_checked = len(layer.shared), len(geometry.checked)
    n_q, n_k = geometry.shape
    ahead = n_shared * n_checked if n_checked < n_q else 0
    n_rows = ahead + layer.n_patterns * n_q
    rows = torch.empty((n_rows, n_k), dtype=torch.bool, device=geometry.device)
    patterns = rows[ahead:].view(-1, n_q, n_k)
    checked = rows[:ahead].view(-1, n_checked, n_k) if ahead else patterns[:n_shared]
    return patterns, checked, rows[: ahead + n_shared * n_q]


@dataclass(frozen=True, eq=False)
class _Steps:
    """The steps of one layer's selection, and what they leave.

    Attributes:
        rule: The rule.
        layer: The layer's plan.
        pivots: What pivots gave so far.
        inputs: Queries and keys.
        patterns: Where patterns are written, bool `[P, n_q, n_k]`.
        checked: The rows of shared patterns that the check looks at, bool `[S, m, n_k]`.
        overhead: What the steps cost.
        is_finite: As in `PolicyTaken`.
        read_instead: For patterns that are not read everywhere, their rows, and what is read in
            place of each, int64.
    """

    rule: PlannedRule
    layer: PlannedLayer
    pivots: PivotPatterns
    inputs: LayerInputs
    patterns: Tensor
    checked: Tensor
    overhead: list[Overhead] = field(default_factory=list)
    is_finite: list[tuple[int, Tensor]] = field(default_factory=list)
    read_instead: list[tuple[slice, Tensor]] = field(default_factory=list)

    def choose_pivots(self, value: Tokens, output: Tensor) -> None:
        """Pivots' patterns: from sampled rows, or from all of them with the dense output."""
        layer, inputs, rows = self.layer, self.inputs, self.rule.plan.pivot_rows
        heads = layer.pivots.heads
        if len(heads) and rows:
            self.pivots.keep(layer.pivots, self.rule.estimator.estimate(inputs, heads))
            self.overhead.append(Overhead(heads, sampling_work(inputs, rows)))
        elif len(heads):
            dense, maps = pooled_attention(
                inputs.query,
                inputs.keys,
                value,
                block_size=inputs.geometry.block_size,
                scale=inputs.scale,
                heads=heads,
                softcap=inputs.softcap,
                sinks=inputs.sinks,
            )
            assert dense is not None
            output.index_copy_(0, heads, dense)
            self.pivots.keep(layer.pivots, maps)
        if self.rule.exchange is not None:
            self.pivots.fill_in(layer.pivots, self.rule.exchange)

    def check(self) -> tuple[Tensor, Coverage | None]:
        """Lets heads share whose sampled rows have enough of their attention inside the pattern.

        The rows are of some query blocks alone (`Geometry.checked`). A head's own map that is not
        finite covers NaN, as every row's own block is in a pattern.

        Returns:
            What each head reads, and the heads that own patterns are asked for, int64 `[H + T]`.
        """
        layer, sharing, inputs = self.layer, self.layer.sharing, self.inputs
        if sharing is None:
            return layer.on_fail, None
        rows = inputs.geometry.checked_rows(self.rule.plan.check_rows)
        maps = sampled_maps(inputs, sharing.heads, rows)
        mass = covered_mass(maps, self.checked, sharing.place_of_pattern)
        is_finite = self.pivots.is_finite[sharing.pattern_of_head]
        passed = (mass >= sharing.min_coverage) & is_finite
        self.overhead.append(Overhead(sharing.heads, sampling_work(inputs, rows)))
        requested = torch.where(passed[layer.check_of], layer.on_pass, layer.on_fail)
        return requested, Coverage(sharing.heads, mass, is_finite)

    def choose(self, group: OwnPatterns, requested: Tensor) -> Tensor:
        """Patterns of heads that choose by themselves.

        Returns:
            What each head of the group reads, int64 `[S]`.
        """
        inputs, geometry = self.inputs, self.inputs.geometry
        heads, out = requested[group.requested], self.patterns[group.rows]
        policy = self.rule.selectors[group.policy]
        if isinstance(policy, InPlacePolicy):
            is_finite = policy.write(inputs, policy.estimate(inputs, heads), group.gamma, out)
            self.overhead.append(Overhead(heads, policy.work(inputs)))
            if policy.fills_nonfinite:
                self.is_finite.append((group.rows.start, is_finite))
                return group.pattern_ids
        else:
            chosen = policy.select(inputs, heads, group.gamma)
            check_pattern(policy, chosen.pattern, tuple(out.shape), out.device)
            torch.logical_or(chosen.pattern, geometry.always, out=out).logical_and_(geometry.causal)
            self.overhead.append(Overhead(heads, chosen.work))
            is_finite = _are_finite(inputs)[group.heads]
        return self._read_if(is_finite, group, self.layer.dense_id)

    def choose_sparse(self, slash: OwnPatterns, sampled: OwnPatterns, requested: Tensor) -> Tensor:
        """Vertical-slash patterns for highly sparse heads, row-sampled ones for the others.

        Returns:
            `requested`, without the heads that need no row-sampled pattern.
        """
        inputs, geometry, heads = self.inputs, self.inputs.geometry, requested[slash.requested]
        profile = profiles(inputs, heads)
        vertical_slash_blocks(
            *profile, slash.gamma, out=self.patterns[slash.rows], **geometry.reads
        )
        self.overhead.append(Overhead(heads, profile_work(inputs)))
        # A distance that is not a number is above nothing: its head samples, and is found out then.
        index = self.layer.no_index[: len(slash.heads)]
        is_sparse = (
            js_distances(profile[0][:, None], geometry.uniform, index) > self.rule.plan.delta
        )
        if self.layer.sharing is None:
            requested = requested.clone()  # It is the plan's.
        requested[sampled.requested][: len(slash.heads)].masked_fill_(is_sparse, -1)
        read = self.choose(sampled, requested)
        self._read_if(is_sparse, slash, read[: len(slash.heads)])
        return requested

    def _read_if(self, holds: Tensor, group: OwnPatterns, otherwise: Tensor) -> Tensor:
        """Lets heads read their own patterns where something holds, bool `[S]`.

        Returns:
            What each head reads, int64 `[S]`.
        """
        read = torch.where(holds, group.pattern_ids, otherwise)
        self.read_instead.append((group.rows, read))
        return read

    def read(self, wanted: Tensor) -> Tensor:
        """What heads read in the end, where they want these patterns, int64 `[H]`."""
        if not self.read_instead:
            return wanted
        ids, end, parts = self.layer.pattern_ids, 0, []
        for rows, read in sorted(self.read_instead, key=lambda part: part[0].start):
            parts += [ids[end : rows.start], read]
            end = rows.stop
        return torch.cat([*parts, ids[end:]])[wanted]


def _are_finite(inputs: LayerInputs) -> Tensor:
    """Whether the queries and keys of heads hold numbers only, bool `[H]`."""
    query, key = (t.sum((1, 2), dtype=torch.float32) for t in (inputs.query, inputs.key))
    return (query.view(len(key), -1) + key[:, None]).flatten().abs() < math.inf


# What heads do without a pattern of their own.
_NOT_OWN = frozenset((Policy.DENSE, Policy.PIVOT, Policy.SHARE))


class _LayerMaker:
    """Makes one layer's plan. Lists of heads hold positions among the heads of this process."""

    def __init__(self, rule: PlannedRule, index: int, device: torch.device) -> None:
        self.rule, self.device = rule, device
        self.every = rule.plan.layers[index]
        self.heads = [self.every[h] for h in rule.heads]
        self.sharing = self._having(lambda plan: plan.policy == Policy.SHARE)
        keys = (rule.pivot_pattern(plan) for plan in self.heads)
        self.shared = sorted({rule.pivot_patterns[key] for key in keys if key is not None})
        # The policy of a head that reads a pattern, pattern by pattern.
        self.by_pattern: list[int] = [int(Policy.SHARE)] * len(self.shared)
        # Policy -> head -> its own pattern.
        self.own: dict[int, dict[int, int]] = {}
        # Heads of the groups of own patterns, after each other.
        self.requested: list[int] = []

    def make(self) -> PlannedLayer:
        """The plan."""
        groups = self._own_patterns()
        slash, sampled = groups.get(Policy.VERTICAL_SLASH), groups.get(Policy.SAMPLED)
        sparse = None
        if self.rule.plan.slash_needs_sparsity and slash is not None:
            assert sampled is not None
            sparse = slash, sampled
            del groups[Policy.VERTICAL_SLASH], groups[Policy.SAMPLED]
        on_pass, on_fail = self._read(fails=False), self._read(fails=True)
        shares, n_patterns = set(self.sharing), len(self.by_pattern)
        dense = self._having(lambda plan: plan.policy == Policy.DENSE)
        return PlannedLayer(
            n_heads=len(self.heads),
            dense=self._integers(dense),
            is_dense=len(dense) == len(self.heads),
            reads_patterns=max(on_pass + on_fail) >= 0,
            by_head=self._integers(int(plan.policy) for plan in self.heads),
            by_pattern=self._integers([*self.by_pattern, int(Policy.DENSE)]),
            pivots=self._pivots(),
            shared=self._integers(self.shared),
            sharing=self._sharing() if self.sharing else None,
            check_of=self._integers(
                self.sharing.index(h) if h in shares else 0
                for h in (*range(len(self.heads)), *self.requested)
            ),
            on_pass=self._integers(on_pass + [-1 if h in shares else h for h in self.requested]),
            on_fail=self._integers(on_fail + self.requested),
            own=tuple(groups.values()),
            sparse=sparse,
            n_patterns=n_patterns,
            pattern_ids=self._integers([*range(n_patterns + 1), -1]),
            dense_id=self._integers([n_patterns]),
            no_index=self._integers([0] * len(self.heads)),
        )

    def _having(self, test: Callable[[HeadPlan], bool]) -> list[int]:
        return [h for h, plan in enumerate(self.heads) if test(plan)]

    def _own_patterns(self) -> dict[int, OwnPatterns]:
        """The groups of own patterns by policy, row-sampled ones last: others may turn to them."""
        policies = {code for plan in self.heads for code in (plan.policy, plan.fallback)}
        slash = self._having(lambda p: Policy.VERTICAL_SLASH in (p.policy, p.fallback))
        first = slash if self.rule.plan.slash_needs_sparsity else []
        last = (Policy.VERTICAL_SLASH, Policy.SAMPLED)
        groups = {}
        for code in (*sorted(policies - _NOT_OWN - set(last)), *last):
            chosen = self._having(lambda p, code=code: code in (p.policy, p.fallback))
            if code == Policy.SAMPLED:
                chosen = [*first, *(h for h in chosen if h not in first)]
            if chosen:
                groups[code] = self._group(code, chosen)
        return groups

    def _group(self, code: int, chosen: Sequence[int]) -> OwnPatterns:
        row, place = len(self.by_pattern), len(self.heads) + len(self.requested)
        self.own[code] = {h: row + number for number, h in enumerate(chosen)}
        self.by_pattern += [int(code)] * len(chosen)
        self.requested += chosen
        plans = [self.heads[h] for h in chosen]
        gamma = (p.fallback_gamma if p.policy == Policy.SHARE else p.gamma for p in plans)
        return OwnPatterns(
            heads=self._integers(chosen),
            gamma=numbers(gamma, self.device),
            policy=int(code),
            rows=slice(row, row + len(chosen)),
            pattern_ids=self._integers(range(row, row + len(chosen))),
            requested=slice(place, place + len(chosen)),
        )

    def _pivots(self) -> PivotHeads:
        places = self.rule.pivot_patterns
        mine = self._having(lambda plan: plan.policy == Policy.PIVOT)
        position = {self.heads[h].head: number for number, h in enumerate(mine)}
        given = [key for key in places if key[0] in position]
        giver = [position[pivot] for pivot, _ in given]
        of_layer = {plan.head for plan in self.every if plan.policy == Policy.PIVOT}
        return PivotHeads(
            heads=self._integers(mine),
            given=_run(places[key] for key in given),
            giver=None if giver == [*range(len(mine))] else self._integers(giver),
            gamma=numbers((gamma for _, gamma in given), self.device),
            given_by_all=_run(place for key, place in places.items() if key[0] in of_layer),
        )

    def _sharing(self) -> SharingHeads:
        plans = [self.heads[h] for h in self.sharing]
        return SharingHeads(
            heads=self._integers(self.sharing),
            pattern_of_head=self._integers(self._pivot_pattern(plan) for plan in plans),
            place_of_pattern=self._integers(
                self.shared.index(self._pivot_pattern(plan)) for plan in plans
            ),
            min_coverage=numbers((plan.min_coverage for plan in plans), self.device),
        )

    def _read(self, *, fails: bool) -> list[int]:
        """The pattern that each head reads, -1 for none."""
        read: list[int] = []
        for h, plan in enumerate(self.heads):
            code = plan.fallback if fails and plan.policy == Policy.SHARE else plan.policy
            if code == Policy.DENSE:
                read.append(len(self.by_pattern))
            elif code in (Policy.PIVOT, Policy.SHARE):
                is_read = self.rule.pivot_pattern(plan) is not None
                read.append(self.shared.index(self._pivot_pattern(plan)) if is_read else -1)
            else:
                read.append(self.own[code][h])
        return read

    def _pivot_pattern(self, plan: HeadPlan) -> int:
        key = self.rule.pivot_pattern(plan)
        assert key is not None
        return self.rule.pivot_patterns[key]

    def _integers(self, values: Iterable[int]) -> Tensor:
        return integers(values, self.device)


def _run(places: Iterable[int]) -> slice:
    """Places that follow each other, as a slice."""
    found = [*places]
    if not found:
        return slice(0, 0)
    assert found == [*range(found[0], found[0] + len(found))]
    return slice(found[0], found[0] + len(found))
