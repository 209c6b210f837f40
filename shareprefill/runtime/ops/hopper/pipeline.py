"""Steps that the Gluon kernels for Hopper share: rings of tiles, and products of matrices.

A ring is `(tiles, ready, free)`: places in shared memory, and for each place a barrier that says it
is filled and one that says it was read. Runs on Triton 3.6 and compiles on 3.7 and 3.9.
"""

from __future__ import annotations

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Triton 3.6 knows `async_copy_global_to_shared`, `thread_barrier` and `_reinterpret`, 3.9 the other
# names only.
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
_memory = gl.shared_memory_descriptor
reinterpret = _memory.reinterpret if hasattr(_memory, "reinterpret") else _memory._reinterpret

QUERIES = gl.constexpr(2)  # query tiles in shared memory


@gluon.jit
def make_barriers(N: gl.constexpr, COUNT: gl.constexpr):
    """`N` barriers in shared memory, each complete after `COUNT` arrivals."""
    bars = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        mbarrier.init(bars.index(i), count=COUNT)
    return bars


@gluon.jit
def wait_tile(ready, i_step):
    """Wait until the tile of a step has arrived in its ring."""
    STAGES: gl.constexpr = ready.shape[0]
    mbarrier.wait(ready.index(i_step % STAGES), (i_step // STAGES) & 1)


@gluon.jit
def free_tile(free, i_step):
    """Say that this warpgroup has read the tile of a step."""
    mbarrier.arrive(free.index(i_step % free.shape[0]), count=1)


@gluon.jit
def wait_free(free, i_step):
    """Wait until the place of a step in its ring was read in the round before."""
    STAGES: gl.constexpr = free.shape[0]
    mbarrier.wait(free.index(i_step % STAGES), ((i_step // STAGES) & 1) ^ 1)


@gluon.jit
def issue_logits(q_tiles, i_tile, k_tiles, i_step, layout: gl.constexpr):
    """Start the product of a half tile of queries and a block of keys."""
    ROWS: gl.constexpr = q_tiles.shape[2]
    BLOCK: gl.constexpr = k_tiles.shape[2]
    BLOCK_D: gl.constexpr = k_tiles.shape[3]
    b_q = q_tiles.index(i_tile).reshape([ROWS, BLOCK_D])  # [M, D]
    b_k = k_tiles.index(i_step % k_tiles.shape[0]).reshape([BLOCK, BLOCK_D])  # [N, D]
    b_zero = gl.zeros([ROWS, BLOCK], gl.float32, layout)
    return warpgroup_mma(b_q, b_k.permute((1, 0)), b_zero, use_acc=False, is_async=True)


@gluon.jit
def issue_values(b_weights, v_tiles, i_step, b_acc):
    """Start the product of weights and a block of values.

    Weights stay float32 until here: halves that a loop carries are unpacked and packed again.
    """
    BLOCK: gl.constexpr = v_tiles.shape[2]
    BLOCK_D: gl.constexpr = v_tiles.shape[3]
    layout: gl.constexpr = gl.DotOperandLayout(0, b_acc.type.layout, 2)
    b_p = gl.convert_layout(b_weights.to(v_tiles.dtype), layout)  # [M, N]
    b_v = v_tiles.index(i_step % v_tiles.shape[0]).reshape([BLOCK, BLOCK_D])  # [N, Dv]
    return warpgroup_mma(b_p, b_v, b_acc, is_async=True)


@gluon.jit
def first_logits(q_ring, k_ring, HALF: gl.constexpr, layout: gl.constexpr):
    """Logits of half of the first query tile and the first block of keys, waited for."""
    q_tiles, q_ready, _q_free = q_ring
    k_tiles, k_ready, k_free = k_ring
    wait_tile(q_ready, 0)
    wait_tile(k_ready, 0)
    b_logits = issue_logits(q_tiles, HALF, k_tiles, 0, layout)  # [M, N]
    b_logits = warpgroup_mma_wait(0, deps=[b_logits])
    free_tile(k_free, 0)
    return b_logits


@gluon.jit
def cap_logits(b_logits, scales, HAS_SOFTCAP: gl.constexpr):
    """Soft-capped logits in units of log2, as `triton_steps.cap_logits`; others as they are."""
    if HAS_SOFTCAP:
        scale_log2, softcap_log2 = scales
        b_logits = softcap_log2 * (1.0 - 2.0 / (gl.exp2(b_logits * scale_log2) + 1.0))
    return b_logits


@gluon.jit
def hide_later_keys(b_logits, i_position, i_key):
    """-inf where a key stands past its row; `i_position`, `i_key`: those of the first."""
    layout: gl.constexpr = b_logits.type.layout
    o_row = gl.arange(0, b_logits.shape[0], layout=gl.SliceLayout(1, layout))
    o_key = gl.arange(0, b_logits.shape[1], layout=gl.SliceLayout(0, layout))
    b_seen = o_key[None, :] <= (o_row + (i_position - i_key))[:, None]  # [M, N]
    return gl.where(b_seen, b_logits, float("-inf"))


@gluon.jit
def hide_in_last(b_logits, i_position, i_block, n_k_tokens, PAGE_SIZE: gl.constexpr):
    """`hide_later_keys` in what may be a sequence's last block, as `load_keys` lays that out."""
    BLOCK: gl.constexpr = b_logits.shape[1]
    if PAGE_SIZE == 0:
        return hide_later_keys(b_logits, i_position, i_block * BLOCK)
    if (i_block + 1) * BLOCK <= n_k_tokens:
        b_logits = hide_later_keys(b_logits, i_position, i_block * BLOCK)
    else:
        layout: gl.constexpr = b_logits.type.layout
        PART: gl.constexpr = part_tokens(PAGE_SIZE, BLOCK)
        i_last, n_behind = last_part(n_k_tokens, PART)
        o_row = i_position + gl.arange(0, b_logits.shape[0], layout=gl.SliceLayout(1, layout))
        o_place = i_block * BLOCK + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, layout))
        # What the last part begins with stands past every row.
        m_before = (o_place >= i_last * PART) & (o_place < i_last * PART + n_behind)
        o_key = gl.where(o_place >= i_last * PART, o_place - n_behind, o_place)
        o_key = gl.where(m_before, 2**31 - 1, o_key)
        b_logits = gl.where(o_key[None, :] <= o_row[:, None], b_logits, float("-inf"))  # [M, N]
    return b_logits


@gluon.constexpr_function
def part_tokens(PAGE_SIZE, BLOCK):
    """Tokens of the largest part of which both a page and a key block hold whole ones."""
    return math.gcd(PAGE_SIZE, BLOCK)


@gluon.jit
def last_part(n_k_tokens, PART: gl.constexpr):
    """The part of `PART` tokens that holds a sequence's last, and how many it has behind that."""
    i_last = (n_k_tokens - 1) // PART
    return i_last, (i_last + 1) * PART - n_k_tokens


@gluon.jit
def load_pages(pages, i_block, n_k_tokens, BLOCK: gl.constexpr, PAGE_SIZE: gl.constexpr):
    """The page of a key block, or those of its parts, `[32]`, again and again; 0 without pages.

    Of a block before the first or behind the last one: a page of the sequence.
    """
    i_page = 0
    if PAGE_SIZE > 0:
        p_table, _step = pages
        PART: gl.constexpr = part_tokens(PAGE_SIZE, BLOCK)
        PARTS: gl.constexpr = BLOCK // PART
        # A sequence's table may end with its last page.
        i_last, _behind = last_part(n_k_tokens, PART)
        o_part = gl.maximum(i_block, 0) * PARTS
        if PARTS > 1:
            o_part += gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0])) % PARTS
        o_page = gl.minimum(o_part, i_last) // (PAGE_SIZE // PART)
        i_page = gl.load(p_table + o_page).to(gl.int32)
    return i_page


@gluon.jit
def load_keys(
    desc,
    ring,
    i_step,
    pages,
    i_page,
    i_group,
    i_block,
    n_k_tokens,
    ENDS_WITH_LAST: gl.constexpr,
    BLOCK: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
):
    """Start to load a block of keys or values into the free place of a step, from one warp.

    Whole, out of a tensor or a page that holds it, or in parts, as pages end within it; parts
    behind the sequence's last one repeat it. What lies behind the last token in its page may be
    NaN, which a weight of zero does not take away: so with `ENDS_WITH_LAST` its part ends with it,
    and begins with as many tokens before, or with zeros where the page begins.
    """
    tiles, ready, _free = ring
    slot = i_step % tiles.shape[0]
    bar = ready.index(slot)
    if PAGE_SIZE == 0:
        mbarrier.expect(bar, desc.block_type.nbytes)
        load_tile(desc, [i_group, i_block * BLOCK, 0], bar, tiles.index(slot))
    else:
        PART: gl.constexpr = part_tokens(PAGE_SIZE, BLOCK)
        PARTS: gl.constexpr = BLOCK // PART
        # A tile lies in memory as bands of columns, each with the rows of all parts.
        COLUMNS: gl.constexpr = desc.block_type.shape[2]
        BANDS: gl.constexpr = tiles.shape[3] // COLUMNS
        shape: gl.constexpr = [tiles.shape[0] * BANDS * PARTS, 1, PART, COLUMNS]
        places = reinterpret(tiles, tiles.dtype, shape, desc.layout)
        _table, page_step = pages
        b_place = i_page * page_step + i_group
        i_last, n_behind = last_part(n_k_tokens, PART)
        mbarrier.expect(bar, desc.block_type.nbytes * (BANDS * PARTS))
        for i_part in gl.static_range(PARTS):
            i_place = b_place
            if PARTS > 1:
                lane = gl.arange(0, 32, layout=b_place.type.layout)
                i_place = gl.max(gl.where(lane == i_part, b_place, 0), 0)
            i_own = gl.minimum(i_block * PARTS + i_part, i_last)
            i_token = i_own % (PAGE_SIZE // PART) * PART
            if ENDS_WITH_LAST:
                i_token -= gl.where(i_own == i_last, n_behind, 0)
            for i_band in gl.static_range(BANDS):
                load_tile(
                    desc,
                    [i_place, i_token, i_band * COLUMNS],
                    bar,
                    places.index((slot * BANDS + i_band) * PARTS + i_part),
                )


@gluon.jit
def _within_threads(b_x):
    """`[M, N]` of logits as `[M, N / 8, 4, 2]`, where a thread holds all but the dim of four."""
    return b_x.reshape([b_x.shape[0], b_x.shape[1] // 8, 4, 2])


@gluon.jit
def max_of_rows(b_logits):
    """Maximum of each row `[M]`: within threads, in several chains, then of a row's four."""
    b_max = gl.max(gl.max(gl.max(_within_threads(b_logits), 3), 1), 1)
    return gl.convert_layout(b_max, gl.SliceLayout(1, b_logits.type.layout), assert_trivial=True)


@gluon.jit
def sum_within_threads(b_weights):
    """Sums of each row `[M, 4]`, one in each of its four threads: shuffles can wait."""
    return gl.sum(gl.sum(_within_threads(b_weights), 3), 1)


@gluon.jit
def rescale_sums(b_sums, b_rescale):
    """Sums `[M, 4]` times factors of their rows."""
    layout: gl.constexpr = gl.SliceLayout(1, b_sums.type.layout)
    return b_sums * gl.convert_layout(b_rescale, layout, assert_trivial=True)[:, None]


@gluon.jit
def sum_of_threads(b_sums, layout: gl.constexpr):
    """Sum of each row `[M]` from those in its four threads."""
    return gl.convert_layout(gl.sum(b_sums, 1), layout, assert_trivial=True)


@gluon.jit
def store_rows(
    b_acc, b_factor, p_rows, stride_on, i_row, n_q_tokens, DTYPE: gl.constexpr, DIM: gl.constexpr
):
    """Scale the rows of one head and write those that exist."""
    ROWS: gl.constexpr = b_acc.shape[0]
    BLOCK_D: gl.constexpr = b_acc.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    o_m = i_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    o_d = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, layout))
    b_factor = gl.convert_layout(b_factor, gl.SliceLayout(1, b_acc.type.layout))
    b_out = gl.convert_layout((b_acc * b_factor[:, None]).to(DTYPE), layout)  # [M, Dv]
    m_out = (o_m < n_q_tokens)[:, None]
    if DIM != BLOCK_D:
        m_out = m_out & (o_d < DIM)[None, :]
    gl.store(p_rows + (o_m.to(gl.int64) * stride_on)[:, None] + o_d[None, :], b_out, mask=m_out)
