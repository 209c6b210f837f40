"""The warp that draws the work of the Hopper kernel."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from shareprefill.runtime.ops.hopper.work_queue import (
    draw_work,
    place_work,
    write_work,
    zero_rows,
)


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
    p_rows = p_out + i_head.to(gl.int64) * stride_oh
    zero_rows(p_rows, stride_on, i_row, n_q_tokens, HEAD_DIM, BLOCK_D, BLOCK)
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
    p_head_to_list,
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
    """One warp: draws tiles from the counter that all programs share, and reads their lists."""
    _out, _lse, _sinks, _stride_oh, _stride_on, n_q_tokens = output
    lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    n_work = n_heads * n_q
    i_round = 0
    i_work = gl.program_id(0)
    while i_work < n_work:
        i_head, i_tile = place_work(i_work, n_heads, n_at_once, n_q)
        i_pattern = gl.load(p_head_to_list + i_head)
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
                write_work(queue, i_round, i_head, i_tile, i_start, n_listed, i_last, i_second)
                i_round += 1
            else:
                _write_unseen(
                    output, i_head, i_tile * BLOCK, HEAD_DIM, BLOCK_D, BLOCK, HAS_LSE, HAS_SINKS
                )
        i_work = draw_work(p_next, n_work)
    write_work(queue, i_round, -1, 0, 0, 0, 0, 0)
