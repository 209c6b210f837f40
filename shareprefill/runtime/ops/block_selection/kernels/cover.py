"""Triton kernels that choose, per row, the smallest set of entries whose mass reaches gamma.

There is no sort. The smallest value taken is found by a search over the bits of a float32, which
order positive numbers: each pass over the row, which stays in the L1 cache, sums the mass above
three thresholds. One warp serves one row, so that no sum crosses warps.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _smallest_taken(p_row, n_columns, limit, CHUNK: tl.constexpr):
    """Bits of the smallest value taken, and the mass of the values above it.

    It is the least `t` with `mass(bits > t) < limit`; 0 where the whole row stays below.
    """
    o_n = tl.arange(0, CHUNK)
    b_high = tl.zeros([CHUNK], dtype=tl.float32)
    for i_column in range(0, n_columns, CHUNK):
        m_n = i_column + o_n < n_columns
        b_high = tl.maximum(b_high, tl.load(p_row + i_column + o_n, mask=m_n, other=0.0))
    i_low = 0
    i_high = tl.max(b_high, 0).to(tl.int32, bitcast=True)
    above = 0.0
    while i_low < i_high:
        width = i_high - i_low
        i_one = i_low + width // 4
        i_two = i_low + width // 2
        # Written so that it stays below i_high and does not overflow.
        i_three = i_high - 1 - (width - 1) // 4
        b_one = tl.zeros([CHUNK], dtype=tl.float32)
        b_two = tl.zeros([CHUNK], dtype=tl.float32)
        b_three = tl.zeros([CHUNK], dtype=tl.float32)
        for i_column in range(0, n_columns, CHUNK):
            m_n = i_column + o_n < n_columns
            b_mass = tl.load(p_row + i_column + o_n, mask=m_n, other=0.0)  # [chunk]
            b_bits = b_mass.to(tl.int32, bitcast=True)
            b_one += tl.where(b_bits > i_one, b_mass, 0.0)
            b_two += tl.where(b_bits > i_two, b_mass, 0.0)
            b_three += tl.where(b_bits > i_three, b_mass, 0.0)
        mass_one = tl.sum(b_one, 0)
        mass_two = tl.sum(b_two, 0)
        mass_three = tl.sum(b_three, 0)
        # Sums of the same order of terms fall with the threshold, rounding included.
        if mass_one < limit:
            i_high = i_one
            above = mass_one
        elif mass_two < limit:
            i_low = i_one + 1
            i_high = i_two
            above = mass_two
        elif mass_three < limit:
            i_low = i_two + 1
            i_high = i_three
            above = mass_three
        else:
            i_low = i_three + 1
    return i_high, above


@triton.jit
def store_cover(p_row, p_out, n_seen, n_columns, limit, n_sink, i_local, CHUNK: tl.constexpr):
    """Mark, in a row of `n_columns`, what covers `limit` of its first `n_seen` entries.

    Columns below `n_sink` and from `i_local` on are marked too, as far as they are seen.
    """
    i_taken, above = _smallest_taken(p_row, n_seen, limit, CHUNK)
    value = i_taken.to(tl.float32, bitcast=True)
    n_equal = 0
    for i_column in range(0, n_columns, CHUNK):
        o_n = i_column + tl.arange(0, CHUNK)
        b_mass = tl.load(p_row + o_n, mask=o_n < n_seen, other=0.0)  # [chunk]
        b_bits = b_mass.to(tl.int32, bitcast=True)
        # Of equal values the lower columns come first.
        b_equal = (b_bits == i_taken).to(tl.int32)
        b_before = above + (n_equal + tl.cumsum(b_equal, 0) - b_equal).to(tl.float32) * value
        n_equal += tl.sum(b_equal, 0)
        m_taken = (b_bits > i_taken) | ((b_equal > 0) & (b_before < limit) & (b_mass > 0.0))
        m_taken = (m_taken | (o_n < n_sink) | (o_n >= i_local)) & (o_n < n_seen)
        tl.store(p_out + o_n, m_taken.to(p_out.dtype.element_ty), mask=o_n < n_columns)


@triton.jit
def store_short_cover(p_row, p_out, n_columns, limit, LENGTH: tl.constexpr, STEP: tl.constexpr):
    """Mark, in a row of at most `LENGTH` columns, what covers `limit` of it.

    As `store_cover`, by comparing all pairs: of a short row it takes a program of several warps, in
    which sums cross them, less than a search.
    """
    o_n = tl.arange(0, LENGTH)
    b_own = tl.load(p_row + o_n, mask=o_n < n_columns, other=0.0)  # [length]
    b_before = tl.zeros([LENGTH, STEP], dtype=tl.float32)
    for i_column in range(0, n_columns, STEP):
        o_c = i_column + tl.arange(0, STEP)
        b_mass = tl.load(p_row + o_c, mask=o_c < n_columns, other=0.0)[None, :]  # [1, step]
        m_equal = (b_mass == b_own[:, None]) & (o_c[None, :] < o_n[:, None])
        b_before += tl.where((b_mass > b_own[:, None]) | m_equal, b_mass, 0.0)
    m_taken = (tl.sum(b_before, 1) < limit) & (b_own > 0.0)
    tl.store(p_out + o_n, m_taken.to(p_out.dtype.element_ty), mask=o_n < n_columns)


@triton.jit
def store_finite(p_row, p_finite, n_seen, CHUNK: tl.constexpr):
    """Store, and return, whether the sum of the first `n_seen` entries of a row is a number."""
    b_sum = tl.zeros([CHUNK], dtype=tl.float32)
    for i_column in range(0, n_seen, CHUNK):
        o_n = i_column + tl.arange(0, CHUNK)
        b_sum += tl.load(p_row + o_n, mask=o_n < n_seen, other=0.0)  # [chunk]
    is_finite = tl.abs(tl.sum(b_sum, 0)) < float("inf")
    tl.store(p_finite, is_finite.to(tl.int8))
    return is_finite


@triton.jit(
    do_not_specialize=["n_q", "n_k", "n_query", "offset", "block_size", "n_sink", "n_local"],
    do_not_specialize_on_alignment=["p_out", "p_finite"],
)
def select_kernel(
    p_maps,
    p_gamma,
    p_out,
    p_finite,
    n_q,
    n_k,
    n_query,
    offset,
    block_size,
    n_sink,
    n_local,
    ROUNDING: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program: one row of one map. Late rows, which have the most blocks, go first."""
    i_program = tl.program_id(0).to(tl.int64)
    n_maps = tl.num_programs(0) // n_q
    i_map = i_program % n_maps
    i_q = n_q - 1 - i_program // n_maps
    i_row = i_map * n_q + i_q
    i_first = (i_q * block_size + offset) // block_size
    i_last = (tl.minimum((i_q + 1) * block_size, n_query) - 1 + offset) // block_size
    n_seen = (i_last + 1).to(tl.int32)
    is_finite = store_finite(p_maps + i_row * n_k, p_finite + i_row, n_seen, CHUNK)
    store_cover(
        p_maps + i_row * n_k,
        p_out + i_row * n_k,
        n_seen,
        n_k,
        tl.load(p_gamma + i_map) - ROUNDING,
        # Without numbers to choose by, a row reads every causal block.
        tl.where(is_finite, n_sink, n_k),
        tl.where(n_local > 0, i_first - n_local + 1, n_k).to(tl.int32),
        CHUNK,
    )


@triton.jit(do_not_specialize=["n_k"])
def cover_profiles_kernel(
    p_vertical,
    p_slash,
    p_gamma,
    p_columns,
    p_distances,
    p_finite,
    n_k,
    ROUNDING: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program: the vertical (even) or the slash profile (odd) of one head."""
    i_head = (tl.program_id(0) // 2).to(tl.int64)
    limit = tl.load(p_gamma + i_head) - ROUNDING
    if tl.program_id(0) % 2 == 0:
        i_start = i_head * n_k
        store_finite(p_vertical + i_start, p_finite + i_head, n_k, CHUNK)
        store_cover(p_vertical + i_start, p_columns + i_start, n_k, n_k, limit, 0, n_k, CHUNK)
    else:
        i_start = i_head * (n_k + 1)
        store_cover(
            p_slash + i_start, p_distances + i_start, n_k + 1, n_k + 1, limit, 0, n_k + 1, CHUNK
        )


@triton.jit
def draw_lines(
    p_columns,
    p_distances,
    p_out,
    i_row,
    is_finite,
    n_q,
    n_k,
    n_query,
    offset,
    block_size,
    n_sink,
    n_local,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Store `ROWS` rows of one head's pattern from `i_row` on, from its columns and distances."""
    o_q = i_row + tl.arange(0, ROWS)
    b_first = ((o_q * block_size + offset) // block_size)[:, None]
    b_end = tl.minimum((o_q + 1) * block_size, n_query)
    b_last = ((b_end - 1 + offset) // block_size)[:, None]
    # Without numbers to choose by, a head reads every causal block.
    n_sink = tl.where(is_finite, n_sink, n_k)
    for i_column in range(0, n_k, CHUNK):
        o_n = (i_column + tl.arange(0, CHUNK))[None, :]
        m_n = (o_n <= b_last) & (o_q < n_q)[:, None]  # [rows, chunk]
        b_taken = tl.load(p_distances + (b_last - o_n), mask=m_n, other=0)
        b_taken |= tl.load(p_distances + (b_first - o_n), mask=m_n & (o_n <= b_first), other=0)
        b_taken |= tl.load(p_columns + o_n, mask=o_n < n_k, other=0)
        m_taken = (b_taken > 0) | (o_n < n_sink) | ((o_n > b_first - n_local) & (n_local > 0))
        m_taken = m_taken & m_n
        p_tile = p_out + (o_q * n_k)[:, None] + o_n
        m_tile = (o_q < n_q)[:, None] & (o_n < n_k)
        tl.store(p_tile, m_taken.to(p_out.dtype.element_ty), mask=m_tile)


@triton.jit(
    do_not_specialize=["n_q", "n_k", "n_query", "offset", "block_size", "n_sink", "n_local"],
    do_not_specialize_on_alignment=["p_out"],
)
def vertical_slash_kernel(
    p_columns,
    p_distances,
    p_finite,
    p_out,
    n_q,
    n_k,
    n_query,
    offset,
    block_size,
    n_sink,
    n_local,
    CHUNK: tl.constexpr,
):
    """One program: one row of one head's pattern."""
    i_head = (tl.program_id(0) // n_q).to(tl.int64)
    draw_lines(
        p_columns + i_head * n_k,
        p_distances + i_head * (n_k + 1),
        p_out + i_head * n_q * n_k,
        tl.program_id(0) % n_q,
        tl.load(p_finite + i_head) > 0,
        n_q,
        n_k,
        n_query,
        offset,
        block_size,
        n_sink,
        n_local,
        1,
        CHUNK,
    )
