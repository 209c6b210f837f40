"""Triton kernel of vertical-slash patterns of short prompts, all that follows `sums_kernel`."""

from __future__ import annotations

import triton
import triton.language as tl

from shareprefill.runtime.ops.block_selection.kernels.cover import (
    draw_lines,
    store_finite,
    store_short_cover,
)
from shareprefill.runtime.ops.block_selection.kernels.heads import decide_sparse
from shareprefill.runtime.ops.vertical_slash.triton_kernel import store_profiles


@triton.jit(
    do_not_specialize=[
        *("n_splits", "split_blocks", "n_q_tokens", "n_k_tokens", "n_k", "n_q"),
        *("n_sink", "n_local", "n_heads", "n_entries", "first", "otherwise", "place"),
    ],
    do_not_specialize_on_alignment=["p_heads", "p_out", "p_finite"],
)
def pattern_kernel(
    p_sums,
    p_peaks,
    p_gamma,
    p_heads,
    p_requested,
    p_vertical,
    p_slash,
    p_columns,
    p_distances,
    p_out,
    p_finite,
    p_decided,
    n_splits,
    split_blocks,
    n_q_tokens,
    n_k_tokens,
    n_k,
    n_q,
    n_sink,
    n_local,
    n_heads,
    n_entries,
    first,
    otherwise,
    place,
    delta,
    ROUNDING: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_HEADS: tl.constexpr,
    HAS_GUARD: tl.constexpr,
    ENTRIES: tl.constexpr,
    LENGTH: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program: one head: its profiles, what covers gamma of each, and its pattern.

    `HAS_GUARD`: it also decides whether the pattern is read, as `sparse_heads_kernel`.
    """
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
    if HAS_GUARD:
        decide_sparse(
            p_vertical,
            p_requested,
            p_decided,
            i_slot,
            tl.num_programs(0),
            n_k,
            n_heads,
            n_entries,
            first,
            otherwise,
            place,
            delta,
            ENTRIES,
            CHUNK,
        )
    is_finite = store_finite(p_vertical, p_finite + i_slot, n_k, CHUNK)
    store_short_cover(p_vertical, p_columns, n_k, limit, LENGTH, STEP)
    store_short_cover(p_slash, p_distances, n_k + 1, limit, LENGTH, STEP)
    tl.debug_barrier()
    for i_row in range(0, n_q, ROWS):
        draw_lines(
            p_columns,
            p_distances,
            p_out + i_slot.to(tl.int64) * n_q * n_k,
            i_row,
            is_finite,
            n_q,
            n_k,
            n_q_tokens,
            n_k_tokens - n_q_tokens,
            BLOCK_SIZE,
            n_sink,
            n_local,
            ROWS,
            CHUNK,
        )
