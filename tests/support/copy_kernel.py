"""A kernel to test launches with."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy_kernel(p_source, p_target, count, factor, BLOCK: tl.constexpr):
    """One program: `BLOCK` entries, times a factor."""
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_entry = tl.load(p_source + o_n, mask=o_n < count)
    tl.store(p_target + o_n, b_entry * factor, mask=o_n < count)


@triton.jit(do_not_specialize_on_alignment=["p_target"])
def copy_anywhere_kernel(p_source, p_target, count, factor, BLOCK: tl.constexpr):
    """The same, compiled alike for all addresses of the target."""
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_entry = tl.load(p_source + o_n, mask=o_n < count)
    tl.store(p_target + o_n, b_entry * factor, mask=o_n < count)
