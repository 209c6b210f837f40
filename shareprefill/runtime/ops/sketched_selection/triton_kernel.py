"""The Triton kernels that choose a decode step's blocks by a sketch of the keys."""

from __future__ import annotations

import triton
import triton.language as tl

from shareprefill.runtime.ops.triton_steps import find_pages, wait_for_last


@triton.jit
def dot_bytes(b_codes, i_query, b_sum, PACKED: tl.constexpr):
    """`b_sum` and the products of four codes, one a byte, with four signed bytes of a query."""
    if PACKED:
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [b_codes, i_query, b_sum],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    for i in tl.static_range(4):
        b_sum += ((b_codes >> (8 * i)) & 255) * ((i_query << (24 - 8 * i)) >> 24)
    return b_sum


@triton.jit
def fast_exp2(b_x, PACKED: tl.constexpr):
    """2 to the power of x; 0 below 2 ** -126."""
    if PACKED:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=r,r", [b_x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.exp2(b_x)


@triton.jit
def fast_log2(b_x, PACKED: tl.constexpr):
    """Logarithm to base 2."""
    if PACKED:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=r,r", [b_x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.log2(b_x)


@triton.jit
def query_kernel(
    p_q,
    p_mean,
    p_axes,
    p_parts,
    p_factors,
    stride_qb,
    stride_qh,
    n_heads,
    n_bases,
    scale_log2,
    SHARED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program: the coordinates of one query, as `score_kernel` takes them.

    Stores them as signed bytes of one factor, `[RANK / 8, 2]` int32: those that the lower four bits
    of a word's bytes belong to, then the others. And the factor, and what is to be added to the
    product with the codes, float32 `[2]`.
    """
    wait_for_last(OVERLAPS)
    i_row = tl.program_id(0).to(tl.int64)
    o_c, o_d = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    m_c, m_d = o_c < RANK, o_d < HEAD_DIM
    p_query = p_q + (i_row // n_heads) * stride_qb + (i_row % n_heads) * stride_qh
    b_q = tl.load(p_query + o_d, mask=m_d, other=0.0).to(tl.float32) * scale_log2
    # Sequences have bases of their own, or one together.
    i_base = i_row // SHARED % n_bases
    p_axis = p_axes + (i_base * RANK + o_c)[:, None] * HEAD_DIM + o_d[None, :]
    b_axes = tl.load(p_axis, mask=m_c[:, None] & m_d[None, :], other=0.0)
    b_parts = tl.sum(b_axes * b_q[None, :], 1)  # [BLOCK_R]
    b_top = tl.max(tl.abs(b_parts), 0)
    b_bytes = tl.floor(b_parts * tl.where(b_top > 0, 127.0 / b_top, 0.0) + 0.5)
    b_factor = b_top / 127.0
    b_mean = tl.load(p_mean + i_base * HEAD_DIM + o_d, mask=m_d, other=0.0)
    b_const = tl.sum(b_q * b_mean, 0) - 7.5 * b_factor * tl.sum(b_bytes, 0)
    tl.store(p_factors + i_row * 2, b_factor)
    tl.store(p_factors + i_row * 2 + 1, b_const)
    b_bytes = (b_bytes.to(tl.int32) & 255) << (o_c % 8 // 2 * 8)
    b_words = tl.sum(tl.reshape(b_bytes, [BLOCK_R // 8, 4, 2]), 1)
    o_w = tl.arange(0, BLOCK_R // 8)
    p_part = p_parts + (i_row * (RANK // 8) + o_w)[:, None] * 2 + tl.arange(0, 2)[None, :]
    tl.store(p_part, b_words, mask=(o_w < RANK // 8)[:, None])


@triton.jit
def score_always(
    p_lse,
    p_query,
    p_key,
    p_tables,
    stride_qh,
    stride_tb,
    stride_kb,
    stride_kn,
    i_batch,
    i_start,
    i_block,
    n_keys,
    n_capacity,
    scale_log2,
    SHARED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LOCAL: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    """Store the log-sum-exp in base 2 of a block by its keys, if it is one that is always read."""
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_DIM
    o_token = i_block * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    m_token = (o_token >= 0) & (o_token < n_keys)
    b_page, o_row = find_pages(i_batch, o_token + i_start, m_token, p_tables, stride_tb, PAGE_SIZE)
    p_keys = p_key + (b_page * stride_kb + o_row * stride_kn)[:, None] + o_d[None, :]
    b_k = tl.load(p_keys, mask=m_token[:, None] & m_d[None, :], other=0.0).to(tl.float32)
    o_block = i_block + tl.arange(0, 1)
    m_read = (o_block == 0) | (o_block * BLOCK_SIZE + BLOCK_SIZE > n_keys - LOCAL)
    for i_row in tl.static_range(SHARED):
        b_q = tl.load(p_query + i_row * stride_qh + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_logits = tl.sum(b_k * (b_q * scale_log2)[None, :], 1)
        b_logits = tl.where(m_token, b_logits, float("-inf"))
        b_top = tl.max(b_logits, 0)
        b_pivot = tl.where(b_top == float("-inf"), 0.0, b_top)
        b_lse = b_pivot + tl.log2(tl.sum(tl.exp2(b_logits - b_pivot), 0))
        # A first block that is one of the newest, too, is stored twice, with the same numbers.
        p_block = p_lse + i_row * n_capacity + o_block
        tl.store(p_block, b_lse + tl.zeros([1], tl.float32), mask=m_read & (o_block >= 0))


@triton.jit(do_not_specialize=["n_tokens", "n_capacity"])
def score_kernel(
    p_q,
    p_k,
    p_words,
    p_parts,
    p_factors,
    p_lengths,
    p_starts,
    p_tables,
    p_lse,
    n_tokens,
    n_capacity,
    stride_qb,
    stride_qh,
    stride_tb,
    stride_kb,
    stride_kg,
    stride_kn,
    n_groups,
    n_words,
    scale_log2,
    SHARED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    LOCAL: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PACKED: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program: the log-sum-exp of key blocks, for all query heads of a KV head.

    The first programs of a KV head take one block that is always read each, by its keys; the others
    take the rest by their codes, `BLOCKS` of them each. Stores float32 `[R, n]`, of blocks that the
    sequence has. Codes begin with a sequence's first token, or are in pages as its keys are.
    """
    wait_for_last(OVERLAPS)
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
    p_list = p_lse + i_list * SHARED * n_capacity

    if i_part <= NEWEST:
        p_query = p_q + i_batch * stride_qb + i_group * SHARED * stride_qh
        p_key = p_k + i_group * stride_kg
        i_block = tl.where(i_part == 0, 0, tl.cdiv(n_keys, BLOCK_SIZE) - i_part)
        score_always(
            p_list,
            p_query,
            p_key,
            p_tables,
            stride_qh,
            stride_tb,
            stride_kb,
            stride_kn,
            i_batch,
            i_start,
            i_block,
            n_keys,
            n_capacity,
            scale_log2,
            SHARED,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_SIZE,
            LOCAL,
            PAGE_SIZE,
        )
    else:
        WORDS: tl.constexpr = RANK // 8
        KEYS: tl.constexpr = BLOCKS * BLOCK_SIZE
        i_first = (i_part - NEWEST - 1) * BLOCKS
        o_block = i_first + tl.arange(0, BLOCKS)
        # All tokens of these are there.
        m_block = (o_block > 0) & (o_block * BLOCK_SIZE + BLOCK_SIZE <= n_keys - LOCAL)
        if PAGE_SIZE > 0:
            # Whole runs of tokens, which lie side by side in their page.
            RUN: tl.constexpr = PAGE_SIZE if PAGE_SIZE < KEYS else KEYS
            o_run = i_first * BLOCK_SIZE + tl.arange(0, KEYS // RUN) * RUN
            p_page = p_tables + i_batch * stride_tb + o_run // PAGE_SIZE
            b_page = tl.load(p_page, mask=o_run < n_keys, other=0).to(tl.int64)
            o_word = (b_page * n_groups + i_group) * (WORDS * PAGE_SIZE) + o_run % PAGE_SIZE
            o_word = o_word[:, None] + tl.arange(0, RUN)[None, :]
            o_token = o_run[:, None] + tl.arange(0, RUN)[None, :]
        else:
            o_token = i_first * BLOCK_SIZE + tl.arange(0, KEYS)
            o_word = i_list * (WORDS * n_words) + o_token
        # All of a block or none of it, which makes wide loads.
        m_word = o_token // BLOCK_SIZE * BLOCK_SIZE + BLOCK_SIZE <= n_keys - LOCAL
        codes = ()
        for i_word in tl.static_range(WORDS):
            p_word = p_words + i_word * (PAGE_SIZE if PAGE_SIZE > 0 else n_words)
            b_word = tl.reshape(tl.load(p_word + o_word, mask=m_word, other=0), [KEYS])
            codes += (b_word & 0x0F0F0F0F, (b_word >> 4) & 0x0F0F0F0F)
        for i_row in tl.static_range(SHARED):
            p_part = p_parts + (i_list * SHARED + i_row) * (2 * WORDS)
            # The bits of 1.5 * 2 ** 23 in float32: a number more is one more in float32, too.
            b_sum = tl.full([KEYS], 0x4B400000, tl.int32)
            for i_half in tl.static_range(2 * WORDS):
                b_sum = dot_bytes(codes[i_half], tl.load(p_part + i_half), b_sum, PACKED)
            p_factor = p_factors + (i_list * SHARED + i_row) * 2
            b_factor, b_const = tl.load(p_factor), tl.load(p_factor + 1)
            b_sum = tl.reshape(b_sum.to(tl.float32, bitcast=True), [BLOCKS, BLOCK_SIZE])
            b_top = tl.max(b_sum, 1)
            b_weights = fast_exp2((b_sum - b_top[:, None]) * b_factor, PACKED)
            b_lse = (b_top - 12582912.0) * b_factor + b_const
            b_lse += fast_log2(tl.sum(b_weights, 1), PACKED)
            tl.store(p_list + i_row * n_capacity + o_block, b_lse, mask=m_block)


@triton.jit(
    do_not_specialize=["n_tokens", "n_capacity"], do_not_specialize_on_alignment=["p_share"]
)
def place_kernel(
    p_lse,
    p_share,
    p_lengths,
    p_starts,
    p_places,
    p_counts,
    n_tokens,
    n_capacity,
    n_groups,
    SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    LOCAL: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    PACKED: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program: which threshold each of `CHUNK` blocks of a KV head reaches first.

    Stores bytes `[n]`: 0 for a block that is always read, else the place of the highest threshold
    that its share of the attention reaches, 64 where it reaches none; and how many blocks there are
    of each place, int32 `[64]`.
    """
    wait_for_last(OVERLAPS)
    i_chunk = tl.program_id(0)
    i_list = tl.program_id(1).to(tl.int64)
    i_batch = i_list // n_groups
    n_keys = n_tokens
    if HAS_LENGTHS:
        n_keys = tl.load(p_lengths + i_batch)
    if HAS_STARTS:
        n_keys -= tl.load(p_starts + i_batch)
    n = tl.cdiv(n_keys, BLOCK_SIZE)
    o_r, o_c = tl.arange(0, ROWS), tl.arange(0, CHUNK)
    m_r = o_r < SHARED
    p_rows = p_lse + (i_list * SHARED + o_r)[:, None] * n_capacity + o_c[None, :]
    b_most = tl.full([ROWS, CHUNK], float("-inf"), tl.float32)
    for i in range(0, n, CHUNK):
        m_there = m_r[:, None] & (i + o_c < n)[None, :]
        b_most = tl.maximum(b_most, tl.load(p_rows + i, mask=m_there, other=float("-inf")))
    # Of a sequence without keys, too.
    b_top = tl.max(b_most, 1)
    b_top = tl.where(b_top > float("-inf"), b_top, 0.0)
    b_sum = tl.zeros([ROWS, CHUNK], tl.float32)
    for i in range(0, n, CHUNK):
        m_there = m_r[:, None] & (i + o_c < n)[None, :]
        b_lse = tl.load(p_rows + i, mask=m_there, other=float("-inf"))
        b_sum += fast_exp2(b_lse - b_top[:, None], PACKED)
    b_total = tl.sum(b_sum, 1)
    b_total = tl.where(b_total > 0, b_total, 1.0)
    b_share = tl.load(p_share + (i_list % n_groups) * SHARED + o_r, mask=m_r, other=0.0) / b_total
    o_n = i_chunk * CHUNK + o_c
    m_n = o_n < n
    b_lse = tl.load(p_rows + i_chunk * CHUNK, mask=m_r[:, None] & m_n[None, :], other=float("-inf"))
    b_mass = tl.sum(fast_exp2(b_lse - b_top[:, None], PACKED) * b_share[:, None], 0)
    b_place = tl.ceil(-2.0 * tl.log2(b_mass))
    b_place = tl.minimum(tl.maximum(b_place, 1.0), 64.0).to(tl.int32)
    m_always = (o_n == 0) | (o_n * BLOCK_SIZE + BLOCK_SIZE > n_keys - LOCAL)
    b_place = tl.where(m_always, 0, b_place)
    tl.store(p_places + i_list * n_capacity + o_n, b_place.to(tl.int8), mask=m_n)
    b_counts = tl.histogram(tl.where(m_n, b_place, 64), 128)
    o_p = tl.arange(0, 128)
    p_count = p_counts + (i_list * tl.num_programs(0) + i_chunk) * 64
    tl.store(p_count + o_p, b_counts, mask=o_p < 64)


@triton.jit(
    do_not_specialize=["n_tokens", "n_capacity"],
    do_not_specialize_on_alignment=["p_worth", "p_counts"],
)
def list_kernel(
    p_places,
    p_chunk_counts,
    p_worth,
    p_lengths,
    p_starts,
    p_blocks,
    p_counts,
    n_tokens,
    n_capacity,
    n_groups,
    BLOCK_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program: the part of one KV head's list that is in `CHUNK` of its blocks.

    Each program finds the last threshold that pays, from the numbers of blocks of each place.
    """
    wait_for_last(OVERLAPS)
    i_chunk = tl.program_id(0)
    i_list = tl.program_id(1).to(tl.int64)
    i_batch = i_list // n_groups
    n_keys = n_tokens
    if HAS_LENGTHS:
        n_keys = tl.load(p_lengths + i_batch)
    if HAS_STARTS:
        n_keys -= tl.load(p_starts + i_batch)
    n = tl.cdiv(n_keys, BLOCK_SIZE)
    o_c, o_k, o_p = tl.arange(0, CHUNK), tl.arange(0, CHUNKS), tl.arange(0, 64)
    o_n = i_chunk * CHUNK + o_c
    m_n = o_n < n
    b_place = tl.load(p_places + i_list * n_capacity + o_n, mask=m_n, other=64).to(tl.int32)
    n_chunks = tl.num_programs(0)
    p_count = p_chunk_counts + (i_list * n_chunks + o_k)[:, None] * 64 + o_p[None, :]
    b_counts = tl.load(p_count, mask=(o_k < n_chunks)[:, None], other=0)  # [CHUNKS, 64]
    # A block's share is one between its threshold and the one before; those always read are known.
    b_mass = tl.exp2(0.25 - 0.5 * o_p.to(tl.float32)) * tl.sum(b_counts, 0).to(tl.float32)
    b_mass = tl.where(o_p > 0, b_mass, 0.0)
    b_lost = tl.cumsum(b_mass, 0, reverse=True) - 0.5 * b_mass
    b_worth = tl.load(p_worth + i_list) / tl.maximum(n, 1)
    m_pays = (o_p > 0) & (b_lost * tl.exp2(-0.5 * o_p.to(tl.float32)) >= b_worth)
    # Where reading costs nothing, blocks count that reach no threshold, too.
    is_free = b_worth <= 0.0
    i_last = tl.where(is_free, 64, tl.sum(m_pays.to(tl.int32), 0))
    b_read = tl.sum(tl.where(o_p[None, :] <= i_last, b_counts, 0), 1)  # [CHUNKS]
    b_there = tl.minimum(tl.maximum(n - o_k * CHUNK, 0), CHUNK)
    b_read = tl.where(is_free, b_there, b_read)
    m_read = m_n & (b_place <= i_last)
    o_entry = tl.cumsum(m_read.to(tl.int32), 0) - 1 + tl.sum(tl.where(o_k < i_chunk, b_read, 0), 0)
    tl.store(p_blocks + i_list * n_capacity + o_entry, o_n, mask=m_read)
    if i_chunk == 0:
        tl.store(p_counts + i_list, tl.sum(b_read, 0))


@triton.jit(do_not_specialize=["n_slots"])
def sketch_kernel(
    p_k,
    p_slots,
    p_mean,
    p_axes,
    p_words,
    n_slots,
    stride_kb,
    stride_kg,
    stride_kn,
    n_groups,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    """One program: the codes of `BLOCK_N` keys of one KV head, stored beside their pages."""
    i_group = tl.program_id(1).to(tl.int64)
    o_n, o_d, o_c = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_R)
    o_slot = tl.program_id(0).to(tl.int64) * BLOCK_N + o_n
    b_slot = tl.load(p_slots + o_slot, mask=o_slot < n_slots, other=-1)
    m_n, m_d, m_c = b_slot >= 0, o_d < HEAD_DIM, o_c < RANK
    b_page, b_row = b_slot // PAGE_SIZE, b_slot % PAGE_SIZE
    p_key = p_k + (b_page * stride_kb + i_group * stride_kg + b_row * stride_kn)[:, None]
    b_k = tl.load(p_key + o_d[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0).to(tl.float32)
    b_mean = tl.load(p_mean + i_group * HEAD_DIM + o_d, mask=m_d, other=0.0)
    p_axis = p_axes + (i_group * RANK + o_c)[None, :] * HEAD_DIM + o_d[:, None]
    b_axes = tl.load(p_axis, mask=m_c[None, :] & m_d[:, None], other=0.0)  # [D, R]
    b_steps = tl.dot(b_k - b_mean[None, :], b_axes, input_precision="ieee")  # [N, R]
    b_codes = tl.minimum(tl.maximum(tl.floor(b_steps + 8.0), 0.0), 15.0).to(tl.int32)
    b_codes = b_codes << (o_c % 8 * 4)[None, :]
    b_words = tl.sum(tl.reshape(b_codes, [BLOCK_N, BLOCK_R // 8, 8]), 2)
    o_w = tl.arange(0, BLOCK_R // 8)
    WORDS: tl.constexpr = RANK // 8
    o_word = ((b_page * n_groups + i_group) * WORDS)[:, None] + o_w[None, :]
    p_word = p_words + o_word * PAGE_SIZE + b_row[:, None]
    tl.store(p_word, b_words, mask=m_n[:, None] & (o_w < WORDS)[None, :])
