"""The Hopper kernel of block-sparse attention whose products have operands of e4m3.

Queue and rings are those of `block_sparse_attention/hopper_kernel.py`. Keys and values come rounded
(`rounding_kernel.py`); a warpgroup rounds the queries of its tile, row by row, and the weights. The
matrix unit adds products of e4m3 with about 14 bits. So it adds up one block of keys alone, and
blocks are added in float32: the two levels of DeepSeek-V3 (arXiv 2412.19437, section 3.3.2).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from shareprefill.runtime.ops.block_sparse_attention.hopper_schedule import schedule
from shareprefill.runtime.ops.hopper.pipeline import (
    QUERIES,
    barrier,
    free_tile,
    hide_later_keys,
    issue_logits,
    max_of_rows,
    rescale_sums,
    store_rows,
    sum_of_threads,
    sum_within_threads,
    wait_tile,
)
from shareprefill.runtime.ops.hopper.work_queue import make_rings, produce, read_work

E4M3_MAX = gl.constexpr(448.0)
# Weights are at most 2^8, within e4m3's range of 2^-9 to 448.
WEIGHT_LOG2 = gl.constexpr(8.0)
TINY = gl.constexpr(1e-30)


@gluon.jit
def _round_queries(q_ring, small, i_round, HALF: gl.constexpr, row_layout: gl.constexpr):
    """Put half a tile of queries into `small` as e4m3; scales of its rows `[M]`."""
    q_tiles, q_ready, q_free = q_ring
    ROWS: gl.constexpr = q_tiles.shape[2]
    BLOCK_D: gl.constexpr = q_tiles.shape[3]
    # Lanes go along rows, which keeps shared memory free of conflicts.
    layout: gl.constexpr = gl.BlockedLayout([1, BLOCK_D // 2], [16, 2], [4, 1], [0, 1])
    wait_tile(q_ready, i_round)
    b_q = q_tiles.index((i_round % QUERIES) * 2 + HALF).reshape([ROWS, BLOCK_D]).load(layout)
    free_tile(q_free, i_round)
    b_q = b_q.to(gl.float32)  # [M, D]
    b_peak = gl.maximum(gl.max(gl.abs(b_q), 1), TINY)  # [M]
    b_small = (b_q * (E4M3_MAX / b_peak)[:, None]).to(small.dtype)
    small.index(HALF).reshape([ROWS, BLOCK_D]).store(b_small)
    fence_async_shared()
    barrier()
    return gl.convert_layout(b_peak * (1.0 / E4M3_MAX), row_layout)


@gluon.jit
def _softmax(b_logits, b_max, b_factor):
    """Weights `[M, N]` times `2^WEIGHT_LOG2`, relative to the new maximum; that maximum, in log2
    units; the weights' sums `[M, 4]`, one in each of a row's threads; the old sums' factor."""
    b_new = gl.maximum(b_max, max_of_rows(b_logits) * b_factor)  # [M]
    # A row that has seen no key keeps a finite pivot: -inf - -inf would be NaN.
    b_pivot = gl.where(b_new == float("-inf"), 0.0, b_new)
    b_weights = gl.exp2(b_logits * b_factor[:, None] - (b_pivot - WEIGHT_LOG2)[:, None])  # [M, N]
    b_rescale = gl.exp2(b_max - b_pivot)
    return b_weights, b_new, sum_within_threads(b_weights), b_rescale


@gluon.jit
def _round_weights(b_weights, layout: gl.constexpr):
    """Weights `[M, N]` as an operand of e4m3 of the product whose accumulators have a layout.

    A thread's logits of 16 keys are its operands of these keys in another order, in which values
    are stored (`SmallOperands`). As the assembly has effects, it stays where it is, before the
    waits for the next tiles.
    """
    ROWS: gl.constexpr = b_weights.shape[0]
    BLOCK: gl.constexpr = b_weights.shape[1]
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 4)
    b_p = b_weights.reshape([ROWS, BLOCK // 16, 2, 4, 2])
    b_p = b_p.permute((0, 1, 3, 2, 4)).reshape([ROWS, BLOCK])
    b_p = gl.convert_layout(b_p, operand, assert_trivial=True)  # [M, N]
    return gl.inline_asm_elementwise(
        """{
            .reg .b16 low, high;
            cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
            cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
            mov.b32 $0, {low, high};
        }""",
        "=r,f,f,f,f",
        [b_p],
        dtype=gl.float8e4nv,
        is_pure=False,
        pack=4,
    )


@gluon.jit
def _issue_values(b_p, v_tiles, i_step, layout: gl.constexpr):
    """Start the product of rounded weights and a block of transposed values."""
    ROWS: gl.constexpr = b_p.shape[0]
    BLOCK: gl.constexpr = b_p.shape[1]
    BLOCK_D: gl.constexpr = v_tiles.shape[2]
    b_v = v_tiles.index(i_step % v_tiles.shape[0]).reshape([BLOCK_D, BLOCK])  # [Dv, N]
    b_zero = gl.zeros([ROWS, BLOCK_D], gl.float32, layout)
    return warpgroup_mma(b_p, b_v.permute((1, 0)), b_zero, use_acc=False, is_async=True)


@gluon.jit
def _add_block(b_acc, b_rescale, b_part):
    """Accumulators `[M, D]` relative to the new maximum, and a block's product."""
    b_rescale = gl.convert_layout(b_rescale, gl.SliceLayout(1, b_acc.type.layout))
    return b_acc * b_rescale[:, None] + b_part


@gluon.jit
def _consume(
    HALF: gl.constexpr,
    rings,
    small,
    p_scales,
    output,
    n_shared,
    n_k_tokens,
    scale_log2,
    HEAD_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK: gl.constexpr,
):
    """One warpgroup: half of the query rows of each tile against the keys that arrive.

    Logits, a block's product and the sums, 64 registers a thread each, leave none for a softmax
    beside the warpgroup's own product: it runs beside the other warpgroup's.
    """
    queue, q_ring, k_ring, v_ring = rings
    p_out, _lse, _sinks, stride_oh, stride_on, n_q_tokens = output
    q_tiles, _q_ready, _q_free = q_ring
    k_tiles, k_ready, k_free = k_ring
    v_tiles, v_ready, v_free = v_ring
    ROWS: gl.constexpr = BLOCK // 2
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 32])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 32])
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)

    i_step = 0
    i_round = 0
    i_head, i_tile, _start, n_listed, i_last, i_second = read_work(queue, i_round)
    while i_head >= 0:
        p_scale = p_scales + i_head // n_shared * 2
        b_factor = _round_queries(q_ring, small, i_round, HALF, row_layout)  # [M]
        b_factor *= scale_log2 * gl.load(p_scale)
        wait_tile(k_ready, i_step)
        b_logits = issue_logits(small, HALF, k_tiles, i_step, s_layout)  # [M, N]
        b_logits = warpgroup_mma_wait(0, deps=[b_logits])
        free_tile(k_free, i_step)
        i_position = i_tile * BLOCK + HALF * ROWS + n_k_tokens - n_q_tokens
        b_logits = hide_later_keys(b_logits, i_position, i_last * BLOCK)
        b_acc = gl.zeros([ROWS, BLOCK_D], gl.float32, o_layout)  # [M, D]
        b_sum = sum_within_threads(gl.zeros([ROWS, BLOCK], gl.float32, s_layout))  # [M, 4]
        b_max = gl.full([ROWS], float("-inf"), gl.float32, row_layout)  # [M]
        i_end = i_step + n_listed
        # Of the others only the next can hold keys past a row.
        i_diagonal = (i_tile * BLOCK + n_k_tokens - n_q_tokens + 1) // BLOCK
        i_masked = gl.where(i_second >= i_diagonal, i_step + 1, -1)
        for i_k in range(i_step + 1, i_end):
            b_weights, b_max, b_mass, b_rescale = _softmax(b_logits, b_max, b_factor)
            b_sum = rescale_sums(b_sum, b_rescale) + b_mass
            b_p = _round_weights(b_weights, o_layout)  # [M, N]
            wait_tile(v_ready, i_k - 1)
            wait_tile(k_ready, i_k)
            b_part = _issue_values(b_p, v_tiles, i_k - 1, o_layout)  # [M, D]
            b_logits = issue_logits(small, HALF, k_tiles, i_k, s_layout)  # [M, N]
            b_part = warpgroup_mma_wait(1, deps=[b_part])
            free_tile(v_free, i_k - 1)
            b_acc = _add_block(b_acc, b_rescale, b_part)
            b_logits = warpgroup_mma_wait(0, deps=[b_logits])
            free_tile(k_free, i_k)
            if i_k == i_masked:
                b_logits = hide_later_keys(b_logits, i_position, i_second * BLOCK)
        b_weights, b_max, b_mass, b_rescale = _softmax(b_logits, b_max, b_factor)
        b_sum = rescale_sums(b_sum, b_rescale) + b_mass
        b_p = _round_weights(b_weights, o_layout)  # [M, N]
        wait_tile(v_ready, i_end - 1)
        b_part = _issue_values(b_p, v_tiles, i_end - 1, o_layout)
        b_part = warpgroup_mma_wait(0, deps=[b_part])
        free_tile(v_free, i_end - 1)
        b_acc = _add_block(b_acc, b_rescale, b_part)

        b_total = sum_of_threads(b_sum, row_layout)
        # A row that has seen no key is zero.
        b_mean = gl.where(b_total == 0.0, 1.0, gl.load(p_scale + 1) / b_total)
        p_rows = p_out + i_head.to(gl.int64) * stride_oh
        i_row = i_tile * BLOCK + HALF * ROWS
        store_rows(b_acc, b_mean, p_rows, stride_on, i_row, n_q_tokens, q_tiles.dtype, HEAD_DIM)
        i_step = i_end
        i_round += 1
        i_head, i_tile, _start, n_listed, i_last, i_second = read_work(queue, i_round)


SIZES = ["n_heads", "n_shared", "n_at_once", "n_q", "n_q_tokens", "n_k_tokens"]
SCALAR_POINTERS = ["p_scales", "p_offsets", "p_indices", "p_head_to_list", "p_next"]


@gluon.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SCALAR_POINTERS)
def fp8_attention_kernel(
    q_desc,
    k_desc,
    v_desc,
    p_scales,
    p_out,
    p_offsets,
    p_indices,
    p_head_to_list,
    p_next,
    stride_oh,
    stride_on,
    n_heads,
    n_shared,
    n_at_once,
    n_q,
    n_q_tokens,
    n_k_tokens,
    scale_log2,
    HEAD_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
):
    """A persistent program: tiles of `BLOCK` query rows of one head, drawn from `p_next`.

    `p_next` is an int32 that is zero before the launch and after it.
    """
    rings = make_rings(q_desc, k_desc, v_desc, BLOCK, BLOCK_D, STAGES, True)
    queue, q_ring, k_ring, v_ring = rings
    SMALL: gl.constexpr = gl.NVMMASharedLayout(
        swizzle_byte_width=BLOCK_D, element_bitwidth=8, rank=3
    )
    small = gl.allocate_shared_memory(k_desc.dtype, [2, 1, BLOCK // 2, BLOCK_D], SMALL)
    output = (p_out, p_out, p_out, stride_oh, stride_on, n_q_tokens)
    # fmt: off
    gl.warp_specialize(
        [
            (_consume, (
                0, rings, small, p_scales, output, n_shared, n_k_tokens, scale_log2, HEAD_DIM,
                BLOCK_D, BLOCK,
            )),
            (_consume, (
                1, rings, small, p_scales, output, n_shared, n_k_tokens, scale_log2, HEAD_DIM,
                BLOCK_D, BLOCK,
            )),
            (produce, (
                queue, k_ring, k_desc, q_ring, q_desc, p_indices, n_shared, None, n_k_tokens,
                BLOCK, True, True, 0,
            )),
            (produce, (
                queue, v_ring, v_desc, None, None, p_indices, n_shared, None, n_k_tokens, BLOCK,
                False, True, 0,
            )),
            (schedule, (
                queue, output, p_next, p_offsets, p_indices, p_head_to_list, n_heads, n_at_once,
                n_q, n_k_tokens, HEAD_DIM, BLOCK_D, BLOCK, False, False,
            )),
        ],
        [4, 1, 1, 1],
        [240, 24, 24, 24],
    )
    # fmt: on
