"""The blocks of one sequence, or of one chunk of it, and the tensors that follow from them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property, lru_cache, partial
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from shareprefill.runtime.ops.blocks import (
    always_blocks,
    causal_blocks,
    count_blocks,
    count_causal_blocks,
)
from shareprefill.runtime.ops.devices import stream_of_tables
from shareprefill.runtime.ops.pooled_attention import row_table, sample_rows

# Query blocks that the check before sharing looks at, of however many. A mean over them is as
# certain in a long prompt as in a short one, so the check's share of the work falls with the
# length. With blocks of 128 tokens that is a quarter of the blocks of 8K tokens.
CHECKED_BLOCKS = 16


class SampledRows(NamedTuple):
    """Rows that are sampled.

    Attributes:
        rows: Of every query block.
        is_check: Whether of those query blocks alone that the check before sharing looks at.
    """

    rows: int
    is_check: bool = False


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
        device: Where tensors are made.
        block_size: Tokens a block.
        sink_blocks: Leading key blocks that every pattern reads.
        local_blocks: Trailing causal key blocks of every query block that every pattern reads.

    Attributes:
        sizes: The sizes, as keyword arguments of an operator of selection.
        reads: The same with the blocks that are always read.
        rows: Gives `r` evenly spaced query rows of every block, int64 `[n_q, r]`.
        rows_of: Gives the rows of a `SampledRows`, int64 `[m, r]`.
        row_table: Gives the tiles in which kernels take rows of two groups of heads. Each is told
            by its number of heads and its `SampledRows`, and tiles by their rows.
        checked_rows: Gives those of the query blocks that the check before sharing looks at, int64
            `[m, r]`.
    """

    def __init__(
        self,
        n_query: int,
        n_key: int,
        device: torch.device,
        *,
        block_size: int,
        sink_blocks: int,
        local_blocks: int,
    ) -> None:
        self.n_query, self.n_key, self.device = n_query, n_key, device
        self.block_size = block_size
        self.rows = cache(partial(_kept, sample_rows, device, n_query, block_size))
        self.checked_rows = cache(partial(_kept, _checked_rows, device, n_query, block_size))
        self.rows_of = cache(partial(_kept, _rows_of, device, n_query, block_size))
        self.row_table = cache(partial(_kept, _row_table, device, n_query, block_size))
        self.sizes = Sizes(n_query=n_query, n_key=n_key, block_size=block_size)
        self.reads = Reads(**self.sizes, sink_blocks=sink_blocks, local_blocks=local_blocks)

    def to(self, device: torch.device) -> Geometry:
        """The same blocks on another device."""
        return self if device == self.device else Geometry(device=device, **self.reads)

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
            self.n_key - self.n_query,
            self.block_size,
            sink_blocks=self.reads["sink_blocks"],
            local_blocks=self.reads["local_blocks"],
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
        return torch.full((1, 1, n_k), 1 / n_k, device=self.device, dtype=torch.float32)

    @cached_property
    def checked(self) -> Tensor:
        """The query blocks that the check before sharing looks at, int64 `[m]`."""
        return _kept(checked_blocks, self.device, self.shape[0])


def _kept(make: Callable[..., Tensor], device: torch.device, *sizes: Any) -> Tensor:
    """A table that follows from sizes; that of an earlier pass, if there was one."""
    stream = stream_of_tables(device)
    if stream is None:
        return make(*sizes, device)
    return _made_once(make, device, sizes, stream, CHECKED_BLOCKS)


@lru_cache(maxsize=256)
def _made_once(
    make: Callable[..., Tensor],
    device: torch.device,
    sizes: tuple[Any, ...],
    _stream: int,
    _checked: int,
) -> Tensor:
    return make(*sizes, device)


def _checked_rows(n_query: int, block_size: int, r: int, device: torch.device) -> Tensor:
    """`r` rows of each query block that the check before sharing looks at."""
    every = sample_rows(n_query, block_size, r, device)
    return every[checked_blocks(len(every), device)]


def _rows_of(n_query: int, block_size: int, r: int, is_check: bool, device: torch.device) -> Tensor:
    """`r` rows of every query block, or of those that the check before sharing looks at."""
    return (_checked_rows if is_check else sample_rows)(n_query, block_size, r, device)


def _row_table(
    n_query: int,
    block_size: int,
    first: tuple[int, int, bool],
    second: tuple[int, int, bool],
    height: int,
    device: torch.device,
) -> Tensor:
    """The rows of two groups of heads in tiles."""

    groups = (first, second)
    rows = [_rows_of(n_query, block_size, r, is_check, device) for _, r, is_check in groups]
    return row_table(rows, [n_heads for n_heads, *_ in groups], height)


def checked_blocks(n_q: int, device: torch.device) -> Tensor:
    """Query blocks for the check before sharing: evenly spaced, the last one among them.

    >>> checked_blocks(4, torch.device("cpu")).tolist()
    [0, 1, 2, 3]
    >>> checked_blocks(64, torch.device("cpu")).tolist()[:3]
    [3, 7, 11]

    Args:
        n_q: Query blocks.
        device: Of the result.

    Returns:
        int64 `[min(n_q, CHECKED_BLOCKS)]`, ascending.
    """
    count = min(n_q, CHECKED_BLOCKS)
    return torch.arange(1, count + 1, device=device).mul_(n_q).floor_divide_(count).sub_(1)
