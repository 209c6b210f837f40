"""Triton kernel of vertical-slash patterns of short prompts, all that follows `sums_kernel`."""

from __future__ import annotations

import triton
import triton.language as tl

from shareprefill.runtime.ops.block_selection.kernels.cover import store_cover, store_finite
from shareprefill.runtime.ops.vertical_slash.triton_kernel import store_profiles


@triton.jit(
    do_not_specialize=[
        *("n_splits", "split_blocks", "n_q_tokens", "n_k_tokens", "n_k", "n_q"),
        *("n_sink", "n_local"),
    ],
    do_not_specialize_on_alignment=["p_heads", "p_out", "p_finite"],
)
def pattern_kernel(
    p_sums,
    p_peaks,
    p_gamma,
    p_heads,
    p_vertical,
    p_slash,
    p_columns,
    p_distances,
    p_out,
    p_finite,
    n_splits,
    split_blocks,
    n_q_tokens,
    n_k_tokens,
    n_k,
    n_q,
    n_sink,
    n_local,
    ROUNDING: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program: one head: its profiles, what covers gamma of each, and its pattern."""
    i_slot = tl.program_id(0)
    for i_entry in range(0, n_k + 1, BLOCK_J):
        store_profiles(
            p_sums,
            p_peaks,
            p_vertical,
            p_slash,
            p_heads,
            i_slot,
            i_entry,
            n_splits,
            split_blocks,
            n_q_tokens,
            n_k_tokens,
            n_k,
            BLOCK_SIZE,
            BLOCK_M,
            BLOCK_J,
            BLOCK_S,
            PARTS,
            HAS_HEADS,
        )
    # Threads read what others of the program have written, here and below.
    tl.debug_barrier()
    limit = tl.load(p_gamma + i_slot) - ROUNDING
    p_vertical += i_slot * n_k
    p_slash += i_slot * (n_k + 1)
    p_columns += i_slot * n_k
    p_distances += i_slot * (n_k + 1)
    is_finite = store_finite(p_vertical, p_finite + i_slot, n_k, CHUNK)
    store_cover(p_vertical, p_columns, n_k, n_k, limit, 0, n_k, CHUNK)
    store_cover(p_slash, p_distances, n_k + 1, n_k + 1, limit, 0, n_k + 1, CHUNK)
    tl.debug_barrier()
    # Without numbers to choose by, a head reads every causal block.
    n_sink = tl.where(is_finite, n_sink, n_k)
    offset = n_k_tokens - n_q_tokens
    p_out += i_slot.to(tl.int64) * n_q * n_k
    for i_row in range(0, n_q, ROWS):
        o_q = i_row + tl.arange(0, ROWS)
        b_first = ((o_q * BLOCK_SIZE + offset) // BLOCK_SIZE)[:, None]
        b_end = tl.minimum((o_q + 1) * BLOCK_SIZE, n_q_tokens)
        b_last = ((b_end - 1 + offset) // BLOCK_SIZE)[:, None]
        for i_column in range(0, n_k, CHUNK):
            o_n = (i_column + tl.arange(0, CHUNK))[None, :]
            m_n = (o_n <= b_last) & (o_q < n_q)[:, None]  # [rows, chunk]
            b_taken = tl.load(p_distances + (b_last - o_n), mask=m_n, other=0)
            b_taken |= tl.load(p_distances + (b_first - o_n), mask=m_n & (o_n <= b_first), other=0)
            b_taken |= tl.load(
                p_columns + o_n + tl.zeros_like(b_taken).to(tl.int32), mask=m_n, other=0
            )
            m_taken = (b_taken > 0) | (o_n < n_sink) | ((o_n > b_first - n_local) & (n_local > 0))
            m_taken = m_taken & m_n
            p_tile = p_out + (o_q * n_k)[:, None] + o_n
            m_tile = (o_q < n_q)[:, None] & (o_n < n_k)
            tl.store(p_tile, m_taken.to(p_out.dtype.element_ty), mask=m_tile)
