"""The Hopper kernel of pooled attention: TMA, wgmma and warp specialisation in Gluon.

Runs on Triton 3.6 (measured) and compiles on 3.9. The schedule of a warpgroup, which issues the
next block's logits before the last block's product and computes the softmax meanwhile, is
FlashAttention-3's (arXiv 2407.08608, section 3.2). Masses become means as in `kernel.py`.
"""

# Gluon is typed by its compiler, which knows constexpr, program-wide scalars and tiles.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma_wait,
)

from shareprefill.runtime.ops.gluon import (
    QUERIES,
    barrier,
    free_tile,
    hide_later_keys,
    issue_logits,
    issue_values,
    load_tile,
    make_barriers,
    wait_tile,
)


@gluon.jit
def _place(i_work, p_heads, n_slots, n_at_once, n_q, HAS_HEADS: gl.constexpr):
    """Slot, head and query tile of a work item.

    Tiles run from the last to the first, `n_at_once` slots together: late rows have the most keys,
    light tiles fill the end, and the heads' keys stay in the L2 cache.
    """
    i_section = i_work // (n_at_once * n_q)
    i_rest = i_work - i_section * (n_at_once * n_q)
    width = gl.minimum(n_at_once, n_slots - i_section * n_at_once)
    i_slot = i_section * n_at_once + i_rest % width
    i_head = i_slot
    if HAS_HEADS:
        i_head = gl.load(p_heads + i_slot).to(gl.int32)
    return i_slot, i_head, n_q - 1 - i_rest // width


@gluon.jit
def _produce(
    q_desc,
    k_desc,
    v_desc,
    rings,
    sizes,
    SHARED: gl.constexpr,
    BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_HEADS: gl.constexpr,
):
    """One warp: loads query, key and value tiles by TMA as their places in the rings get free."""
    q_ring, k_ring, v_ring = rings
    q_tiles, q_ready, q_free = q_ring
    k_tiles, k_ready, k_free = k_ring
    v_tiles, v_ready, v_free = v_ring
    p_heads, n_slots, n_at_once, n_q, _columns, n_q_tokens, n_k_tokens = sizes
    i_step = 0
    i_round = 0
    for i_work in range(gl.program_id(0), n_slots * n_q, gl.num_programs(0)):
        _slot, i_head, i_tile = _place(i_work, p_heads, n_slots, n_at_once, n_q, HAS_HEADS)
        if i_head >= 0:
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
            i_group = i_head // SHARED
            n_rows = gl.minimum((i_tile + 1) * BLOCK, n_q_tokens)
            i_last = (n_rows + (n_k_tokens - n_q_tokens) - 1) // BLOCK
            for i_entry in range(i_last + 1):
                i_block = i_last - i_entry
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
            i_round += 1


@gluon.jit
def _softmax(b_logits, b_max, b_sum, p_mass, scale_log2, MASKED: gl.constexpr):
    """Weights relative to the new maximum, which is in units of the logits; the new sum; the factor
    of what was accumulated before. Stores log2 of the rows' mass in this block."""
    b_new = gl.maximum(b_max, gl.max(b_logits, 1))
    b_pivot = b_new * scale_log2
    if MASKED:
        # A row that has seen no key keeps a finite pivot: -inf - -inf would be NaN.
        b_pivot = gl.where(b_new == float("-inf"), 0.0, b_pivot)
    b_weights = gl.exp2(b_logits * scale_log2 - b_pivot[:, None])
    b_mass = gl.sum(b_weights, 1)
    b_rescale = gl.exp2(b_max * scale_log2 - b_pivot)
    ROWS: gl.constexpr = b_mass.shape[0]
    o_row = gl.arange(0, ROWS, layout=b_mass.type.layout)
    gl.store(p_mass + o_row, b_pivot + gl.log2(b_mass))
    return b_weights, b_new, b_sum * b_rescale + b_mass, b_rescale


@gluon.jit
def _store_rows(
    b_acc, b_factor, p_rows, stride_on, i_row, n_q_tokens, DTYPE: gl.constexpr, DIM: gl.constexpr
):
    """Scale the rows of one head and write those that exist; `p_rows`: the head's first row."""
    ROWS: gl.constexpr = b_acc.shape[0]
    BLOCK_D: gl.constexpr = b_acc.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    o_m = i_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    o_d = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, layout))
    b_factor = gl.convert_layout(b_factor, gl.SliceLayout(1, b_acc.type.layout))
    b_out = gl.convert_layout((b_acc * b_factor[:, None]).to(DTYPE), layout)
    m_out = (o_m < n_q_tokens)[:, None]
    if DIM != BLOCK_D:
        m_out = m_out & (o_d < DIM)[None, :]
    gl.store(p_rows + (o_m.to(gl.int64) * stride_on)[:, None] + o_d[None, :], b_out, mask=m_out)


@gluon.jit
def _store_means(p_mass, p_map, b_lse, share, n_seen, n_k, ROWS: gl.constexpr, J: gl.constexpr):
    """Sum `share * 2^(log mass - lse)` over the rows, for every key block."""
    layout: gl.constexpr = gl.BlockedLayout([1, ROWS // 32], [1, 32], [4, 1], [1, 0])
    o_m = gl.arange(0, ROWS, layout=gl.SliceLayout(0, layout))
    o_j = gl.arange(0, J, layout=gl.SliceLayout(1, layout))
    b_lse = gl.convert_layout(b_lse, gl.SliceLayout(0, layout))
    # Threads read what others of the warpgroup stored, and later store over it.
    barrier()
    for i_block in range(0, n_k, J):
        i_blocks = i_block + o_j
        b_log = gl.load(
            p_mass + (i_blocks * ROWS)[:, None] + o_m[None, :],
            mask=(i_blocks < n_seen)[:, None],
            other=float("-inf"),
        )
        b_mean = gl.sum(gl.exp2(b_log - b_lse[None, :]), 1) * share
        gl.store(p_map + i_blocks, b_mean, mask=i_blocks < n_k)
    barrier()


@gluon.jit
def _consume(
    HALF: gl.constexpr,
    rings,
    sizes,
    results,
    DTYPE: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_HEADS: gl.constexpr,
    HAS_SINKS: gl.constexpr,
):
    """One warpgroup: half of the query rows of each tile against the keys that arrive.

    A mbarrier wait between a softmax and the wait for the product that ran meanwhile keeps ptxas
    from moving that wait up.
    """
    q_ring, k_ring, v_ring = rings
    q_tiles, q_ready, q_free = q_ring
    k_tiles, k_ready, k_free = k_ring
    v_tiles, v_ready, v_free = v_ring
    p_heads, n_slots, n_at_once, n_q, n_k, n_q_tokens, n_k_tokens = sizes
    p_out, p_maps, p_mass, p_sinks, stride_oh, stride_on, scale_log2 = results
    ROWS: gl.constexpr = BLOCK // 2
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    rescale_layout: gl.constexpr = gl.SliceLayout(1, o_layout)
    q_offset = n_k_tokens - n_q_tokens
    p_mass += (gl.program_id(0) * 2 + HALF).to(gl.int64) * n_k * ROWS

    i_step = 0
    i_round = 0
    for i_work in range(gl.program_id(0), n_slots * n_q, gl.num_programs(0)):
        i_slot, i_head, i_tile = _place(i_work, p_heads, n_slots, n_at_once, n_q, HAS_HEADS)
        i_row = i_tile * BLOCK + HALF * ROWS
        b_acc = gl.zeros([ROWS, BLOCK_D], gl.float32, o_layout)
        b_max = gl.full([ROWS], float("-inf"), gl.float32, row_layout)
        b_sum = gl.zeros([ROWS], gl.float32, row_layout)
        n_seen = 0
        if i_head >= 0:
            i_position = i_row + q_offset
            n_rows = gl.minimum((i_tile + 1) * BLOCK, n_q_tokens)
            i_last = (n_rows + q_offset - 1) // BLOCK
            n_seen = i_last + 1
            n_masked = gl.where(i_last > (i_tile * BLOCK + q_offset + 1) // BLOCK, 2, 1)
            wait_tile(q_ready, i_round)
            wait_tile(k_ready, i_step)
            i_query = (i_round % QUERIES) * 2 + HALF
            b_logits = issue_logits(q_tiles, i_query, k_tiles, i_step, s_layout)
            b_logits = warpgroup_mma_wait(0, deps=[b_logits])
            free_tile(k_free, i_step)
            b_logits = hide_later_keys(b_logits, i_position, i_last * BLOCK)
            b_weights, b_max, b_sum, b_rescale = _softmax(
                b_logits, b_max, b_sum, p_mass + i_last * ROWS, scale_log2, True
            )
            i_end = i_step + n_seen
            if n_seen > 1:
                wait_tile(k_ready, i_step + 1)
            for UNMASKED in gl.static_range(2):
                for i_k in range(
                    i_step + n_masked if UNMASKED else i_step + 1,
                    i_end if UNMASKED else i_step + n_masked,
                ):
                    b_logits = issue_logits(q_tiles, i_query, k_tiles, i_k, s_layout)
                    wait_tile(v_ready, i_k - 1)
                    b_acc = issue_values(b_weights, v_tiles, i_k - 1, b_acc)
                    b_logits = warpgroup_mma_wait(1, deps=[b_logits])
                    free_tile(k_free, i_k)
                    i_block = i_end - 1 - i_k
                    if not UNMASKED:
                        b_logits = hide_later_keys(b_logits, i_position, i_block * BLOCK)
                    b_weights, b_max, b_sum, b_rescale = _softmax(
                        b_logits, b_max, b_sum, p_mass + i_block * ROWS, scale_log2, not UNMASKED
                    )
                    if i_k + 1 < i_end:
                        wait_tile(k_ready, i_k + 1)
                    b_acc, b_weights = warpgroup_mma_wait(0, deps=[b_acc, b_weights])
                    free_tile(v_free, i_k - 1)
                    b_acc = b_acc * gl.convert_layout(b_rescale, rescale_layout)[:, None]
            free_tile(q_free, i_round)
            wait_tile(v_ready, i_end - 1)
            b_acc = issue_values(b_weights, v_tiles, i_end - 1, b_acc)
            b_acc = warpgroup_mma_wait(0, deps=[b_acc])
            free_tile(v_free, i_end - 1)
            i_step = i_end
            i_round += 1

        # Rows past the last see keys of padding, rows of a skipped head none.
        o_row = i_row + gl.arange(0, ROWS, layout=row_layout)
        m_row = (o_row < n_q_tokens) & (b_sum > 0.0)
        b_divisor = gl.where(m_row, b_sum, 1.0)
        b_lse = gl.where(m_row, b_max * scale_log2 + gl.log2(b_divisor), float("inf"))
        b_factor = 1.0 / b_divisor
        if HAS_SINKS:
            LOG2E: gl.constexpr = 1.4426950408889634
            sink = gl.load(p_sinks + gl.maximum(i_head, 0)).to(gl.float32) * LOG2E
            # The share of the attention that goes to keys.
            b_factor = b_factor / (1.0 + gl.exp2(sink - b_lse))
        _store_rows(
            b_acc,
            b_factor,
            p_out + i_slot.to(gl.int64) * stride_oh,
            stride_on,
            i_row,
            n_q_tokens,
            DTYPE,
            HEAD_DIM,
        )
        n_valid = gl.minimum(n_q_tokens - i_tile * BLOCK, BLOCK)
        i_map = (i_slot.to(gl.int64) * n_q + i_tile) * 2 + HALF
        _store_means(
            p_mass,
            p_maps + i_map * n_k,
            b_lse,
            1.0 / n_valid.to(gl.float32),
            n_seen,
            n_k,
            ROWS,
            32,
        )


@gluon.jit(do_not_specialize=["n_slots", "n_at_once", "n_q", "n_k", "n_q_tokens", "n_k_tokens"])
def pooled_hopper_kernel(
    q_desc,
    k_desc,
    v_desc,
    p_out,
    p_maps,
    p_mass,
    p_heads,
    p_sinks,
    stride_oh,
    stride_on,
    n_slots,
    n_at_once,
    n_q,
    n_k,
    n_q_tokens,
    n_k_tokens,
    scale_log2,
    SHARED: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_HEADS: gl.constexpr,
    HAS_SINKS: gl.constexpr,
):
    """A persistent program: tiles `program, program + programs, ...` of `BLOCK` rows of one head.

    The means of a map row come in two parts, of the first and of the second half of its rows.
    """
    DTYPE: gl.constexpr = k_desc.dtype
    HALF: gl.constexpr = BLOCK // 2
    q_tiles = gl.allocate_shared_memory(DTYPE, [QUERIES * 2, 1, HALF, BLOCK_D], q_desc.layout)
    k_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, 1, BLOCK, BLOCK_D], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, 1, BLOCK, BLOCK_D], v_desc.layout)
    q_ring = (q_tiles, make_barriers(QUERIES, 1), make_barriers(QUERIES, 2))
    k_ring = (k_tiles, make_barriers(STAGES, 1), make_barriers(STAGES, 2))
    v_ring = (v_tiles, make_barriers(STAGES, 1), make_barriers(STAGES, 2))
    fence_async_shared()

    rings = (q_ring, k_ring, v_ring)
    sizes = (p_heads, n_slots, n_at_once, n_q, n_k, n_q_tokens, n_k_tokens)
    results = (p_out, p_maps, p_mass, p_sinks, stride_oh, stride_on, scale_log2)
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    0,
                    rings,
                    sizes,
                    results,
                    DTYPE,
                    HEAD_DIM,
                    BLOCK_D,
                    BLOCK,
                    STAGES,
                    HAS_HEADS,
                    HAS_SINKS,
                ),
            ),
            (
                _consume,
                (
                    1,
                    rings,
                    sizes,
                    results,
                    DTYPE,
                    HEAD_DIM,
                    BLOCK_D,
                    BLOCK,
                    STAGES,
                    HAS_HEADS,
                    HAS_SINKS,
                ),
            ),
            (_produce, (q_desc, k_desc, v_desc, rings, sizes, SHARED, BLOCK, STAGES, HAS_HEADS)),
        ],
        [4, 1],
        [240, 24],
    )
