"""Triton kernels around FlashAttention-4: its block lists, and the heads that it leaves out."""

# Triton's language is typed by its compiler, which knows constexpr, program-wide scalars and tiles.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportAssignmentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _copy_rows(
    p_from,
    p_to,
    stride_fn,
    stride_tn,
    n_rows,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Copy `[n_rows, DIM]`, `BLOCK_M` rows at a time."""
    o_d = tl.arange(0, BLOCK_D)
    for i_row in range(0, n_rows, BLOCK_M):
        o_m = i_row + tl.arange(0, BLOCK_M)
        m_tile = (o_m < n_rows)[:, None] & (o_d < DIM)[None, :]
        b_rows = tl.load(p_from + o_m[:, None] * stride_fn + o_d[None, :], mask=m_tile)
        tl.store(p_to + o_m[:, None] * stride_tn + o_d[None, :], b_rows, mask=m_tile)


@triton.jit(do_not_specialize=["i_first_row", "n_rows", "n_q", "n_q_tokens", "n_k_tokens", "width"])
def prepare_kernel(
    p_offsets,
    p_indices,
    p_head_to_list,
    p_counts,
    p_nothing,
    p_tiles,
    p_out,
    p_kept,
    stride_oh,
    stride_on,
    stride_eh,
    stride_en,
    i_first_row,
    n_rows,
    n_q,
    n_q_tokens,
    n_k_tokens,
    width,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One program: the key tiles of one query block of one head, `[H, n_rows, width]`.

    Listed blocks that no row of the query block sees are dropped, the others cut into tiles of
    `TILE` keys, of which the last ones may lie past the last row's position. A head that is left
    out gets no tiles, and its rows of the output are kept in `p_kept`.
    """
    SUBTILES: tl.constexpr = BLOCK_SIZE // TILE
    i_program = tl.program_id(0).to(tl.int64)
    i_head = i_program // n_rows
    i_local = i_program % n_rows
    i_row = i_first_row + i_local
    if i_head == 0:
        tl.store(p_nothing + i_local, 0)
    i_pattern = tl.load(p_head_to_list + i_head).to(tl.int64)
    i_end = tl.minimum((i_row + 1) * BLOCK_SIZE, n_q_tokens)
    if i_pattern < 0:
        tl.store(p_counts + i_program, 0)
        _copy_rows(
            p_out + i_head * stride_oh + i_row * BLOCK_SIZE * stride_on,
            p_kept + i_head * stride_eh + i_local * BLOCK_SIZE * stride_en,
            stride_on,
            stride_en,
            i_end - i_row * BLOCK_SIZE,
            DIM,
            BLOCK_D,
            BLOCK_M,
        )
        return
    i_start = tl.load(p_offsets + i_pattern * n_q + i_row)
    n_listed = tl.load(p_offsets + i_pattern * n_q + i_row + 1) - i_start
    p_list = p_indices + i_start
    i_last = i_end - 1 + (n_k_tokens - n_q_tokens)
    while (n_listed > 0) & (
        tl.load(p_list + n_listed - 1, mask=n_listed > 0, other=-1) > i_last // BLOCK_SIZE
    ):
        n_listed -= 1
    n_tiles = n_listed * SUBTILES
    if SUBTILES > 1:
        i_block = tl.load(p_list + n_listed - 1, mask=n_listed > 0, other=0)
        n_seen = (i_last - i_block * BLOCK_SIZE) // TILE + 1
        n_tiles -= tl.maximum(SUBTILES - n_seen, 0).to(tl.int32)
        n_tiles = tl.maximum(n_tiles, 0)
    tl.store(p_counts + i_program, n_tiles)
    p_row = p_tiles + i_program * width
    for i_tile in range(0, n_tiles, BLOCK):
        o_tiles = i_tile + tl.arange(0, BLOCK)
        m_tiles = o_tiles < n_tiles
        b_blocks = tl.load(p_list + o_tiles // SUBTILES, mask=m_tiles)
        tl.store(p_row + o_tiles, b_blocks * SUBTILES + o_tiles % SUBTILES, mask=m_tiles)


@triton.jit(do_not_specialize=["i_first_row", "n_rows", "n_q_tokens"])
def restore_kernel(
    p_head_to_list,
    p_out,
    p_kept,
    stride_oh,
    stride_on,
    stride_eh,
    stride_en,
    i_first_row,
    n_rows,
    n_q_tokens,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One program: the kept rows of one query block of one head that is left out, put back."""
    i_program = tl.program_id(0).to(tl.int64)
    i_head = i_program // n_rows
    i_local = i_program % n_rows
    if tl.load(p_head_to_list + i_head) >= 0:
        return
    i_row = (i_first_row + i_local) * BLOCK_SIZE
    _copy_rows(
        p_kept + i_head * stride_eh + i_local * BLOCK_SIZE * stride_en,
        p_out + i_head * stride_oh + i_row * stride_on,
        stride_en,
        stride_on,
        tl.minimum(i_row + BLOCK_SIZE, n_q_tokens) - i_row,
        DIM,
        BLOCK_D,
        BLOCK_M,
    )
