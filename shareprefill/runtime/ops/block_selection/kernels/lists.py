"""Triton kernels that turn bitmaps into block lists: count; lay out and write."""

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
    do_not_specialize=[
        *("n_shared", "n_q", "n_k", "n_heads", "n_query", "offset", "block_size"),
        *("first", "n_flagged", "n_flags", "max_blocks"),
    ]
)
def count_kernel(
    p_bitmap,
    p_shared,
    p_source,
    p_flags,
    p_head_to_list,
    p_counts,
    n_shared,
    n_q,
    n_k,
    n_heads,
    n_query,
    offset,
    block_size,
    first,
    n_flagged,
    n_flags,
    max_blocks,
    HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program: causal set entries of one row of one pattern; 0 where no head points at it.

    The first row of a pattern that is not to be read counts more than a pattern may have: of the
    patterns `first .. first + n_flagged - 1` those whose flags are not all set.
    """
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
        i_flagged = i_pattern - first
        if (i_q == 0) & (i_flagged >= 0) & (i_flagged < n_flagged):
            b_unset = tl.zeros([CHUNK], dtype=tl.int32)
            for i_flag in range(0, n_flags, CHUNK):
                o_f = i_flag + tl.arange(0, CHUNK)
                b_flag = tl.load(p_flags + i_flagged * n_flags + o_f, mask=o_f < n_flags, other=1)
                b_unset += (b_flag == 0).to(tl.int32)
            n_listed = tl.where(tl.sum(b_unset, 0) > 0, max_blocks + 1, n_listed)
    tl.store(p_counts + i_row, n_listed)


@triton.jit
def _count_before(
    p_counts,
    i_list,
    n_q,
    max_blocks,
    PATTERNS: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_BOUND: tl.constexpr,
):
    """Listed entries of the patterns before one, and how many of these are over the bound."""
    o_r = tl.arange(0, ROWS)
    n_listed = 0
    n_over = 0
    for i_first in range(0, i_list, PATTERNS):
        o_p = i_first + tl.arange(0, PATTERNS)
        b_counts = tl.zeros([PATTERNS, ROWS], dtype=tl.int32)  # [patterns, rows]
        for i_row in range(0, n_q, ROWS):
            m_tile = (o_p < i_list)[:, None] & (i_row + o_r < n_q)[None, :]
            p_tile = p_counts + (o_p * n_q + i_row)[:, None] + o_r[None, :]
            b_counts += tl.load(p_tile, mask=m_tile, other=0)
        b_total = tl.sum(b_counts, 1)  # [patterns]
        if HAS_BOUND:
            n_over += tl.sum((b_total > max_blocks).to(tl.int32), 0)
            b_total = tl.where(b_total > max_blocks, 0, b_total)
        n_listed += tl.sum(b_total, 0)
    return n_listed, n_over


@triton.jit
def _count_rows(p_counts, o_q, n_counted, n_all, n_query, offset, block_size):
    """Entries of rows: the first `n_counted` have counts, all causal blocks the first `n_all`."""
    b_count = tl.load(p_counts + o_q, mask=o_q < n_counted, other=0)
    return tl.where(o_q < n_all, _seen_blocks(o_q, n_query, offset, block_size), b_count)


@triton.jit(
    do_not_specialize=[
        *("n_patterns", "n_shared", "n_q", "n_k", "n_heads", "n_query", "offset", "block_size"),
        *("max_blocks", "strip", "n_strips"),
    ]
)
def list_kernel(
    p_bitmap,
    p_shared,
    p_source,
    p_counts,
    p_head_to_list,
    p_offsets,
    p_indices,
    p_listed,
    p_totals,
    n_patterns,
    n_shared,
    n_q,
    n_k,
    n_heads,
    n_query,
    offset,
    block_size,
    max_blocks,
    strip,
    n_strips,
    HEADS: tl.constexpr,
    PATTERNS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_BOUND: tl.constexpr,
):
    """One program: offsets and indices of `strip` rows of one list.

    Each adds up what lies before its own: cheaper than one more launch. The first one of a list
    also stores its heads' entries in `p_listed`, the last one its end in `p_totals`, which holds
    every pattern's first offset, and the end of the last one.

    `HAS_BOUND`: a pattern of more than `max_blocks` is empty and its heads point at list
    `n_patterns`, which holds all causal blocks if any head points there.
    """
    i_list = tl.program_id(0) // n_strips
    i_first = tl.program_id(0) % n_strips * strip
    o_h = tl.arange(0, HEADS)
    b_pattern = tl.load(p_head_to_list + o_h, mask=o_h < n_heads, other=-1).to(tl.int32)
    i_next, n_over = _count_before(p_counts, i_list, n_q, max_blocks, PATTERNS, ROWS, HAS_BOUND)

    is_dense = i_list == n_patterns
    n_counted = tl.where(is_dense, 0, n_q)
    n_all = n_q - n_counted
    p_counts += i_list * n_q
    b_own = tl.zeros([ROWS], dtype=tl.int32)
    b_before = tl.zeros([ROWS], dtype=tl.int32)
    for i_row in range(0, n_q, ROWS):
        o_q = i_row + tl.arange(0, ROWS)
        b_count = _count_rows(p_counts, o_q, n_counted, n_all, n_query, offset, block_size)
        b_own += b_count
        b_before += tl.where(o_q < i_first, b_count, 0)
    n_unlisted = 0
    if HAS_BOUND:
        n_pointing = n_over + tl.sum((b_pattern == n_patterns).to(tl.int32), 0)
        is_over = tl.where(is_dense, n_pointing == 0, tl.sum(b_own, 0) > max_blocks)
        n_unlisted = is_over.to(tl.int32)
    i_next += tl.sum(b_before, 0) * (1 - n_unlisted)

    for i_row in range(i_first, tl.minimum(i_first + strip, n_q), TILE):
        o_q = i_row + tl.arange(0, TILE)
        b_count = _count_rows(p_counts, o_q, n_counted, n_all, n_query, offset, block_size)
        b_count = tl.where(o_q < n_q, b_count * (1 - n_unlisted), 0)
        b_end = i_next + tl.cumsum(b_count, 0)
        tl.store(p_offsets + 1 + i_list * n_q + o_q, b_end, mask=o_q < n_q)
        i_next += tl.sum(b_count, 0)
        b_next = b_end - b_count  # [tile]
        b_seen = tl.where(b_count > 0, _seen_blocks(o_q, n_query, offset, block_size), 0)
        # A row is read from the bitmap, or is one of the list of all causal blocks.
        b_read = tl.where(is_dense, 0, b_seen)
        b_all = b_seen - b_read
        p_row = _find_row(
            p_bitmap, p_shared, p_source, i_list.to(tl.int64), i_row, n_shared, n_q, n_k
        )
        p_row = p_row + (o_q - i_row).to(tl.int64)[:, None] * n_k
        for i_column in range(0, tl.max(b_seen, 0), CHUNK):
            o_n = (i_column + tl.arange(0, CHUNK))[None, :]
            b_set = tl.load(p_row + o_n, mask=o_n < b_read[:, None], other=0)  # [tile, chunk]
            m_set = (b_set > 0) | (o_n < b_all[:, None])
            b_set = m_set.to(tl.int32)
            o_entry = b_next[:, None] + tl.cumsum(b_set, 1) - 1
            tl.store(p_indices + o_entry, o_n + tl.zeros_like(o_entry), mask=m_set)
            b_next += tl.sum(b_set, 1)

    if i_first + strip >= n_q:
        tl.store(p_totals + 1 + i_list, i_next)
    if i_first == 0:
        i_listed = tl.where(n_unlisted > 0, n_patterns, i_list)
        tl.store(p_listed + o_h, i_listed + tl.zeros_like(o_h), mask=b_pattern == i_list)
        if i_list == 0:
            tl.store(p_offsets, 0)
            tl.store(p_totals, 0)
            m_skipped = (b_pattern < 0) & (o_h < n_heads)
            tl.store(p_listed + o_h, tl.full([HEADS], -1, tl.int32), mask=m_skipped)
