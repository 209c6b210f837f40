"""Triton kernels that find the thresholds of large maps, several programs a map.

What `head_threshold.py` does in one program takes it a pass over the map for every step of its
search. Here a launch is a step: each program sums a strip of a map's rows at or above `CANDIDATES`
thresholds, and the next launch's programs add the strips up, in one order, and go on between two of
these.
"""

from __future__ import annotations

import triton
import triton.language as tl

from shareprefill.runtime.ops.block_selection.kernels.head_threshold import (
    least_bits,
    load_masses,
    mark_rows,
    sum_rows,
)
from shareprefill.runtime.ops.block_selection.kernels.smoothing import last_blocks


@triton.jit
def _candidates(i_low, i_high, i_number, CANDIDATES: tl.constexpr):
    """Thresholds `i_number` of those between two, the upper one being the last."""
    return i_low + ((i_high - i_low) * (i_number + 1) + CANDIDATES - 1) // CANDIDATES


@triton.jit
def _read_rows(p_index, i_pattern, n_q, HAS_INDEX: tl.constexpr):
    """The map of a pattern, and its rows: none without a map."""
    i_map = i_pattern
    if HAS_INDEX:
        i_map = tl.load(p_index + i_pattern)
    return i_map, tl.where(i_map >= 0, n_q, 0).to(tl.int32)


@triton.jit
def _interval(
    p_totals,
    p_peaks,
    p_before,
    p_sums,
    gamma,
    i_pattern,
    n_strips,
    IS_FIRST: tl.constexpr,
    CANDIDATES: tl.constexpr,
    STRIPS: tl.constexpr,
    ROUNDING: tl.constexpr,
    SHIFT: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Where a pattern's threshold lies after the last step, and whether its sum is a number."""
    o_strip = tl.arange(0, STRIPS)
    b_total = tl.zeros([STRIPS], dtype=tl.float32)  # [strips]
    b_peak = tl.zeros([STRIPS], dtype=tl.int32)
    for i_strip in range(0, n_strips, STRIPS):
        i_place = i_pattern * n_strips + i_strip + o_strip
        m_strip = i_strip + o_strip < n_strips
        b_total += tl.load(p_totals + i_place, mask=m_strip, other=0.0)
        b_peak = tl.maximum(b_peak, tl.load(p_peaks + i_place, mask=m_strip, other=0))
    total = tl.sum(b_total)
    is_finite = tl.abs(total) < float("inf")
    if IS_FIRST:
        i_high = tl.max(b_peak) >> SHIFT
        i_low = tl.maximum(i_high - SPAN, 0)
        if (gamma >= 1.0) | (is_finite == 0):
            i_low = 0
            i_high = 0
    else:
        i_low = tl.load(p_before + i_pattern * 2)
        i_high = tl.load(p_before + i_pattern * 2 + 1)
        if i_low < i_high:
            wanted = gamma * total * (1.0 - ROUNDING)
            o_number = tl.arange(0, CANDIDATES)
            b_sums = tl.zeros([CANDIDATES, STRIPS], dtype=tl.float32)  # [candidates, strips]
            for i_strip in range(0, n_strips, STRIPS):
                i_place = (i_pattern * CANDIDATES + o_number)[:, None] * n_strips
                i_place += (i_strip + o_strip)[None, :]
                m_strip = (i_strip + o_strip < n_strips)[None, :]
                b_sums += tl.load(p_sums + i_place, mask=m_strip, other=0.0)
            # Sums fall with the threshold.
            n_reached = tl.sum((tl.sum(b_sums, 1) >= wanted).to(tl.int32), 0)
            i_below = _candidates(i_low, i_high, n_reached - 1, CANDIDATES)
            i_above = _candidates(i_low, i_high, n_reached, CANDIDATES) - 1
            i_low = tl.where(n_reached > 0, i_below, i_low)
            i_high = tl.where(n_reached < CANDIDATES, i_above, i_high)
    return i_low, i_high, is_finite


@triton.jit(do_not_specialize=["n_q", "n_k", "reach", "n_strips"])
def total_kernel(
    p_maps,
    p_index,
    p_totals,
    p_peaks,
    n_q,
    n_k,
    reach,
    n_strips,
    HAS_INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """One program: the sum and the largest mass of one strip of the map of one pattern."""
    i_pattern = tl.program_id(1).to(tl.int64)
    i_row = tl.program_id(0) * ROWS
    i_map, n_read = _read_rows(p_index, i_pattern, n_q, HAS_INDEX)
    i_end = tl.minimum(i_row + ROWS, n_read)
    p_map = p_maps + i_map * n_q * n_k
    total, i_peak = sum_rows(p_map, i_row, i_end, n_k, reach, ROWS, CHUNK, UNROLL)
    i_place = i_pattern * n_strips + tl.program_id(0)
    tl.store(p_totals + i_place, total)
    tl.store(p_peaks + i_place, i_peak)


@triton.jit(do_not_specialize=["n_q", "n_k", "reach", "n_strips"])
def narrow_kernel(
    p_maps,
    p_gamma,
    p_index,
    p_totals,
    p_peaks,
    p_before,
    p_after,
    p_sums,
    p_sums_after,
    n_q,
    n_k,
    reach,
    n_strips,
    IS_FIRST: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    ROUNDING: tl.constexpr,
    SHIFT: tl.constexpr,
    SPAN: tl.constexpr,
    CANDIDATES: tl.constexpr,
    STRIPS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """One program: what one strip has at or above the next candidates of one pattern."""
    i_pattern = tl.program_id(1).to(tl.int64)
    i_low, i_high, _finite = _interval(
        p_totals,
        p_peaks,
        p_before,
        p_sums,
        tl.load(p_gamma + i_pattern),
        i_pattern,
        n_strips,
        IS_FIRST,
        CANDIDATES,
        STRIPS,
        ROUNDING,
        SHIFT,
        SPAN,
    )
    if tl.program_id(0) == 0:
        tl.store(p_after + i_pattern * 2, i_low)
        tl.store(p_after + i_pattern * 2 + 1, i_high)
    if i_low < i_high:
        i_row = tl.program_id(0) * ROWS
        i_map, n_read = _read_rows(p_index, i_pattern, n_q, HAS_INDEX)
        i_end = tl.minimum(i_row + ROWS, n_read)
        p_rows = p_maps + i_map * n_q * n_k + i_row * n_k
        o_number = tl.arange(0, CANDIDATES)
        b_bits = (_candidates(i_low, i_high, o_number, CANDIDATES) << SHIFT)[:, None, None]
        b_sums = tl.zeros([CANDIDATES, ROWS, CHUNK], dtype=tl.float32)  # [candidates, rows, chunk]
        for i_column in range(0, last_blocks(i_end - 1, n_k, reach) + 1, CHUNK * UNROLL):
            for i_tile in tl.static_range(UNROLL):
                i_start = i_column + i_tile * CHUNK
                b_mass = load_masses(p_rows, i_row, i_start, i_end, n_k, reach, ROWS, CHUNK)
                b_mass = b_mass[None, :, :]
                b_sums += tl.where(b_mass.to(tl.int32, bitcast=True) >= b_bits, b_mass, 0.0)
        i_place = (i_pattern * CANDIDATES + o_number) * n_strips + tl.program_id(0)
        tl.store(p_sums_after + i_place, tl.sum(tl.sum(b_sums, 2), 1))


@triton.jit(
    do_not_specialize=["n_q", "n_k", "first", "reach", "n_strips", "n_sink", "n_local"],
    do_not_specialize_on_alignment=["p_out", "p_finite"],
)
def mark_kernel(
    p_maps,
    p_gamma,
    p_index,
    p_totals,
    p_peaks,
    p_before,
    p_sums,
    p_out,
    p_finite,
    n_q,
    n_k,
    first,
    reach,
    n_strips,
    n_sink,
    n_local,
    HAS_INDEX: tl.constexpr,
    ROUNDING: tl.constexpr,
    SHIFT: tl.constexpr,
    SPAN: tl.constexpr,
    CANDIDATES: tl.constexpr,
    STRIPS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program: one strip of one pattern, after the last step."""
    i_pattern = tl.program_id(1).to(tl.int64)
    i_low, _high, is_finite = _interval(
        p_totals,
        p_peaks,
        p_before,
        p_sums,
        tl.load(p_gamma + i_pattern),
        i_pattern,
        n_strips,
        False,
        CANDIDATES,
        STRIPS,
        ROUNDING,
        SHIFT,
        SPAN,
    )
    if tl.program_id(0) == 0:
        tl.store(p_finite + i_pattern, is_finite.to(tl.int8))
    i_map, n_read = _read_rows(p_index, i_pattern, n_q, HAS_INDEX)
    mark_rows(
        p_maps + i_map * n_q * n_k,
        p_out + i_pattern * n_q * n_k,
        least_bits(i_low, is_finite, SHIFT),
        tl.program_id(0) * ROWS,
        n_read,
        n_q,
        n_k,
        first,
        reach,
        n_sink,
        n_local,
        ROWS,
        CHUNK,
    )
