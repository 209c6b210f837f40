"""Launches of the Triton kernels of selection; nothing waits for the device."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton

from shareprefill.runtime.ops.block_selection.kernels.cover import (
    cover_profiles_kernel,
    select_kernel,
    vertical_slash_kernel,
)
from shareprefill.runtime.ops.block_selection.kernels.head_threshold import head_kernel
from shareprefill.runtime.ops.block_selection.kernels.head_threshold_large import (
    mark_kernel,
    narrow_kernel,
    total_kernel,
)
from shareprefill.runtime.ops.block_selection.kernels.lists import (
    count_kernel,
    offsets_kernel,
    write_kernel,
)
from shareprefill.runtime.ops.block_selection.kernels.measures import covered_kernel, js_kernel
from shareprefill.runtime.ops.block_selection.kernels.smoothing import lines_kernel, smooth_kernel
from shareprefill.runtime.ops.block_selection.reference import ROUNDING, SHIFT, SPAN
from shareprefill.runtime.ops.block_selection.weights import LineWeights
from shareprefill.runtime.ops.blocks import BlockLists, count_causal_blocks
from shareprefill.runtime.ops.devices import device_of

# Entries of a row that a program holds at a time. Fixed, so that no length compiles a kernel anew.
CHUNK = 256
LIST_CHUNK = 512
# Rows and columns of a tile of the measures, and entries of a program: with the maps of up to 32K
# tokens it takes all rows of one, and nothing is left to add up.
MEASURE_ROWS, MEASURE_CHUNK = 32, 128
MEASURE_ENTRIES = 2**16
# A tile of the search for a map's threshold, and tiles whose loads go out together: 8192 entries,
# without which one program alone does not use its share of the L2 cache's bandwidth. Larger tiles
# of as many warps spill registers.
HEAD_ROWS, HEAD_CHUNK, HEAD_UNROLL = 64, 64, 2
# Maps of so many entries, those of 64K tokens, are searched by a program for every strip of rows,
# in more launches. A launch sums at or above so many thresholds; so many strips are added up at a
# time.
LARGE_MAP = 2**18
STRIP_ROWS, STRIP_CHUNK = 16, 256
CANDIDATES, STRIPS = 8, 128
# Tiles of the sums over lines and of the smoothed maps.
LINE_ROWS, LINES = 32, 64
SMOOTH_ROWS, SMOOTH_CHUNK = 8, 128
# Counts that a program of the offsets reads at a time.
OFFSET_PATTERNS, OFFSET_ROWS = 16, 256

LINE_OPTIONS: dict[str, Any] = {"CHUNK": CHUNK, "num_warps": 1}
COVER_OPTIONS: dict[str, Any] = LINE_OPTIONS | {"ROUNDING": ROUNDING}
MEASURE_OPTIONS: dict[str, Any] = {"ROWS": MEASURE_ROWS, "CHUNK": MEASURE_CHUNK, "num_warps": 8}
HEAD_OPTIONS: dict[str, Any] = {
    "ROUNDING": ROUNDING,
    "SHIFT": SHIFT,
    "SPAN": SPAN,
    "ROWS": HEAD_ROWS,
    "CHUNK": HEAD_CHUNK,
    "UNROLL": HEAD_UNROLL,
    "num_warps": 16,
}
STRIP_OPTIONS: dict[str, Any] = HEAD_OPTIONS | {
    "ROWS": STRIP_ROWS,
    "CHUNK": STRIP_CHUNK,
    "CANDIDATES": CANDIDATES,
    "STRIPS": STRIPS,
}
SUM_OPTIONS: dict[str, Any] = {"ROWS": LINE_ROWS, "LINES": LINES, "num_warps": 4}
SMOOTH_OPTIONS: dict[str, Any] = {"ROWS": SMOOTH_ROWS, "CHUNK": SMOOTH_CHUNK, "num_warps": 4}
LIST_OPTIONS: dict[str, Any] = {"CHUNK": LIST_CHUNK, "num_warps": 1}
OFFSET_OPTIONS: dict[str, Any] = {"PATTERNS": OFFSET_PATTERNS, "ROWS": OFFSET_ROWS, "num_warps": 4}


def _count_steps(width: int) -> int:
    """Launches until `CANDIDATES` thresholds a launch leave one of `width + 1`."""
    return 0 if width <= 0 else 1 + _count_steps(triton.cdiv(width, CANDIDATES) - 1)


N_STEPS = _count_steps(SPAN)


def select_blocks(
    maps: torch.Tensor,
    gamma: torch.Tensor,
    n_query: int,
    n_key: int,
    block_size: int,
    sink_blocks: int,
    local_blocks: int,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """One launch; arguments as in the operator of this name."""
    maps, gamma = maps.contiguous(), gamma.contiguous()
    n_maps, n_q, n_k = maps.shape
    chosen = _pattern((n_maps, n_q, n_k), maps, out)
    if n_maps:
        with device_of(maps):
            select_kernel[(n_maps * n_q,)](
                maps,
                gamma,
                chosen.view(torch.uint8),
                n_q,
                n_k,
                n_query,
                n_key - n_query,
                block_size,
                sink_blocks,
                local_blocks,
                **COVER_OPTIONS,
            )
    return chosen


def head_blocks(
    maps: torch.Tensor,
    gamma: torch.Tensor,
    index: torch.Tensor | None,
    n_query: int,
    n_key: int,
    block_size: int,
    sink_blocks: int,
    local_blocks: int,
    out: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One launch, or for large maps nine; arguments as in the operator of this name."""
    maps, gamma = maps.contiguous(), gamma.contiguous()
    n_patterns, (n_q, n_k) = len(gamma), maps.shape[1:]
    chosen = _pattern((n_patterns, n_q, n_k), maps, out)
    is_finite = torch.empty(n_patterns, dtype=torch.bool, device=maps.device)
    has_index: dict[str, Any] = {"HAS_INDEX": index is not None}
    inputs = (maps, gamma, gamma if index is None else index.contiguous())
    results = (chosen.view(torch.uint8), is_finite.view(torch.uint8))
    reach, always = _reach(n_query, n_key, block_size), (sink_blocks, local_blocks)
    if n_patterns:
        with device_of(maps):
            if n_q * n_k >= LARGE_MAP:
                _search_in_strips(inputs, results, reach, always, STRIP_OPTIONS | has_index)
            else:
                if maps.is_cuda:  # the interpreter compiles nothing
                    _compile_strips(maps.device, index is not None)
                head_kernel[(n_patterns,)](
                    *(*inputs, *results, n_q, n_k, *reach, *always),
                    **(HEAD_OPTIONS | has_index),
                )
    return chosen, is_finite


@lru_cache(maxsize=64)
def _compile_strips(device: torch.device, has_index: bool) -> None:
    """Searches a map of one entry: the first long prompt then finds its kernels compiled."""
    maps, gamma = (
        torch.ones((1, 1, 1), device=device, dtype=torch.float32),
        torch.ones(1, device=device, dtype=torch.float32),
    )
    index = torch.zeros(1, dtype=torch.int64, device=device) if has_index else gamma
    results = (
        torch.empty_like(maps, dtype=torch.uint8),
        torch.empty(1, dtype=torch.uint8, device=device),
    )
    options = STRIP_OPTIONS | {"HAS_INDEX": has_index}
    _search_in_strips((maps, gamma, index), results, (0, 0), (0, 0), options)


def _search_in_strips(
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    results: tuple[torch.Tensor, torch.Tensor],
    reach: tuple[int, int],
    always: tuple[int, int],
    options: dict[str, Any],
) -> None:
    """What `head_kernel` does, by a program for every strip of rows, in a launch for every step."""
    maps, gamma, index = inputs
    n_patterns, (n_q, n_k) = len(gamma), maps.shape[1:]
    n_strips = triton.cdiv(n_q, STRIP_ROWS)
    sizes, grid = (n_q, n_k, reach[1], n_strips), (n_strips, n_patterns)
    totals = maps.new_empty((n_patterns, n_strips))
    peaks = torch.empty_like(totals, dtype=torch.int32)
    # A step reads what the one before it has written.
    sums = maps.new_empty((2, n_patterns, CANDIDATES, n_strips))
    # Both begin at 16 bytes: Triton compiles kernels anew for other addresses.
    intervals = [
        torch.empty((n_patterns, 2), dtype=torch.int32, device=maps.device) for _ in range(2)
    ]
    total_kernel[grid](maps, index, totals, peaks, *sizes, **_taken(total_kernel, options))
    new = 0
    for step in range(N_STEPS):
        old, new = new, 1 - new
        is_first: dict[str, Any] = {"IS_FIRST": step == 0}
        narrow_kernel[grid](
            *inputs,
            totals,
            peaks,
            intervals[old],
            intervals[new],
            sums[old],
            sums[new],
            *sizes,
            **(options | is_first),
        )
    mark_kernel[grid](
        *inputs,
        totals,
        peaks,
        intervals[new],
        sums[new],
        *results,
        n_q,
        n_k,
        *reach,
        n_strips,
        *always,
        **_taken(mark_kernel, options),
    )


def _taken(kernel: triton.JITFunction, options: dict[str, Any]) -> dict[str, Any]:
    """The options that a kernel takes."""
    known = {*kernel.arg_names, "num_warps"}
    return {name: value for name, value in options.items() if name in known}


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
) -> torch.Tensor:
    """Two launches; arguments as in the operator of this name."""
    vertical, slash, gamma = vertical.contiguous(), slash.contiguous(), gamma.contiguous()
    n_heads, n_k = vertical.shape
    n_q = triton.cdiv(n_query, block_size)
    columns = torch.empty((n_heads, n_k), dtype=torch.uint8, device=vertical.device)
    distances = torch.empty((n_heads, n_k + 1), dtype=torch.uint8, device=vertical.device)
    chosen = _pattern((n_heads, n_q, n_k), vertical, out)
    if n_heads:
        with device_of(vertical):
            cover_profiles_kernel[(2 * n_heads,)](
                vertical,
                slash,
                gamma,
                columns,
                distances,
                n_k,
                **COVER_OPTIONS,
            )
            vertical_slash_kernel[(n_heads * n_q,)](
                columns,
                distances,
                chosen.view(torch.uint8),
                n_q,
                n_k,
                n_query,
                n_key - n_query,
                block_size,
                sink_blocks,
                local_blocks,
                **LINE_OPTIONS,
            )
    return chosen


def js_distances(maps: torch.Tensor, pivots: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """One launch, or two for long maps; arguments as in the operator of this name."""
    return _measure(js_kernel, maps, pivots.contiguous(), index)


def covered_mass(maps: torch.Tensor, patterns: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """One launch, or three for long maps; arguments as in the operator of this name."""
    found = _measure(covered_kernel, maps, patterns.contiguous().view(torch.uint8), index)
    return found if _parts(*maps.shape[1:])[0] == 1 else found.clamp_(max=1)


def list_blocks(
    bitmap: torch.Tensor,
    head_to_list: torch.Tensor,
    n_query: int,
    n_key: int,
    block_size: int,
    max_blocks: int | None,
) -> BlockLists:
    """Three launches; `max_blocks` is what `max_density` of the operator stands for."""
    bitmap, head_to_list = bitmap.contiguous().view(torch.uint8), head_to_list.contiguous()
    n_patterns, n_q, n_k = bitmap.shape
    n_heads, offset = len(head_to_list), n_key - n_query
    most = count_causal_blocks(n_query, offset, block_size)
    n_used = min(n_patterns, n_heads)
    capacity = n_used * most if max_blocks is None else n_used * max_blocks + most
    n_lists = n_patterns + (max_blocks is not None)
    numbers = {"dtype": torch.int32, "device": bitmap.device}
    offsets = torch.empty(n_lists * n_q + 1, **numbers)
    indices = torch.empty(max(1, capacity), **numbers)
    listed = torch.empty(n_heads, **numbers)
    if not n_lists or not n_heads:
        return BlockLists(offsets.zero_(), indices, listed.fill_(-1), n_q, n_k, block_size)
    counts = torch.empty(max(1, n_patterns * n_q), **numbers)
    heads: dict[str, Any] = {"HEADS": triton.next_power_of_2(n_heads)}
    bound: dict[str, Any] = {"HAS_BOUND": max_blocks is not None}
    geometry = (n_query, offset, block_size)
    with device_of(bitmap):
        if n_patterns:
            count_kernel[(n_patterns * n_q,)](
                bitmap,
                head_to_list,
                counts,
                n_q,
                n_k,
                n_heads,
                *geometry,
                **(LIST_OPTIONS | heads),
            )
        offsets_kernel[(n_lists,)](
            counts,
            head_to_list,
            offsets,
            listed,
            n_patterns,
            n_q,
            n_heads,
            *geometry,
            0 if max_blocks is None else max_blocks,
            **(OFFSET_OPTIONS | heads | bound),
        )
        write_kernel[(n_lists * n_q,)](
            bitmap,
            offsets,
            indices,
            n_patterns,
            n_q,
            n_k,
            *geometry,
            **LIST_OPTIONS,
        )
    return BlockLists(offsets, indices, listed, n_q, n_k, block_size)


def smooth_maps(
    maps: torch.Tensor, weights: LineWeights, n_query: int, n_key: int, block_size: int
) -> torch.Tensor:
    """Two launches; arguments as in the operator of this name."""
    maps = maps.contiguous()
    n_maps, n_q, n_k = maps.shape
    smoothed = torch.empty_like(maps)
    if not n_maps:
        return smoothed
    _, reach = _reach(n_query, n_key, block_size)
    # Block diagonals with a causal entry: from the last row's first block to the first row's last.
    n_diagonals = n_q + min(reach, n_k - 1)
    has_lines = weights.column > 0 or weights.diagonal > 0
    # Without sums over lines the second kernel does not touch it.
    means = maps.new_empty((n_maps, n_diagonals + n_k)) if has_lines else maps
    sizes = (n_q, n_k, reach, n_diagonals)
    with device_of(maps):
        if has_lines:
            n_columns = n_k if weights.column > 0 else 0
            n_strips = triton.cdiv(n_diagonals, LINES) + triton.cdiv(n_columns, LINES)
            lines_kernel[(n_strips, n_maps)](maps, means, *sizes, **SUM_OPTIONS)
        n_tiles = triton.cdiv(n_q, SMOOTH_ROWS) * triton.cdiv(n_k, SMOOTH_CHUNK)
        smooth_kernel[(n_tiles, n_maps)](
            maps,
            means,
            smoothed,
            *sizes,
            # Whole numbers would be types of their own, and compile the kernel anew.
            float(weights.itself),
            float(weights.vertical1),
            float(weights.diagonal1),
            float(weights.vertical2),
            float(weights.diagonal2),
            float(weights.column),
            float(weights.diagonal),
            **SMOOTH_OPTIONS,
        )
    return smoothed


def _pattern(
    shape: tuple[int, int, int], like: torch.Tensor, out: torch.Tensor | None
) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bool, device=like.device) if out is None else out


def _reach(n_query: int, n_key: int, block_size: int) -> tuple[int, int]:
    """Key blocks of the first and of the last row of a whole first query block."""
    offset = n_key - n_query
    return offset // block_size, (offset + block_size - 1) // block_size


def _parts(n_q: int, n_k: int) -> tuple[int, int]:
    """Programs of a measured map, and rows of each."""
    n_rows = max(1, MEASURE_ENTRIES // n_k)
    return triton.cdiv(n_q, n_rows), n_rows


def _measure(
    kernel: triton.JITFunction, maps: torch.Tensor, partners: torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    """What `kernel` finds for each map, put together where several programs share one."""
    maps, index = maps.contiguous(), index.contiguous()
    n_maps, n_q, n_k = maps.shape
    n_parts, n_rows = _parts(n_q, n_k)
    parts = maps.new_empty((n_maps, n_parts))
    if n_maps:
        with device_of(maps):
            kernel[(n_parts, n_maps)](
                maps,
                partners,
                index,
                parts,
                n_q,
                n_k,
                n_rows,
                **MEASURE_OPTIONS,
            )
    return parts.view(-1) if n_parts == 1 else parts.sum(1)
