"""The query rows whose attention stands for their block."""

from __future__ import annotations

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
