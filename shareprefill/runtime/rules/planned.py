"""The rule for heads whose policies were chosen offline.

Pivots come first, then every other head of the layer, so that heads of the pivot's own layer share
too. The patterns of a layer have numbers:

    shared ones | one for each head that may choose by itself, group by group

The first are read where pivots left them, the others lie in the layer's bitmap, into which the
operators write. The pattern with the number P, which is in neither, is every causal block. The host
does not know which checks pass. So the plan says for every head which pattern it reads as checks
pass and as they fail, and likewise which heads each group is asked for; the check chooses between
the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from shareprefill.artifact import Policy
from shareprefill.runtime.geometry import Geometry, SampledRows
from shareprefill.runtime.ops.block_selection import (
    LineWeights,
    SparseGuard,
    check_heads,
    head_blocks,
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
from shareprefill.runtime.policies.sampled import (
    Sampled,
    sampled_maps,
    sampling_work,
    two_sampled_maps,
)
from shareprefill.runtime.policies.smoothed import Smoothed, line_weights
from shareprefill.runtime.policies.vertical_slash import (
    VerticalSlash,
    write_patterns,
)
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
        min_coverage: The mass inside that pattern from which on it shares, float32 `[S]`.
        with_pivots: The layer's pivots, and then these heads, int64.
    """

    heads: Tensor
    with_pivots: Tensor
    pattern_of_head: Tensor
    min_coverage: Tensor


@dataclass(frozen=True, eq=False)
class OwnPatterns:
    """Heads of a layer that may choose a pattern by themselves, by one policy.

    Attributes:
        heads: int64 `[S]`.
        gamma: Attention mass that the pattern of each covers, float32 `[S]`.
        policy: Number of the policy.
        rows: Where their patterns lie in the layer's bitmap.
        first: The number of the first of these patterns.
        requested: Where they are in `PlannedLayer.on_fail`: a head, or -1 where none is needed.
    """

    heads: Tensor
    gamma: Tensor
    policy: int
    rows: slice
    first: int
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
        sampled: Heads that may take a pattern from sampled rows, smoothed or not: up to two groups
            that are requested one after the other.
        own: Heads that choose by themselves in other ways, group by group.
        guarded: Heads that may take a vertical-slash pattern while they are highly sparse; and
            those that may take a row-sampled one, first the former, in their order. None for none,
            and where vertical-slash patterns are for all heads: then their group is in `own`.
        n_own: Patterns in the layer's bitmap.
    """

    by_head: Tensor
    by_pattern: Tensor
    pivots: PivotHeads
    shared: Tensor
    sharing: SharingHeads | None
    check_of: Tensor
    on_pass: Tensor
    on_fail: Tensor
    sampled: tuple[OwnPatterns, ...]
    own: tuple[OwnPatterns, ...]
    guarded: tuple[OwnPatterns, OwnPatterns] | None
    n_own: int


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

    def keep(self, pivots: PivotHeads, maps: Tensor, weights: LineWeights | None = None) -> None:
        """Cuts and keeps the patterns that this process's pivots of a layer give.

        Each covers gamma of its pivot's whole mass, and has the blocks that are always read.

        Args:
            pivots: Of the layer.
            maps: Their maps, in any scale, float32 `[S, n_q, n_k]`.
            weights: By which these are smoothed first; None for exact ones.
        """
        if len(pivots.gamma):
            patterns, finite = self.patterns[pivots.given], self.is_finite[pivots.given]
            options = {"weights": weights, "out": patterns, "finite": finite}
            head_blocks(maps, pivots.gamma, pivots.giver, **options, **self.geometry.reads)

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
    def selectors(self) -> dict[int, SelectionPolicy]:
        """What chooses the patterns of heads that choose by themselves in other ways, by policy."""
        return {int(Policy.VERTICAL_SLASH): VerticalSlash(), **self.plan.selectors}

    @cached_property
    def samplers(self) -> dict[int, Smoothed | Sampled]:
        """What makes patterns of sampled rows, by policy."""
        return {
            int(Policy.SMOOTHED): self._smoothed(Smoothed.rows),
            int(Policy.SAMPLED): Sampled(self.plan.sample_rows),
        }

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

    def memory(self, layer: PlannedLayer, pivots: PivotPatterns) -> tuple[Tensor, ...] | None:
        """Of layers whose heads follow policies of ours, in a process that holds all heads."""
        further = {group.policy for group in layer.own} & {*self.plan.selectors}
        if self.exchange is not None or further:
            return None
        return pivots.patterns, pivots.is_finite

    def select(
        self, layer: PlannedLayer, pivots: PivotPatterns, inputs: LayerInputs, value: Tokens
    ) -> LayerSelection:
        """Pivots, then the check of the sharing heads, then the heads that choose themselves."""
        heads, n_query, _ = inputs.query.shape
        # Tokens come first in memory, as the model reads it: its transposition is no copy then.
        output = inputs.query.new_empty((n_query, heads, value.shape[-1])).transpose(0, 1)
        shape, device = (layer.n_own, *inputs.geometry.shape), inputs.query.device
        own = torch.empty(shape, dtype=torch.bool, device=device)
        steps = _Steps(self, layer, pivots, inputs, own)
        maps = steps.first_maps()
        steps.choose_pivots(value, output, maps[0])
        requested, coverage = steps.check(maps[1])
        for group in layer.own:
            steps.choose(group, requested)
        if layer.guarded is not None:
            requested = steps.choose_sparse(*layer.guarded, requested)
        flags = steps.choose_sampled(requested)
        is_sharing = len(layer.shared) > 0
        return LayerSelection(
            own=own,
            head_to_pattern=requested[: layer.n_heads],
            flags=flags,
            output=output,
            shared=pivots.patterns if is_sharing else None,
            source=layer.shared if is_sharing else None,
            policy_taken=PolicyTaken(layer.by_head, layer.by_pattern, tuple(steps.is_finite)),
            overhead=tuple(steps.overhead),
            coverage=coverage,
        )


@dataclass(frozen=True, eq=False)
class _Steps:
    """The steps of one layer's selection, and what they leave.

    Attributes:
        rule: The rule.
        layer: The layer's plan.
        pivots: What pivots gave so far.
        inputs: Queries and keys.
        patterns: Where the layer's own patterns are written, bool `[O, n_q, n_k]`.
        overhead: What the steps cost.
        is_finite: As in `PolicyTaken`.
    """

    rule: PlannedRule
    layer: PlannedLayer
    pivots: PivotPatterns
    inputs: LayerInputs
    patterns: Tensor
    overhead: list[Overhead] = field(default_factory=list)
    is_finite: list[tuple[int, Tensor]] = field(default_factory=list)

    def first_maps(self) -> tuple[Tensor | None, Tensor | None]:
        """Maps of sampled rows of the pivots, and of the heads that share; None for none."""
        plan, layer, inputs = self.rule.plan, self.layer, self.inputs
        heads, sharing = layer.pivots.heads, layer.sharing
        if len(heads) and plan.pivot_rows and sharing is not None:
            rows = SampledRows(plan.pivot_rows), SampledRows(plan.check_rows, is_check=True)
            return two_sampled_maps(inputs, sharing.with_pivots, len(heads), rows)
        pivots = check = None
        if len(heads) and plan.pivot_rows:
            pivots = sampled_maps(inputs, heads, plan.pivot_rows)
        if sharing is not None:
            rows = inputs.geometry.checked_rows(plan.check_rows)
            check = sampled_maps(inputs, sharing.heads, rows)
        return pivots, check

    def choose_pivots(self, value: Tokens, output: Tensor, maps: Tensor | None) -> None:
        """Pivots' patterns: from sampled rows, or from all of them with the dense output."""
        layer, inputs, rows = self.layer, self.inputs, self.rule.plan.pivot_rows
        heads = layer.pivots.heads
        if maps is not None:
            self.pivots.keep(layer.pivots, maps, self.rule.estimator.weights)
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

    def check(self, maps: Tensor | None) -> tuple[Tensor, Coverage | None]:
        """Lets heads share whose sampled rows have enough of their attention inside the pattern.

        The rows are of some query blocks alone (`Geometry.checked`). A head's own map that is not
        finite covers NaN, as every row's own block is in a pattern.

        Returns:
            What each head reads, and the heads that own patterns are asked for, int64 `[H + T]`.
        """
        layer, sharing, inputs = self.layer, self.layer.sharing, self.inputs
        if sharing is None or maps is None:
            return layer.on_fail, None
        geometry, pivots = inputs.geometry, self.pivots
        rows = geometry.checked_rows(self.rule.plan.check_rows)
        requested, mass, found = check_heads(
            maps,
            pivots.patterns,
            sharing.pattern_of_head,
            geometry.checked,
            sharing.min_coverage,
            pivots.is_finite,
            layer.check_of,
            layer.on_pass,
            layer.on_fail,
        )
        self.overhead.append(Overhead(sharing.heads, sampling_work(inputs, rows)))
        return requested, Coverage(sharing.heads, mass, found)

    def choose(self, group: OwnPatterns, requested: Tensor) -> None:
        """Patterns of heads that choose by themselves; every causal block for want of numbers."""
        inputs, geometry = self.inputs, self.inputs.geometry
        heads, out = requested[group.requested], self.patterns[group.rows]
        policy = self.rule.selectors[group.policy]
        if isinstance(policy, InPlacePolicy):
            is_finite = policy.write(inputs, heads, group.gamma, out)
            self.overhead.append(Overhead(heads, policy.work(inputs)))
        else:
            chosen = policy.select(inputs, heads, group.gamma)
            check_pattern(policy, chosen.pattern, tuple(out.shape), out.device)
            torch.logical_or(chosen.pattern, geometry.always, out=out)
            self.overhead.append(Overhead(heads, chosen.work))
            is_finite = _are_finite(inputs)[group.heads]
        if not (isinstance(policy, InPlacePolicy) and policy.fills_nonfinite):
            is_finite = is_finite.view(len(heads), -1).all(1)
            out.logical_or_(~is_finite[:, None, None]).logical_and_(geometry.causal)
        self.is_finite.append((group.first, is_finite))

    def choose_sparse(self, slash: OwnPatterns, sampled: OwnPatterns, requested: Tensor) -> Tensor:
        """Vertical-slash patterns for highly sparse heads; the others are to be row-sampled.

        Returns:
            `requested`, with what is read and asked for then, int64 `[H + T]`.
        """
        inputs, heads = self.inputs, requested[slash.requested]
        guard = SparseGuard(
            n_heads=self.layer.n_heads,
            delta=float(self.rule.plan.delta),
            first=slash.first,
            otherwise=sampled.first,
            place=sampled.requested.start,
        )
        finite = torch.empty_like(slash.gamma, dtype=torch.bool)
        out = self.patterns[slash.rows]
        decided = write_patterns(inputs, heads, slash.gamma, out, finite, requested, guard)
        self.overhead.append(Overhead(heads, VerticalSlash().work(inputs)))
        # A distance that is not a number is above nothing: its head samples, and is found out then.
        assert decided is not None
        return decided

    def choose_sampled(self, requested: Tensor) -> tuple[int, Tensor] | None:
        """Patterns from sampled rows, smoothed or not.

        Returns:
            As in `LayerSelection.flags`.
        """
        groups, inputs, flags = self.layer.sampled, self.inputs, None
        if not groups:
            return None
        policies = [self.rule.samplers[group.policy] for group in groups]
        heads = requested[groups[0].requested.start : groups[-1].requested.stop]
        if len(groups) == 2:
            rows = SampledRows(policies[0].rows), SampledRows(policies[1].rows)
            maps = two_sampled_maps(inputs, heads, len(groups[0].heads), rows)
        else:
            maps = (sampled_maps(inputs, heads, policies[0].rows),)
        for group, policy, mine in zip(groups, policies, maps, strict=True):
            finite = policy.cut(inputs, mine, group.gamma, self.patterns[group.rows])
            work = sampling_work(inputs, policy.rows)
            self.overhead.append(Overhead(requested[group.requested], work))
            if policy.fills_nonfinite:
                self.is_finite.append((group.first, finite))
            else:
                flags = group.first, finite
        return flags


def _are_finite(inputs: LayerInputs) -> Tensor:
    """Whether the queries and keys of heads hold numbers only, bool `[H]`."""
    query, key = (t.sum((1, 2), dtype=torch.float32) for t in (inputs.query, inputs.key))
    return (query.view(len(key), -1) + key[:, None]).flatten().abs() < math.inf


# Policies that make patterns of sampled rows.
_FROM_ROWS = (Policy.SMOOTHED, Policy.SAMPLED)
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
        guarded = None
        if self.rule.plan.slash_needs_sparsity and Policy.VERTICAL_SLASH in groups:
            guarded = groups.pop(Policy.VERTICAL_SLASH), groups[Policy.SAMPLED]
        ours = (code for code in _FROM_ROWS if code not in self.rule.plan.selectors)
        sampled = [groups.pop(code) for code in ours if code in groups]
        on_pass, on_fail = self._read(fails=False), self._read(fails=True)
        shares = set(self.sharing)
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
            sampled=tuple(sampled),
            own=tuple(groups.values()),
            guarded=guarded,
            n_own=len(self.by_pattern) - len(self.shared),
        )

    def _having(self, test: Callable[[HeadPlan], bool]) -> list[int]:
        return [h for h, plan in enumerate(self.heads) if test(plan)]

    def _own_patterns(self) -> dict[int, OwnPatterns]:
        """The groups of own patterns by policy; those from sampled rows last, side by side."""
        policies = {code for plan in self.heads for code in (plan.policy, plan.fallback)}
        slash = self._having(lambda p: Policy.VERTICAL_SLASH in (p.policy, p.fallback))
        first = slash if self.rule.plan.slash_needs_sparsity else []
        last = (Policy.VERTICAL_SLASH, *_FROM_ROWS)
        groups = {}
        for code in (*sorted(policies - _NOT_OWN - set(last)), *last):
            chosen = self._having(lambda p, code=code: code in (p.policy, p.fallback))
            if code == Policy.SAMPLED:
                chosen = [*first, *(h for h in chosen if h not in first)]
            if chosen:
                groups[code] = self._group(code, chosen)
        return groups

    def _group(self, code: int, chosen: Sequence[int]) -> OwnPatterns:
        first, place = len(self.by_pattern), len(self.heads) + len(self.requested)
        self.own[code] = {h: first + number for number, h in enumerate(chosen)}
        row = first - len(self.shared)
        self.by_pattern += [int(code)] * len(chosen)
        self.requested += chosen
        plans = [self.heads[h] for h in chosen]
        gamma = (p.fallback_gamma if p.policy == Policy.SHARE else p.gamma for p in plans)
        return OwnPatterns(
            heads=self._integers(chosen),
            gamma=numbers(gamma, self.device),
            policy=int(code),
            rows=slice(row, row + len(chosen)),
            first=first,
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
        mine = self._having(lambda plan: plan.policy == Policy.PIVOT)
        plans = [self.heads[h] for h in self.sharing]
        return SharingHeads(
            heads=self._integers(self.sharing),
            with_pivots=self._integers([*mine, *self.sharing]),
            pattern_of_head=self._integers(self._pivot_pattern(plan) for plan in plans),
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
