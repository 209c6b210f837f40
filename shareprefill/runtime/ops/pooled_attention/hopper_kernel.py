"""The Hopper kernel of pooled attention: TMA, wgmma and warp specialisation in Gluon.

Runs on Triton 3.6 and compiles on 3.9. The schedule of a warpgroup, which issues the next block's
logits before the last block's product and computes the softmax meanwhile, is FlashAttention-3's
(arXiv 2407.08608, section 3.2); as in the block-sparse kernel it runs on from tile to tile. Masses
become means as in `triton_kernel.py`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait

from shareprefill.runtime.ops.hopper.pipeline import (
    QUERIES,
    barrier,
    first_logits,
    free_tile,
    hide_in_last,
    hide_later_keys,
    issue_logits,
    issue_values,
    max_of_rows,
    store_rows,
    sum_of_threads,
    sum_within_threads,
    wait_tile,
)
from shareprefill.runtime.ops.hopper.work_queue import (
    draw_work,
    make_rings,
    place_work,
    produce,
    read_work,
    write_work,
    zero_rows,
)

LOG2E = gl.constexpr(1.4426950408889634)
MEANS = gl.constexpr(64)  # map entries of one step, whose masses are 32 registers a thread


@gluon.jit
def _schedule(
    queue,
    sizes,
    results,
    p_next,
    p_heads,
    n_at_once,
    HEAD_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK: gl.constexpr,
    HAS_HEADS: gl.constexpr,
):
    """One warp: draws tiles from the counter that all programs share, and zeroes their map rows."""
    n_slots, n_q, n_k, n_q_tokens, n_k_tokens = sizes
    p_out, p_maps, _mass, _sinks, stride_oh, stride_on, _scale = results
    lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    n_work = n_slots * n_q
    i_round = 0
    i_work = gl.program_id(0)
    while i_work < n_work:
        i_slot, i_tile = place_work(i_work, n_slots, n_at_once, n_q)
        i_head = i_slot
        if HAS_HEADS:
            i_head = gl.load(p_heads + i_slot).to(gl.int32)
        p_map = p_maps + (i_slot.to(gl.int64) * n_q + i_tile) * n_k
        for i_block in range(0, n_k, 32):
            i_blocks = i_block + lane
            gl.store(p_map + i_blocks, gl.zeros_like(lane).to(gl.float32), mask=i_blocks < n_k)
        if i_head >= 0:
            n_rows = gl.minimum((i_tile + 1) * BLOCK, n_q_tokens)
            i_last = (n_rows + (n_k_tokens - n_q_tokens) - 1) // BLOCK
            # Both warpgroups add to the zeros.
            barrier()
            write_work(queue, i_round, i_head, i_tile, i_slot, i_last + 1, i_last, i_last - 1)
            i_round += 1
        else:
            p_rows = p_out + i_slot.to(gl.int64) * stride_oh
            zero_rows(p_rows, stride_on, i_tile * BLOCK, n_q_tokens, HEAD_DIM, BLOCK_D, BLOCK)
        i_work = draw_work(p_next, n_work)
    write_work(queue, i_round, -1, 0, 0, 0, 0, 0)


@gluon.jit
def _softmax(b_logits, b_max, b_sum, scale_log2):
    """Weights relative to the new maximum; that maximum, in units of log2; the block's mass, in a
    row's four threads; the sums so far, and their factor, relative to the new maximum."""
    b_new = gl.maximum(b_max, max_of_rows(b_logits) * scale_log2)  # [M]
    # A row that has seen no key keeps a finite pivot: -inf - -inf would be NaN.
    b_pivot = gl.where(b_new == float("-inf"), 0.0, b_new)
    b_weights = gl.exp2(b_logits * scale_log2 - b_pivot[:, None])  # [M, N]
    b_rescale = gl.exp2(b_max - b_pivot)
    return b_weights, b_new, sum_within_threads(b_weights), b_sum * b_rescale, b_rescale


@gluon.jit
def _keep_mass(b_sum, b_mass, b_max, p_block):
    """Store log2 of the rows' mass in a block, and add it to the rows' sums."""
    layout: gl.constexpr = b_sum.type.layout
    b_mass = sum_of_threads(b_mass, layout)
    # Its error of 2^-22 is below what storing the logarithm costs; log2 takes 30 instructions.
    b_log = gl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=f,f", [b_mass], dtype=gl.float32, is_pure=True, pack=1
    )
    # A row that has seen no key has a mass and a maximum of -inf.
    o_row = gl.arange(0, b_sum.shape[0], layout=layout)
    gl.store(p_block + o_row, b_max + b_log)
    return b_sum + b_mass


@gluon.jit
def _add_means(p_mass, p_map, b_lse, share, n_seen):
    """Add `share * 2^(log mass - lse)`, summed over the rows, to the key blocks' map entries.

    A map row is zero before, and the sum of the two halves' means does not depend on their order.
    """
    ROWS: gl.constexpr = b_lse.shape[0]
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
    o_m = gl.arange(0, ROWS, layout=gl.SliceLayout(0, layout))
    o_j = gl.arange(0, MEANS, layout=gl.SliceLayout(1, layout))
    b_lse = gl.convert_layout(b_lse, gl.SliceLayout(0, layout))
    # Threads read what others of the warpgroup stored, and later store over it.
    barrier()
    for i_block in range(0, n_seen, MEANS):
        i_blocks = i_block + o_j
        m_seen = i_blocks < n_seen
        p_logs = p_mass + (i_blocks * ROWS)[:, None] + o_m[None, :]
        b_log = gl.load(p_logs, mask=m_seen[:, None], other=float("-inf"))  # [J, M]
        b_mean = gl.sum(gl.exp2(b_log - b_lse[None, :]), 1) * share  # [J]
        gl.atomic_add(p_map + i_blocks, b_mean, mask=m_seen, sem="relaxed")
    barrier()


@gluon.jit
def _store(
    results,
    sizes,
    p_mass,
    b_acc,
    b_max,
    b_sum,
    i_head,
    i_tile,
    i_slot,
    n_seen,
    HALF: gl.constexpr,
    DTYPE: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK: gl.constexpr,
    HAS_SINKS: gl.constexpr,
):
    """Write half a tile's output, and its share of the map row."""
    p_out, p_maps, _mass, p_sinks, stride_oh, stride_on, _scale = results
    _slots, n_q, n_k, n_q_tokens, _tokens = sizes
    i_row = i_tile * BLOCK + HALF * (BLOCK // 2)
    # Rows past the last see keys of padding.
    o_row = i_row + gl.arange(0, b_sum.shape[0], layout=b_sum.type.layout)
    m_row = o_row < n_q_tokens
    b_divisor = gl.where(m_row, b_sum, 1.0)
    b_lse = gl.where(m_row, b_max + gl.log2(b_divisor), float("inf"))
    b_factor = 1.0 / b_divisor
    if HAS_SINKS:
        # The share of the attention that goes to keys.
        sink = gl.load(p_sinks + i_head).to(gl.float32) * LOG2E
        b_factor = b_factor / (1.0 + gl.exp2(sink - b_lse))
    p_rows = p_out + i_slot.to(gl.int64) * stride_oh
    store_rows(b_acc, b_factor, p_rows, stride_on, i_row, n_q_tokens, DTYPE, HEAD_DIM)
    share = 1.0 / gl.minimum(n_q_tokens - i_tile * BLOCK, BLOCK).to(gl.float32)
    p_map = p_maps + (i_slot.to(gl.int64) * n_q + i_tile) * n_k
    _add_means(p_mass, p_map, b_lse, share, n_seen)


@gluon.jit
def _consume(
    HALF: gl.constexpr,
    rings,
    sizes,
    results,
    HEAD_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK: gl.constexpr,
    HAS_SINKS: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
):
    """One warpgroup: half of the query rows of each tile against the keys that arrive.

    What ptxas (CUDA 12.8) asks for is said in the block-sparse kernel. A block's mass is kept a
    step later, while the next block's logits are computed and the warps would wait.
    """
    queue, q_ring, k_ring, v_ring = rings
    q_tiles, q_ready, q_free = q_ring
    k_tiles, k_ready, k_free = k_ring
    v_tiles, v_ready, v_free = v_ring
    _slots, _q, n_k, n_q_tokens, n_k_tokens = sizes
    _out, _maps, p_mass, _sinks, _stride_oh, _stride_on, scale_log2 = results
    ROWS: gl.constexpr = BLOCK // 2
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    b_unseen = gl.full([ROWS], float("-inf"), gl.float32, row_layout)  # [M]
    b_none = gl.zeros([ROWS], gl.float32, row_layout)
    i_offset = HALF * ROWS + n_k_tokens - n_q_tokens
    p_mass += (gl.program_id(0) * 2 + HALF).to(gl.int64) * n_k * ROWS

    i_step = 0
    i_round = 0
    i_head, i_tile, i_slot, n_seen, i_last, _second = read_work(queue, i_round)
    b_logits = gl.zeros([ROWS, BLOCK], gl.float32, s_layout)  # [M, N]
    if i_head >= 0:
        b_logits = first_logits(q_ring, k_ring, HALF, s_layout)  # [M, N]
        b_logits = hide_in_last(b_logits, i_tile * BLOCK + i_offset, i_last, n_k_tokens, PAGE_SIZE)
    b_weights, b_max, b_mass, b_sum, _rescale = _softmax(b_logits, b_unseen, b_none, scale_log2)
    while i_head >= 0:
        # The weights of the tile's last block are there.
        i_position = i_tile * BLOCK + i_offset
        i_query = (i_round % QUERIES) * 2 + HALF
        b_acc = gl.zeros([ROWS, BLOCK_D], gl.float32, o_layout)  # [M, D]
        i_end = i_step + n_seen
        # Of the others only the next can hold keys past a row.
        i_diagonal = (i_tile * BLOCK + n_k_tokens - n_q_tokens + 1) // BLOCK
        i_masked = gl.where(n_seen - 2 >= i_diagonal, i_step + 1, -1)
        if n_seen > 1:
            wait_tile(k_ready, i_step + 1)
        for i_k in range(i_step + 1, i_end):
            b_logits = issue_logits(q_tiles, i_query, k_tiles, i_k, s_layout)  # [M, N]
            p_block = p_mass + (i_end - i_k) * ROWS
            b_sum = _keep_mass(b_sum, b_mass, b_max, p_block)
            wait_tile(v_ready, i_k - 1)
            b_acc = issue_values(b_weights, v_tiles, i_k - 1, b_acc)  # [M, D]
            b_logits = warpgroup_mma_wait(1, deps=[b_logits])
            free_tile(k_free, i_k)
            if i_k == i_masked:
                b_logits = hide_later_keys(b_logits, i_position, (n_seen - 2) * BLOCK)
            b_weights, b_max, b_mass, b_sum, b_rescale = _softmax(
                b_logits, b_max, b_sum, scale_log2
            )
            if i_k + 1 < i_end:
                wait_tile(k_ready, i_k + 1)
            b_acc, b_weights = warpgroup_mma_wait(0, deps=[b_acc, b_weights])
            free_tile(v_free, i_k - 1)
            b_acc *= gl.convert_layout(b_rescale, gl.SliceLayout(1, o_layout))[:, None]
        free_tile(q_free, i_round)
        b_old_sum = _keep_mass(b_sum, b_mass, b_max, p_mass)
        b_old_max = b_max

        # The tile's last product, beside which the next tile begins.
        i_round += 1
        i_step = i_end
        n_head, n_tile, n_slot, n_next, i_last, _second = read_work(queue, i_round)
        if n_head >= 0:
            wait_tile(q_ready, i_round)
            wait_tile(k_ready, i_step)
            i_other = (i_round % QUERIES) * 2 + HALF
            b_logits = issue_logits(q_tiles, i_other, k_tiles, i_step, s_layout)  # [M, N]
            wait_tile(v_ready, i_step - 1)
            b_acc = issue_values(b_weights, v_tiles, i_step - 1, b_acc)
            b_logits = warpgroup_mma_wait(1, deps=[b_logits])
            free_tile(k_free, i_step)
            b_logits = hide_in_last(
                b_logits, n_tile * BLOCK + i_offset, i_last, n_k_tokens, PAGE_SIZE
            )
            b_weights, b_max, b_mass, b_sum, _rescale = _softmax(
                b_logits, b_unseen, b_none, scale_log2
            )
            wait_tile(v_ready, i_step - 1)
            b_acc, b_weights = warpgroup_mma_wait(0, deps=[b_acc, b_weights])
        else:
            wait_tile(v_ready, i_step - 1)
            b_acc = issue_values(b_weights, v_tiles, i_step - 1, b_acc)
            b_acc = warpgroup_mma_wait(0, deps=[b_acc])
        free_tile(v_free, i_step - 1)
        _store(
            results,
            sizes,
            p_mass,
            b_acc,
            b_old_max,
            b_old_sum,
            i_head,
            i_tile,
            i_slot,
            n_seen,
            HALF,
            k_tiles.dtype,
            HEAD_DIM,
            BLOCK,
            HAS_SINKS,
        )
        i_head = n_head
        i_tile = n_tile
        i_slot = n_slot
        n_seen = n_next


SIZES = ["n_slots", "n_shared", "n_at_once", "n_q", "n_k", "n_q_tokens", "n_k_tokens", "page_step"]
SCALAR_POINTERS = ["p_heads", "p_sinks", "p_table", "p_next"]


@gluon.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SCALAR_POINTERS)
def pooled_hopper_kernel(
    q_desc,
    k_desc,
    v_desc,
    p_out,
    p_maps,
    p_mass,
    p_heads,
    p_sinks,
    p_table,
    p_next,
    stride_oh,
    stride_on,
    n_slots,
    n_shared,
    n_at_once,
    n_q,
    n_k,
    n_q_tokens,
    n_k_tokens,
    page_step,
    scale_log2,
    HEAD_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_HEADS: gl.constexpr,
    HAS_SINKS: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
):
    """A persistent program: tiles of `BLOCK` query rows of one head, drawn from `p_next`.

    `p_next` is an int32 that is zero before the launch and after it.
    """
    rings = make_rings(q_desc, k_desc, v_desc, BLOCK, BLOCK_D, STAGES)
    queue, q_ring, k_ring, v_ring = rings
    sizes = (n_slots, n_q, n_k, n_q_tokens, n_k_tokens)
    results = (p_out, p_maps, p_mass, p_sinks, stride_oh, stride_on, scale_log2)
    pages = (p_table, page_step)
    # fmt: off
    gl.warp_specialize(
        [
            (_consume, (
                0, rings, sizes, results, HEAD_DIM, BLOCK_D, BLOCK, HAS_SINKS, PAGE_SIZE,
            )),
            (_consume, (
                1, rings, sizes, results, HEAD_DIM, BLOCK_D, BLOCK, HAS_SINKS, PAGE_SIZE,
            )),
            (produce, (
                queue, k_ring, k_desc, q_ring, q_desc, p_heads, n_shared, pages, n_k_tokens, BLOCK,
                True, False, PAGE_SIZE,
            )),
            (produce, (
                queue, v_ring, v_desc, None, None, p_heads, n_shared, pages, n_k_tokens, BLOCK,
                False, False, PAGE_SIZE,
            )),
            (_schedule, (
                queue, sizes, results, p_next, p_heads, n_at_once, HEAD_DIM, BLOCK_D, BLOCK,
                HAS_HEADS,
            )),
        ],
        [4, 1, 1, 1],
        [240, 24, 24, 24],
    )
    # fmt: on
