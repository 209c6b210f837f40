"""What the layers of one forward pass of one sequence share: its geometry and its pivots."""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from shareprefill.runtime.ops.blocks import causal_blocks, count_causal_blocks
from shareprefill.runtime.ops.pooled_attention import sample_rows
from shareprefill.runtime.orders import LayerOrders, Orders
from shareprefill.runtime.patterns import always_blocks
from shareprefill.runtime.plan import RuntimePlan


class Geometry:
    """Blocks and rows of `n_query` queries at the end of `n_key` keys; made once, used by layers.

    Args:
        n_query: Query rows, in tokens.
        n_key: Keys, in tokens; query row i is at position n_key - n_query + i.
        plan: Block size, and the blocks that are always read.
        device: Where tensors are made.
    """

    def __init__(self, n_query: int, n_key: int, plan: RuntimePlan, device: torch.device) -> None:
        self.n_query, self.n_key, self.device = n_query, n_key, device
        self.block_size = plan.block_size
        self._sink, self._local = plan.sink_blocks, plan.local_blocks
        self._rows: dict[int, Tensor] = {}

    @cached_property
    def causal(self) -> Tensor:
        """Causal blocks, bool `[n_q, n_k]`."""
        offset = self.n_key - self.n_query
        return causal_blocks(self.n_query, offset, self.block_size, device=self.device)

    @cached_property
    def causal_count(self) -> int:
        """Number of causal blocks."""
        return count_causal_blocks(self.n_query, self.n_key - self.n_query, self.block_size)

    @cached_property
    def always(self) -> Tensor:
        """Blocks that every pattern reads, bool `[n_q, n_k]`."""
        return always_blocks(
            self.n_query,
            self.n_key,
            self.block_size,
            sink=self._sink,
            local=self._local,
            device=self.device,
        )

    def rows(self, r: int) -> Tensor:
        """`r` evenly spaced query rows of every block, int64 `[n_q, r]`."""
        if r not in self._rows:
            self._rows[r] = sample_rows(self.n_query, self.block_size, r, self.device)
        return self._rows[r]


class Exchange(Protocol):
    """Brings together what the processes of a tensor-parallel group have found."""

    def sum(self, tensor: Tensor) -> None:
        """Adds the tensors of all processes, in place in each."""
        ...


class ForwardState:
    """Geometry and pivots of one sequence (or one chunk of it) in one forward pass.

    Args:
        geometry: Of the sequence.
        orders: What the heads that this process holds are to do.
        exchange: Of the other processes' heads; None where this one holds all of them.
    """

    def __init__(
        self, geometry: Geometry, orders: Orders, exchange: Exchange | None = None
    ) -> None:
        self.geometry, self.orders, self.exchange = geometry, orders, exchange

    @cached_property
    def patterns(self) -> Tensor:
        """Patterns of planned pivots so far, bool `[pairs, n_q, n_k]`, by the orders' pairs.

        One without any block is not there: its pivot is of a later layer, or unsound.
        """
        shape = (len(self.orders.pairs), *self.geometry.causal.shape)
        return torch.zeros(shape, dtype=torch.bool, device=self.geometry.device)

    @cached_property
    def maps(self) -> Tensor:
        """Maps of the elected pivots so far, float32 `[C, n_q, n_k]`; zeros for the others."""
        shape = (self.orders.n_clusters, *self.geometry.causal.shape)
        return torch.zeros(shape, device=self.geometry.device)

    @cached_property
    def elected(self) -> Tensor:
        """Clusters that have a pivot, bool `[C]`."""
        shape = (self.orders.n_clusters,)
        return torch.zeros(shape, dtype=torch.bool, device=self.geometry.device)

    def keep_planned(self, orders: LayerOrders, patterns: Tensor, sound: Tensor) -> None:
        """Keeps the patterns that this process's pivots of a layer give.

        Args:
            orders: Of the layer.
            patterns: bool `[N, n_q, n_k]`, by `orders.new_pairs`.
            sound: bool `[N]`: where it is False, the pattern rests on NaN or Inf, and is given to
                nobody.
        """
        self.patterns[orders.new_pairs] = patterns & sound[:, None, None]

    def exchange_planned(self, orders: LayerOrders) -> None:
        """Fills in the patterns that other processes' pivots of a layer give."""
        if self.exchange is not None and len(orders.layer_pairs):
            # Every pattern comes from one process, and is empty in the others.
            every = self.patterns[orders.layer_pairs].view(torch.uint8)
            self.exchange.sum(every)
            self.patterns[orders.layer_pairs] = every.view(torch.bool)

    def are_sound(self, pairs: Tensor) -> Tensor:
        """Whether patterns are there to be read, bool of the shape of `pairs`."""
        # Every pattern reads the last row's own block.
        return self.patterns[:, -1, -1][pairs]

    def elect(self, orders: LayerOrders, willing: Tensor) -> Tensor:
        """The first willing head of every cluster that has no pivot yet.

        Args:
            orders: Of the layer.
            willing: Heads that may be one, bool `[H]`.

        Returns:
            bool `[H]`.
        """
        willing = self._of_all_heads(willing)
        candidates = orders.members & willing
        new = candidates.any(-1) & ~self.elected[orders.clusters]
        first = candidates.int().argmax(-1)
        places = torch.arange(len(willing), device=willing.device)
        chosen = ((places == first[:, None]) & new[:, None]).any(0)
        return chosen[self.orders.heads.start : self.orders.heads.stop]

    def keep_elected(self, orders: LayerOrders, is_pivot: Tensor, maps: Tensor) -> None:
        """Keeps the maps `[H, n_q, n_k]` of the heads that are pivots."""
        if not len(orders.clusters):
            return
        mine = slice(self.orders.heads.start, self.orders.heads.stop)
        won = orders.members[:, mine] & is_pivot
        found = maps[won.int().argmax(-1)]
        found = torch.where(won.any(-1)[:, None, None], found, 0.0)
        new = self._of_all_clusters(won.any(-1))
        if self.exchange is not None:
            self.exchange.sum(found)
        old = self.maps[orders.clusters]
        self.maps[orders.clusters] = torch.where(new[:, None, None], found, old)
        self.elected[orders.clusters] |= new

    def _of_all_heads(self, mine: Tensor) -> Tensor:
        if self.exchange is None:
            return mine
        heads = len(self.orders.plan.layers[0])
        every = torch.zeros(heads, dtype=torch.int32, device=mine.device)
        every[self.orders.heads.start : self.orders.heads.stop] = mine.int()
        self.exchange.sum(every)
        return every.bool()

    def _of_all_clusters(self, mine: Tensor) -> Tensor:
        if self.exchange is None:
            return mine
        every = mine.int()
        self.exchange.sum(every)
        return every.bool()
