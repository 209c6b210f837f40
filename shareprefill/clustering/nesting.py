"""Patterns at many gammas at once: for each block the least gamma at which it is read.

A pattern at a higher gamma holds those at lower ones, so one sort serves all of them. Each function
here agrees with the operator of selection of its name, at every gamma.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from shareprefill.runtime.geometry import Geometry
from shareprefill.runtime.ops.block_selection.reference import ROUNDING, SHIFT, SPAN
from shareprefill.runtime.ops.blocks import block_diagonals


def nested_head_blocks(maps: Tensor, gammas: Sequence[float], geometry: Geometry) -> Tensor:
    """`head_blocks` at every gamma.

    Args:
        maps: float32 `[S, n_q, n_k]`.
        gammas: Ascending, at most 255 of them.
        geometry: Of the maps' blocks, and which of them are always read.

    Returns:
        uint8 `[S, n_q, n_k]`: the number of the least gamma at which a block is read,
        `len(gammas)` where it never is.
    """
    causal = maps[:, geometry.causal]  # [S, blocks]
    held = causal.sum(1)
    asked = torch.tensor(gammas, dtype=torch.float32, device="cpu")
    wanted = (asked * held[:, None] * (1.0 - ROUNDING)).double()  # [S, gammas]
    # NumPy sorts numbers ten times as fast as torch.
    falling = torch.from_numpy(np.sort(causal.numpy(), axis=1)).flip(1)
    kept = falling.cumsum(1, dtype=torch.float64)
    last = torch.searchsorted(kept, wanted).clamp_(max=kept.shape[1] - 1)
    steps = falling.gather(1, last).view(torch.int32) >> SHIFT
    highest = falling[:, :1].contiguous().view(torch.int32) >> SHIFT
    least = (torch.maximum(steps, highest - SPAN) << SHIFT).clamp_(min=1)
    least[:, asked >= 1.0] = 1
    rising = least.flip(1)
    met = torch.searchsorted(
        rising, maps.flatten(1).view(torch.int32), right=True, out_int32=True
    ).view(maps.shape)
    return _bounded(len(gammas) - met, held.isfinite()[:, None], len(gammas), geometry)


def nested_row_blocks(maps: Tensor, gammas: Sequence[float], geometry: Geometry) -> Tensor:
    """`select_blocks` at every gamma; arguments and result as of `nested_head_blocks`."""
    maps = maps.masked_fill(~geometry.causal, 0.0)
    since = _smallest_covers(maps, gammas)
    return _bounded(since, maps.sum(-1).isfinite(), len(gammas), geometry)


def nested_lines(
    vertical: Tensor, slash: Tensor, gammas: Sequence[float], geometry: Geometry
) -> Tensor:
    """`vertical_slash_blocks` at every gamma.

    Args:
        vertical: float32 `[S, n_k]`, mass by key block.
        slash: float32 `[S, n_k + 1]`, mass by block distance.
        gammas: As of `nested_head_blocks`.
        geometry: Likewise.

    Returns:
        As `nested_head_blocks`.
    """
    sizes = geometry.sizes
    offset = geometry.n_key - geometry.n_query
    columns = torch.arange(vertical.shape[1], device="cpu")
    since, distances = _smallest_covers(vertical, gammas)[:, None], _smallest_covers(slash, gammas)
    for diagonal in block_diagonals(sizes["n_query"], offset, sizes["block_size"], device="cpu"):
        distance = diagonal[:, None] - columns
        on_line = distances[:, distance.clamp(min=0)].masked_fill_(distance < 0, len(gammas))
        since = torch.minimum(since, on_line)
    return _bounded(since, vertical.sum(-1).isfinite()[:, None], len(gammas), geometry)


def _smallest_covers(maps: Tensor, gammas: Sequence[float]) -> Tensor:
    """For each entry of rows `[..., n]` the least gamma whose smallest cover has it: int32."""
    values, order = maps.sort(dim=-1, descending=True, stable=True)
    before = torch.where(values > 0, values.cumsum(-1) - values, torch.inf)
    reached = torch.tensor(gammas, dtype=torch.float32, device="cpu") - ROUNDING
    since = torch.searchsorted(reached, before, right=True, out_int32=True)
    return torch.empty_like(since).scatter_(-1, order, since)


def _bounded(since: Tensor, is_finite: Tensor, never: int, geometry: Geometry) -> Tensor:
    """With blocks that are always read, those of maps that are not finite, and no others."""
    since = since.masked_fill(~is_finite[..., None], 0)
    since.masked_fill_(geometry.always, 0)
    return since.masked_fill_(~geometry.causal, never).to(torch.uint8)
