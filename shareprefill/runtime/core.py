"""The core: attention of one layer and one sequence on plain tensors, with shared sparse patterns.

It knows no framework. Who calls it keeps a `SequenceState` for every sequence (or chunk of one) of
a forward pass, and gives it layer after layer, in ascending order:

    prefill = SparsePrefill(plan)
    state = prefill.begin(plan.geometry(n_query, n_key, device))
    for layer in range(layers):
        output, record = prefill.attend(layer, state, query, key, value, scale=scale)

All decisions are made on the device, for all heads at once: nothing here waits for it. A shared
pattern is not copied from head to head: heads point at one list.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from shareprefill.errors import DataError, UnsupportedError
from shareprefill.runtime.crossover import crossover
from shareprefill.runtime.dense import causal_attention
from shareprefill.runtime.geometry import Geometry
from shareprefill.runtime.ops.block_selection import covered_mass, list_blocks
from shareprefill.runtime.ops.block_sparse_attention import block_sparse_attention
from shareprefill.runtime.ops.blocks import BlockLists
from shareprefill.runtime.ops.devices import stream_of_tables
from shareprefill.runtime.ops.dispatch import has_fast_kernel
from shareprefill.runtime.ops.fp8_attention import fp8_attention
from shareprefill.runtime.ops.inputs import facts, lie_alike
from shareprefill.runtime.ops.pages import PagedTokens, Tokens, gathered
from shareprefill.runtime.ops.pooled_attention import pooled_attention
from shareprefill.runtime.ops.prepared import are_kept
from shareprefill.runtime.plan import RuntimePlan
from shareprefill.runtime.policies.base import LayerInputs
from shareprefill.runtime.records import SKETCH_SIDE, LayerRecord, Sketch
from shareprefill.runtime.repeats import Repeats
from shareprefill.runtime.rules.base import Exchange, LayerPlan, LayerRule, LayerSelection, Pivots
from shareprefill.runtime.rules.planned import PlannedRule
from shareprefill.runtime.rules.shareprefill import SharePrefillRule


@dataclass
class SequenceState:
    """What the layers of a forward pass share for one sequence, or for one chunk of it.

    A further chunk has a state of its own: its patterns are those of its own query rows.

    Attributes:
        geometry: The sequence's blocks.
        pivots: What the pivots of earlier layers gave.
    """

    geometry: Geometry
    pivots: Pivots

    def move_to(self, device: torch.device) -> None:
        """Moves to the device of the next layers: with a device map, layers are on several."""
        self.geometry, self.pivots = self.geometry.to(device), self.pivots.to(device)


@dataclass(frozen=True, eq=False)
class Fp8Heads:
    """The heads of a layer whose sparse attention has operands of e4m3.

    Attributes:
        are_fp8: Which ones, bool `[H]`.
        are_all: Whether all are.
    """

    are_fp8: Tensor
    are_all: bool


@dataclass(frozen=True, eq=False)
class LayerChoice:
    """What one layer's heads read, before attention is computed.

    Attributes:
        plan: The layer's plan.
        selection: The rule's answer.
        lists: The blocks that heads read, list P being of every causal block; None where no head
            reads a list.
        by_sdpa: Heads that dense attention computes faster than a list of every block, int64
            `[S]`; None for none.
        record: What was done.
        fp8: Heads that are computed in FP8; None for none.
    """

    plan: LayerPlan
    selection: LayerSelection
    lists: BlockLists | None
    by_sdpa: Tensor | None
    record: LayerRecord
    fp8: Fp8Heads | None

    @property
    def head_to_pattern(self) -> Tensor:
        """The pattern that each head reads once dense ones are known, int64 `[H]`; -1: all blocks.

        Of a pattern that is denser than the crossover every causal block is read.
        """
        if self.lists is None:
            return torch.full_like(self.selection.head_to_pattern, -1)
        pattern = self.lists.head_to_list.long()
        return torch.where(pattern == self.lists.n_patterns - 1, -1, pattern)


class SparsePrefill:
    """The attention of a planned model, as far as one process holds it.

    Args:
        plan: What every head of the model is to do.
        heads: The query heads of every layer that this process holds; None for all of them.
        exchange: Of the other processes' heads; None where this one holds all of them.
    """

    def __init__(
        self, plan: RuntimePlan, heads: range | None = None, exchange: Exchange | None = None
    ) -> None:
        self.plan = plan
        self.heads = range(len(plan.layers[0])) if heads is None else heads
        rule = SharePrefillRule if plan.online else PlannedRule
        self.rule: LayerRule[Any, Any] = rule(plan, self.heads, exchange)
        # A layer's plan on a device; and whether launches of a device are kept, to be repeated.
        self._layer, self._are_kept = cache(self.rule.make_layer), cache(are_kept)
        self._fp8 = cache(self._make_fp8)
        self._repeats = Repeats[LayerRecord]()

    def begin(self, geometry: Geometry) -> SequenceState:
        """The state of a sequence before the first layer of a forward pass.

        Args:
            geometry: Of `RuntimePlan.geometry`; sequences of equal sizes may have one in common.
        """
        return SequenceState(geometry, self.rule.new_pivots(geometry))

    def attend(
        self,
        layer: int,
        state: SequenceState,
        query: Tensor,
        key: Tokens,
        value: Tokens,
        *,
        scale: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        measure_recall: bool = False,
        keep_maps: bool = False,
    ) -> tuple[Tensor, LayerRecord]:
        """Computes one layer's attention for one sequence.

        Args:
            layer: Layer index.
            state: The sequence's; this layer's pivots are added.
            query: `[H, Nq, D]`, the last rows of the sequence.
            key: `[G, Nk, D]`, all keys up to the last row; or the same in an engine's pages.
            value: `[G, Nk, Dv]`, as keys lie.
            scale: The model's factor on the logits.
            softcap: The model's soft-cap of the logits; None for none.
            sinks: The model's attention sinks, one logit a head, `[H]`; None for none.
            measure_recall: Also compute the exact map of every head (as much work as dense
                attention) and with it the recall of its pattern.

        Returns:
            The output `[H, Nq, Dv]`, and what was done.

        Raises:
            UnsupportedError: the layer has other heads than the plan, or is to be computed in FP8,
                which cannot be.
            DataError: a tensor holds NaN or Inf, and the plan says that this is an error.
        """
        if len(query) != len(self.heads):
            raise UnsupportedError(
                f"a layer has {len(query)} query heads in this process, {self.heads} were "
                "expected: use tensor parallelism that divides every attention layer by its "
                "heads, or none"
            )
        if query.device != state.geometry.device:
            state.move_to(query.device)
        inputs = LayerInputs(query, key, scale, state.geometry, softcap, sinks)
        if self.plan.refuse_nonfinite:
            tensors = {"query": query, "key": inputs.key, "value": gathered(value)}
            _refuse_nonfinite(layer, tensors)
        if measure_recall:
            choice = self.choose(layer, state, inputs, value)
            measured = _measured(inputs, choice, keep_maps=keep_maps)
            return _output(choice, inputs, value), replace(choice.record, **measured)
        call = self._call(layer, state, inputs, value)
        compute = partial(self._compute, layer, state, inputs, value)
        return compute() if call is None else self._repeats.run(*call, compute)

    def _compute(
        self, layer: int, state: SequenceState, inputs: LayerInputs, value: Tokens
    ) -> tuple[Tensor, LayerRecord]:
        choice = self.choose(layer, state, inputs, value)
        return _output(choice, inputs, value), choice.record

    def _call(
        self, layer: int, state: SequenceState, inputs: LayerInputs, value: Tokens
    ) -> tuple[Hashable, list[Tensor]] | None:
        """What calls that launch alike have in common, and the tensors that they are given.

        None where they are not to be repeated.
        """
        device = inputs.query.device
        stream = stream_of_tables(device) if self._are_kept(device) else None
        if stream is None:
            return None
        memory = self.rule.memory(self._layer(layer, device), state.pivots)
        if memory is None or not lie_alike(inputs.keys, value):
            return None
        tensors = (inputs.query, inputs.keys, value, inputs.sinks)
        sizes = (*state.geometry.reads.values(), inputs.scale, inputs.softcap)
        kind = (layer, stream, *map(facts, tensors), *sizes)
        given = [inputs.query, *_parts(inputs.keys), _parts(value)[0], *memory]
        return kind, given if inputs.sinks is None else [*given, inputs.sinks]

    def choose(
        self, layer: int, state: SequenceState, inputs: LayerInputs, value: Tokens
    ) -> LayerChoice:
        """Chooses and lists the patterns; pivots that are computed densely have their output then.

        Args:
            layer: Layer index.
            state: The sequence's, on the layer's device.
            inputs: Queries and keys.
            value: `[G, Nk, Dv]`.
        """
        geometry, device = state.geometry, state.geometry.device
        plan = self._layer(layer, device)
        selection = self.rule.select(plan, state.pivots, inputs, value)
        lists = by_sdpa = None
        most = self.plan.max_density
        fp8 = self._fp8(layer, device)
        # SDPA knows neither soft-capping nor sinks nor FP8.
        is_plain = inputs.softcap is None and inputs.sinks is None
        if fp8 is not None and not is_plain:
            raise UnsupportedError(
                f"layer {layer} has soft-capped logits or attention sinks, which FP8 attention "
                "does not compute; use precision='model'"
            )
        is_plain = is_plain and fp8 is None
        if plan.reads_patterns and not (plan.is_dense and is_plain):
            first, finite = selection.flags or (0, None)
            lists = list_blocks(
                selection.own,
                selection.head_to_pattern,
                max_density=crossover(device).density if most is None else most,
                shared=selection.shared,
                source=selection.source,
                finite=finite,
                first=first,
                **geometry.sizes,
            )
            if is_plain:
                by_sdpa = self._heads_of_sdpa(plan, lists, inputs, value)
        record = LayerRecord(
            layer=layer,
            causal=geometry.causal_count,
            policy_taken=selection.policy_taken,
            overhead=selection.overhead,
            coverage=selection.coverage,
            candidate_distances=selection.distances,
            totals=None if lists is None else lists.totals(),
        )
        return LayerChoice(plan, selection, lists, by_sdpa, record, fp8)

    def _make_fp8(self, layer: int, device: torch.device) -> Fp8Heads | None:
        """The heads of a layer that are computed in FP8, as far as this process holds them."""
        found = [self.plan.layers[layer][head].is_fp8 for head in self.heads]
        if not any(found):
            return None
        return Fp8Heads(torch.tensor(found, device=device), all(found))

    def _heads_of_sdpa(
        self, plan: LayerPlan, lists: BlockLists, inputs: LayerInputs, value: Tokens
    ) -> Tensor:
        """Heads that dense attention computes faster than a list of every block, int64 `[S]`."""
        if has_fast_kernel(inputs.query, inputs.keys, value, lists.block_size):
            # One launch for all heads beats copies of some heads' tensors.
            return plan.dense[:0]
        if value.device.type == "cpu":
            # Its values may be read at no cost, and its sparse blocks cost more than dense ones.
            return (lists.head_to_list == lists.n_patterns - 1).nonzero()[:, 0]
        return plan.dense


def _parts(tokens: Tokens) -> tuple[Tensor, ...]:
    return (tokens.pool, tokens.table) if isinstance(tokens, PagedTokens) else (tokens,)


def _output(choice: LayerChoice, inputs: LayerInputs, value: Tokens) -> Tensor:
    """The output of a layer, with that of the heads that have none yet."""
    plan, output, lists = choice.plan, choice.selection.output, choice.lists
    if lists is None:
        return _dense(inputs, value) if plan.is_dense else output
    heads = choice.by_sdpa
    if heads is not None and len(heads) == plan.n_heads:
        return _dense(inputs, value)
    if heads is not None and len(heads):
        output[heads] = _dense(inputs, value, heads)
        lists = replace(lists, head_to_list=lists.head_to_list.index_fill(0, heads, -1))
    fp8, read = choice.fp8, lists.head_to_list
    if fp8 is not None:
        in_fp8 = replace(lists, head_to_list=read.masked_fill(~fp8.are_fp8, -1))
        tensors = (inputs.query, inputs.key, gathered(value))
        fp8_attention(*tensors, in_fp8, scale=inputs.scale, out=output)
        if fp8.are_all:
            return output
        lists = replace(lists, head_to_list=read.masked_fill(fp8.are_fp8, -1))
    block_sparse_attention(
        inputs.query,
        inputs.keys,
        value,
        lists,
        scale=inputs.scale,
        softcap=inputs.softcap,
        sinks=inputs.sinks,
        out=output,
    )
    return output


def _dense(inputs: LayerInputs, value: Tokens, heads: Tensor | None = None) -> Tensor:
    """Dense attention of some heads, or of all."""
    query, key, value = inputs.query, inputs.key, gathered(value)
    if heads is not None:
        group = heads // (len(query) // len(key))
        query, key, value = query[heads], key[group], value[group]
    return causal_attention(query, key, value, scale=inputs.scale)


def _measured(inputs: LayerInputs, choice: LayerChoice, *, keep_maps: bool) -> dict[str, Any]:
    """What exact maps tell of a choice: `recall` and `sketch` of a `LayerRecord`."""
    geometry, patterns = inputs.geometry, choice.selection.patterns
    _, maps = pooled_attention(
        inputs.query,
        inputs.keys,
        block_size=geometry.block_size,
        scale=inputs.scale,
        softcap=inputs.softcap,
    )
    if choice.lists is None:
        patterns = geometry.causal[None]
    read = choice.head_to_pattern
    found: dict[str, Any] = {"recall": covered_mass(maps, patterns, read)}
    if keep_maps:
        whole = torch.cat([patterns, geometry.causal[None]])
        found["sketch"] = Sketch(
            geometry.n_query, geometry.n_key, _small(maps), _small(whole[read].to(maps.dtype))
        )
    return found


def _small(maps: Tensor) -> Tensor:
    """Maps `[H, n_q, n_k]` averaged to at most `SKETCH_SIDE` a side, as float16."""
    rows, columns = (min(SKETCH_SIDE, size) for size in maps.shape[1:])
    return torch.nn.functional.adaptive_avg_pool2d(maps, (rows, columns)).half()


def _refuse_nonfinite(layer: int, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        heads = (~tensor.isfinite().flatten(1).all(-1)).nonzero()[:, 0].tolist()
        if heads:
            raise DataError(
                f"layer {layer} has NaN or Inf in the {name} of heads {heads}: look for "
                "an overflow in the model's weights or dtype, or set nonfinite='dense'"
            )
