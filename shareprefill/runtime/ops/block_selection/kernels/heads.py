"""Triton kernels that decide which pattern every head reads."""

from __future__ import annotations

import triton
import triton.language as tl

from shareprefill.runtime.ops.block_selection.kernels.measures import sum_covered, xlog2


@triton.jit(do_not_specialize=["n_rows", "n_k", "n_pattern_rows", "n_entries"])
def check_kernel(
    p_maps,
    p_patterns,
    p_pattern,
    p_rows,
    p_least,
    p_finite,
    p_check,
    p_on_pass,
    p_on_fail,
    p_mass,
    p_decided,
    p_found,
    n_rows,
    n_k,
    n_pattern_rows,
    n_entries,
    ENTRIES: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program: one check: its covered mass, whether its pattern is of numbers, its entries."""
    i_check = tl.program_id(0).to(tl.int64)
    i_pattern = tl.load(p_pattern + i_check)
    p_map = p_maps + i_check * n_rows * n_k
    p_one = p_patterns + i_pattern * n_pattern_rows * n_k
    mass = sum_covered(p_map, p_one, p_rows, 0, n_rows, n_k, n_k, True, ROWS, CHUNK) / n_rows
    # Not a minimum, which would turn NaN into 1.
    mass = tl.where(mass > 1.0, 1.0, mass)
    i_found = tl.load(p_finite + i_pattern)
    tl.store(p_mass + i_check, mass)
    tl.store(p_found + i_check, i_found)
    passes = (mass >= tl.load(p_least + i_check)) & (i_found > 0)
    for i_entry in range(0, n_entries, ENTRIES):
        o_e = i_entry + tl.arange(0, ENTRIES)
        m_e = tl.load(p_check + o_e, mask=o_e < n_entries, other=-1) == i_check
        b_pass = tl.load(p_on_pass + o_e, mask=m_e, other=0)
        b_fail = tl.load(p_on_fail + o_e, mask=m_e, other=0)
        tl.store(p_decided + o_e, tl.where(passes, b_pass, b_fail), mask=m_e)


@triton.jit
def decide_sparse(
    p_vertical,
    p_requested,
    p_decided,
    i_slot,
    n_slots,
    n_k,
    n_heads,
    n_entries,
    first,
    otherwise,
    place,
    delta,
    ENTRIES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Store the entries of one pattern, by whether its head is highly sparse.

    `p_vertical` is its head's attention by key block. With the first pattern go the entries that
    are of none.
    """
    HALF_LN2: tl.constexpr = 0.34657359027997264
    even = 1.0 / n_k
    b_sum = tl.zeros([CHUNK], dtype=tl.float32)
    for i_column in range(0, n_k, CHUNK):
        o_n = i_column + tl.arange(0, CHUNK)
        b_p = tl.load(p_vertical + o_n, mask=o_n < n_k, other=0.0)
        b_q = tl.where(o_n < n_k, even, 0.0)
        b_sum += xlog2(b_p) + xlog2(b_q) - 2.0 * xlog2((b_p + b_q) * 0.5)
    divergence = tl.sum(b_sum, 0) * HALF_LN2
    # A distance that is not a number is above nothing.
    is_sparse = tl.sqrt(tl.where(divergence < 0.0, 0.0, divergence)) > delta
    for i_entry in range(0, n_entries, ENTRIES):
        o_e = i_entry + tl.arange(0, ENTRIES)
        is_head = o_e < n_heads
        b_entry = tl.load(p_requested + o_e, mask=o_e < n_entries, other=0)
        b_slot = tl.where(is_head, b_entry - first, o_e - place)
        b_slot = tl.where((b_slot >= 0) & (b_slot < n_slots), b_slot, n_slots)
        b_moved = tl.where(is_sparse, b_entry, otherwise + b_slot)
        b_asked = tl.where(is_sparse, -1, b_entry)
        b_new = tl.where(is_head, b_moved, b_asked)
        b_new = tl.where(b_slot < n_slots, b_new, b_entry)
        m_mine = tl.where(b_slot < n_slots, b_slot, 0) == i_slot
        tl.store(p_decided + o_e, b_new, mask=(o_e < n_entries) & m_mine)


@triton.jit(do_not_specialize=["n_k", "n_heads", "n_entries", "first", "otherwise", "place"])
def sparse_heads_kernel(
    p_vertical,
    p_requested,
    p_decided,
    n_k,
    n_heads,
    n_entries,
    first,
    otherwise,
    place,
    delta,
    ENTRIES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program: one pattern."""
    i_slot = tl.program_id(0)
    decide_sparse(
        p_vertical + i_slot.to(tl.int64) * n_k,
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
