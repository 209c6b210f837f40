"""Steps that the Triton kernels share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def wait_for_last(OVERLAPS: tl.constexpr):
    """Wait for the launch before this one, which it may overlap, and let the next overlap this one.

    To be called before anything is read or written that another launch writes or reads.
    """
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def load_tile(p_tile, m_rows, m_dims, MASK_ROWS: tl.constexpr, MASK_DIMS: tl.constexpr):
    """Load `[rows, dims]`, zeros where a needed mask is off."""
    if MASK_ROWS and MASK_DIMS:
        b_tile = tl.load(p_tile, mask=m_rows[:, None] & m_dims[None, :], other=0.0)
    elif MASK_ROWS:
        b_tile = tl.load(p_tile, mask=m_rows[:, None], other=0.0)
    elif MASK_DIMS:
        b_tile = tl.load(p_tile, mask=m_dims[None, :], other=0.0)
    else:
        b_tile = tl.load(p_tile)
    return b_tile


@triton.jit
def rows_in_page(o_n, PAGE_SIZE: tl.constexpr):
    """Where the tokens of a tile stand in their page, or in the tile; `PAGE_SIZE` 0: no pages."""
    if PAGE_SIZE > 0:
        o_n = o_n % PAGE_SIZE
    return o_n


@triton.jit
def find_tile(i_key, o_n, n_k_tokens, p_table, stride_page, stride_n, PAGE_SIZE: tl.constexpr):
    """Steps from a head's first tokens to those from `i_key` on, a multiple of the tile's tokens.

    One number, or `[N, 1]` where pages, whose sizes are powers of two, are smaller than the tile.
    To be added to pointers of `rows_in_page(o_n)`.
    """
    BLOCK_N: tl.constexpr = o_n.shape[0]
    if PAGE_SIZE == 0:
        o_tile = tl.multiple_of(tl.cast(i_key, tl.int64), BLOCK_N) * stride_n
    elif PAGE_SIZE >= BLOCK_N:
        i_page = tl.cast(tl.load(p_table + i_key // PAGE_SIZE), tl.int64)
        i_row = tl.multiple_of(tl.cast(i_key % PAGE_SIZE, tl.int64), BLOCK_N)
        o_tile = i_page * stride_page + i_row * stride_n
    else:
        o_keys = i_key + o_n
        b_pages = tl.load(p_table + o_keys // PAGE_SIZE, mask=o_keys < n_k_tokens, other=0)
        o_tile = (b_pages.to(tl.int64) * stride_page)[:, None]  # [N, 1]
    return o_tile


@triton.jit
def find_pages(i_batch, o_token, m_token, p_tables, stride_tb, PAGE_SIZE: tl.constexpr):
    """Pages of a sequence's tokens, and where they stand in them, int64.

    `PAGE_SIZE` 0: no pages, or one for each sequence.
    """
    if PAGE_SIZE == 0:
        b_page = i_batch
        o_row = o_token.to(tl.int64)
    else:
        # Unsigned, so that shifts divide by a power of two.
        o_place = o_token.to(tl.uint32)
        p_table = p_tables + i_batch * stride_tb
        b_page = tl.load(p_table + o_place // PAGE_SIZE, mask=m_token, other=0).to(tl.int64)
        o_row = (o_place % PAGE_SIZE).to(tl.int64)
    return b_page, o_row


@triton.jit
def softmax_step(b_logits, b_max, b_sum, MASKED: tl.constexpr):
    """Online softmax in base 2.

    Takes logits `[M, N]` in units of log2 and the running maximum and sum `[M]`. Returns the
    weights relative to the new maximum, their row sums, the new maximum and sum, and the factor of
    what was accumulated before.
    """
    b_new = tl.maximum(b_max, tl.max(b_logits, 1))  # [M]
    # A row that has seen no key keeps a finite pivot: -inf - -inf would be NaN.
    b_pivot = tl.where(b_new == float("-inf"), 0.0, b_new) if MASKED else b_new
    b_weights = tl.exp2(b_logits - b_pivot[:, None])  # [M, N]
    b_mass = tl.sum(b_weights, 1)  # [M]
    b_rescale = tl.exp2(b_max - b_pivot)
    return b_weights, b_mass, b_new, b_sum * b_rescale + b_mass, b_rescale


@triton.jit
def sum_peaks(p_peaks, o_m, b_position, n_live, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr):
    """Log-sum-exps of rows `o_m` from their maxima and sums in `n_live` splits of the keys.

    +inf for rows whose position is below 0.
    """
    o_s = tl.arange(0, BLOCK_S)
    b_max = tl.zeros_like(b_position).to(tl.float32) + float("-inf")  # [rows]
    b_sum = tl.zeros_like(b_position).to(tl.float32)
    for i_split in range(0, n_live, BLOCK_S):
        p_tile = p_peaks + (i_split + o_s)[:, None] * (2 * BLOCK_M) + o_m[None, :]
        m_tile = (i_split + o_s < n_live)[:, None]
        b_part_max = tl.load(p_tile, mask=m_tile, other=float("-inf"))  # [S, rows]
        b_part_sum = tl.load(p_tile + BLOCK_M, mask=m_tile, other=0.0)
        b_new = tl.maximum(b_max, tl.max(b_part_max, 0))
        b_pivot = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_parts = b_part_sum * tl.exp2(b_part_max - b_pivot[None, :])  # [S, rows]
        b_sum = b_sum * tl.exp2(b_max - b_pivot) + tl.sum(b_parts, 0)
        b_max = b_new
    m_seen = b_position >= 0
    return tl.where(m_seen, b_max + tl.log2(tl.where(m_seen, b_sum, 1.0)), float("inf"))


@triton.jit
def cap_logits(b_logits, softcap_log2):
    """Soft-capped logits in units of log2.

    Takes `2 log2(e) / c` times the scaled logits and `c log2(e)`:
    `c tanh(x / c) = c (1 - 2 / (exp(2 x / c) + 1))`.
    """
    return softcap_log2 * (1.0 - 2.0 / (tl.exp2(b_logits) + 1.0))
