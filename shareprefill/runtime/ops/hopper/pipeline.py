"""Steps that the Gluon kernels for Hopper share: rings of tiles, and products of matrices.

A ring is `(tiles, ready, free)`: places in shared memory, and for each place a barrier that says it
is filled and one that says it was read. Runs on Triton 3.6 and compiles on 3.7 and 3.9.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Triton 3.6 knows `async_copy_global_to_shared` and `thread_barrier`, 3.9 the other names only.
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier

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
def tokens_before(i_block, n_k_tokens, BLOCK: gl.constexpr, PAGE_BLOCKS: gl.constexpr):
    """Tokens of blocks before that the tile of a key block begins with.

    In pages a sequence's last tile ends with its last token, as what lies behind it may be NaN,
    which a weight of zero does not take away: the tile begins with tokens of the block before, or
    with zeros where the page begins.
    """
    n_before = 0
    if PAGE_BLOCKS > 0:
        n_before = gl.maximum((i_block + 1) * BLOCK - n_k_tokens, 0)
    return n_before


@gluon.jit
def hide_in_last(b_logits, i_position, i_block, n_k_tokens, PAGE_BLOCKS: gl.constexpr):
    """`hide_later_keys` in what may be a sequence's last block, and tokens of blocks before."""
    BLOCK: gl.constexpr = b_logits.shape[1]
    n_before = tokens_before(i_block, n_k_tokens, BLOCK, PAGE_BLOCKS)
    b_logits = hide_later_keys(b_logits, i_position, i_block * BLOCK - n_before)
    if PAGE_BLOCKS > 0:
        o_key = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, b_logits.type.layout))
        b_logits = gl.where((o_key >= n_before)[None, :], b_logits, float("-inf"))
    return b_logits


@gluon.jit
def find_tile(pages, i_page, i_group, i_block, BLOCK: gl.constexpr, PAGE_BLOCKS: gl.constexpr):
    """Where a key block's tile begins: its place in a descriptor's first dim, and its token."""
    i_place = i_group
    i_token = i_block * BLOCK
    if PAGE_BLOCKS > 0:
        _table, page_step = pages
        i_place = i_page * page_step + i_group
        i_token = (i_block % PAGE_BLOCKS) * BLOCK
    return i_place, i_token


@gluon.jit
def load_page(pages, i_block, PAGE_BLOCKS: gl.constexpr):
    """The page of a key block; 0 without pages."""
    i_page = 0
    if PAGE_BLOCKS > 0:
        p_table, _step = pages
        i_page = gl.load(p_table + gl.maximum(i_block, 0) // PAGE_BLOCKS).to(gl.int32)
    return i_page


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
