"""Triton kernels that compare block maps with pivots' maps and with patterns."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def xlog2(b_mass):
    """`x * log2(x)`, 0 at 0."""
    return b_mass * tl.log2(tl.where(b_mass > 0.0, b_mass, 1.0))


@triton.jit(do_not_specialize=["n_q", "n_k", "n_rows"])
def js_kernel(
    p_maps,
    p_pivots,
    p_index,
    p_parts,
    n_q,
    n_k,
    n_rows,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program: `n_rows` rows of one map; stores the sum of their distances over `n_q`."""
    HALF_LN2: tl.constexpr = 0.34657359027997264
    i_map = tl.program_id(1).to(tl.int64)
    i_pivot = tl.load(p_index + i_map)
    share = float("inf")
    if i_pivot >= 0:
        p_map = p_maps + i_map * n_q * n_k
        p_pivot = p_pivots + i_pivot * n_q * n_k
        i_start = tl.program_id(0) * n_rows
        i_end = tl.minimum(i_start + n_rows, n_q)
        b_distance = tl.zeros([ROWS], dtype=tl.float32)
        for i_row in range(i_start, i_end, ROWS):
            o_m = i_row + tl.arange(0, ROWS)
            o_row = (o_m.to(tl.int64) * n_k)[:, None]
            b_sum = tl.zeros([ROWS, CHUNK], dtype=tl.float32)  # [rows, chunk]
            for i_column in range(0, n_k, CHUNK):
                o_n = i_column + tl.arange(0, CHUNK)
                m_tile = (o_m < i_end)[:, None] & (o_n < n_k)[None, :]
                b_p = tl.load(p_map + o_row + o_n[None, :], mask=m_tile, other=0.0)  # [rows, chunk]
                b_q = tl.load(p_pivot + o_row + o_n[None, :], mask=m_tile, other=0.0)
                b_sum += xlog2(b_p) + xlog2(b_q) - 2.0 * xlog2((b_p + b_q) * 0.5)
            b_divergence = tl.sum(b_sum, 1) * HALF_LN2  # [rows]
            # Not a maximum with 0, which would turn NaN into 0.
            b_distance += tl.sqrt(tl.where(b_divergence < 0.0, 0.0, b_divergence))
        share = tl.sum(b_distance, 0) / n_q
    tl.store(p_parts + i_map * tl.num_programs(0) + tl.program_id(0), share)


@triton.jit
def sum_covered(
    p_map,
    p_pattern,
    p_rows,
    i_start,
    i_end,
    n_k,
    n_listed,
    HAS_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The mass of rows `i_start .. i_end - 1` of a map inside a pattern.

    From column `n_listed` on all of it counts as inside. `HAS_ROWS`: the rows of the map are those
    of the pattern that stand in `p_rows`.
    """
    b_sum = tl.zeros([ROWS, CHUNK], dtype=tl.float32)  # [rows, chunk]
    for i_row in range(i_start, i_end, ROWS):
        o_m = i_row + tl.arange(0, ROWS)
        o_row = (o_m.to(tl.int64) * n_k)[:, None]
        o_read = o_row
        if HAS_ROWS:
            o_read = (tl.load(p_rows + o_m, mask=o_m < i_end, other=0) * n_k)[:, None]
        for i_column in range(0, n_k, CHUNK):
            o_n = i_column + tl.arange(0, CHUNK)
            m_tile = (o_m < i_end)[:, None] & (o_n < n_k)[None, :]
            m_listed = (o_m < i_end)[:, None] & (o_n < n_listed)[None, :]
            b_taken = tl.load(p_pattern + o_read + o_n[None, :], mask=m_listed, other=1)
            b_mass = tl.load(p_map + o_row + o_n[None, :], mask=m_tile, other=0.0)  # [rows, chunk]
            # A mass that is not a number counts wherever it is: it covers nothing.
            b_sum += tl.where((b_taken > 0) | (b_mass != b_mass), b_mass, 0.0)
    return tl.sum(tl.sum(b_sum, 1), 0)


@triton.jit(do_not_specialize=["n_q", "n_k", "n_rows"])
def covered_kernel(
    p_maps,
    p_patterns,
    p_index,
    p_parts,
    n_q,
    n_k,
    n_rows,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program: `n_rows` rows of one map; stores the sum of their covered mass over `n_q`."""
    i_map = tl.program_id(1).to(tl.int64)
    i_pattern = tl.load(p_index + i_map)
    # No pattern: nothing is read, and what is not read counts as taken.
    n_listed = tl.where(i_pattern >= 0, n_k, 0)
    p_map = p_maps + i_map * n_q * n_k
    p_pattern = p_patterns + i_pattern * n_q * n_k
    i_start = tl.program_id(0) * n_rows
    i_end = tl.minimum(i_start + n_rows, n_q)
    share = (
        sum_covered(p_map, p_pattern, p_index, i_start, i_end, n_k, n_listed, False, ROWS, CHUNK)
        / n_q
    )
    # Not a minimum, which would turn NaN into 1.
    share = tl.where(share > 1.0, 1.0, share)
    tl.store(p_parts + i_map * tl.num_programs(0) + tl.program_id(0), share)
