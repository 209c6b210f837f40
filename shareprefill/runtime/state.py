"""What the layers of one forward pass of one sequence share: its geometry and its pivots."""

from __future__ import annotations

from functools import cached_property
from typing import Protocol, TypedDict

import torch
from torch import Tensor

from shareprefill.runtime.ops.blocks import causal_blocks, count_blocks, count_causal_blocks
from shareprefill.runtime.ops.pooled_attention import sample_rows
from shareprefill.runtime.ops.selection import head_blocks
from shareprefill.runtime.orders import LayerOrders, Orders
from shareprefill.runtime.patterns import always_blocks
from shareprefill.runtime.plan import RuntimePlan


class Sizes(TypedDict):
    """Tokens, and those of a block, as the operators of selection name them."""

    n_query: int
    n_key: int
    block_size: int


class Reads(Sizes):
    """The same with the blocks that are always read."""

    sink_blocks: int
    local_blocks: int


class Geometry:
    """Blocks and rows of `n_query` queries at the end of `n_key` keys; made once, used by layers.

    Args:
        n_query: Query rows, in tokens.
        n_key: Keys, in tokens; query row i is at position n_key - n_query + i.
        plan: Block size, and the blocks that are always read.
        device: Where tensors are made.

    Attributes:
        sizes: The sizes, as keyword arguments of an operator of selection.
        reads: The same with the blocks that are always read.
    """

    def __init__(self, n_query: int, n_key: int, plan: RuntimePlan, device: torch.device) -> None:
        self.n_query, self.n_key, self.device = n_query, n_key, device
        self.block_size = plan.block_size
        self._rows: dict[int, Tensor] = {}
        self.sizes = Sizes(n_query=n_query, n_key=n_key, block_size=plan.block_size)
        self.reads = Reads(
            **self.sizes, sink_blocks=plan.sink_blocks, local_blocks=plan.local_blocks
        )

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
            sink=self.reads["sink_blocks"],
            local=self.reads["local_blocks"],
            device=self.device,
        )

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Query blocks and key blocks."""
        return count_blocks(self.n_query, self.block_size), count_blocks(
            self.n_key, self.block_size
        )

    @cached_property
    def uniform(self) -> Tensor:
        """The even distribution over the last query block's key blocks, float32 `[1, 1, n_k]`."""
        n_k = self.shape[1]
        return torch.full((1, 1, n_k), 1 / n_k, device=self.device)

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

        They hold anything where `sound` is False.
        """
        shape = (len(self.orders.pairs), *self.geometry.shape)
        return torch.empty(shape, dtype=torch.bool, device=self.geometry.device)

    @cached_property
    def sound(self) -> Tensor:
        """Whether patterns may be shared, bool `[pairs]`.

        Not one that rests on NaN or Inf, and not one whose pivot is of a later layer.
        """
        return torch.zeros(len(self.orders.pairs), dtype=torch.bool, device=self.geometry.device)

    @cached_property
    def maps(self) -> Tensor:
        """Maps of the elected pivots so far, float32 `[C, n_q, n_k]`; zeros for the others."""
        shape = (self.orders.n_clusters, *self.geometry.shape)
        return torch.zeros(shape, device=self.geometry.device)

    @cached_property
    def elected(self) -> Tensor:
        """Clusters that have a pivot, bool `[C]`."""
        shape = (self.orders.n_clusters,)
        return torch.zeros(shape, dtype=torch.bool, device=self.geometry.device)

    def keep_planned(self, orders: LayerOrders, estimate: Tensor) -> None:
        """Keeps the patterns that this process's pivots of a layer give.

        Each covers gamma of its pivot's whole mass, and has the blocks that are always read.

        Args:
            orders: Of the layer.
            estimate: Maps of the pivots `[S, n_q, n_k]`, by `orders.pivots`.
        """
        new = orders.new
        _, sound = head_blocks(
            estimate,
            orders.new_gammas,
            orders.new_pivots,
            out=self.patterns[new],
            **self.geometry.reads,
        )
        self.sound[new] = sound

    def exchange_planned(self, orders: LayerOrders) -> None:
        """Fills in the patterns that other processes' pivots of a layer give."""
        layer, new = orders.of_layer, orders.new
        if self.exchange is None or layer.start == layer.stop:
            return
        # Every pattern comes from one process, and is empty in the others.
        has_new = new.start < new.stop
        start, stop = (new.start, new.stop) if has_new else (layer.stop, layer.stop)
        for kept in (self.patterns, self.sound):
            kept[layer.start : start] = False
            kept[stop : layer.stop] = False
            self.exchange.sum(kept[layer].view(torch.uint8))

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
