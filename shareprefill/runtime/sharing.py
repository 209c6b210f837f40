"""The attention of one layer with shared sparse patterns: SharePrefill, and the planned policies.

All decisions are made on the device, for all heads at once: nothing here waits for it. A shared
pattern is not copied from head to head: heads point at one list.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from shareprefill.errors import DataError
from shareprefill.runtime.crossover import crossover
from shareprefill.runtime.dense import causal_attention
from shareprefill.runtime.online import choose_online
from shareprefill.runtime.ops.block_selection import covered_mass, list_blocks
from shareprefill.runtime.ops.block_sparse_attention import block_sparse_attention
from shareprefill.runtime.ops.blocks import BlockLists
from shareprefill.runtime.ops.dispatch import has_fast_kernel
from shareprefill.runtime.ops.pooled_attention import pooled_attention
from shareprefill.runtime.orders import LayerOrders
from shareprefill.runtime.plan import RuntimePlan
from shareprefill.runtime.planned import PlannedChoice
from shareprefill.runtime.policies.base import LayerInputs
from shareprefill.runtime.records import Choice, Decision, LayerRecord
from shareprefill.runtime.state import ForwardState


class LayerPass:
    """One layer's heads on one sequence: chooses a pattern for every head, then computes them.

    Args:
        plan: What every head of the model is to do.
        layer: Layer index.
        state: Pivots of the earlier layers in this forward pass; this layer's are added.
        inputs: Queries and keys.
        value: `[G, Nk, Dv]`.

    Attributes:
        out: The output, `[H, Nq, Dv]`.
        bitmap: Once chosen: candidate patterns, bool `[P, n_q, n_k]`.
        lists: Once chosen: the blocks that heads read, list P being of every causal block; None
            where no head reads any.
        record: Once chosen: what was done.
    """

    bitmap: Tensor
    lists: BlockLists | None
    record: LayerRecord

    def __init__(
        self, plan: RuntimePlan, layer: int, state: ForwardState, inputs: LayerInputs, value: Tensor
    ) -> None:
        self.plan, self.layer, self.state = plan, layer, state
        self.inputs, self.value = inputs, value
        self.geometry = inputs.geometry
        query = inputs.query
        self.orders: LayerOrders = state.orders.of(layer, query.device)
        # Tokens first, as the model reads it: its transposition is no copy then.
        self.out = query.new_empty((query.shape[1], len(query), value.shape[-1])).transpose(0, 1)

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
        if measure_recall:
            self.record = replace(self.record, recall=self._recall())
        return self.out, self.record

    def choose(self) -> None:
        """Chooses the patterns; pivots that are computed densely have their output then."""
        orders, geometry = self.orders, self.geometry
        self.lists, decision = None, Decision()
        if orders.is_dense and self.inputs.is_plain:
            self.bitmap = geometry.causal[None]
        else:
            choice = self._choice()
            self.bitmap, decision = choice.bitmap, choice.decision
            if orders.reads_lists:
                self.lists = list_blocks(
                    choice.bitmap, choice.pattern, max_density=self._max_density(), **geometry.sizes
                )
        totals = None if self.lists is None else self.lists.totals()
        self.record = LayerRecord(self.layer, geometry.causal_count, orders, decision, totals)

    @property
    def pattern(self) -> Tensor:
        """The candidate that each head reads, int64 `[H]`; -1: every causal block."""
        if self.lists is None:
            return torch.full_like(self.orders.codes, -1)
        pattern = self.lists.head_to_list.long()
        return torch.where(pattern == len(self.bitmap), -1, pattern)

    def compute(self) -> None:
        """Computes all heads that have no output yet."""
        inputs, lists = self.inputs, self.lists
        if lists is None:
            if self.orders.is_dense:
                self._compute_dense(self.orders.dense.index)
            return
        if inputs.is_plain:
            # SDPA knows neither soft-capping nor sinks.
            heads = self._heads_of_sdpa(lists)
            if len(heads):
                self._compute_dense(heads)
                left = lists.head_to_list.index_fill(0, heads, -1)
                lists = replace(lists, head_to_list=left)
            if len(heads) == self.orders.n_heads:
                return
        block_sparse_attention(
            inputs.query,
            inputs.key,
            self.value,
            lists,
            scale=inputs.scale,
            softcap=inputs.softcap,
            sinks=inputs.sinks,
            out=self.out,
        )

    def _choice(self) -> Choice:
        plan, orders, state, inputs = self.plan, self.orders, self.state, self.inputs
        if not plan.online:
            return PlannedChoice(plan, orders, state, inputs).make(self.value, self.out)
        self.out, choice = choose_online(plan, orders, state, inputs, self.value)
        return choice

    def _heads_of_sdpa(self, lists: BlockLists) -> Tensor:
        """Heads that dense attention computes faster than a list of every block, int64 `[S]`."""
        dense = self.orders.dense.index
        query, key, value = self.inputs.query, self.inputs.key, self.value
        if has_fast_kernel(query, key, value, lists.block_size):
            # One launch for all heads beats copies of some heads' tensors.
            return dense[:0]
        if lists.device.type == "cpu":
            # Its values may be read at no cost, and its sparse blocks cost more than dense ones.
            return (lists.head_to_list == len(self.bitmap)).nonzero()[:, 0]
        return dense

    def _compute_dense(self, heads: Tensor) -> None:
        inputs = self.inputs
        if len(heads) == self.orders.n_heads:
            self.out = causal_attention(inputs.query, inputs.key, self.value, scale=inputs.scale)
            return
        group = heads // (self.orders.n_heads // inputs.key.shape[0])
        self.out[heads] = causal_attention(
            inputs.query[heads], inputs.key[group], self.value[group], scale=inputs.scale
        )

    def _recall(self) -> Tensor:
        """Attention mass inside every head's pattern, float32 `[H]`."""
        inputs = self.inputs
        _, maps = pooled_attention(
            inputs.query,
            inputs.key,
            block_size=self.geometry.block_size,
            scale=inputs.scale,
            softcap=inputs.softcap,
        )
        return covered_mass(maps, self.bitmap, self.pattern)

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
        return crossover(self.geometry.device).density
