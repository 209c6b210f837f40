"""Choice of blocks in torch, written to be believed; also what a CPU runs."""

from __future__ import annotations

import torch

from shareprefill.runtime.ops.blocks import (
    BlockLists,
    block_diagonals,
    causal_blocks,
)

# A sum of float32 values that should reach gamma exactly may miss it by rounding.
ROUNDING = 1e-6


def select_blocks(
    maps: torch.Tensor,
    gamma: torch.Tensor,
    n_query: int,
    n_key: int,
    block_size: int,
    sink_blocks: int,
    local_blocks: int,
) -> torch.Tensor:
    """Arguments as in the operator of this name."""
    offset = n_key - n_query
    causal = causal_blocks(n_query, offset, block_size, device=maps.device)
    always = _always(n_query, offset, block_size, sink_blocks, local_blocks, maps.device)
    chosen = _smallest_cover(maps.masked_fill(~causal, 0.0), gamma[:, None])
    return chosen.logical_or_(always).logical_and_(causal)


def vertical_slash_blocks(
    vertical: torch.Tensor,
    slash: torch.Tensor,
    gamma: torch.Tensor,
    n_query: int,
    n_key: int,
    block_size: int,
    sink_blocks: int,
    local_blocks: int,
) -> torch.Tensor:
    """Arguments as in the operator of this name."""
    offset, device = n_key - n_query, vertical.device
    diagonals = block_diagonals(n_query, offset, block_size, device=device)
    columns = torch.arange(vertical.shape[1], device=device)
    distances = _smallest_cover(slash, gamma)
    chosen = _smallest_cover(vertical, gamma)[:, None, :].repeat(1, len(diagonals[0]), 1)
    for diagonal in diagonals:
        distance = diagonal[:, None] - columns[None, :]
        chosen |= distances[:, distance.clamp(min=0)] & (distance >= 0)
    chosen |= _always(n_query, offset, block_size, sink_blocks, local_blocks, device)
    return chosen & causal_blocks(n_query, offset, block_size, device=device)


def js_distances(maps: torch.Tensor, pivots: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Arguments as in the operator of this name."""
    distances = maps.new_full((len(maps),), torch.inf)
    for slot, number in enumerate(index.tolist()):
        if number >= 0:
            p, q = maps[slot], pivots[number]
            middle = (p + q) / 2
            terms = torch.xlogy(p, p) + torch.xlogy(q, q) - 2 * torch.xlogy(middle, middle)
            # Rounding may take equal distributions below zero, and NaN would fail every check.
            distances[slot] = (terms.sum(-1) / 2).clamp_(min=0).sqrt_().mean()
    return distances


def covered_mass(maps: torch.Tensor, patterns: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Arguments as in the operator of this name."""
    covered = maps.new_empty(len(maps))
    for slot, number in enumerate(index.tolist()):
        inside = maps[slot] if number < 0 else maps[slot] * patterns[number]
        covered[slot] = inside.sum(-1).mean()
    return covered.clamp_(max=1)


def list_blocks(
    bitmap: torch.Tensor,
    pattern: torch.Tensor,
    n_query: int,
    n_key: int,
    block_size: int,
    max_blocks: int | None,
) -> BlockLists:
    """Arguments as in the operator of this name; `max_blocks` is what `max_density` stands for."""
    n_patterns, offset = len(bitmap), n_key - n_query
    causal = causal_blocks(n_query, offset, block_size, device=bitmap.device)
    numbers = torch.arange(n_patterns, device=bitmap.device)
    used = (numbers[:, None] == pattern[None, :]).any(1)
    bitmap = bitmap & causal & used[:, None, None]
    if max_blocks is not None:
        over = bitmap.sum((1, 2)) > max_blocks
        too_many = (over[:, None] & (numbers[:, None] == pattern[None, :])).any(0)
        pattern = torch.where(too_many, n_patterns, pattern)
        dense = causal & (pattern == n_patterns).any()
        bitmap = torch.cat([bitmap & ~over[:, None, None], dense[None]])
    return BlockLists.from_bitmap(bitmap, pattern, block_size)


def _smallest_cover(maps: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """The smallest set of entries of every row of `[..., n]` whose sum reaches `gamma` `[...]`."""
    values, order = maps.sort(dim=-1, descending=True, stable=True)
    before = torch.where(values > 0, values.cumsum(-1) - values, torch.inf)
    taken = before < gamma[..., None] - ROUNDING
    return torch.empty_like(taken).scatter_(-1, order, taken)


def _always(
    n_query: int,
    offset: int,
    block_size: int,
    sink_blocks: int,
    local_blocks: int,
    device: torch.device,
) -> torch.Tensor:
    """The first `sink_blocks` and, for each row, the last `local_blocks` causal key blocks."""
    first, _ = block_diagonals(n_query, offset, block_size, device=device)
    columns = torch.arange(-(-(n_query + offset) // block_size), device=device)
    near = columns[None, :] > (first - local_blocks)[:, None]
    return (near & (local_blocks > 0)) | (columns < sink_blocks)[None, :]
