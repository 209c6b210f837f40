"""The Triton kernels of a decode step's attention over listed key blocks."""

from __future__ import annotations

import triton
import triton.language as tl

from shareprefill.runtime.ops.triton_steps import find_pages, softmax_step, wait_for_last


@triton.jit(
    do_not_specialize=["n_entries", "n_tokens", "n_splits"],
    do_not_specialize_on_alignment=["p_counts"],
)
def split_kernel(
    p_q,
    p_k,
    p_v,
    p_blocks,
    p_counts,
    p_lengths,
    p_starts,
    p_tables,
    p_parts,
    p_lse,
    n_entries,
    n_tokens,
    n_splits,
    stride_qb,
    stride_qh,
    stride_tb,
    stride_kb,
    stride_kg,
    stride_kn,
    stride_vb,
    stride_vg,
    stride_vn,
    n_groups,
    scale_log2,
    SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program: all query heads of one KV head against one of `n_splits` parts of its list.

    Stores their output over this part `[SHARED, Dv]` and their log-sum-exp in base 2, which is
    -inf, with an output that is not stored, where the part has no key.
    """
    wait_for_last(OVERLAPS)
    i_split = tl.program_id(0)
    i_list = tl.program_id(1).to(tl.int64)
    i_batch = i_list // n_groups
    i_group = i_list % n_groups
    n_blocks = tl.load(p_counts + i_list)
    n_keys = n_tokens
    if HAS_LENGTHS:
        n_keys = tl.load(p_lengths + i_batch)
    i_first = tl.full([], 0, tl.int64)
    if HAS_STARTS:
        i_first = tl.load(p_starts + i_batch).to(tl.int64)
        n_keys -= i_first.to(tl.int32)
    # A step takes several small blocks, or a part of a large one.
    STEP: tl.constexpr = BLOCK_N // BLOCK_SIZE if BLOCK_N > BLOCK_SIZE else 1
    PARTS: tl.constexpr = BLOCK_SIZE // BLOCK_N if BLOCK_SIZE > BLOCK_N else 1
    n_steps = tl.cdiv(n_blocks, STEP) * PARTS
    n_mine = tl.cdiv(n_steps, n_splits)
    start = i_split * n_mine
    stop = tl.minimum(start + n_mine, n_steps)

    o_r = tl.arange(0, ROWS)
    o_d, o_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    o_n = tl.arange(0, BLOCK_N)
    m_r, m_d, m_dv = o_r < SHARED, o_d < HEAD_DIM, o_dv < VALUE_DIM
    p_query = p_q + i_batch * stride_qb + (i_group * SHARED + o_r)[:, None] * stride_qh
    b_q = tl.load(p_query + o_d[None, :], mask=m_r[:, None] & m_d[None, :], other=0.0)
    p_key, p_value = p_k + i_group * stride_kg, p_v + i_group * stride_vg
    p_list = p_blocks + i_list * n_entries

    b_max = tl.full([ROWS], float("-inf"), tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    b_out = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    for i_step in range(start, stop):
        o_entry = (i_step // PARTS) * STEP + o_n // BLOCK_SIZE
        m_entry = o_entry < n_blocks
        b_block = tl.load(p_list + o_entry, mask=m_entry, other=0)
        o_token = b_block * BLOCK_SIZE + (i_step % PARTS) * BLOCK_N + o_n % BLOCK_SIZE
        m_token = m_entry & (o_token < n_keys)
        b_page, o_row = find_pages(
            i_batch, o_token + i_first, m_token, p_tables, stride_tb, PAGE_SIZE
        )
        p_keys = p_key + (b_page * stride_kb + o_row * stride_kn)[None, :] + o_d[:, None]
        b_k = tl.load(p_keys, mask=m_token[None, :] & m_d[:, None], other=0.0)  # [D, N]
        p_values = p_value + (b_page * stride_vb + o_row * stride_vn)[:, None] + o_dv[None, :]
        b_v = tl.load(p_values, mask=m_token[:, None] & m_dv[None, :], other=0.0)
        b_logits = tl.dot(b_q, b_k, input_precision=PRECISION) * scale_log2  # [R, N]
        b_logits = tl.where(m_token[None, :], b_logits, float("-inf"))
        b_weights, _, b_max, b_sum, b_rescale = softmax_step(b_logits, b_max, b_sum, True)
        b_out = b_out * b_rescale[:, None]
        b_out += tl.dot(b_weights.to(b_v.dtype), b_v, input_precision=PRECISION)

    m_any = b_sum > 0
    o_row = (i_list * n_splits + i_split) * SHARED + o_r
    b_lse = tl.where(m_any, b_max + tl.log2(tl.where(m_any, b_sum, 1.0)), float("-inf"))
    tl.store(p_lse + o_row, b_lse, mask=m_r)
    b_out = b_out / tl.where(m_any, b_sum, 1.0)[:, None]
    m_out = (m_r & m_any)[:, None] & m_dv[None, :]
    tl.store(p_parts + o_row[:, None] * VALUE_DIM + o_dv[None, :], b_out, mask=m_out)


@triton.jit(do_not_specialize=["n_splits"])
def merge_kernel(
    p_parts,
    p_lse,
    p_out,
    n_splits,
    SHARED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program: the parts of one query head, put together."""
    wait_for_last(OVERLAPS)
    i_head = tl.program_id(0).to(tl.int64)
    o_s, o_dv = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_DV)
    m_dv = o_dv < VALUE_DIM
    o_row = ((i_head // SHARED) * n_splits + o_s) * SHARED + i_head % SHARED
    b_lse = tl.load(p_lse + o_row, mask=o_s < n_splits, other=float("-inf"))
    b_top = tl.max(b_lse, 0)
    b_weights = tl.exp2(b_lse - tl.where(b_top == float("-inf"), 0.0, b_top))  # [S]
    m_part = (b_lse > float("-inf"))[:, None] & m_dv[None, :]
    b_parts = tl.load(p_parts + o_row[:, None] * VALUE_DIM + o_dv[None, :], mask=m_part, other=0.0)
    b_sum = tl.sum(b_weights, 0)
    b_out = tl.sum(b_parts * b_weights[:, None], 0) / tl.where(b_sum > 0, b_sum, 1.0)
    tl.store(p_out + i_head * VALUE_DIM + o_dv, b_out.to(p_out.dtype.element_ty), mask=m_dv)
