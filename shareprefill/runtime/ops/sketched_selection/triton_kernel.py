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


@triton.jit
def query_kernel(
    p_q,
    p_mean,
    p_axes,
    p_parts,
    p_const,
    stride_qb,
    stride_qh,
    n_groups,
    scale_log2,
    SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program: the coordinates of the queries of one KV head, as `score_kernel` takes them.

    Stores each coordinate as the sum of two float16, `[2, ROWS, BLOCK_R]`, zero where there is
    none, and what is to be added to their products with 64 + code, float32 `[ROWS]`.
    """
    i_list = tl.program_id(0).to(tl.int64)
    i_batch = i_list // n_groups
    i_group = i_list % n_groups
    o_m, o_d, o_c = tl.arange(0, 2 * ROWS), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_R)
    m_m, m_d, m_c = o_m < SHARED, o_d < HEAD_DIM, o_c < RANK
    p_query = p_q + i_batch * stride_qb + (i_group * SHARED + o_m)[:, None] * stride_qh
    b_q = tl.load(p_query + o_d[None, :], mask=m_m[:, None] & m_d[None, :], other=0.0)
    b_q = b_q.to(tl.float32) * scale_log2
    p_axis = p_axes + (i_list * RANK + o_c)[None, :] * HEAD_DIM + o_d[:, None]
    b_axes = tl.load(p_axis, mask=m_c[None, :] & m_d[:, None], other=0.0)  # [D, BLOCK_R]
    b_parts = tl.dot(b_q, b_axes, input_precision="ieee")
    b_high = b_parts.to(tl.float16)
    b_low = (b_parts - b_high.to(tl.float32)).to(tl.float16)
    p_part = p_parts + (i_list * 2 * ROWS + o_m)[:, None] * BLOCK_R + o_c[None, :]
    m_row = (o_m < ROWS)[:, None] & (o_c >= 0)[None, :]
    tl.store(p_part, b_high, mask=m_row)
    tl.store(p_part + ROWS * BLOCK_R, b_low, mask=m_row)
    b_mean = tl.load(p_mean + i_list * HEAD_DIM + o_d, mask=m_d, other=0.0)
    b_const = tl.sum(b_q * b_mean[None, :], 1)
    b_const -= 71.5 * tl.sum(b_high.to(tl.float32) + b_low.to(tl.float32), 1)
    tl.store(p_const + i_list * ROWS + o_m, b_const, mask=o_m < ROWS)


@triton.jit(do_not_specialize=["n_tokens", "n_words", "n_capacity"])
def score_kernel(
    p_q,
    p_k,
    p_words,
    p_parts,
    p_const,
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
    BLOCK_R: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
    LOCAL: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
):
    """One program: the log-sum-exp of key blocks, for all query heads of a KV head.

    The first programs of a KV head take one block that is always read each, by its keys; the others
    take the rest by their codes, `TILES` times `BLOCKS` of them each. Stores float32 `[R, n]`, of
    blocks that the sequence has.
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
    # Rows of a matrix unit: each query twice by its coordinates, once by its keys.
    o_m = tl.arange(0, 2 * ROWS)
    m_r, m_m, m_d = o_r < SHARED, o_m < SHARED, o_d < HEAD_DIM
    p_list = p_lse + i_list * SHARED * n_capacity

    if i_part <= NEWEST:
        p_query = p_q + i_batch * stride_qb + (i_group * SHARED + o_m)[:, None] * stride_qh
        b_q = tl.load(p_query + o_d[None, :], mask=m_m[:, None] & m_d[None, :], other=0.0)
        b_q = b_q.to(tl.float32) * scale_log2
        i_block = tl.where(i_part == 0, 0, n - i_part)
        o_token = i_block * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
        m_token = (o_token >= 0) & (o_token < n_keys)
        p_keys = p_k + i_batch * stride_kb + i_group * stride_kg + i_start * stride_kn
        p_keys += o_token.to(tl.int64)[None, :] * stride_kn + o_d[:, None]
        b_k = tl.load(p_keys, mask=m_token[None, :] & m_d[:, None], other=0.0).to(tl.float32)
        b_logits = tl.dot(b_q, b_k, input_precision="ieee")  # [2 * ROWS, BLOCK_SIZE]
        b_logits = tl.where(m_token[None, :], b_logits, float("-inf"))
        o_block = i_block + tl.arange(0, 1)
        m_read = (o_block == 0) | (o_block * BLOCK_SIZE + BLOCK_SIZE > n_keys - LOCAL)
        # A first block that is one of the newest, too, is stored twice, with the same numbers.
        m_block = m_m[:, None] & (m_read & (o_block >= 0))[None, :]
        store_masses(p_list + o_m[:, None] * n_capacity, b_logits, o_block, m_block, BLOCK_SIZE)
    else:
        o_c = tl.arange(0, BLOCK_R)
        p_part = p_parts + (i_list * 2 * ROWS + o_m)[:, None] * BLOCK_R + o_c[None, :]
        b_parts = tl.load(p_part)
        b_const = tl.load(p_const + i_list * ROWS + o_r)
        i_start_block = (i_part - NEWEST - 1) * BLOCKS * TILES
        for i_tile in range(TILES):
            i_first = i_start_block + i_tile * BLOCKS
            if i_first < n:
                o_token = i_first * BLOCK_SIZE + tl.arange(0, BLOCKS * BLOCK_SIZE)
                m_token = o_token < n_keys
                p_codes = p_words + (i_list * n_words + o_token)[:, None] * (RANK // 8)
                m_code = m_token[:, None] & (o_c < RANK)[None, :]
                b_word = tl.load(p_codes + (o_c // 8)[None, :], mask=m_code, other=0)
                # The bits of 64 + code in float16.
                b_code = ((b_word >> (4 * (o_c % 8))[None, :]) & 15) * 16 + 0x5400
                b_code = b_code.to(tl.int16).to(tl.float16, bitcast=True)  # [N, BLOCK_R]
                b_both = tl.dot(b_parts, tl.trans(b_code))  # [2 * ROWS, N]
                b_both = tl.reshape(b_both, [2, ROWS, BLOCKS * BLOCK_SIZE])
                b_logits = tl.sum(b_both, 0) + b_const[:, None]
                b_logits = tl.where(m_token[None, :], b_logits, float("-inf"))
                o_block = i_first + tl.arange(0, BLOCKS)
                m_older = o_block * BLOCK_SIZE + BLOCK_SIZE <= n_keys - LOCAL
                m_block = m_r[:, None] & ((o_block > 0) & m_older)[None, :]
                p_rows = p_list + o_r[:, None] * n_capacity
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
