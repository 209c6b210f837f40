"""What the layers of one forward pass of one sequence share: its geometry and its pivots."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from shareprefill.runtime.ops.blocks import causal_blocks
from shareprefill.runtime.ops.pooled_attention import sample_rows
from shareprefill.runtime.patterns import always_blocks, mass_before, select_mass
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
        self._heads: dict[tuple[int, ...], Tensor] = {}

    @cached_property
    def causal(self) -> Tensor:
        """Causal blocks, bool `[n_q, n_k]`."""
        offset = self.n_key - self.n_query
        return causal_blocks(self.n_query, offset, self.block_size, device=self.device)

    @cached_property
    def causal_count(self) -> int:
        """Number of causal blocks."""
        return int(self.causal.sum())

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

    def index(self, heads: Sequence[int]) -> Tensor:
        """Heads as int64 `[S]`: a copy to the device only once for each choice of heads."""
        key = tuple(heads)
        if key not in self._heads:
            self._heads[key] = torch.tensor(key, dtype=torch.int64, device=self.device)
        return self._heads[key]


class ForwardState:
    """Geometry and pivots of one sequence (or one chunk of it) in one forward pass.

    Attributes:
        geometry: Of the sequence.
        maps: Pivot's global id -> block map `[n_q, n_k]`, float32.
        of_cluster: Cluster id -> pivot's global id (policy `share` finds pivots at run time).
    """

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.maps: dict[int, Tensor] = {}
        self.of_cluster: dict[int, int] = {}
        self._before: dict[int, Tensor] = {}
        self._patterns: dict[tuple[int, float], Tensor] = {}

    def add_pivots(self, pivots: Sequence[int], maps: Tensor) -> None:
        """Keeps pivots' maps `[S, n_q, n_k]`; they are ranked once, for every gamma."""
        for pivot, pivot_map, before in zip(pivots, maps, mass_before(maps), strict=True):
            self.maps[pivot], self._before[pivot] = pivot_map, before

    def pattern(self, pivot: int, gamma: float) -> Tensor:
        """A pivot's pattern, bool `[n_q, n_k]`: one tensor for all heads that share it."""
        key = (pivot, gamma)
        if key not in self._patterns:
            self._patterns[key] = select_mass(self._before[pivot], gamma)
        return self._patterns[key]
