"""Choice of blocks in torch, written to be believed; also what a CPU runs."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from shareprefill.runtime.ops.block_selection.weights import LineWeights
from shareprefill.runtime.ops.blocks import (
    BlockLists,
    always_blocks,
    block_diagonals,
    causal_blocks,
)

# A sum of float32 values that should reach gamma exactly may miss it by rounding.
ROUNDING = 1e-6
# A threshold of a whole map has 14 of float32's 23 bits after the point, and lies at most 40
# octaves below the map's largest mass: SPAN steps.
SHIFT = 23 - 14
SPAN = 40 << 14


def select_blocks(
    maps: torch.Tensor,
    gamma: torch.Tensor,
    n_query: int,
    n_key: int,
    block_size: int,
    sink_blocks: int,
    local_blocks: int,
    out: torch.Tensor | None,
    finite: torch.Tensor | None,
) -> torch.Tensor:
    """Arguments as in the operator of this name."""
    causal = causal_blocks(n_query, n_key - n_query, block_size, device=maps.device)
    maps = maps.masked_fill(~causal, 0.0)
    is_finite = maps.sum(-1).isfinite()
    if finite is not None:
        finite.copy_(is_finite)
    chosen = _smallest_cover(maps, gamma[:, None]).logical_or_(~is_finite[:, :, None])
    return _written(chosen, n_query, n_key, block_size, sink_blocks, local_blocks, out)


def head_blocks(
    maps: torch.Tensor,
    gamma: torch.Tensor,
    index: torch.Tensor | None,
    weights: LineWeights | None,
    n_query: int,
    n_key: int,
    block_size: int,
    sink_blocks: int,
    local_blocks: int,
    out: torch.Tensor | None,
    finite: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments as in the operator of this name."""
    causal = causal_blocks(n_query, n_key - n_query, block_size, device=maps.device)
    if weights is not None:
        maps = smooth_along_lines(maps, weights, causal)
    maps = maps.masked_fill(~causal, 0.0)
    if index is not None:
        # One map of zeros stands for none.
        maps = torch.cat([maps, torch.zeros_like(causal, dtype=maps.dtype)[None]])[index]
    is_finite = maps.sum((1, 2)).isfinite()
    chosen = blocks_above_threshold(maps, gamma).logical_or_(~is_finite[:, None, None])
    pattern = _written(chosen, n_query, n_key, block_size, sink_blocks, local_blocks, out)
    return pattern, is_finite if finite is None else finite.copy_(is_finite)


def blocks_above_threshold(maps: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """The blocks of each map at or above the threshold that `head_blocks` defines.

    Args:
        maps: float32 `[S, n_q, n_k]`, zero where nothing may be read.
        gamma: float32 `[S]`, share of the map's mass.

    Returns:
        bool `[S, n_q, n_k]`; of a map that holds NaN or Inf anything.
    """
    # The bits of positive numbers are ordered as the numbers are.
    bits = maps.view(torch.int32)
    steps = bits >> SHIFT
    wanted = gamma * maps.sum((1, 2)) * (1.0 - ROUNDING)
    high = steps.amax((1, 2)).clamp(min=0)
    low = (high - SPAN).clamp(min=0)
    for _ in range(SPAN.bit_length()):
        middle = (low + high + 1) // 2
        kept = torch.where(steps >= middle[:, None, None], maps, 0.0).sum((1, 2))
        enough = kept >= wanted
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle - 1)
    least = torch.where(gamma >= 1.0, 1, (low << SHIFT).clamp(min=1))
    return bits >= least[:, None, None]


def vertical_slash_blocks(
    vertical: torch.Tensor,
    slash: torch.Tensor,
    gamma: torch.Tensor,
    n_query: int,
    n_key: int,
    block_size: int,
    sink_blocks: int,
    local_blocks: int,
    out: torch.Tensor | None,
    finite: torch.Tensor | None,
) -> torch.Tensor:
    """Arguments as in the operator of this name."""
    is_finite = vertical.sum(-1).isfinite()
    if finite is not None:
        finite.copy_(is_finite)
    diagonals = block_diagonals(n_query, n_key - n_query, block_size, device=vertical.device)
    columns = torch.arange(vertical.shape[1], device=vertical.device)
    distances = _smallest_cover(slash, gamma)
    chosen = _smallest_cover(vertical, gamma)[:, None, :].repeat(1, len(diagonals[0]), 1)
    for diagonal in diagonals:
        distance = diagonal[:, None] - columns[None, :]
        chosen |= distances[:, distance.clamp(min=0)] & (distance >= 0)
    chosen.logical_or_(~is_finite[:, None, None])
    return _written(chosen, n_query, n_key, block_size, sink_blocks, local_blocks, out)


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


def check_heads(
    maps: torch.Tensor,
    patterns: torch.Tensor,
    pattern_of_head: torch.Tensor,
    rows: torch.Tensor,
    least: torch.Tensor,
    is_finite: torch.Tensor,
    check_of: torch.Tensor,
    on_pass: torch.Tensor,
    on_fail: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Arguments as in the operator of this name."""
    mass = covered_mass(maps, patterns[:, rows], pattern_of_head)
    found = is_finite[pattern_of_head]
    passed = (mass >= least) & found
    return torch.where(passed[check_of], on_pass, on_fail), mass, found


def sparse_heads(
    vertical: torch.Tensor,
    requested: torch.Tensor,
    n_heads: int,
    delta: float,
    first: int,
    otherwise: int,
    place: int,
) -> torch.Tensor:
    """Arguments as in the operator of this name."""
    even = torch.full_like(vertical[:1, None], 1 / vertical.shape[1])
    of_all = torch.zeros(len(vertical), dtype=torch.int64, device=vertical.device)
    is_sparse = js_distances(vertical[:, None], even, of_all) > delta
    decided = requested.clone()
    decided[place : place + len(vertical)].masked_fill_(is_sparse, -1)
    numbers = torch.arange(first, first + len(vertical), device=requested.device)
    is_away = ((requested[:n_heads, None] == numbers) & ~is_sparse).any(1)
    decided[:n_heads] += (otherwise - first) * is_away
    return decided


def list_blocks(
    bitmap: torch.Tensor,
    head_to_list: torch.Tensor,
    shared: torch.Tensor | None,
    source: torch.Tensor | None,
    finite: torch.Tensor | None,
    n_query: int,
    n_key: int,
    block_size: int,
    max_blocks: int | None,
    first: int,
) -> BlockLists:
    """Arguments as in the operator of this name; `max_blocks` is what `max_density` stands for."""
    if shared is not None and source is not None:
        bitmap = torch.cat([shared[source], bitmap])
    n_patterns, offset = len(bitmap), n_key - n_query
    causal = causal_blocks(n_query, offset, block_size, device=bitmap.device)
    numbers = torch.arange(n_patterns, device=bitmap.device)
    used = (numbers[:, None] == head_to_list[None, :]).any(1)
    bitmap = bitmap & causal & used[:, None, None]
    if max_blocks is not None:
        over = bitmap.sum((1, 2)) > max_blocks
        if finite is not None:
            over[first : first + len(finite)] |= ~finite.all(1)
        too_many = (over[:, None] & (numbers[:, None] == head_to_list[None, :])).any(0)
        head_to_list = torch.where(too_many, n_patterns, head_to_list)
        dense = causal & (head_to_list == n_patterns).any()
        bitmap = torch.cat([bitmap & ~over[:, None, None], dense[None]])
    return BlockLists.from_bitmap(bitmap, head_to_list, block_size)


def smooth_maps(
    maps: torch.Tensor, weights: LineWeights, n_query: int, n_key: int, block_size: int
) -> torch.Tensor:
    """Arguments as in the operator of this name."""
    causal = causal_blocks(n_query, n_key - n_query, block_size, device=maps.device)
    return smooth_along_lines(maps, weights, causal)


def smooth_along_lines(
    maps: torch.Tensor, weights: LineWeights, causal: torch.Tensor
) -> torch.Tensor:
    """What `smooth_maps` computes, of any causal blocks.

    Args:
        maps: float32 `[S, n_q, n_k]`.
        weights: of the lines.
        causal: bool `[n_q, n_k]`.

    Returns:
        float32 `[S, n_q, n_k]`.
    """
    maps = maps.masked_fill(~causal, 0.0)
    total = maps * weights.itself
    for weight, distance, step in (
        (weights.vertical1, 1, 0),
        (weights.diagonal1, 1, 1),
        (weights.vertical2, 2, 0),
        (weights.diagonal2, 2, 2),
    ):
        if weight > 0:
            total += weight * _means_of_two(maps, causal, distance, step)
    if weights.column > 0:
        total += weights.column * (maps.sum(1) / causal.sum(0).clamp(min=1))[:, None, :]
    if weights.diagonal > 0:
        total += weights.diagonal * _diagonal_means(maps, causal)
    return total.masked_fill_(~causal, 0.0)


def _means_of_two(
    maps: torch.Tensor, causal: torch.Tensor, distance: int, step: int
) -> torch.Tensor:
    """Mean of the causal entries `distance` rows and `step` columns before and after.

    An entry without such neighbours in the map stands for itself.
    """
    count = torch.zeros(causal.shape, device=maps.device, dtype=torch.float32)
    total = torch.zeros_like(maps)
    n_q, n_k = causal.shape
    if distance < n_q and step < n_k:
        early, late = slice(0, n_q - distance), slice(distance, n_q)
        left, right = slice(0, n_k - step), slice(step, n_k)
        total[:, late, right] += maps[:, early, left]
        count[late, right] += causal[early, left]
        total[:, early, left] += maps[:, late, right]
        count[early, left] += causal[late, right]
    return torch.where(count > 0, total / count.clamp(min=1), maps)


def _diagonal_means(maps: torch.Tensor, causal: torch.Tensor) -> torch.Tensor:
    """Mean of every block diagonal, at each of its entries."""
    n_q, n_k = causal.shape
    means = _diagonal_sums(maps) / _diagonal_sums(causal[None].float()).clamp(min=1)
    line = torch.arange(n_k, device=maps.device) - torch.arange(n_q, device=maps.device)[:, None]
    return means[:, line + (n_q - 1)]


def _diagonal_sums(maps: torch.Tensor) -> torch.Tensor:
    """Sums over diagonals `[S, n_q + n_k - 1]`, from the lowest left entry to the upper right."""
    n_maps, n_q, n_k = maps.shape
    # Each row of the padded map, read at one column less, starts one further to the right.
    padded = pad(maps.flip(1), (0, n_q)).flatten(1)
    return padded[:, : n_q * (n_q + n_k - 1)].view(n_maps, n_q, n_q + n_k - 1).sum(1)


def _written(
    chosen: torch.Tensor,
    n_query: int,
    n_key: int,
    block_size: int,
    sink_blocks: int,
    local_blocks: int,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """Chosen blocks `[S, n_q, n_k]` and those always read, as far as they are causal, in `out`."""
    offset, device = n_key - n_query, chosen.device
    always = always_blocks(
        n_query,
        offset,
        block_size,
        sink_blocks=sink_blocks,
        local_blocks=local_blocks,
        device=device,
    )
    chosen.logical_or_(always)
    chosen.logical_and_(causal_blocks(n_query, offset, block_size, device=device))
    return chosen if out is None else out.copy_(chosen)


def _smallest_cover(maps: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """The smallest set of entries of every row of `[..., n]` whose sum reaches `gamma` `[...]`."""
    values, order = maps.sort(dim=-1, descending=True, stable=True)
    before = torch.where(values > 0, values.cumsum(-1) - values, torch.inf)
    taken = before < gamma[..., None] - ROUNDING
    return torch.empty_like(taken).scatter_(-1, order, taken)
