"""Tensor parallelism: which heads a process holds, and what processes tell each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shareprefill.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class HeadShard:
    """A process's part of every attention layer: a run of query heads, and their KV heads.

    Attributes:
        rank: Its place in the tensor-parallel group.
        size: Processes of the group.
        group: The group, over which pivots' patterns go.
    """

    rank: int
    size: int
    group: ProcessGroup

    def heads(self, n_heads: int) -> range:
        """The query heads of a layer that this process holds.

        Args:
            n_heads: Query heads of the layer, over all processes.
        """
        mine = n_heads // self.size
        return range(self.rank * mine, (self.rank + 1) * mine)

    def check(self, heads: int, kv_heads: int) -> None:
        """Refuses a model whose heads do not divide by the processes.

        Args:
            heads: Query heads of every layer, over all processes.
            kv_heads: KV heads of every layer.

        Raises:
            ConfigError: some process would have a part of a head.
        """
        if heads % self.size or kv_heads % self.size:
            raise ConfigError(
                f"{self.size} processes cannot share {heads} query heads and {kv_heads} KV heads "
                "evenly: start as many processes (torchrun --nproc-per-node) as divide both numbers"
            )

    def sum(self, tensor: Tensor) -> None:
        """Adds the tensors of all processes, in place in each."""
        torch.distributed.all_reduce(tensor, group=self.group)
