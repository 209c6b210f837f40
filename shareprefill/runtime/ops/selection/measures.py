"""Triton kernels that compare block maps with pivots' maps and with patterns."""

# Triton's language is typed by its compiler, which knows constexpr, program-wide scalars and tiles.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportAssignmentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _xlog2(b_mass):
    """`x * log2(x)`, 0 at 0."""
    return b_mass * tl.log2(tl.where(b_mass > 0.0, b_mass, 1.0))


@triton.jit(do_not_specialize=["n_q", "n_k"])
def js_kernel(
    p_maps,
    p_pivots,
    p_index,
    p_parts,
    n_q,
    n_k,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program: `ROWS` rows of one map; stores the sum of their distances over `n_q`."""
    HALF_LN2: tl.constexpr = 0.34657359027997264
    i_map = tl.program_id(1).to(tl.int64)
    i_pivot = tl.load(p_index + i_map)
    share = float("inf")
    if i_pivot >= 0:
        o_m = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        m_m = o_m < n_q
        p_p = p_maps + i_map * n_q * n_k + o_m[:, None] * n_k
        p_q = p_pivots + i_pivot * n_q * n_k + o_m[:, None] * n_k
        b_sum = tl.zeros([ROWS, CHUNK], dtype=tl.float32)
        for i_column in range(0, n_k, CHUNK):
            o_n = i_column + tl.arange(0, CHUNK)
            m_tile = m_m[:, None] & (o_n < n_k)[None, :]
            b_p = tl.load(p_p + o_n[None, :], mask=m_tile, other=0.0)
            b_q = tl.load(p_q + o_n[None, :], mask=m_tile, other=0.0)
            b_sum += _xlog2(b_p) + _xlog2(b_q) - 2.0 * _xlog2((b_p + b_q) * 0.5)
        b_distance = tl.sqrt(tl.maximum(tl.sum(b_sum, 1) * HALF_LN2, 0.0))
        share = tl.sum(b_distance, 0) / n_q
    tl.store(p_parts + i_map * tl.num_programs(0) + tl.program_id(0), share)


@triton.jit(do_not_specialize=["n_q", "n_k"])
def covered_kernel(
    p_maps,
    p_patterns,
    p_index,
    p_parts,
    n_q,
    n_k,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program: `ROWS` rows of one map; stores the sum of their covered mass over `n_q`."""
    i_map = tl.program_id(1).to(tl.int64)
    i_pattern = tl.load(p_index + i_map)
    o_m = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    m_m = o_m < n_q
    p_mass = p_maps + i_map * n_q * n_k + o_m[:, None] * n_k
    # No pattern: nothing is read, and what is not read counts as taken.
    n_listed = tl.where(i_pattern >= 0, n_k, 0)
    p_taken = p_patterns + i_pattern * n_q * n_k + o_m[:, None] * n_k
    b_sum = tl.zeros([ROWS, CHUNK], dtype=tl.float32)
    for i_column in range(0, n_k, CHUNK):
        o_n = i_column + tl.arange(0, CHUNK)
        m_tile = m_m[:, None] & (o_n < n_k)[None, :]
        m_listed = m_m[:, None] & (o_n < n_listed)[None, :]
        b_taken = tl.load(p_taken + o_n[None, :], mask=m_listed, other=1)
        b_sum += tl.load(p_mass + o_n[None, :], mask=m_tile & (b_taken > 0), other=0.0)
    share = tl.sum(tl.sum(b_sum, 1), 0) / n_q
    tl.store(p_parts + i_map * tl.num_programs(0) + tl.program_id(0), share)
