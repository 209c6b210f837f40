"""The Triton kernels of the vertical and slash profile.

A row at position `p = f * B + c` and key `J * B + j` are `p - J * B - j` apart: with weight
`(c - j) / B` the key counts for block offset `f - J + 1` where `j < c`, with weight `(j - c) / B`
for `f - J - 1` where `j > c`, and with the rest for `f - J`. So three sums a row and key block are
all that is needed. They are kept relative to the row's maximum so far, and become means in a second
launch, when the rows' log-sum-exp is known.
"""

from __future__ import annotations

import triton
import triton.language as tl

from shareprefill.runtime.ops.triton_steps import (
    cap_logits,
    find_tile,
    load_tile,
    rows_in_page,
    sum_peaks,
)


@triton.jit(
    do_not_specialize=["n_slots", "n_splits", "split_blocks", "n_q_tokens", "n_k_tokens", "n_k"],
    do_not_specialize_on_alignment=["p_heads"],
)
def sums_kernel(
    p_q,
    p_k,
    p_sums,
    p_peaks,
    p_heads,
    p_table,
    stride_qh,
    stride_qn,
    stride_kp,
    stride_kg,
    stride_kn,
    n_slots,
    n_splits,
    split_blocks,
    n_q_tokens,
    n_k_tokens,
    n_k,
    scale_log2,
    softcap_log2,
    SHARED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_HEADS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    """One program: `BLOCK_M` of the last rows of one head against `split_blocks` key blocks.

    Stores four numbers a row and block, `[4, BLOCK_M]`: the maximum that the others are relative
    to, the mass, and its parts for the next and the previous offset; and the row's maximum and sum
    over the blocks. Programs that follow each other are heads that read the same keys.
    """
    i_program = tl.program_id(0)
    i_slot = i_program % n_slots
    i_part = (i_program // n_slots) % PARTS
    i_split = i_program // n_slots // PARTS
    i_head = i_slot
    if HAS_HEADS:
        i_head = tl.load(p_heads + i_slot).to(tl.int32)
    n_rows = tl.minimum(BLOCK_SIZE, n_q_tokens)
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    o_row = i_part * BLOCK_M + o_m
    m_m = o_row < n_rows
    b_position = tl.where(m_m, n_k_tokens - n_rows + o_row, -1)
    i_last = tl.max(b_position, 0)
    i_first = i_split * split_blocks
    n_seen = tl.where(i_head >= 0, (i_last + BLOCK_SIZE) // BLOCK_SIZE, 0)
    if i_first < n_seen:
        i_end = tl.minimum(i_first + split_blocks, n_seen)
        n_full = (n_k_tokens - n_rows + i_part * BLOCK_M + 1) // BLOCK_SIZE
        i_full = tl.maximum(tl.minimum(n_full, i_end), i_first)
        i_query = (n_q_tokens - n_rows + o_row).to(tl.int64)
        p_q_rows = p_q + i_head.to(tl.int64) * stride_qh + i_query * stride_qn
        p_k_tile = p_k + (i_head // SHARED).to(tl.int64) * stride_kg
        o_rows = rows_in_page(o_n, PAGE_SIZE)
        p_k_tile = p_k_tile + o_rows[:, None] * stride_kn + o_d[None, :]
        b_q = load_tile(
            p_q_rows[:, None] + o_d[None, :], m_m, o_d < HEAD_DIM, True, HEAD_DIM != BLOCK_D
        )  # [M, D]
        i_place = (i_slot * PARTS + i_part).to(tl.int64)
        p_sums += i_place * n_k * 4 * BLOCK_M
        b_inside = (b_position % BLOCK_SIZE).to(tl.float32)
        b_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
        for MASKED in tl.static_range(2):
            for i_block in range(i_full if MASKED else i_first, i_end if MASKED else i_full):
                b_mass = tl.zeros([BLOCK_M], dtype=tl.float32)
                b_next = tl.zeros([BLOCK_M], dtype=tl.float32)
                b_previous = tl.zeros([BLOCK_M], dtype=tl.float32)
                for STEP in tl.static_range(BLOCK_SIZE // BLOCK_N):
                    i_key = i_block * BLOCK_SIZE + STEP * BLOCK_N
                    o_keys = i_key + o_n
                    o_tile = find_tile(
                        i_key, o_n, n_k_tokens, p_table, stride_kp, stride_kn, PAGE_SIZE
                    )
                    b_k = load_tile(
                        p_k_tile + o_tile,
                        o_keys < n_k_tokens,
                        o_d < HEAD_DIM,
                        MASKED,
                        HEAD_DIM != BLOCK_D,
                    )  # [N, D]
                    b_logits = tl.dot(
                        b_q, tl.trans(b_k), input_precision=PRECISION, out_dtype=tl.float32
                    )  # [M, N]
                    factor = scale_log2
                    if HAS_SOFTCAP:
                        b_logits = cap_logits(b_logits * scale_log2, softcap_log2)
                        factor = 1.0
                    if MASKED:
                        m_seen = o_keys[None, :] <= b_position[:, None]
                        b_logits = tl.where(m_seen, b_logits, float("-inf"))
                    b_new = tl.maximum(b_max, tl.max(b_logits, 1) * factor)  # [M]
                    # A row that has seen no key keeps a finite pivot: -inf - -inf would be NaN.
                    b_pivot = tl.where(b_new == float("-inf"), 0.0, b_new) if MASKED else b_new
                    b_weights = tl.exp2(b_logits * factor - b_pivot[:, None])  # [M, N]
                    b_rescale = tl.exp2(b_max - b_pivot)
                    b_max = b_new
                    b_step = tl.sum(b_weights, 1)  # [M]
                    b_ahead = (b_inside[:, None] - (STEP * BLOCK_N + o_n)[None, :]) / BLOCK_SIZE
                    b_ahead = b_weights * b_ahead  # [M, N]
                    b_mass = b_mass * b_rescale + b_step
                    b_next = b_next * b_rescale + tl.sum(tl.maximum(b_ahead, 0.0), 1)
                    b_previous = b_previous * b_rescale - tl.sum(tl.minimum(b_ahead, 0.0), 1)
                    b_sum = b_sum * b_rescale + b_step
                p_block = p_sums + i_block * 4 * BLOCK_M + o_m
                tl.store(p_block, b_max)
                tl.store(p_block + BLOCK_M, b_mass)
                tl.store(p_block + 2 * BLOCK_M, b_next)
                tl.store(p_block + 3 * BLOCK_M, b_previous)
        p_peaks += (i_place * n_splits + i_split) * 2 * BLOCK_M
        tl.store(p_peaks + o_m, b_max)
        tl.store(p_peaks + BLOCK_M + o_m, b_sum)


@triton.jit
def store_profiles(
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
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_HEADS: tl.constexpr,
):
    """`BLOCK_J` entries of both profiles of one head, from `i_entry` on."""
    i_head = i_slot
    if HAS_HEADS:
        i_head = tl.load(p_heads + i_slot).to(tl.int32)
    n_rows = tl.minimum(BLOCK_SIZE, n_q_tokens)
    o_m = tl.arange(0, BLOCK_M)
    o_j = i_entry + tl.arange(0, BLOCK_J)
    b_vertical = tl.zeros([BLOCK_J], dtype=tl.float32)
    b_slash = tl.zeros([BLOCK_J], dtype=tl.float32)
    for i_part in range(PARTS):
        o_row = i_part * BLOCK_M + o_m
        # Rows past the last one, and all rows of a skipped head, see no block.
        b_position = tl.where(o_row < tl.where(i_head >= 0, n_rows, 0), o_row, -n_k_tokens)
        b_position += n_k_tokens - n_rows
        b_own = tl.where(b_position >= 0, b_position // BLOCK_SIZE, -1)
        n_live = tl.max(b_own, 0) // split_blocks + 1
        i_place = (i_slot * PARTS + i_part).to(tl.int64)
        p_tile = p_peaks + i_place * n_splits * 2 * BLOCK_M
        b_lse = sum_peaks(p_tile, o_m, b_own, n_live, BLOCK_M, BLOCK_S)
        p_place = p_sums + i_place * n_k * 4 * BLOCK_M
        i_block = o_j[:, None] + tl.zeros([BLOCK_J, BLOCK_M], dtype=tl.int32)
        b_vertical += tl.sum(_masses(p_place, i_block, b_own, b_lse, o_m, 0, BLOCK_M), 1)
        # Which block a row's sums are of, if they count for offset o_j.
        i_block = b_own[None, :] - o_j[:, None]
        b_mass = _masses(p_place, i_block, b_own, b_lse, o_m, 1, BLOCK_M)  # [J, M]
        b_mass += _masses(p_place, i_block + 1, b_own, b_lse, o_m, 2, BLOCK_M)
        b_mass += _masses(p_place, i_block - 1, b_own, b_lse, o_m, 3, BLOCK_M)
        b_slash += tl.sum(b_mass, 1)
    tl.store(p_vertical + i_slot.to(tl.int64) * n_k + o_j, b_vertical / n_rows, mask=o_j < n_k)
    tl.store(p_slash + i_slot.to(tl.int64) * (n_k + 1) + o_j, b_slash / n_rows, mask=o_j < n_k + 1)


@triton.jit(
    do_not_specialize=["n_splits", "split_blocks", "n_q_tokens", "n_k_tokens", "n_k"],
    do_not_specialize_on_alignment=["p_heads"],
)
def profiles_kernel(
    p_sums,
    p_peaks,
    p_vertical,
    p_slash,
    p_heads,
    n_splits,
    split_blocks,
    n_q_tokens,
    n_k_tokens,
    n_k,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_HEADS: tl.constexpr,
):
    """One program: `BLOCK_J` entries of both profiles of one head, from what `sums_kernel` left."""
    store_profiles(
        p_sums,
        p_peaks,
        p_vertical,
        p_slash,
        p_heads,
        tl.program_id(1),
        tl.program_id(0) * BLOCK_J,
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


@triton.jit
def _masses(p_place, i_block, b_own, b_lse, o_m, KIND: tl.constexpr, BLOCK_M: tl.constexpr):
    """One kind of mass of rows in the blocks `[J, M]` that they see.

    Kind 0: all; 1: what stays at the block's own offset; 2 and 3: what goes to the next and to
    the previous one.
    """
    m_tile = (i_block >= 0) & (i_block <= b_own[None, :])
    p_tile = p_place + i_block.to(tl.int64) * (4 * BLOCK_M) + o_m[None, :]
    b_max = tl.load(p_tile, mask=m_tile, other=float("-inf"))  # [J, M]
    if KIND < 2:
        b_mass = tl.load(p_tile + BLOCK_M, mask=m_tile, other=0.0)
        if KIND == 1:
            b_mass -= tl.load(p_tile + 2 * BLOCK_M, mask=m_tile, other=0.0)
            b_mass -= tl.load(p_tile + 3 * BLOCK_M, mask=m_tile, other=0.0)
    else:
        b_mass = tl.load(p_tile + KIND * BLOCK_M, mask=m_tile, other=0.0)
    return b_mass * tl.exp2(b_max - b_lse[None, :])
