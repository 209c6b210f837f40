"""Triton kernels that turn bitmaps into block lists: count, lay out, write."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _seen_blocks(i_q, n_query, offset, block_size):
    """Causal key blocks of query block `i_q`."""
    return (tl.minimum((i_q + 1) * block_size, n_query) - 1 + offset) // block_size + 1


@triton.jit
def _find_row(p_bitmap, p_shared, p_source, i_pattern, i_q, n_shared, n_q, n_k):
    """A row of a pattern: the first `n_shared` are patterns of another bitmap."""
    p_row = p_bitmap + ((i_pattern - n_shared) * n_q + i_q) * n_k
    if i_pattern < n_shared:
        p_row = p_shared + (tl.load(p_source + i_pattern) * n_q + i_q) * n_k
    return p_row


@triton.jit(
    do_not_specialize=["n_shared", "n_q", "n_k", "n_heads", "n_query", "offset", "block_size"]
)
def count_kernel(
    p_bitmap,
    p_shared,
    p_source,
    p_head_to_list,
    p_counts,
    n_shared,
    n_q,
    n_k,
    n_heads,
    n_query,
    offset,
    block_size,
    HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program: causal set entries of one row of one pattern; 0 where no head points at it."""
    i_row = tl.program_id(0).to(tl.int64)
    o_h = tl.arange(0, HEADS)
    b_pattern = tl.load(p_head_to_list + o_h, mask=o_h < n_heads, other=-1)
    n_listed = 0
    i_pattern, i_q = i_row // n_q, i_row % n_q
    if tl.max((b_pattern == i_pattern).to(tl.int32), 0) > 0:
        n_seen = _seen_blocks(i_q, n_query, offset, block_size)
        p_row = _find_row(p_bitmap, p_shared, p_source, i_pattern, i_q, n_shared, n_q, n_k)
        b_count = tl.zeros([CHUNK], dtype=tl.int32)
        for i_column in range(0, n_seen, CHUNK):
            o_n = i_column + tl.arange(0, CHUNK)
            b_set = tl.load(p_row + o_n, mask=o_n < n_seen, other=0)  # [chunk]
            b_count += (b_set > 0).to(tl.int32)
        n_listed = tl.sum(b_count, 0)
    tl.store(p_counts + i_row, n_listed)


@triton.jit(
    do_not_specialize=[
        "n_patterns",
        "n_q",
        "n_heads",
        "n_query",
        "offset",
        "block_size",
        "max_blocks",
    ]
)
def offsets_kernel(
    p_counts,
    p_head_to_list,
    p_offsets,
    p_listed,
    p_totals,
    n_patterns,
    n_q,
    n_heads,
    n_query,
    offset,
    block_size,
    max_blocks,
    HEADS: tl.constexpr,
    PATTERNS: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_BOUND: tl.constexpr,
):
    """One program: the offsets of one pattern's rows, and its heads' entries in `p_listed`.

    `p_totals` holds every pattern's first offset, and the end of the last one.

    `HAS_BOUND`: a pattern of more than `max_blocks` is empty and its heads point at list
    `n_patterns`, which holds all causal blocks if any head points there.
    """
    i_pattern = tl.program_id(0)
    o_h = tl.arange(0, HEADS)
    o_r = tl.arange(0, ROWS)
    b_pattern = tl.load(p_head_to_list + o_h, mask=o_h < n_heads, other=-1).to(tl.int32)

    # Each program adds up the patterns before its own: cheaper than one more launch.
    i_start = 0
    n_over = 0
    for i_first in range(0, i_pattern, PATTERNS):
        o_p = i_first + tl.arange(0, PATTERNS)
        b_counts = tl.zeros([PATTERNS, ROWS], dtype=tl.int32)  # [patterns, rows]
        for i_row in range(0, n_q, ROWS):
            m_tile = (o_p < i_pattern)[:, None] & (i_row + o_r < n_q)[None, :]
            p_tile = p_counts + (o_p * n_q + i_row)[:, None] + o_r[None, :]
            b_counts += tl.load(p_tile, mask=m_tile, other=0)
        b_total = tl.sum(b_counts, 1)  # [patterns]
        if HAS_BOUND:
            n_over += tl.sum((b_total > max_blocks).to(tl.int32), 0)
            b_total = tl.where(b_total > max_blocks, 0, b_total)
        i_start += tl.sum(b_total, 0)

    is_dense = i_pattern == n_patterns
    is_listed = True
    if HAS_BOUND:
        if is_dense:
            is_listed = n_over + tl.sum((b_pattern == n_patterns).to(tl.int32), 0) > 0
        else:
            b_own = tl.zeros([ROWS], dtype=tl.int32)
            for i_row in range(0, n_q, ROWS):
                p_own = p_counts + i_pattern * n_q + i_row + o_r
                b_own += tl.load(p_own, mask=i_row + o_r < n_q, other=0)
            is_listed = tl.sum(b_own, 0) <= max_blocks

    n_counted = tl.where(is_dense, 0, n_q)
    for i_row in range(0, n_q, ROWS):
        o_q = i_row + o_r
        m_q = o_q < n_q
        b_count = tl.load(p_counts + i_pattern * n_q + o_q, mask=o_q < n_counted, other=0)
        if HAS_BOUND:
            b_seen = _seen_blocks(o_q, n_query, offset, block_size)
            b_count = tl.where(is_dense, tl.where(m_q, b_seen, 0), b_count)
            b_count = tl.where(is_listed, b_count, 0)
        b_ends = i_start + tl.cumsum(b_count, 0)
        tl.store(p_offsets + 1 + i_pattern * n_q + o_q, b_ends, mask=m_q)
        i_start += tl.sum(b_count, 0)

    tl.store(p_totals + 1 + i_pattern, i_start)
    i_list = tl.where(is_listed, i_pattern, n_patterns)
    tl.store(p_listed + o_h, i_list + tl.zeros_like(o_h), mask=b_pattern == i_pattern)
    if i_pattern == 0:
        tl.store(p_offsets, 0)
        tl.store(p_totals, 0)
        m_skipped = (b_pattern < 0) & (o_h < n_heads)
        tl.store(p_listed + o_h, tl.full([HEADS], -1, tl.int32), mask=m_skipped)


@triton.jit(
    do_not_specialize=["n_patterns", "n_shared", "n_q", "n_k", "n_query", "offset", "block_size"]
)
def write_kernel(
    p_bitmap,
    p_shared,
    p_source,
    p_offsets,
    p_indices,
    n_patterns,
    n_shared,
    n_q,
    n_k,
    n_query,
    offset,
    block_size,
    CHUNK: tl.constexpr,
):
    """One program: the indices of one row of one list."""
    i_row = tl.program_id(0).to(tl.int64)
    i_next = tl.load(p_offsets + i_row)
    if tl.load(p_offsets + i_row + 1) > i_next:
        i_pattern, i_q = i_row // n_q, i_row % n_q
        n_seen = _seen_blocks(i_q, n_query, offset, block_size)
        p_row = _find_row(p_bitmap, p_shared, p_source, i_pattern, i_q, n_shared, n_q, n_k)
        # A row is read from the bitmap, or is one of the list of all causal blocks.
        n_read = tl.where(i_row < n_patterns * n_q, n_seen, 0)
        n_all = n_seen - n_read
        for i_column in range(0, n_seen, CHUNK):
            o_n = i_column + tl.arange(0, CHUNK)
            b_set = tl.load(p_row + o_n, mask=o_n < n_read, other=0)  # [chunk]
            b_set = ((b_set > 0) | (o_n < n_all)).to(tl.int32)
            o_entry = i_next + tl.cumsum(b_set, 0) - 1
            tl.store(p_indices + o_entry, o_n, mask=b_set > 0)
            i_next += tl.sum(b_set, 0)
