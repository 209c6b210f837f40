"""Triton kernel that chooses the blocks of a map at or above one threshold, smoothed or not.

Positive float32 numbers are ordered as their bits are. The threshold is a number of few mantissa
bits, found by a search over its bits: each pass over the map sums the mass at or above three
candidates. One program serves one pattern, so that a search needs no other program and one launch
is enough; `head_threshold_large.py` divides the maps of long prompts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from shareprefill.runtime.ops.block_selection.kernels.smoothing import last_blocks, store_smoothed


@triton.jit
def load_masses(p_rows, i_row, i_column, n_q, n_k, reach, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """The causal masses of a tile from row `i_row`, at `p_rows`, on; zeros elsewhere."""
    o_m = i_row + tl.arange(0, ROWS)
    o_n = i_column + tl.arange(0, CHUNK)
    b_last = last_blocks(o_m, n_k, reach)
    m_tile = (o_m < n_q)[:, None] & (o_n[None, :] <= b_last[:, None])
    p_tile = p_rows + (tl.arange(0, ROWS) * n_k)[:, None] + o_n[None, :]
    return tl.load(p_tile, mask=m_tile, other=0.0)


@triton.jit
def sum_rows(
    p_map,
    i_row,
    i_end,
    n_k,
    reach,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Of rows `i_row .. i_end - 1` the sum of all masses, and the bits of the largest."""
    p_rows = p_map + i_row * n_k
    b_sum = tl.zeros([ROWS, CHUNK], dtype=tl.float32)  # [rows, chunk]
    b_peak = tl.zeros([ROWS, CHUNK], dtype=tl.int32)
    for i_strip in range(i_row, i_end, ROWS):
        i_last = last_blocks(tl.minimum(i_strip + ROWS, i_end) - 1, n_k, reach)
        for i_column in range(0, i_last + 1, CHUNK * UNROLL):
            for i_tile in tl.static_range(UNROLL):
                i_start = i_column + i_tile * CHUNK
                b_mass = load_masses(p_rows, i_strip, i_start, i_end, n_k, reach, ROWS, CHUNK)
                b_sum += b_mass
                b_peak = tl.maximum(b_peak, b_mass.to(tl.int32, bitcast=True))
        p_rows += ROWS * n_k
    return tl.sum(b_sum), tl.max(b_peak)


@triton.jit
def _sum_above(
    p_map,
    n_q,
    n_k,
    reach,
    i_one,
    i_two,
    i_three,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """The sums of the masses whose bits are at least each of three numbers."""
    p_rows = p_map
    b_one = tl.zeros([ROWS, CHUNK], dtype=tl.float32)  # [rows, chunk]
    b_two = tl.zeros([ROWS, CHUNK], dtype=tl.float32)
    b_three = tl.zeros([ROWS, CHUNK], dtype=tl.float32)
    for i_row in range(0, n_q, ROWS):
        i_last = last_blocks(tl.minimum(i_row + ROWS, n_q) - 1, n_k, reach)
        for i_column in range(0, i_last + 1, CHUNK * UNROLL):
            for i_tile in tl.static_range(UNROLL):
                i_start = i_column + i_tile * CHUNK
                b_mass = load_masses(p_rows, i_row, i_start, n_q, n_k, reach, ROWS, CHUNK)
                b_bits = b_mass.to(tl.int32, bitcast=True)
                b_one += tl.where(b_bits >= i_one, b_mass, 0.0)
                b_two += tl.where(b_bits >= i_two, b_mass, 0.0)
                b_three += tl.where(b_bits >= i_three, b_mass, 0.0)
        p_rows += ROWS * n_k
    return tl.sum(b_one), tl.sum(b_two), tl.sum(b_three)


@triton.jit
def least_bits(i_low, is_finite, SHIFT: tl.constexpr):
    """The bits of the least mass that is taken, where `i_low` is the threshold.

    Blocks without mass are below every threshold; all blocks are taken where sums are no numbers.
    """
    return tl.where(is_finite, tl.maximum(i_low << SHIFT, 1), -(2**31))


@triton.jit
def mark_rows(
    p_map,
    p_out,
    i_least,
    i_row,
    n_read,
    n_q,
    n_k,
    first,
    reach,
    n_sink,
    n_local,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """`ROWS` rows of a pattern from `i_row` on, all columns; of the map `n_read` rows are read."""
    o_m = i_row + tl.arange(0, ROWS)
    b_first = (o_m + first)[:, None]
    b_last = last_blocks(o_m, n_k, reach)[:, None]
    p_rows = p_map + i_row * n_k
    for i_column in range(0, n_k, CHUNK):
        o_n = (i_column + tl.arange(0, CHUNK))[None, :]
        b_mass = load_masses(p_rows, i_row, i_column, n_read, n_k, reach, ROWS, CHUNK)
        m_taken = b_mass.to(tl.int32, bitcast=True) >= i_least
        m_taken = m_taken | (o_n < n_sink) | ((o_n > b_first - n_local) & (n_local > 0))
        m_taken = m_taken & (o_n <= b_last)
        p_tile = p_out + (o_m * n_k)[:, None] + o_n
        m_tile = (o_m < n_q)[:, None] & (o_n < n_k)
        tl.store(p_tile, m_taken.to(p_out.dtype.element_ty), mask=m_tile)


@triton.jit
def _find_threshold(
    p_map,
    gamma,
    n_read,
    n_k,
    reach,
    ROUNDING: tl.constexpr,
    SHIFT: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """The threshold of a map of `n_read` rows, and whether its sum is a number.

    Of a threshold's bits all but the lowest `SHIFT` are searched. The search starts `SPAN` steps of
    the threshold below the largest mass. Sums of the same order of terms fall with the threshold,
    rounding included; and with sums that are not numbers the search ends, too.
    """
    total, i_peak = sum_rows(p_map, 0, n_read, n_k, reach, ROWS, CHUNK, UNROLL)
    is_finite = tl.abs(total) < float("inf")
    wanted = gamma * total * (1.0 - ROUNDING)
    i_high = i_peak >> SHIFT
    i_low = tl.maximum(i_high - SPAN, 0)
    if (gamma >= 1.0) | (is_finite == 0):
        i_low = 0
        i_high = 0
    while i_low < i_high:
        width = i_high - i_low - 1
        i_one = i_low + 1 + width // 4
        i_two = i_low + 1 + width // 2
        i_three = i_high - width // 4
        mass_one, mass_two, mass_three = _sum_above(
            p_map,
            n_read,
            n_k,
            reach,
            i_one << SHIFT,
            i_two << SHIFT,
            i_three << SHIFT,
            ROWS,
            CHUNK,
            UNROLL,
        )
        if mass_three >= wanted:
            i_low = i_three
        elif mass_two >= wanted:
            i_low = i_two
            i_high = i_three - 1
        elif mass_one >= wanted:
            i_low = i_one
            i_high = i_two - 1
        else:
            i_high = i_one - 1
    return i_low, is_finite


@triton.jit(
    do_not_specialize=["n_q", "n_k", "first", "reach", "n_sink", "n_local", "n_diagonals"],
    do_not_specialize_on_alignment=["p_out", "p_finite"],
)
def head_kernel(
    p_maps,
    p_means,
    p_gamma,
    p_index,
    p_smoothed,
    p_out,
    p_finite,
    n_q,
    n_k,
    first,
    reach,
    n_sink,
    n_local,
    n_diagonals,
    itself,
    vertical1,
    diagonal1,
    vertical2,
    diagonal2,
    column,
    diagonal,
    SMOOTHS: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    ROUNDING: tl.constexpr,
    SHIFT: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """One program: one pattern. `SMOOTHS`: of a smoothed map in memory of the program's own.

    `first` and `reach` are the key blocks of the first and of the last row of a whole first query
    block; those of the next ones follow one by one.
    """
    i_pattern = tl.program_id(0).to(tl.int64)
    i_map = i_pattern
    if HAS_INDEX:
        i_map = tl.load(p_index + i_pattern)
    # Without a map no row is read.
    n_read = tl.where(i_map >= 0, n_q, 0).to(tl.int32)
    p_map = p_maps + i_map * n_q * n_k
    if SMOOTHS:
        p_own = p_smoothed + i_pattern * n_q * n_k
        for i_row in range(0, n_read, ROWS):
            i_last = last_blocks(tl.minimum(i_row + ROWS, n_q) - 1, n_k, reach)
            for i_column in range(0, i_last + 1, CHUNK):
                store_smoothed(
                    p_map,
                    p_means + i_map * (n_diagonals + n_k),
                    p_own,
                    i_row,
                    i_column,
                    n_q,
                    n_k,
                    reach,
                    n_diagonals,
                    itself,
                    vertical1,
                    diagonal1,
                    vertical2,
                    diagonal2,
                    column,
                    diagonal,
                    ROWS,
                    CHUNK,
                )
        # Threads read what others of the program have written.
        tl.debug_barrier()
        p_map = p_own
    gamma = tl.load(p_gamma + i_pattern)
    i_threshold, is_finite = _find_threshold(
        p_map, gamma, n_read, n_k, reach, ROUNDING, SHIFT, SPAN, ROWS, CHUNK, UNROLL
    )
    tl.store(p_finite + i_pattern, is_finite.to(tl.int8))
    for i_row in range(0, n_q, ROWS):
        mark_rows(
            p_map,
            p_out + i_pattern * n_q * n_k,
            least_bits(i_threshold, is_finite, SHIFT),
            i_row,
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
