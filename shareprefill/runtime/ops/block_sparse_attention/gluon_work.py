"""What feeds the Hopper kernel: one warp that draws work, one that loads tiles by TMA."""

# Gluon is typed by its compiler, which knows constexpr, program-wide scalars and tiles.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

# Triton 3.9 knows the first name only, 3.6 the second.
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

ROUNDS = gl.constexpr(2)  # work items between the scheduler and the others
QUERIES = gl.constexpr(2)  # query tiles in shared memory


@gluon.jit
def _write_work(queue, i_round, i_head, i_tile, i_start, n_listed, i_last, i_second):
    items, ready, free = queue
    slot = i_round % ROUNDS
    mbarrier.wait(free.index(slot), ((i_round // ROUNDS) & 1) ^ 1)
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
    """Work item: head, query tile, start of its list, entries, the last two entries' blocks."""
    items, ready, free = queue
    slot = i_round % ROUNDS
    mbarrier.wait(ready.index(slot), (i_round // ROUNDS) & 1)
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
def _write_unseen(
    output,
    i_head,
    i_row,
    HEAD_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK: gl.constexpr,
    HAS_LSE: gl.constexpr,
    HAS_SINKS: gl.constexpr,
):
    """A tile whose rows see no key, from one warp."""
    p_out, p_lse, p_sinks, stride_oh, stride_on, n_q_tokens = output
    ROWS: gl.constexpr = 256 // BLOCK_D
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [ROWS, BLOCK_D // 8], [1, 1], [1, 0])
    o_m = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    o_d = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, layout))
    b_zero = gl.zeros([ROWS, BLOCK_D], p_out.dtype.element_ty, layout)
    p_rows = p_out + i_head.to(gl.int64) * stride_oh
    for i_step in range(BLOCK // ROWS):
        o_row = i_row + i_step * ROWS + o_m
        p_tile = p_rows + (o_row.to(gl.int64) * stride_on)[:, None] + o_d[None, :]
        gl.store(p_tile, b_zero, mask=(o_row < n_q_tokens)[:, None] & (o_d < HEAD_DIM)[None, :])
    if HAS_LSE:
        line: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
        o_row = i_row + gl.arange(0, BLOCK, layout=line)
        b_lse = gl.full([BLOCK], float("-inf"), gl.float32, line)
        if HAS_SINKS:
            b_lse = gl.zeros([BLOCK], gl.float32, line) + gl.load(p_sinks + i_head)
        p_row = p_lse + i_head.to(gl.int64) * n_q_tokens
        gl.store(p_row + o_row, b_lse, mask=o_row < n_q_tokens)


@gluon.jit
def schedule(
    queue,
    output,
    p_next,
    p_offsets,
    p_indices,
    p_pattern,
    n_heads,
    n_at_once,
    n_q,
    n_k_tokens,
    HEAD_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK: gl.constexpr,
    HAS_LSE: gl.constexpr,
    HAS_SINKS: gl.constexpr,
):
    """One warp: draws tiles from the counter that all programs share, and reads their lists.

    Tiles go from the last to the first, `n_at_once` heads together: late rows have the most
    blocks, light tiles fill the end, and the heads' keys stay in the L2 cache.
    """
    n_q_tokens = output[5]
    lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    n_work = n_heads * n_q
    i_round = 0
    i_work = gl.program_id(0)
    while i_work < n_work:
        i_section = i_work // (n_at_once * n_q)
        i_rest = i_work - i_section * (n_at_once * n_q)
        width = gl.minimum(n_at_once, n_heads - i_section * n_at_once)
        i_tile = n_q - 1 - i_rest // width
        i_head = i_section * n_at_once + i_rest % width
        i_pattern = gl.load(p_pattern + i_head)
        if i_pattern >= 0:
            p_list = p_offsets + i_pattern.to(gl.int64) * n_q + i_tile
            i_start = gl.load(p_list)
            n_listed = gl.load(p_list + 1) - i_start
            # Lists ascend: at their end stand blocks past the last row, then those to mask.
            n_rows = gl.minimum((i_tile + 1) * BLOCK, n_q_tokens)
            i_bound = (n_rows + (n_k_tokens - n_q_tokens) - 1) // BLOCK
            i_entry = n_listed - 1 - lane
            tail = gl.load(p_indices + i_start + i_entry, mask=i_entry >= 0, other=-1)
            n_past = gl.sum((tail > i_bound).to(gl.int32), 0)
            while n_past > 0:
                n_listed -= n_past
                i_entry = n_listed - 1 - lane
                tail = gl.load(p_indices + i_start + i_entry, mask=i_entry >= 0, other=-1)
                n_past = gl.sum((tail > i_bound).to(gl.int32), 0)
            if n_listed > 0:
                i_last = gl.max(tail, 0)
                i_second = gl.max(gl.where(lane == 0, -1, tail), 0)
                _write_work(queue, i_round, i_head, i_tile, i_start, n_listed, i_last, i_second)
                i_round += 1
            else:
                _write_unseen(
                    output, i_head, i_tile * BLOCK, HEAD_DIM, BLOCK_D, BLOCK, HAS_LSE, HAS_SINKS
                )
        # Every tile is followed by one draw; the last of all draws leaves the counter at zero.
        i_draw = gl.atomic_add(p_next, 1, sem="relaxed")
        if i_draw == n_work - 1:
            gl.store(p_next, 0)
        i_work = i_draw + gl.num_programs(0)
    _write_work(queue, i_round, -1, 0, 0, 0, 0, 0)


@gluon.jit
def produce(
    rings,
    q_desc,
    k_desc,
    v_desc,
    p_indices,
    n_shared,
    BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
):
    """One warp: loads query, key and value tiles by TMA as their places in the rings get free."""
    queue, q_ring, k_ring, v_ring = rings
    q_tiles, q_ready, q_free = q_ring
    k_tiles, k_ready, k_free = k_ring
    v_tiles, v_ready, v_free = v_ring
    i_step = 0
    i_round = 0
    i_head, i_tile, i_start, n_listed, i_block, _second = read_work(queue, i_round)
    while i_head >= 0:
        q_slot = i_round % QUERIES
        mbarrier.wait(q_free.index(q_slot), ((i_round // QUERIES) & 1) ^ 1)
        mbarrier.expect(q_ready.index(q_slot), q_desc.block_type.nbytes * 2)
        for i_half in gl.static_range(2):
            load_tile(
                q_desc,
                [i_head, i_tile * BLOCK + i_half * (BLOCK // 2), 0],
                q_ready.index(q_slot),
                q_tiles.index(q_slot * 2 + i_half),
            )
        i_group = i_head // n_shared
        p_entry = p_indices + i_start + n_listed - 2
        for i_entry in range(n_listed):
            # The next index arrives while this one's places get free.
            i_next = gl.load(p_entry - i_entry, mask=i_entry + 1 < n_listed, other=0)
            slot = i_step % STAGES
            phase = ((i_step // STAGES) & 1) ^ 1
            mbarrier.wait(k_free.index(slot), phase)
            mbarrier.expect(k_ready.index(slot), k_desc.block_type.nbytes)
            load_tile(
                k_desc, [i_group, i_block * BLOCK, 0], k_ready.index(slot), k_tiles.index(slot)
            )
            mbarrier.wait(v_free.index(slot), phase)
            mbarrier.expect(v_ready.index(slot), v_desc.block_type.nbytes)
            load_tile(
                v_desc, [i_group, i_block * BLOCK, 0], v_ready.index(slot), v_tiles.index(slot)
            )
            i_step += 1
            i_block = i_next
        i_round += 1
        i_head, i_tile, i_start, n_listed, i_block, _second = read_work(queue, i_round)
