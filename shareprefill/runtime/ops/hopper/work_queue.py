"""What feeds the Hopper kernels: a queue of work items, and the warps that load tiles by TMA.

A work item is a tile of query rows of one head. One warp writes items, the others read them.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from shareprefill.runtime.ops.hopper.pipeline import (
    QUERIES,
    load_keys,
    load_pages,
    load_tile,
    make_barriers,
    wait_free,
    wait_tile,
)

ROUNDS = gl.constexpr(2)  # work items between the scheduler and the others


@gluon.jit
def make_rings(
    q_desc,
    k_desc,
    v_desc,
    BLOCK: gl.constexpr,
    BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr,
    TRANSPOSED: gl.constexpr = False,
):
    """The queue of work items, and the rings of query, key and value tiles, in shared memory.

    `TRANSPOSED`: value tiles are `[D, N]`.
    """
    Q_SHAPE: gl.constexpr = [QUERIES * 2, 1, BLOCK // 2, BLOCK_D]
    q_tiles = gl.allocate_shared_memory(q_desc.dtype, Q_SHAPE, q_desc.layout)
    k_tiles = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, BLOCK, BLOCK_D], k_desc.layout)
    ROWS: gl.constexpr = BLOCK_D if TRANSPOSED else BLOCK
    COLUMNS: gl.constexpr = BLOCK if TRANSPOSED else BLOCK_D
    v_tiles = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, ROWS, COLUMNS], v_desc.layout)
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    items = gl.allocate_shared_memory(gl.int32, [ROUNDS, 32], line)
    # Places are freed by both warpgroups, work items by the two loading warps too.
    queue = (items, make_barriers(ROUNDS, 1), make_barriers(ROUNDS, 4))
    q_ring = (q_tiles, make_barriers(QUERIES, 1), make_barriers(QUERIES, 2))
    k_ring = (k_tiles, make_barriers(STAGES, 1), make_barriers(STAGES, 2))
    v_ring = (v_tiles, make_barriers(STAGES, 1), make_barriers(STAGES, 2))
    fence_async_shared()
    return queue, q_ring, k_ring, v_ring


@gluon.jit
def draw_work(p_next, n_work):
    """The next work item, from the counter that all programs share.

    Every item is followed by one draw; the last of all draws leaves the counter at zero.
    """
    i_draw = gl.atomic_add(p_next, 1, sem="relaxed")
    if i_draw == n_work - 1:
        gl.store(p_next, 0)
    return i_draw + gl.num_programs(0)


@gluon.jit
def place_work(i_work, n_heads, n_at_once, n_q):
    """Head and query tile of the work item `i_work` of `n_heads * n_q`.

    Tiles go from the last to the first, `n_at_once` heads together: late rows have the most
    blocks, light tiles fill the end, and the heads' keys stay in the L2 cache.
    """
    i_section = i_work // (n_at_once * n_q)
    i_rest = i_work - i_section * (n_at_once * n_q)
    width = gl.minimum(n_at_once, n_heads - i_section * n_at_once)
    i_tile = n_q - 1 - i_rest // width
    i_head = i_section * n_at_once + i_rest % width
    return i_head, i_tile


@gluon.jit
def write_work(queue, i_round, i_head, i_tile, i_start, n_listed, i_last, i_second):
    """Hand a work item to the other warps, as `read_work` gives it."""
    items, ready, free = queue
    slot = i_round % ROUNDS
    wait_free(free, i_round)
    lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    item = gl.where(lane == 0, i_head, i_tile)
    item = gl.where(lane == 2, i_start, item)
    item = gl.where(lane == 3, n_listed, item)
    item = gl.where(lane == 4, i_last, item)
    item = gl.where(lane == 5, i_second, item)
    items.index(slot).store(item)
    mbarrier.arrive(ready.index(slot), count=1)


@gluon.jit
def _read_field(item, FIELD: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.max(item.slice(FIELD, 1).load(layout), 0)


@gluon.jit
def read_work(queue, i_round):
    """Work item: head, query tile, start of its list, entries, the last two entries' blocks.

    Without lists the start is free for another number. A head of -1 ends the work.
    """
    items, ready, free = queue
    slot = i_round % ROUNDS
    wait_tile(ready, i_round)
    item = items.index(slot)
    i_head = _read_field(item, 0)
    i_tile = _read_field(item, 1)
    i_start = _read_field(item, 2)
    n_listed = _read_field(item, 3)
    i_last = _read_field(item, 4)
    i_second = _read_field(item, 5)
    mbarrier.arrive(free.index(slot), count=1)
    return i_head, i_tile, i_start, n_listed, i_last, i_second


@gluon.jit
def zero_rows(
    p_rows,
    stride_on,
    i_row,
    n_q_tokens,
    HEAD_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK: gl.constexpr,
):
    """Write zeros to a tile of the rows of one head, from one warp."""
    ROWS: gl.constexpr = 256 // BLOCK_D
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [ROWS, BLOCK_D // 8], [1, 1], [1, 0])
    o_m = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    o_d = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, layout))
    b_zero = gl.zeros([ROWS, BLOCK_D], p_rows.dtype.element_ty, layout)
    for i_step in range(BLOCK // ROWS):
        o_row = i_row + i_step * ROWS + o_m
        p_tile = p_rows + (o_row.to(gl.int64) * stride_on)[:, None] + o_d[None, :]
        gl.store(p_tile, b_zero, mask=(o_row < n_q_tokens)[:, None] & (o_d < HEAD_DIM)[None, :])


@gluon.jit
def produce(
    queue,
    ring,
    desc,
    q_ring,
    q_desc,
    p_indices,
    n_shared,
    pages,
    n_k_tokens,
    BLOCK: gl.constexpr,
    HAS_QUERIES: gl.constexpr,
    HAS_LISTS: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
):
    """One warp: loads key or value tiles by TMA as their places in the ring get free.

    One of the two loads the query tiles too. With lists an item's blocks stand in `p_indices`;
    without they are its last and all before it. Pages hold `PAGE_SIZE` tokens; 0: keys and values
    are tensors.
    """
    _tiles, _ready, free = ring
    i_step = 0
    i_round = 0
    i_head, i_tile, i_start, n_listed, i_block, i_next = read_work(queue, i_round)
    while i_head >= 0:
        if HAS_QUERIES:
            q_tiles, q_ready, q_free = q_ring
            q_slot = i_round % QUERIES
            wait_free(q_free, i_round)
            mbarrier.expect(q_ready.index(q_slot), q_desc.block_type.nbytes * 2)
            for i_half in gl.static_range(2):
                load_tile(
                    q_desc,
                    [i_head, i_tile * BLOCK + i_half * (BLOCK // 2), 0],
                    q_ready.index(q_slot),
                    q_tiles.index(q_slot * 2 + i_half),
                )
        i_group = i_head // n_shared
        i_page = load_pages(pages, i_block, n_k_tokens, BLOCK, PAGE_SIZE)
        p_entry = p_indices + i_start + n_listed - 3
        for i_entry in range(n_listed):
            # The next page arrives while this block's place gets free; so its index, which came
            # with the work item or in the round before, must be there.
            i_page_next = load_pages(pages, i_next, n_k_tokens, BLOCK, PAGE_SIZE)
            i_after = i_next - 1
            if HAS_LISTS:
                i_after = gl.load(p_entry - i_entry, mask=i_entry + 2 < n_listed, other=0)
            wait_free(free, i_step)
            load_keys(
                *(desc, ring, i_step, pages, i_page, i_group, i_block, n_k_tokens),
                *(True, BLOCK, PAGE_SIZE),
            )
            i_step += 1
            i_block = i_next
            i_next = i_after
            i_page = i_page_next
        i_round += 1
        i_head, i_tile, i_start, n_listed, i_block, i_next = read_work(queue, i_round)
