"""The Triton kernels that choose a decode step's blocks by a sketch of the keys."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def store_masses(p_lse, b_logits, o_block, m_block, BLOCK_SIZE: tl.constexpr):
    """Store the log-sum-exp in base 2 of each block of logits `[R, blocks * BLOCK_SIZE]`."""
    ROWS: tl.constexpr = b_logits.shape[0]
    BLOCKS: tl.constexpr = b_logits.shape[1] // BLOCK_SIZE
    b_logits = tl.reshape(b_logits, [ROWS, BLOCKS, BLOCK_SIZE])
    b_top = tl.max(b_logits, 2)
    b_pivot = tl.where(b_top == float("-inf"), 0.0, b_top)
    b_sum = tl.sum(tl.exp2(b_logits - b_pivot[:, :, None]), 2)
    b_lse = b_pivot + tl.log2(b_sum)
    tl.store(p_lse + o_block[None, :], b_lse, mask=m_block)


@triton.jit(do_not_specialize=["n_tokens", "n_words", "n_capacity"])
def score_kernel(
    p_q,
    p_k,
    p_words,
    p_mean,
    p_axes,
    p_lengths,
    p_starts,
    p_lse,
    stride_qb,
    stride_qh,
    stride_kb,
    stride_kg,
    stride_kn,
    n_groups,
    n_tokens,
    n_words,
    n_capacity,
    scale_log2,
    SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    LOCAL: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
):
    """One program: the log-sum-exp of `BLOCKS` key blocks, for all query heads of a KV head.

    The first programs of a KV head take one block that is always read each, by its keys; the others
    take the rest by their codes. Stores float32 `[R, n]`, of blocks that the sequence has.
    """
    NEWEST: tl.constexpr = (LOCAL + BLOCK_SIZE - 2) // BLOCK_SIZE + 1
    i_part = tl.program_id(0)
    i_list = tl.program_id(1).to(tl.int64)
    i_batch = i_list // n_groups
    i_group = i_list % n_groups
    n_keys = n_tokens
    if HAS_LENGTHS:
        n_keys = tl.load(p_lengths + i_batch)
    i_start = tl.full([], 0, tl.int64)
    if HAS_STARTS:
        i_start = tl.load(p_starts + i_batch).to(tl.int64)
        n_keys -= i_start.to(tl.int32)
    n = tl.cdiv(n_keys, BLOCK_SIZE)
    o_r, o_d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    m_r, m_d = o_r < SHARED, o_d < HEAD_DIM
    p_query = p_q + i_batch * stride_qb + (i_group * SHARED + o_r)[:, None] * stride_qh
    b_q = tl.load(p_query + o_d[None, :], mask=m_r[:, None] & m_d[None, :], other=0.0)
    b_q = b_q.to(tl.float32) * scale_log2
    p_rows = p_lse + i_list * SHARED * n_capacity + o_r[:, None] * n_capacity

    if i_part <= NEWEST:
        i_block = tl.where(i_part == 0, 0, n - i_part)
        o_token = i_block * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
        m_token = (o_token >= 0) & (o_token < n_keys)
        p_keys = p_k + i_batch * stride_kb + i_group * stride_kg + i_start * stride_kn
        p_keys += o_token.to(tl.int64)[:, None] * stride_kn + o_d[None, :]
        b_k = tl.load(p_keys, mask=m_token[:, None] & m_d[None, :], other=0.0).to(tl.float32)
        b_logits = tl.sum(b_q[:, None, :] * b_k[None, :, :], 2)  # [R, BLOCK_SIZE]
        b_logits = tl.where(m_token[None, :], b_logits, float("-inf"))
        o_block = i_block + tl.arange(0, 1)
        m_read = (o_block == 0) | (o_block * BLOCK_SIZE + BLOCK_SIZE > n_keys - LOCAL)
        # A first block that is one of the newest, too, is stored twice, with the same numbers.
        m_block = m_r[:, None] & (m_read & (o_block >= 0))[None, :]
        store_masses(p_rows, b_logits, o_block, m_block, BLOCK_SIZE)
    else:
        i_first = (i_part - NEWEST - 1) * BLOCKS
        if i_first < n:
            o_token = i_first * BLOCK_SIZE + tl.arange(0, BLOCKS * BLOCK_SIZE)
            m_token = o_token < n_keys
            b_mean = tl.load(p_mean + i_list * HEAD_DIM + o_d, mask=m_d, other=0.0)
            b_logits = tl.sum(b_q * b_mean[None, :], 1)[:, None]
            b_logits += tl.zeros([ROWS, BLOCKS * BLOCK_SIZE], tl.float32)
            p_codes = p_words + (i_list * n_words + o_token) * (RANK // 8)
            for i_word in tl.static_range(RANK // 8):
                b_word = tl.load(p_codes + i_word, mask=m_token, other=0)
                for i_code in tl.static_range(8):
                    i_axis = i_word * 8 + i_code
                    p_axis = p_axes + (i_list * RANK + i_axis) * HEAD_DIM + o_d
                    b_axis = tl.load(p_axis, mask=m_d, other=0.0)
                    b_part = tl.sum(b_q * b_axis[None, :], 1)  # [R]
                    b_code = ((b_word >> (4 * i_code)) & 15).to(tl.float32) - 7.5
                    b_logits += b_part[:, None] * b_code[None, :]
            b_logits = tl.where(m_token[None, :], b_logits, float("-inf"))
            o_block = i_first + tl.arange(0, BLOCKS)
            m_older = o_block * BLOCK_SIZE + BLOCK_SIZE <= n_keys - LOCAL
            m_block = m_r[:, None] & ((o_block > 0) & m_older)[None, :]
            store_masses(p_rows, b_logits, o_block, m_block, BLOCK_SIZE)


@triton.jit(do_not_specialize=["n_tokens", "n_capacity"])
def select_kernel(
    p_lse,
    p_share,
    p_worth,
    p_lengths,
    p_starts,
    p_blocks,
    p_counts,
    n_groups,
    n_tokens,
    n_capacity,
    SHARED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOCAL: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HALVINGS: tl.constexpr,
):
    """One program: the list of one KV head, `BLOCK_N` at least its number of blocks."""
    i_list = tl.program_id(0).to(tl.int64)
    i_batch = i_list // n_groups
    n_keys = n_tokens
    if HAS_LENGTHS:
        n_keys = tl.load(p_lengths + i_batch)
    if HAS_STARTS:
        n_keys -= tl.load(p_starts + i_batch)
    n = tl.cdiv(n_keys, BLOCK_SIZE)
    o_n = tl.arange(0, BLOCK_N)
    m_n = o_n < n
    b_mass = tl.zeros([BLOCK_N], tl.float32)
    for i_row in tl.static_range(SHARED):
        p_row = p_lse + (i_list * SHARED + i_row) * n_capacity
        b_lse = tl.load(p_row + o_n, mask=m_n, other=float("-inf"))
        b_weights = tl.exp2(b_lse - tl.max(b_lse, 0))
        b_share = tl.load(p_share + (i_list % n_groups) * SHARED + i_row)
        b_mass += b_weights * (b_share / tl.sum(b_weights, 0))
    m_always = m_n & ((o_n == 0) | (o_n * BLOCK_SIZE + BLOCK_SIZE > n_keys - LOCAL))
    b_free = tl.where(m_always, 0.0, b_mass)
    b_worth = tl.load(p_worth + i_list) / n
    # Thresholds are 2 ** (-place / 2); all up to the place that is looked for pay for the blocks
    # above them, or none does.
    i_low = tl.full([], -1, tl.int32)
    i_high = tl.full([], 1 << HALVINGS, tl.int32)
    for _ in tl.static_range(HALVINGS + 1):
        i_middle = (i_low + i_high) // 2
        b_threshold = tl.exp2(-i_middle.to(tl.float32) / 2)
        b_after = tl.sum(tl.where(b_free < b_threshold, b_free, 0.0), 0)
        b_before = tl.sum(tl.where(b_free < 1.41421356 * b_threshold, b_free, 0.0), 0)
        pays = (b_before + b_after) * 0.5 * b_threshold >= b_worth
        i_low = tl.where(pays, i_middle, i_low)
        i_high = tl.where(pays, i_high, i_middle)
    b_threshold = tl.where(i_low < 0, float("inf"), tl.exp2(-i_low.to(tl.float32) / 2))
    m_read = m_always | (m_n & (b_mass >= b_threshold))
    b_place = tl.cumsum(m_read.to(tl.int32), 0) - 1
    tl.store(p_blocks + i_list * n_capacity + b_place, o_n, mask=m_read)
    tl.store(p_counts + i_list, tl.sum(m_read.to(tl.int32), 0))
