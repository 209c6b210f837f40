"""Launches of the Triton kernels of selection; nothing waits for the device.

A function prepares the calls of an operator that are alike, by tensors of one of them. What it
returns takes such tensors and launches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
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
from shareprefill.runtime.ops.block_selection.kernels.heads import (
    check_kernel,
    sparse_heads_kernel,
)
from shareprefill.runtime.ops.block_selection.kernels.lists import (
    count_kernel,
    list_kernel,
)
from shareprefill.runtime.ops.block_selection.kernels.measures import covered_kernel, js_kernel
from shareprefill.runtime.ops.block_selection.kernels.smoothing import lines_kernel, smooth_kernel
from shareprefill.runtime.ops.block_selection.reference import ROUNDING, SHIFT, SPAN
from shareprefill.runtime.ops.block_selection.weights import LineWeights
from shareprefill.runtime.ops.blocks import BlockLists, count_causal_blocks
from shareprefill.runtime.ops.prepared import Launch

# Entries of a row that a program holds at a time. Fixed, so that no length compiles a kernel anew.
CHUNK = 256
LIST_CHUNK = 512
# Rows and columns of a tile of the measures, and entries of a program: with the maps of up to 32K
# tokens it takes all rows of one, and nothing is left to add up.
MEASURE_ROWS, MEASURE_CHUNK = 32, 128
MEASURE_ENTRIES = 2**16
# Rows of a tile of the check before sharing: as many as it has query blocks.
CHECK_ROWS = 16
# A tile of the search for a map's threshold, and tiles whose loads go out together: 8192 entries,
# without which one program alone does not use its share of the L2 cache's bandwidth. Larger tiles
# of as many warps spill registers.
HEAD_ROWS, HEAD_CHUNK, HEAD_UNROLL = 64, 64, 2
# Maps of so many entries, those of 64K tokens, are searched by a program for every strip of rows,
# in more launches. A launch sums at or above so many thresholds; so many strips are added up at a
# time.
LARGE_MAP = 2**18
# Maps of so many entries, those of 16K tokens, are smoothed by the program that searches them.
SMALL_MAP = 2**14
STRIP_ROWS, STRIP_CHUNK = 16, 256
CANDIDATES, STRIPS = 8, 128
# Tiles of the sums over lines and of the smoothed maps.
LINE_ROWS, LINES = 32, 64
SMOOTH_ROWS, SMOOTH_CHUNK = 8, 128
# Counts that a program of the offsets reads at a time.
OFFSET_PATTERNS, OFFSET_ROWS = 16, 256
# Rows of a tile of a program that writes lists, and tiles of it. Each program adds up what lies
# before its own: of long prompts it takes more.
LIST_TILE, LIST_COLUMNS, LIST_TILES = 16, 128, 4
SHORT_LISTS = 256

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
SPARSE_OPTIONS: dict[str, Any] = {"ENTRIES": 128, "CHUNK": 512, "num_warps": 4}
CHECK_OPTIONS: dict[str, Any] = {
    "ENTRIES": 128,
    "ROWS": CHECK_ROWS,
    "CHUNK": MEASURE_CHUNK,
    "num_warps": 8,
}
WRITE_OPTIONS: dict[str, Any] = {
    "PATTERNS": OFFSET_PATTERNS,
    "ROWS": OFFSET_ROWS,
    "TILE": LIST_TILE,
    "CHUNK": LIST_COLUMNS,
    "num_warps": 4,
}


def _count_steps(width: int) -> int:
    """Launches until `CANDIDATES` thresholds a launch leave one of `width + 1`."""
    return 0 if width <= 0 else 1 + _count_steps(triton.cdiv(width, CANDIDATES) - 1)


N_STEPS = _count_steps(SPAN)


Tensor = torch.Tensor


def select_blocks(
    maps: Tensor,
    gamma: Tensor,
    n_query: int,
    n_key: int,
    block_size: int,
    sink_blocks: int,
    local_blocks: int,
) -> Callable[..., Tensor]:
    """One launch; arguments as in the operator of this name."""
    (n_maps, n_q, n_k), device = maps.shape, maps.device
    numbers = (n_q, n_k, n_query, n_key - n_query, block_size, sink_blocks, local_blocks)
    select = Launch(select_kernel, device, (n_maps * n_q,), numbers, COVER_OPTIONS)

    def run(maps: Tensor, gamma: Tensor, out: Tensor | None, finite: Tensor | None) -> Tensor:
        chosen = _room((n_maps, n_q, n_k), torch.bool, device, out)
        finite = _room((n_maps, n_q), torch.bool, device, finite)
        if n_maps:
            select(maps.contiguous(), gamma.contiguous(), chosen, finite)
        return chosen

    return run


def head_blocks(
    maps: Tensor,
    gamma: Tensor,
    index: Tensor | None,
    weights: LineWeights | None,
    n_query: int,
    n_key: int,
    block_size: int,
    sink_blocks: int,
    local_blocks: int,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """One launch, or for large maps ten; arguments as in the operator of this name.

    With weights of whole lines it is one more.
    """
    n_patterns, (n_q, n_k), device = len(gamma), maps.shape[1:], maps.device
    sizes = (n_q, n_k, *_reach(n_query, n_key, block_size))
    always, has_index = (sink_blocks, local_blocks), index is not None
    smooth: Callable[..., Tensor] | None = None
    if weights is not None and n_q * n_k > SMALL_MAP:
        smooth, weights = smooth_maps(maps, weights, n_query, n_key, block_size), None
    if n_q * n_k >= LARGE_MAP:
        search = _search_in_strips(device, n_patterns, sizes, always, has_index)
    else:
        if device.type == "cuda":  # the interpreter compiles nothing
            _compile_further(device, has_index)
        search = _search_at_once(maps, n_patterns, sizes, always, weights, has_index)

    def run(
        maps: Tensor,
        gamma: Tensor,
        index: Tensor | None,
        out: Tensor | None,
        finite: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        chosen = _room((n_patterns, n_q, n_k), torch.bool, device, out)
        finite = _room((n_patterns,), torch.bool, device, finite)
        if n_patterns:
            maps = maps.contiguous() if smooth is None else smooth(maps)
            gamma = gamma.contiguous()
            # Without an index the kernels do not touch it.
            index = gamma if index is None else index.contiguous()
            search(maps, gamma, index, chosen, finite)
        return chosen, finite

    return run


def _search_at_once(
    maps: Tensor,
    n_patterns: int,
    sizes: tuple[int, int, int, int],
    always: tuple[int, int],
    weights: LineWeights | None,
    has_index: bool,
) -> Callable[..., None]:
    """A program for every pattern, which smooths its map where there are weights.

    One launch, or two with sums over lines.
    """
    (n_maps, n_q, n_k), device, smooths = maps.shape, maps.device, weights is not None
    weights = LineWeights(itself=1.0) if weights is None else weights
    sum_lines, n_diagonals = _sum_lines(n_maps, n_q, n_k, sizes[3], weights, device)
    numbers = (*sizes, *always, n_diagonals, *_factors(weights))
    options = HEAD_OPTIONS | {"SMOOTHS": smooths, "HAS_INDEX": has_index}
    launch = Launch(head_kernel, device, (n_patterns,), numbers, options)

    def search(maps: Tensor, gamma: Tensor, index: Tensor, chosen: Tensor, finite: Tensor) -> None:
        smoothed = maps.new_empty((n_patterns, n_q, n_k)) if smooths else maps
        launch(maps, sum_lines(maps), gamma, index, smoothed, chosen, finite)

    return search


@lru_cache(maxsize=64)
def _compile_further(device: torch.device, has_index: bool) -> None:
    """Smooths and searches a map of one entry in all ways: later ones find kernels compiled."""
    sizes, always = (1, 1, 0, 0), (0, 0)
    maps = torch.ones((1, 1, 1), dtype=torch.float32, device=device)
    gamma = torch.ones(1, dtype=torch.float32, device=device)
    # Triton compiles kernels anew for another dtype: without an index, gamma stands in for it.
    index = torch.zeros(1, dtype=torch.int64, device=device) if has_index else gamma
    chosen = torch.empty((1, 1, 1), dtype=torch.bool, device=device)
    finite = torch.empty(1, dtype=torch.bool, device=device)
    weights = LineWeights(itself=1.0, column=1.0)
    smooth_maps(maps, weights, 1, 1, 1)(maps)
    for search in (
        _search_at_once(maps, 1, sizes, always, None, has_index),
        _search_in_strips(device, 1, sizes, always, has_index),
    ):
        search(maps, gamma, index, chosen, finite)


def _search_in_strips(
    device: torch.device,
    n_patterns: int,
    sizes: tuple[int, int, int, int],
    always: tuple[int, int],
    has_index: bool,
) -> Callable[..., None]:
    """What `head_kernel` does, by a program for every strip of rows, in a launch for every step."""
    n_q, n_k, first, reach = sizes
    n_strips = triton.cdiv(n_q, STRIP_ROWS)
    grid, numbers = (n_strips, n_patterns), (n_q, n_k, reach, n_strips)
    options = STRIP_OPTIONS | {"HAS_INDEX": has_index}

    def launch(kernel: triton.JITFunction, numbers: tuple[int, ...], **further: Any) -> Launch:
        return Launch(kernel, device, grid, numbers, _taken(kernel, options | further))

    total = launch(total_kernel, numbers)
    begin, narrow = (
        launch(narrow_kernel, numbers, IS_FIRST=is_first) for is_first in (True, False)
    )
    mark = launch(mark_kernel, (n_q, n_k, first, reach, n_strips, *always))

    def search(maps: Tensor, gamma: Tensor, index: Tensor, chosen: Tensor, finite: Tensor) -> None:
        inputs = (maps, gamma, index)
        totals = maps.new_empty((n_patterns, n_strips))
        peaks = torch.empty_like(totals, dtype=torch.int32)
        # A step reads what the one before it has written.
        sums = maps.new_empty((2, n_patterns, CANDIDATES, n_strips)).unbind(0)
        # Both begin at 16 bytes: Triton compiles kernels anew for other addresses.
        intervals = [
            torch.empty((n_patterns, 2), dtype=torch.int32, device=device) for _ in range(2)
        ]
        total(maps, index, totals, peaks)
        new = 0
        for step in range(N_STEPS):
            old, new = new, 1 - new
            places = (intervals[old], intervals[new], sums[old], sums[new])
            (narrow if step else begin)(*inputs, totals, peaks, *places)
        mark(*inputs, totals, peaks, intervals[new], sums[new], chosen, finite)

    return search


def _taken(kernel: triton.JITFunction, options: dict[str, Any]) -> dict[str, Any]:
    """The options that a kernel takes."""
    known = {*kernel.arg_names, "num_warps"}
    return {name: value for name, value in options.items() if name in known}


def vertical_slash_blocks(
    vertical: Tensor,
    slash: Tensor,
    gamma: Tensor,
    n_query: int,
    n_key: int,
    block_size: int,
    sink_blocks: int,
    local_blocks: int,
) -> Callable[..., Tensor]:
    """Two launches; arguments as in the operator of this name."""
    (n_heads, n_k), device = vertical.shape, vertical.device
    n_q = triton.cdiv(n_query, block_size)
    cover = Launch(cover_profiles_kernel, device, (2 * n_heads,), (n_k,), COVER_OPTIONS)
    numbers = (n_q, n_k, n_query, n_key - n_query, block_size, sink_blocks, local_blocks)
    draw = Launch(vertical_slash_kernel, device, (n_heads * n_q,), numbers, LINE_OPTIONS)

    def run(
        vertical: Tensor, slash: Tensor, gamma: Tensor, out: Tensor | None, finite: Tensor | None
    ) -> Tensor:
        chosen = _room((n_heads, n_q, n_k), torch.bool, device, out)
        finite = _room((n_heads,), torch.bool, device, finite)
        if n_heads:
            columns = torch.empty((n_heads, n_k), dtype=torch.uint8, device=device)
            distances = torch.empty((n_heads, n_k + 1), dtype=torch.uint8, device=device)
            masses = vertical.contiguous(), slash.contiguous(), gamma.contiguous()
            cover(*masses, columns, distances, finite)
            draw(columns, distances, finite, chosen)
        return chosen

    return run


def js_distances(maps: Tensor, pivots: Tensor, index: Tensor) -> Callable[..., Tensor]:
    """One launch, or two for long maps; arguments as in the operator of this name."""
    measure, n_parts = _measure(js_kernel, maps)

    def run(maps: Tensor, pivots: Tensor, index: Tensor) -> Tensor:
        parts = measure(maps, pivots.contiguous(), index.contiguous())
        return parts.view(-1) if n_parts == 1 else parts.sum(1)

    return run


def covered_mass(maps: Tensor, patterns: Tensor, index: Tensor) -> Callable[..., Tensor]:
    """One launch, or three for long maps; arguments as in the operator of this name."""
    measure, n_parts = _measure(covered_kernel, maps)

    def run(maps: Tensor, patterns: Tensor, index: Tensor) -> Tensor:
        parts = measure(maps, patterns.contiguous(), index.contiguous())
        return parts.view(-1) if n_parts == 1 else parts.sum(1).clamp_(max=1)

    return run


def _measure(kernel: triton.JITFunction, maps: Tensor) -> tuple[Callable[..., Tensor], int]:
    """What `kernel` finds of each map in each of its programs, and how many share one."""
    n_maps, n_q, n_k = maps.shape
    n_rows = max(1, MEASURE_ENTRIES // n_k)
    n_parts = triton.cdiv(n_q, n_rows)
    launch = Launch(kernel, maps.device, (n_parts, n_maps), (n_q, n_k, n_rows), MEASURE_OPTIONS)

    def run(maps: Tensor, partners: Tensor, index: Tensor) -> Tensor:
        parts = maps.new_empty((n_maps, n_parts))
        if n_maps:
            launch(maps.contiguous(), partners, index, parts)
        return parts

    return run, n_parts


def check_heads(
    maps: Tensor,
    patterns: Tensor,
    pattern_of_head: Tensor,
    rows: Tensor,
    least: Tensor,
    is_finite: Tensor,
    check_of: Tensor,
    on_pass: Tensor,
    on_fail: Tensor,
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """One launch; arguments as in the operator of this name."""
    (n_checks, n_rows, n_k), device = maps.shape, maps.device
    n_entries = len(check_of)
    numbers = (n_rows, n_k, patterns.shape[1], n_entries)
    check = Launch(check_kernel, device, (n_checks,), numbers, CHECK_OPTIONS)

    def run(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        decided = torch.empty(n_entries, dtype=torch.int64, device=device)
        mass = torch.empty(n_checks, dtype=torch.float32, device=device)
        found = torch.empty(n_checks, dtype=torch.bool, device=device)
        if n_checks:
            check(*(tensor.contiguous() for tensor in inputs), mass, decided, found)
        return decided, mass, found

    return run


def sparse_heads(
    vertical: Tensor,
    requested: Tensor,
    n_heads: int,
    delta: float,
    first: int,
    otherwise: int,
    place: int,
) -> Callable[..., Tensor]:
    """One launch; arguments as in the operator of this name."""
    (n_slots, n_k), n_entries = vertical.shape, len(requested)
    numbers = (n_k, n_heads, n_entries, first, otherwise, place, delta)
    decide = Launch(sparse_heads_kernel, vertical.device, (n_slots,), numbers, SPARSE_OPTIONS)

    def run(vertical: Tensor, requested: Tensor) -> Tensor:
        if not n_slots:
            return requested
        decided = torch.empty_like(requested)
        decide(vertical.contiguous(), requested.contiguous(), decided)
        return decided

    return run


def list_blocks(
    bitmap: Tensor,
    head_to_list: Tensor,
    shared: Tensor | None,
    source: Tensor | None,
    finite: Tensor | None,
    n_query: int,
    n_key: int,
    block_size: int,
    max_blocks: int | None,
    first: int,
) -> Callable[..., BlockLists]:
    """Two launches; `max_blocks` is what `max_density` of the operator stands for."""
    n_own, n_q, n_k = bitmap.shape
    n_shared = 0 if source is None else len(source)
    n_patterns, n_heads, device = n_shared + n_own, len(head_to_list), bitmap.device
    most = count_causal_blocks(n_query, n_key - n_query, block_size)
    n_used, n_lists = min(n_patterns, n_heads), n_patterns + (max_blocks is not None)
    capacity = n_used * most if max_blocks is None else n_used * max_blocks + most
    numbers = {"dtype": torch.int32, "device": device}
    heads = {"HEADS": triton.next_power_of_2(max(1, n_heads))}
    bound = {"HAS_BOUND": max_blocks is not None}
    geometry = (n_query, n_key - n_query, block_size)
    flagged = (first, 0, 0, 0) if finite is None else (first, *finite.shape, max_blocks or 0)
    count = Launch(
        count_kernel,
        device,
        (n_patterns * n_q,),
        (n_shared, n_q, n_k, n_heads, *geometry, *flagged),
        LIST_OPTIONS | heads,
    )
    strip = LIST_TILE * (1 if n_q <= SHORT_LISTS else LIST_TILES)
    n_strips = triton.cdiv(n_q, strip)
    write = Launch(
        list_kernel,
        device,
        (n_lists * n_strips,),
        (n_patterns, n_shared, n_q, n_k, n_heads, *geometry, max_blocks or 0, strip, n_strips),
        WRITE_OPTIONS | heads | bound,
    )

    def run(
        bitmap: Tensor,
        head_to_list: Tensor,
        shared: Tensor | None,
        source: Tensor | None,
        finite: Tensor | None,
    ) -> BlockLists:
        offsets = torch.empty(n_lists * n_q + 1, **numbers)
        indices = torch.empty(max(1, capacity), **numbers)
        listed = torch.empty(n_heads, **numbers)
        if not n_lists or not n_heads:
            return BlockLists(offsets.zero_(), indices, listed.fill_(-1), n_q, n_k, block_size)
        counts = torch.empty(max(1, n_patterns * n_q), **numbers)
        totals = torch.empty(n_lists + 1, **numbers)
        bitmap, head_to_list = bitmap.contiguous(), head_to_list.contiguous()
        if shared is None or source is None or not n_shared:
            # The kernels do not touch them.
            shared, source = bitmap, head_to_list
        patterns = (bitmap, shared.contiguous(), source.contiguous())
        if n_patterns:
            flags = bitmap if finite is None else finite.contiguous()
            count(*patterns, flags, head_to_list, counts)
        write(*patterns, counts, head_to_list, offsets, indices, listed, totals)
        return BlockLists(offsets, indices, listed, n_q, n_k, block_size, totals)

    return run


def smooth_maps(
    maps: Tensor, weights: LineWeights, n_query: int, n_key: int, block_size: int
) -> Callable[[Tensor], Tensor]:
    """Two launches; arguments as in the operator of this name."""
    (n_maps, n_q, n_k), device = maps.shape, maps.device
    _, reach = _reach(n_query, n_key, block_size)
    sum_lines, n_diagonals = _sum_lines(n_maps, n_q, n_k, reach, weights, device)
    n_tiles = triton.cdiv(n_q, SMOOTH_ROWS) * triton.cdiv(n_k, SMOOTH_CHUNK)
    numbers = (n_q, n_k, reach, n_diagonals, *_factors(weights))
    smooth = Launch(smooth_kernel, device, (n_tiles, n_maps), numbers, SMOOTH_OPTIONS)

    def run(maps: Tensor) -> Tensor:
        maps = maps.contiguous()
        smoothed = torch.empty_like(maps)
        if n_maps:
            smooth(maps, sum_lines(maps), smoothed)
        return smoothed

    return run


def _sum_lines(
    n_maps: int, n_q: int, n_k: int, reach: int, weights: LineWeights, device: torch.device
) -> tuple[Callable[[Tensor], Tensor], int]:
    """Means over the lines of maps that weights ask for, and how many diagonals have them."""
    # Block diagonals with a causal entry: from the last row's first block to the first row's last.
    n_diagonals = n_q + min(reach, n_k - 1)
    n_columns = n_k if weights.column > 0 else 0
    n_strips = triton.cdiv(n_diagonals, LINES) + triton.cdiv(n_columns, LINES)
    sizes, has_lines = (n_q, n_k, reach, n_diagonals), weights.column > 0 or weights.diagonal > 0
    launch = Launch(lines_kernel, device, (n_strips, n_maps), sizes, SUM_OPTIONS)

    def run(maps: Tensor) -> Tensor:
        if not has_lines:
            return maps  # Kernels do not touch it then.
        means = maps.new_empty((n_maps, n_diagonals + n_k))
        launch(maps, means)
        return means

    return run, n_diagonals


def _factors(weights: LineWeights) -> tuple[float, ...]:
    """Weights as a kernel takes them: whole numbers would be types of their own to it."""
    return tuple(float(weight) for weight in astuple(weights))


def _room(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, given: Tensor | None
) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device) if given is None else given


def _reach(n_query: int, n_key: int, block_size: int) -> tuple[int, int]:
    """Key blocks of the first and of the last row of a whole first query block."""
    offset = n_key - n_query
    return offset // block_size, (offset + block_size - 1) // block_size
