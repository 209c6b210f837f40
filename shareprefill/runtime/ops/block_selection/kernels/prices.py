"""Triton kernel that chooses the blocks of every query block that are worth a price.

A block is worth its mass times the mass of the blocks that are no larger. Both fall with the mass,
so each query block has a least mass that is worth the price, which is found by a search over its
bits: each pass over the row sums the mass up to three candidates. Nothing is sorted, and no row
waits for another: any number of programs may share a map.
"""

from __future__ import annotations

import triton
import triton.language as tl

from shareprefill.runtime.ops.block_selection.kernels.head_threshold import load_masses, sum_rows
from shareprefill.runtime.ops.block_selection.kernels.smoothing import last_blocks


@triton.jit
def _always_read(o_m, o_n, first, n_sink, n_local):
    """Whether blocks of a tile are read whatever they are worth; also some that are not causal."""
    b_first = (o_m + first)[:, None]
    return (o_n[None, :] < n_sink) | ((o_n[None, :] > b_first - n_local) & (n_local > 0))


@triton.jit
def _is_worth(b_step, b_mass, b_total, price, SHIFT: tl.constexpr):
    """Whether a block of so many steps of mass is worth the price, where others have `b_mass`."""
    b_least = (b_step << SHIFT).to(tl.float32, bitcast=True)
    return (b_least / b_total) * (b_mass / b_total) > price


@triton.jit
def _mark_worthy(
    p_map,
    p_out,
    price,
    is_finite,
    i_row,
    n_read,
    n_q,
    n_k,
    first,
    reach,
    n_sink,
    n_local,
    SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """`ROWS` rows of a pattern from `i_row` on, all columns; of the map `n_read` rows are read."""
    o_m = i_row + tl.arange(0, ROWS)
    b_last = last_blocks(o_m, n_k, reach)[:, None]
    n_seen = last_blocks(tl.minimum(i_row + ROWS, n_q) - 1, n_k, reach) + 1
    p_rows = p_map + i_row * n_k
    b_sum = tl.zeros([ROWS, CHUNK], dtype=tl.float32)  # [rows, chunk]
    b_most = tl.zeros([ROWS, CHUNK], dtype=tl.int32)
    for i_column in range(0, n_seen, CHUNK):
        o_n = i_column + tl.arange(0, CHUNK)
        b_mass = load_masses(p_rows, i_row, i_column, n_read, n_k, reach, ROWS, CHUNK)
        m_always = _always_read(o_m, o_n, first, n_sink, n_local)
        b_sum += b_mass
        b_most = tl.maximum(b_most, tl.where(m_always, 0, b_mass.to(tl.int32, bitcast=True)))
    b_total = tl.sum(b_sum, 1)  # [rows]
    b_total = tl.where(b_total > 0.0, b_total, 1.0)
    # The least step that is worth the price; one above the largest where none is. A block of less
    # than the price's share of the mass is not worth it.
    b_high = (tl.max(b_most, 1) >> SHIFT) + 1
    b_low = (price * b_total).to(tl.int32, bitcast=True) >> SHIFT
    b_low = tl.minimum(tl.maximum(b_low, 1), b_high)
    if is_finite == 0:
        b_low = b_high
    while tl.max(b_high - b_low, 0) > 0:
        b_width = b_high - b_low
        b_one = b_low + b_width // 4
        b_two = b_low + b_width // 2
        b_three = b_high - 1 - tl.maximum(b_width - 1, 0) // 4
        b_upto_one = tl.zeros([ROWS, CHUNK], dtype=tl.float32)  # [rows, chunk]
        b_upto_two = tl.zeros([ROWS, CHUNK], dtype=tl.float32)
        b_upto_three = tl.zeros([ROWS, CHUNK], dtype=tl.float32)
        for i_column in range(0, n_seen, CHUNK):
            o_n = i_column + tl.arange(0, CHUNK)
            b_mass = load_masses(p_rows, i_row, i_column, n_read, n_k, reach, ROWS, CHUNK)
            b_mass = tl.where(_always_read(o_m, o_n, first, n_sink, n_local), 0.0, b_mass)
            b_step = b_mass.to(tl.int32, bitcast=True) >> SHIFT
            b_upto_one += tl.where(b_step <= b_one[:, None], b_mass, 0.0)
            b_upto_two += tl.where(b_step <= b_two[:, None], b_mass, 0.0)
            b_upto_three += tl.where(b_step <= b_three[:, None], b_mass, 0.0)
        is_one = _is_worth(b_one, tl.sum(b_upto_one, 1), b_total, price, SHIFT)
        is_two = _is_worth(b_two, tl.sum(b_upto_two, 1), b_total, price, SHIFT)
        is_three = _is_worth(b_three, tl.sum(b_upto_three, 1), b_total, price, SHIFT)
        b_above = tl.where(is_two, b_one + 1, tl.where(is_three, b_two + 1, b_three + 1))
        b_below = tl.where(is_two, b_two, tl.where(is_three, b_three, b_high))
        is_open = b_width > 0
        b_low = tl.where(is_open & (is_one == 0), b_above, b_low)
        b_high = tl.where(is_open, tl.where(is_one, b_one, b_below), b_high)
    for i_column in range(0, n_k, CHUNK):
        o_n = i_column + tl.arange(0, CHUNK)
        b_mass = load_masses(p_rows, i_row, i_column, n_read, n_k, reach, ROWS, CHUNK)
        m_taken = (b_mass.to(tl.int32, bitcast=True) >> SHIFT) >= b_high[:, None]
        m_taken = m_taken | _always_read(o_m, o_n, first, n_sink, n_local) | (is_finite == 0)
        m_taken = m_taken & (o_n[None, :] <= b_last)
        p_tile = p_out + (o_m * n_k)[:, None] + o_n[None, :]
        m_tile = (o_m < n_q)[:, None] & (o_n < n_k)[None, :]
        tl.store(p_tile, m_taken.to(p_out.dtype.element_ty), mask=m_tile)


@triton.jit(
    do_not_specialize=["n_q", "n_k", "first", "reach", "n_sink", "n_local", "n_rows", "n_strips"],
    do_not_specialize_on_alignment=["p_out", "p_finite"],
)
def priced_kernel(
    p_maps,
    p_price,
    p_index,
    p_totals,
    p_out,
    p_finite,
    n_q,
    n_k,
    first,
    reach,
    n_sink,
    n_local,
    n_rows,
    n_strips,
    HAS_INDEX: tl.constexpr,
    HAS_TOTALS: tl.constexpr,
    SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    UNROLL: tl.constexpr,
    STRIPS: tl.constexpr,
):
    """One program: `n_rows` rows of one pattern.

    Whether the map is of numbers is told by the sums of `n_strips` strips of it, or else found out.
    """
    i_pattern = tl.program_id(1).to(tl.int64)
    i_map = i_pattern
    if HAS_INDEX:
        i_map = tl.load(p_index + i_pattern)
    # Without a map no row is read.
    n_read = tl.where(i_map >= 0, n_q, 0).to(tl.int32)
    p_map = p_maps + i_map * n_q * n_k
    if HAS_TOTALS:
        b_sum = tl.zeros([STRIPS], dtype=tl.float32)
        for i_strip in range(0, n_strips, STRIPS):
            o_strip = i_strip + tl.arange(0, STRIPS)
            p_strip = p_totals + i_pattern * n_strips + o_strip
            b_sum += tl.load(p_strip, mask=o_strip < n_strips, other=0.0)
        total = tl.sum(b_sum)
    else:
        total, _peak = sum_rows(p_map, 0, n_read, n_k, reach, ROWS, CHUNK, UNROLL)
    is_finite = tl.abs(total) < float("inf")
    if tl.program_id(0) == 0:
        tl.store(p_finite + i_pattern, is_finite.to(tl.int8))
    i_begin = tl.program_id(0) * n_rows
    i_end = tl.minimum(i_begin + n_rows, n_q)
    price = tl.load(p_price + i_pattern)
    for i_row in range(i_begin, i_end, ROWS):
        _mark_worthy(
            p_map,
            p_out + i_pattern * n_q * n_k,
            price,
            is_finite,
            i_row,
            tl.minimum(n_read, i_end),
            i_end,
            n_k,
            first,
            reach,
            n_sink,
            n_local,
            SHIFT,
            ROWS,
            CHUNK,
        )
