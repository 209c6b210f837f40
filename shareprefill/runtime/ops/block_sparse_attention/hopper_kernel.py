"""The Hopper kernel of block-sparse attention: TMA, wgmma and warp specialisation in Gluon.

Measured on Triton 3.6; it compiles on 3.7 and 3.9, too. Within a warpgroup the next block's logits
are issued before the last block's product, and the softmax runs beside the product: the schedule of
FlashAttention-3 (arXiv 2407.08608, section 3.2), which here runs on from tile to tile.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait

from shareprefill.runtime.ops.block_sparse_attention.hopper_schedule import schedule
from shareprefill.runtime.ops.hopper.pipeline import (
    QUERIES,
    cap_logits,
    first_logits,
    free_tile,
    hide_in_last,
    hide_later_keys,
    issue_logits,
    issue_values,
    max_of_rows,
    rescale_sums,
    store_rows,
    sum_of_threads,
    sum_within_threads,
    wait_tile,
)
from shareprefill.runtime.ops.hopper.work_queue import make_rings, produce, read_work

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _softmax(b_logits, b_max, scales, HAS_SOFTCAP: gl.constexpr):
    """Weights relative to the new maximum, that maximum, the sums, and the old sums' factor.

    Maxima are in the logits' unit, which is log2 after a soft-cap and not scaled otherwise. Sums
    are `[M, 4]`, one in each of a row's threads.
    """
    scale_log2, _softcap_log2 = scales
    factor = 1.0 if HAS_SOFTCAP else scale_log2
    b_new = gl.maximum(b_max, max_of_rows(b_logits))  # [M]
    # A row that has seen no key keeps a finite pivot: -inf - -inf would be NaN.
    b_pivot = gl.where(b_new == float("-inf"), 0.0, b_new * factor)
    b_weights = gl.exp2(b_logits * factor - b_pivot[:, None])  # [M, N]
    b_rescale = gl.exp2(b_max * factor - b_pivot)
    return b_weights, b_new, sum_within_threads(b_weights), b_rescale


@gluon.jit
def _store(
    output,
    b_acc,
    b_max,
    b_sum,
    scales,
    i_head,
    i_row,
    DTYPE: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    HAS_LSE: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    HAS_SINKS: gl.constexpr,
):
    """Normalise and write rows of one head."""
    p_out, p_lse, p_sinks, stride_oh, stride_on, n_q_tokens = output
    row_layout: gl.constexpr = b_max.type.layout
    b_sum = sum_of_threads(b_sum, row_layout)
    scale_log2, _softcap_log2 = scales
    b_top = b_max * (1.0 if HAS_SOFTCAP else scale_log2)
    b_factor = gl.where(b_sum == 0.0, 1.0, 1.0 / b_sum)
    if HAS_SINKS:
        # One more key without a value. It may be far above all logits, so it can be the pivot.
        sink = gl.load(p_sinks + i_head) * LOG2E
        b_old = b_top
        b_top = gl.maximum(b_old, sink)
        b_factor = gl.exp2(b_old - b_top)
        b_sum = b_sum * b_factor + gl.exp2(sink - b_top)
        b_factor = b_factor / b_sum
    p_rows = p_out + i_head.to(gl.int64) * stride_oh
    store_rows(b_acc, b_factor, p_rows, stride_on, i_row, n_q_tokens, DTYPE, HEAD_DIM)
    if HAS_LSE:
        # Where no key is seen the maximum and the sum's logarithm are -inf.
        o_row = i_row + gl.arange(0, b_sum.shape[0], layout=row_layout)
        p_row = p_lse + i_head.to(gl.int64) * n_q_tokens
        gl.store(p_row + o_row, (b_top + gl.log2(b_sum)) * LN2, mask=o_row < n_q_tokens)


@gluon.jit
def _consume(
    HALF: gl.constexpr,
    rings,
    output,
    n_k_tokens,
    scales,
    HEAD_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK: gl.constexpr,
    HAS_LSE: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    HAS_SINKS: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
):
    """One warpgroup: half of the query rows of each tile against the keys that arrive.

    What ptxas (CUDA 12.8) asks for: a wait on a barrier between a softmax and the wait for the
    product that runs meanwhile, or it moves the latter up; one loop for masked and unmasked blocks,
    as with two it used operands of the first where that had not run; sums rescaled while no product
    is under way, or it serialises them.
    """
    queue, q_ring, k_ring, v_ring = rings
    _out, _lse, _sinks, _stride_oh, _stride_on, n_q_tokens = output
    q_tiles, q_ready, q_free = q_ring
    k_tiles, k_ready, k_free = k_ring
    v_tiles, v_ready, v_free = v_ring
    ROWS: gl.constexpr = BLOCK // 2
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    b_unseen = gl.full([ROWS], float("-inf"), gl.float32, row_layout)  # [M]
    i_offset = HALF * ROWS + n_k_tokens - n_q_tokens

    i_step = 0
    i_round = 0
    i_head, i_tile, _start, n_listed, i_last, i_second = read_work(queue, i_round)
    b_logits = gl.zeros([ROWS, BLOCK], gl.float32, s_layout)  # [M, N]
    if i_head >= 0:
        b_logits = first_logits(q_ring, k_ring, HALF, s_layout)  # [M, N]
        b_logits = cap_logits(b_logits, scales, HAS_SOFTCAP)
        b_logits = hide_in_last(b_logits, i_tile * BLOCK + i_offset, i_last, n_k_tokens, PAGE_SIZE)
    b_weights, b_max, b_sum, b_rescale = _softmax(b_logits, b_unseen, scales, HAS_SOFTCAP)
    while i_head >= 0:
        # The weights of the tile's last block are there.
        i_position = i_tile * BLOCK + i_offset
        i_query = (i_round % QUERIES) * 2 + HALF
        b_acc = gl.zeros([ROWS, BLOCK_D], gl.float32, o_layout)  # [M, D]
        i_end = i_step + n_listed
        # Of the others only the next can hold keys past a row.
        i_diagonal = (i_tile * BLOCK + n_k_tokens - n_q_tokens + 1) // BLOCK
        i_masked = gl.where(i_second >= i_diagonal, i_step + 1, -1)
        if n_listed > 1:
            wait_tile(k_ready, i_step + 1)
        for i_k in range(i_step + 1, i_end):
            b_logits = issue_logits(q_tiles, i_query, k_tiles, i_k, s_layout)  # [M, N]
            wait_tile(v_ready, i_k - 1)
            b_acc = issue_values(b_weights, v_tiles, i_k - 1, b_acc)  # [M, D]
            b_logits = warpgroup_mma_wait(1, deps=[b_logits])
            free_tile(k_free, i_k)
            b_logits = cap_logits(b_logits, scales, HAS_SOFTCAP)
            if i_k == i_masked:
                b_logits = hide_later_keys(b_logits, i_position, i_second * BLOCK)
            b_weights, b_max, b_mass, b_rescale = _softmax(b_logits, b_max, scales, HAS_SOFTCAP)
            b_sum = rescale_sums(b_sum, b_rescale) + b_mass
            if i_k + 1 < i_end:
                wait_tile(k_ready, i_k + 1)
            b_acc, b_weights = warpgroup_mma_wait(0, deps=[b_acc, b_weights])
            free_tile(v_free, i_k - 1)
            b_acc *= gl.convert_layout(b_rescale, gl.SliceLayout(1, o_layout))[:, None]
        free_tile(q_free, i_round)

        # The tile's last product, beside which the next tile begins.
        i_round += 1
        i_step = i_end
        n_head, n_tile, _start, n_listed, i_last, i_second = read_work(queue, i_round)
        b_old_max = b_max
        b_old_sum = b_sum
        if n_head >= 0:
            wait_tile(q_ready, i_round)
            wait_tile(k_ready, i_step)
            i_other = (i_round % QUERIES) * 2 + HALF
            b_logits = issue_logits(q_tiles, i_other, k_tiles, i_step, s_layout)  # [M, N]
            wait_tile(v_ready, i_step - 1)
            b_acc = issue_values(b_weights, v_tiles, i_step - 1, b_acc)
            b_logits = warpgroup_mma_wait(1, deps=[b_logits])
            free_tile(k_free, i_step)
            b_logits = cap_logits(b_logits, scales, HAS_SOFTCAP)
            b_logits = hide_in_last(
                b_logits, n_tile * BLOCK + i_offset, i_last, n_k_tokens, PAGE_SIZE
            )
            b_weights, b_max, b_sum, b_rescale = _softmax(b_logits, b_unseen, scales, HAS_SOFTCAP)
            wait_tile(v_ready, i_step - 1)
            b_acc, b_weights = warpgroup_mma_wait(0, deps=[b_acc, b_weights])
        else:
            wait_tile(v_ready, i_step - 1)
            b_acc = issue_values(b_weights, v_tiles, i_step - 1, b_acc)
            b_acc = warpgroup_mma_wait(0, deps=[b_acc])
        free_tile(v_free, i_step - 1)
        _store(
            output,
            b_acc,
            b_old_max,
            b_old_sum,
            scales,
            i_head,
            i_tile * BLOCK + HALF * ROWS,
            k_tiles.dtype,
            HEAD_DIM,
            HAS_LSE,
            HAS_SOFTCAP,
            HAS_SINKS,
        )
        i_head = n_head
        i_tile = n_tile


SIZES = ["n_heads", "n_shared", "n_at_once", "n_q", "n_q_tokens", "n_k_tokens", "page_step"]
SCALAR_POINTERS = [
    *("p_lse", "p_sinks", "p_offsets", "p_indices", "p_head_to_list", "p_table", "p_next")
]


@gluon.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SCALAR_POINTERS)
def block_sparse_hopper_kernel(
    q_desc,
    k_desc,
    v_desc,
    p_out,
    p_lse,
    p_sinks,
    p_offsets,
    p_indices,
    p_head_to_list,
    p_table,
    p_next,
    stride_oh,
    stride_on,
    n_heads,
    n_shared,
    n_at_once,
    n_q,
    n_q_tokens,
    n_k_tokens,
    page_step,
    scale_log2,
    softcap_log2,
    HEAD_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_LSE: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    HAS_SINKS: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
):
    """A persistent program: tiles of `BLOCK` query rows of one head, drawn from `p_next`.

    `p_next` is an int32 that is zero before the launch and after it.
    """
    rings = make_rings(q_desc, k_desc, v_desc, BLOCK, BLOCK_D, STAGES)
    queue, q_ring, k_ring, v_ring = rings
    output = (p_out, p_lse, p_sinks, stride_oh, stride_on, n_q_tokens)
    scales = (scale_log2, softcap_log2)
    pages = (p_table, page_step)
    # fmt: off
    gl.warp_specialize(
        [
            (_consume, (
                0, rings, output, n_k_tokens, scales, HEAD_DIM, BLOCK_D, BLOCK, HAS_LSE,
                HAS_SOFTCAP, HAS_SINKS, PAGE_SIZE,
            )),
            (_consume, (
                1, rings, output, n_k_tokens, scales, HEAD_DIM, BLOCK_D, BLOCK, HAS_LSE,
                HAS_SOFTCAP, HAS_SINKS, PAGE_SIZE,
            )),
            (produce, (
                queue, k_ring, k_desc, q_ring, q_desc, p_indices, n_shared, pages, n_k_tokens,
                BLOCK, True, True, PAGE_SIZE,
            )),
            (produce, (
                queue, v_ring, v_desc, None, None, p_indices, n_shared, pages, n_k_tokens, BLOCK,
                False, True, PAGE_SIZE,
            )),
            (schedule, (
                queue, output, p_next, p_offsets, p_indices, p_head_to_list, n_heads, n_at_once,
                n_q, n_k_tokens, HEAD_DIM, BLOCK_D, BLOCK, HAS_LSE, HAS_SINKS,
            )),
        ],
        [4, 1, 1, 1],
        [240, 24, 24, 24],
    )
    # fmt: on
