"""Triton kernels that smooth block maps along key blocks and block diagonals.

Every program owns its lines or its blocks: no atomics, the same result in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def last_blocks(o_q, n_k, reach):
    """The last causal key block of query blocks; `reach` is that of a whole first one."""
    return tl.minimum(o_q + reach, n_k - 1)


@triton.jit(do_not_specialize=["n_q", "n_k", "reach", "n_diagonals"])
def lines_kernel(
    p_maps,
    p_means,
    n_q,
    n_k,
    reach,
    n_diagonals,
    ROWS: tl.constexpr,
    LINES: tl.constexpr,
):
    """One program: means over the causal entries of `LINES` diagonals, or columns, of one map.

    Diagonals go from the lowest left entry on, as far as they are causal; columns follow.
    """
    i_map = tl.program_id(1).to(tl.int64)
    n_strips = tl.cdiv(n_diagonals, LINES)
    is_column = tl.program_id(0) >= n_strips
    i_line = (tl.program_id(0) - tl.where(is_column, n_strips, 0)) * LINES
    n_lines = tl.where(is_column, n_k, n_diagonals)
    slope = tl.where(is_column, 0, 1)
    o_line = i_line + tl.arange(0, LINES)
    # The column in which a line meets the first row, or would.
    i_start = i_line - tl.where(is_column, 0, n_q - 1)
    o_start = i_start + tl.arange(0, LINES)
    i_reach = last_blocks(0, n_k, reach)
    i_above = tl.where(is_column, i_start - i_reach, 1 - i_start - LINES)
    p_map = p_maps + i_map * n_q * n_k
    b_sum = tl.zeros([ROWS, LINES], dtype=tl.float32)  # [rows, lines]
    b_count = tl.zeros([ROWS, LINES], dtype=tl.float32)
    for i_row in range(tl.maximum(i_above, 0), n_q, ROWS):
        o_m = i_row + tl.arange(0, ROWS)
        o_n = o_start[None, :] + (o_m * slope)[:, None]
        b_last = last_blocks(o_m, n_k, reach)
        m_tile = (o_m < n_q)[:, None] & (o_n >= 0) & (o_n <= b_last[:, None])
        b_sum += tl.load(p_map + (o_m.to(tl.int64) * n_k)[:, None] + o_n, mask=m_tile, other=0.0)
        b_count += m_tile.to(tl.float32)
    b_mean = tl.sum(b_sum, 0) / tl.maximum(tl.sum(b_count, 0), 1.0)  # [lines]
    p_line = p_means + i_map * (n_diagonals + n_k) + tl.where(is_column, n_diagonals, 0)
    tl.store(p_line + o_line, b_mean, mask=o_line < n_lines)


@triton.jit
def _mean_of_two(
    p_map,
    b_own,
    o_m,
    o_n,
    n_q,
    n_k,
    reach,
    DISTANCE: tl.constexpr,
    STEP: tl.constexpr,
):
    """Mean of the causal entries `DISTANCE` rows and `STEP` columns before and after, else own."""
    o_early, o_left = o_m - DISTANCE, o_n - STEP
    b_last = last_blocks(o_early, n_k, reach)
    m_early = ((o_early >= 0) & (o_early < n_q))[:, None] & (o_left >= 0)[None, :]
    m_early = m_early & (o_left[None, :] <= b_last[:, None])
    p_early = p_map + (o_early.to(tl.int64) * n_k)[:, None] + o_left[None, :]
    b_sum = tl.load(p_early, mask=m_early, other=0.0)
    o_late, o_right = o_m + DISTANCE, o_n + STEP
    b_last = last_blocks(o_late, n_k, reach)
    m_late = (o_late < n_q)[:, None] & (o_right[None, :] <= b_last[:, None])
    p_late = p_map + (o_late.to(tl.int64) * n_k)[:, None] + o_right[None, :]
    b_sum += tl.load(p_late, mask=m_late, other=0.0)
    b_count = m_early.to(tl.float32) + m_late.to(tl.float32)
    return tl.where(b_count > 0.0, b_sum / tl.maximum(b_count, 1.0), b_own)


@triton.jit
def store_smoothed(
    p_map,
    p_means,
    p_out,
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
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Store a tile of one smoothed map, from a row and a column on; zero where not causal."""
    o_m, o_n = i_row + tl.arange(0, ROWS), i_column + tl.arange(0, CHUNK)
    o_tile = (o_m.to(tl.int64) * n_k)[:, None] + o_n[None, :]
    b_total = tl.zeros([ROWS, CHUNK], dtype=tl.float32)  # [rows, chunk]
    if i_column <= last_blocks(tl.minimum(i_row + ROWS, n_q) - 1, n_k, reach):
        b_last = last_blocks(o_m, n_k, reach)
        m_causal = (o_m < n_q)[:, None] & (o_n[None, :] <= b_last[:, None])
        b_own = tl.load(p_map + o_tile, mask=m_causal, other=0.0)
        b_total = itself * b_own
        if vertical1 > 0.0:
            b_total += vertical1 * _mean_of_two(p_map, b_own, o_m, o_n, n_q, n_k, reach, 1, 0)
        if diagonal1 > 0.0:
            b_total += diagonal1 * _mean_of_two(p_map, b_own, o_m, o_n, n_q, n_k, reach, 1, 1)
        if vertical2 > 0.0:
            b_total += vertical2 * _mean_of_two(p_map, b_own, o_m, o_n, n_q, n_k, reach, 2, 0)
        if diagonal2 > 0.0:
            b_total += diagonal2 * _mean_of_two(p_map, b_own, o_m, o_n, n_q, n_k, reach, 2, 2)
        if column > 0.0:
            b_column = tl.load(p_means + n_diagonals + o_n, mask=o_n < n_k, other=0.0)  # [chunk]
            b_total += column * b_column[None, :]
        if diagonal > 0.0:
            o_line = o_n[None, :] - o_m[:, None] + (n_q - 1)
            b_total += diagonal * tl.load(p_means + o_line, mask=m_causal, other=0.0)
        b_total = tl.where(m_causal, b_total, 0.0)
    tl.store(p_out + o_tile, b_total, mask=(o_m < n_q)[:, None] & (o_n < n_k)[None, :])


@triton.jit(do_not_specialize=["n_q", "n_k", "reach", "n_diagonals"])
def smooth_kernel(
    p_maps,
    p_means,
    p_out,
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
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program: a tile of one map; entries that are not causal are zero."""
    i_map = tl.program_id(1).to(tl.int64)
    n_chunks = tl.cdiv(n_k, CHUNK)
    store_smoothed(
        p_maps + i_map * n_q * n_k,
        p_means + i_map * (n_diagonals + n_k),
        p_out + i_map * n_q * n_k,
        tl.program_id(0) // n_chunks * ROWS,
        tl.program_id(0) % n_chunks * CHUNK,
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
