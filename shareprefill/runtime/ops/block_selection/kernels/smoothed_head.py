"""Triton kernel that smooths a map and chooses its blocks in one launch, for small maps."""

from __future__ import annotations

import triton
import triton.language as tl

from shareprefill.runtime.ops.block_selection.kernels.head_threshold import (
    choose_blocks,
    last_blocks,
)
from shareprefill.runtime.ops.block_selection.kernels.smoothing import smoothed_tile


@triton.jit(
    do_not_specialize=["n_q", "n_k", "first", "reach", "n_sink", "n_local", "n_diagonals"],
    do_not_specialize_on_alignment=["p_out", "p_finite"],
)
def smoothed_head_kernel(
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
    HAS_INDEX: tl.constexpr,
    ROUNDING: tl.constexpr,
    SHIFT: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """One program: one pattern. Its smoothed map lies in memory of the program's own."""
    i_pattern = tl.program_id(0).to(tl.int64)
    i_map = i_pattern
    if HAS_INDEX:
        i_map = tl.load(p_index + i_pattern)
    # Without a map no row is read.
    n_read = tl.where(i_map >= 0, n_q, 0).to(tl.int32)
    p_smoothed += i_pattern * n_q * n_k
    for i_row in range(0, n_read, ROWS):
        o_m = i_row + tl.arange(0, ROWS)
        i_last = last_blocks(tl.minimum(i_row + ROWS, n_q) - 1, n_k, reach)
        for i_column in range(0, i_last + 1, CHUNK):
            o_n = i_column + tl.arange(0, CHUNK)
            b_tile = smoothed_tile(
                p_maps + i_map * n_q * n_k,
                p_means + i_map * (n_diagonals + n_k),
                o_m,
                o_n,
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
            )  # [rows, chunk]
            p_tile = p_smoothed + (o_m.to(tl.int64) * n_k)[:, None] + o_n[None, :]
            tl.store(p_tile, b_tile, mask=(o_m < n_q)[:, None] & (o_n < n_k)[None, :])
    # Threads read what others of the program have written.
    tl.debug_barrier()
    choose_blocks(
        p_smoothed,
        p_out + i_pattern * n_q * n_k,
        p_finite + i_pattern,
        tl.load(p_gamma + i_pattern),
        n_read,
        n_q,
        n_k,
        first,
        reach,
        n_sink,
        n_local,
        ROUNDING,
        SHIFT,
        SPAN,
        ROWS,
        CHUNK,
        UNROLL,
    )
