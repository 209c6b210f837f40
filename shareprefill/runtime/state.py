"""What the layers of one forward pass of one sequence share: its pivots."""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from shareprefill.runtime.geometry import Geometry
from shareprefill.runtime.ops.block_selection import head_blocks
from shareprefill.runtime.orders import LayerOrders, Orders


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
        return torch.zeros(shape, device=self.geometry.device, dtype=torch.float32)

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
