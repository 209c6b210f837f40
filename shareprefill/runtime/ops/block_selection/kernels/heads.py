"""Triton kernels that decide which pattern every head reads."""

from __future__ import annotations

import triton
import triton.language as tl

from shareprefill.runtime.ops.block_selection.kernels.measures import sum_covered


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


@triton.jit(do_not_specialize=["n_patterns", "n_flags", "first", "stride_otherwise"])
def redirect_kernel(
    p_read,
    p_holds,
    p_otherwise,
    p_found,
    n_patterns,
    n_flags,
    first,
    stride_otherwise,
    ENTRIES: tl.constexpr,
):
    """One program: one head, which reads another pattern where a flag of its own is not set."""
    i_head = tl.program_id(0)
    i_read = tl.load(p_read + i_head)
    i_place = i_read - first
    if (i_place >= 0) & (i_place < n_patterns):
        b_unset = tl.zeros([ENTRIES], dtype=tl.int32)
        for i_flag in range(0, n_flags, ENTRIES):
            o_f = i_flag + tl.arange(0, ENTRIES)
            b_flag = tl.load(p_holds + i_place * n_flags + o_f, mask=o_f < n_flags, other=1)
            b_unset += (b_flag == 0).to(tl.int32)
        if tl.sum(b_unset, 0) > 0:
            i_read = tl.load(p_otherwise + i_place * stride_otherwise)
    tl.store(p_found + i_head, i_read)
