"""The Triton kernel of block-sparse attention: FlashAttention-2 (arXiv 2307.08691) over lists."""

from __future__ import annotations

import triton
import triton.language as tl

from shareprefill.runtime.ops.triton_steps import (
    cap_logits,
    find_tile,
    load_tile,
    rows_in_page,
    softmax_step,
)


@triton.jit
def _attend_keys(
    b_q,
    b_acc,
    b_max,
    b_sum,
    p_k_tile,
    p_v_tile,
    p_list,
    pages,
    i_first,
    i_end,
    o_positions,
    n_k_tokens,
    stride_kn,
    stride_vn,
    scale_log2,
    softcap_log2,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    """Entries `i_first .. i_end - 1` of the program's list; `MASKED`: some keys are hidden."""
    SUBTILES: tl.constexpr = BLOCK_SIZE // BLOCK_N
    o_n = tl.arange(0, BLOCK_N)
    m_d = tl.arange(0, BLOCK_D) < HEAD_DIM
    m_dv = tl.arange(0, BLOCK_DV) < VALUE_DIM
    p_table, stride_kp, stride_vp = pages
    for i_step in range(i_first * SUBTILES, i_end * SUBTILES):
        i_block = tl.load(p_list + i_step // SUBTILES)
        i_key = i_block * BLOCK_SIZE + (i_step % SUBTILES) * BLOCK_N
        o_keys = i_key + o_n
        m_n = o_keys < n_k_tokens
        o_tile = find_tile(i_key, o_n, n_k_tokens, p_table, stride_kp, stride_kn, PAGE_SIZE)
        b_k = load_tile(p_k_tile + o_tile, m_n, m_d, MASKED, HEAD_DIM != BLOCK_D)
        b_logits = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION, out_dtype=tl.float32)
        b_logits *= scale_log2
        if HAS_SOFTCAP:
            b_logits = cap_logits(b_logits, softcap_log2)
        if MASKED:
            # Positions end at Nk - 1, so this hides the tail of the last block as well.
            b_logits = tl.where(o_keys[None, :] <= o_positions[:, None], b_logits, float("-inf"))
        b_weights, _, b_max, b_sum, b_rescale = softmax_step(b_logits, b_max, b_sum, MASKED)
        b_acc = b_acc * b_rescale[:, None]  # [M, Dv]
        o_tile = find_tile(i_key, o_n, n_k_tokens, p_table, stride_vp, stride_vn, PAGE_SIZE)
        b_v = load_tile(p_v_tile + o_tile, m_n, m_dv, MASKED, VALUE_DIM != BLOCK_DV)
        b_acc = tl.dot(
            b_weights.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION, out_dtype=tl.float32
        )
    return b_acc, b_max, b_sum


@triton.jit
def _attend_tile(
    p_q,
    p_k,
    p_v,
    p_out,
    p_lse,
    p_offsets,
    p_indices,
    p_sinks,
    pages,
    stride_qn,
    stride_kn,
    stride_vn,
    stride_on,
    i_list,
    i_row,
    n_q_tokens,
    n_k_tokens,
    scale_log2,
    softcap_log2,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    """`BLOCK_M` query rows from `i_row` on, of the head and sequence that the pointers start at."""
    i_start = tl.load(p_offsets + i_list)
    n_listed = tl.load(p_offsets + i_list + 1) - i_start
    p_list = p_indices + i_start
    # Lists ascend: from their end come blocks past the last row, then blocks that need a mask.
    i_position = i_row + (n_k_tokens - n_q_tokens)
    i_last = (tl.minimum(i_position + BLOCK_M, n_k_tokens) - 1) // BLOCK_SIZE
    while (n_listed > 0) & (tl.load(p_list + n_listed - 1, mask=n_listed > 0, other=-1) > i_last):
        n_listed -= 1
    n_full = n_listed
    i_diagonal = (i_position + 1) // BLOCK_SIZE
    while (n_full > 0) & (tl.load(p_list + n_full - 1, mask=n_full > 0, other=-1) >= i_diagonal):
        n_full -= 1

    o_m = i_row + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    m_m = o_m < n_q_tokens
    o_positions = (o_m + (n_k_tokens - n_q_tokens)).to(tl.int32)
    p_q_tile = p_q + o_m[:, None] * stride_qn + o_d[None, :]
    o_rows = rows_in_page(o_n, PAGE_SIZE)
    p_k_tile = p_k + o_rows[:, None] * stride_kn + o_d[None, :]
    p_v_tile = p_v + o_rows[:, None] * stride_vn + o_dv[None, :]
    b_q = load_tile(p_q_tile, m_m, o_d < HEAD_DIM, True, HEAD_DIM != BLOCK_D)  # [M, D]
    b_acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)  # [M, Dv]
    if HAS_SINKS:
        # The sink is a key that was seen before all others and has no value.
        LOG2E: tl.constexpr = 1.4426950408889634
        b_max = tl.zeros([BLOCK_M], dtype=tl.float32) + tl.load(p_sinks) * LOG2E  # [M]
        b_sum = tl.full([BLOCK_M], 1.0, dtype=tl.float32)
    else:
        b_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)  # [M]
        b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    for MASKED in tl.static_range(2):
        b_acc, b_max, b_sum = _attend_keys(
            b_q,
            b_acc,
            b_max,
            b_sum,
            p_k_tile,
            p_v_tile,
            p_list,
            pages,
            n_full if MASKED else 0,
            n_listed if MASKED else n_full,
            o_positions,
            n_k_tokens,
            stride_kn,
            stride_vn,
            scale_log2,
            softcap_log2,
            HEAD_DIM,
            VALUE_DIM,
            BLOCK_D,
            BLOCK_DV,
            BLOCK_SIZE,
            BLOCK_N,
            HAS_SOFTCAP,
            MASKED,
            PRECISION,
            PAGE_SIZE,
        )

    b_divisor = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_out = b_acc / b_divisor[:, None]  # [M, Dv]
    p_out_tile = p_out + o_m[:, None] * stride_on + o_dv[None, :]
    m_out = m_m[:, None] & (o_dv < VALUE_DIM)[None, :]
    tl.store(p_out_tile, b_out.to(p_out.dtype.element_ty), mask=m_out)
    if HAS_LSE:
        LN2: tl.constexpr = 0.6931471805599453
        b_lse = tl.where(b_sum == 0.0, float("-inf"), (b_max + tl.log2(b_divisor)) * LN2)
        tl.store(p_lse + o_m, b_lse, mask=m_m)


@triton.jit(do_not_specialize=["n_heads", "n_tiles", "n_q", "n_q_tokens", "n_k_tokens"])
def block_sparse_kernel(
    p_q,
    p_k,
    p_v,
    p_out,
    p_lse,
    p_offsets,
    p_indices,
    p_head_to_list,
    p_sinks,
    p_table,
    stride_qh,
    stride_qn,
    stride_kp,
    stride_kg,
    stride_kn,
    stride_vp,
    stride_vg,
    stride_vn,
    stride_oh,
    stride_on,
    n_heads,
    n_tiles,
    n_q,
    n_q_tokens,
    n_k_tokens,
    scale_log2,
    softcap_log2,
    SHARED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    """One program: `BLOCK_M` query rows of one head against their pattern's listed keys.

    Programs run from the last query tile to the first, all heads of a tile together: under the
    causal bound late rows have the most blocks, and light programs fill the end of the launch.
    """
    i_program = tl.program_id(0).to(tl.int64)
    i_head = i_program % n_heads
    i_row = (n_tiles - 1 - i_program // n_heads) * BLOCK_M
    i_pattern = tl.load(p_head_to_list + i_head).to(tl.int64)
    if i_pattern < 0:
        return

    _attend_tile(
        p_q + i_head * stride_qh,
        p_k + i_head // SHARED * stride_kg,
        p_v + i_head // SHARED * stride_vg,
        p_out + i_head * stride_oh,
        p_lse + i_head * n_q_tokens,
        p_offsets,
        p_indices,
        p_sinks + i_head,
        (p_table, stride_kp, stride_vp),
        stride_qn,
        stride_kn,
        stride_vn,
        stride_on,
        i_pattern * n_q + i_row // BLOCK_SIZE,
        i_row,
        n_q_tokens,
        n_k_tokens,
        scale_log2,
        softcap_log2,
        HEAD_DIM,
        VALUE_DIM,
        BLOCK_D,
        BLOCK_DV,
        BLOCK_SIZE,
        BLOCK_M,
        BLOCK_N,
        HAS_LSE,
        HAS_SOFTCAP,
        HAS_SINKS,
        PRECISION,
        PAGE_SIZE,
    )
