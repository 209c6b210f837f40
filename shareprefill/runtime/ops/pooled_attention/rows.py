"""The query rows whose attention stands for their block."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shareprefill.errors import ConfigError
from shareprefill.runtime.ops.blocks import count_blocks
from shareprefill.runtime.ops.inputs import check_block_size


def sample_rows(
    n_q_tokens: int,
    block_size: int,
    r: int,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Evenly spaced rows of every query block, the last row of the block always among them.

    A block with m valid rows gives the rows at offsets `floor((t + 1) * m / r) - 1`, t = 0..r-1,
    clipped at 0; a last block shorter than r repeats rows.

    >>> sample_rows(10, 4, 2).tolist()
    [[1, 3], [5, 7], [8, 9]]

    Args:
        n_q_tokens: query rows Nq.
        block_size: tokens in a block.
        r: rows in a group, 1 to `block_size`.
        device: device of the result.

    Returns:
        int64 `[n_q, r]`, indices of query rows.

    Raises:
        ConfigError: a number is out of range.
    """
    check_block_size(block_size)
    if n_q_tokens < 1 or not 1 <= r <= block_size:
        raise ConfigError(
            f"need at least one row and 1 <= r <= block_size ({block_size}), "
            f"got {n_q_tokens} rows, r = {r}"
        )
    starts = torch.arange(count_blocks(n_q_tokens, block_size), device=device) * block_size
    valid = (n_q_tokens - starts).clamp_(max=block_size)
    steps = torch.arange(1, r + 1, device=device)
    offsets = (steps[None, :] * valid[:, None]).div_(r, rounding_mode="floor").sub_(1)
    return starts[:, None] + offsets.clamp_(min=0)


def row_table(rows: Sequence[torch.Tensor], n_heads: Sequence[int], height: int) -> torch.Tensor:
    """The tiles in which kernels take rows of groups of heads, one after the other.

    An entry is the head's place among all of them times 2^32, and the query row; -1: none. The rows
    of a map row stand together, in as many places as the next power of two, and those of a tile
    are of one head.

    >>> row_table([torch.tensor([[3], [7]])], [2], 4).tolist()[0]
    [3, 7, -1, -1]

    Args:
        rows: for each group int64 `[m, r]` query rows, r at most `height`.
        n_heads: heads of each group.
        height: rows of a tile, a power of two.

    Returns:
        int64 `[tiles, height]`.
    """
    tiles, first = [], 0
    for group, count in zip(rows, n_heads, strict=True):
        members, r = group.shape
        width = row_width(r)
        n_tiles = count_blocks(members * width, height)
        entries = group.new_full((n_tiles * height // width, width), -1)
        entries[:members, :r] = group
        heads = torch.arange(first, first + count, device=group.device)[:, None, None]
        entries = entries.view(1, n_tiles, height)
        every = torch.where(entries < 0, entries, entries + (heads << 32))
        tiles.append(every.reshape(-1, height))
        first += count
    return torch.cat(tiles)


def row_width(r: int) -> int:
    """Places of a tile that the rows of a map row take."""
    return 1 << (r - 1).bit_length()
