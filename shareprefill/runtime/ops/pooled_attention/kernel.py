"""The Triton kernel of pooled attention: one pass over the keys gives output and block means.

Each program keeps the mass of its rows in every key tile, as a logarithm, in a private piece of
global memory (2 % of the bytes that it reads for 128-token tiles) and turns it into means once the
rows' log-sum-exp is known. A fixed number of programs share all work, so that this memory does not
grow with the number of rows.
"""

# Triton's language is typed by its compiler, which knows constexpr, program-wide scalars and tiles.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportAssignmentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from shareprefill.runtime.ops.kernels import load_tile, softmax_step


@triton.jit
def _pool_keys(
    b_q,
    b_acc,
    b_max,
    b_sum,
    p_k_tile,
    p_v_tile,
    p_mass,
    i_first,
    i_end,
    b_position,
    n_k_tokens,
    stride_kn,
    stride_vn,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_VALUE: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Key tiles `i_first .. i_end - 1`; stores log2 of each row's unnormalised mass in each."""
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    m_d = tl.arange(0, BLOCK_D) < HEAD_DIM
    m_dv = tl.arange(0, BLOCK_DV) < VALUE_DIM
    for i_tile in range(i_first, i_end):
        o_keys = i_tile * BLOCK_N + o_n
        i_key = tl.multiple_of(tl.cast(i_tile * BLOCK_N, tl.int64), BLOCK_N)
        m_n = o_keys < n_k_tokens
        b_k = load_tile(p_k_tile + i_key * stride_kn, m_n, m_d, MASKED, HEAD_DIM != BLOCK_D)
        b_logits = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION, out_dtype=tl.float32)
        b_logits *= scale_log2
        if MASKED:
            b_logits = tl.where(o_keys[None, :] <= b_position[:, None], b_logits, float("-inf"))
        b_weights, b_mass, b_max, b_sum, b_rescale = softmax_step(b_logits, b_max, b_sum, MASKED)
        # Rows without mass in this tile: the logarithm of zero, without computing it.
        b_seen = b_mass > 0.0
        b_log = tl.where(b_seen, b_max + tl.log2(tl.where(b_seen, b_mass, 1.0)), float("-inf"))
        tl.store(p_mass + i_tile * BLOCK_M + o_m, b_log)
        if HAS_VALUE:
            b_acc = b_acc * b_rescale[:, None]
            b_v = load_tile(p_v_tile + i_key * stride_vn, m_n, m_dv, MASKED, VALUE_DIM != BLOCK_DV)
            b_acc = tl.dot(
                b_weights.to(b_v.dtype),
                b_v,
                b_acc,
                input_precision=PRECISION,
                out_dtype=tl.float32,
            )
    return b_acc, b_max, b_sum


@triton.jit
def _store_means(
    p_mass,
    p_map,
    m_map,
    b_lse,
    b_share,
    n_seen,
    n_k,
    SUBTILES: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Sum `share * 2^(log mass - lse)` over each segment's rows, for every key block."""
    o_m = tl.arange(0, BLOCK_M)
    o_t = tl.arange(0, BLOCK_J * SUBTILES)
    o_j = tl.arange(0, BLOCK_J)
    for i_block in range(0, n_k, BLOCK_J):
        i_tiles = i_block * SUBTILES + o_t
        b_log = tl.load(
            p_mass + i_tiles[:, None] * BLOCK_M + o_m[None, :],
            mask=(i_tiles < n_seen)[:, None],
            other=float("-inf"),
        )
        b_mass = tl.exp2(b_log - b_lse[None, :]) * b_share[None, :]
        b_mass = tl.reshape(b_mass, [BLOCK_J * SUBTILES, SEGMENTS, BLOCK_M // SEGMENTS])
        b_mass = tl.reshape(tl.sum(b_mass, 2), [BLOCK_J, SUBTILES, SEGMENTS])
        b_mass = tl.sum(b_mass, 1)
        m_j = i_block + o_j < n_k
        tl.store(
            p_map[None, :] + (i_block + o_j)[:, None], b_mass, mask=m_j[:, None] & m_map[None, :]
        )


@triton.jit(
    do_not_specialize=[
        "n_members",
        "n_heads_z",
        "n_tiles",
        "n_q_tokens",
        "n_k_tokens",
        "n_k",
        "stride_mass",
    ]
)
def pooled_kernel(
    p_q,
    p_k,
    p_v,
    p_out,
    p_maps,
    p_mass,
    p_rows,
    p_heads,
    stride_qh,
    stride_qn,
    stride_kg,
    stride_kn,
    stride_vg,
    stride_vn,
    stride_oh,
    stride_on,
    stride_mass,
    n_members,
    n_heads_z,
    n_tiles,
    n_q_tokens,
    n_k_tokens,
    n_k,
    scale_log2,
    SHARED: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_HEADS: tl.constexpr,
    HAS_VALUE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: tiles `program, program + programs, ...` of `BLOCK_M` query rows each.

    A segment is the rows of one map row of one head (`ROWS` of them). A tile holds `SEGMENTS`
    segments, or one of the `PARTS` of a segment. Segments run through the `PACKED` heads of a KV
    head fastest, so that these meet each key tile together; tiles run from the last rows to the
    first, as late rows have the most keys.
    """
    TILE_ROWS: tl.constexpr = BLOCK_M // SEGMENTS
    SUBTILES: tl.constexpr = BLOCK_SIZE // BLOCK_N
    i_program = tl.program_id(0).to(tl.int64)
    p_mass += i_program * stride_mass
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    for i_work in range(i_program, n_tiles * n_heads_z, tl.num_programs(0)):
        i_tile = (n_tiles - 1 - i_work // n_heads_z).to(tl.int32)
        i_z = (i_work % n_heads_z).to(tl.int32)
        # Which map row, head and query row each row of the tile is.
        i_segment = (i_tile // PARTS) * SEGMENTS
        if SEGMENTS > 1:
            i_segment += o_m // TILE_ROWS
        i_member = i_segment // PACKED
        i_slot = i_z * PACKED + i_segment % PACKED
        o_row = (i_tile % PARTS) * TILE_ROWS + o_m % TILE_ROWS
        m_m = o_row < tl.where(i_member < n_members, ROWS, 0)
        if HAS_ROWS:
            i_query = tl.load(p_rows + i_member * ROWS + o_row, mask=m_m, other=0)
            b_share = tl.where(m_m, 1.0 / ROWS, 0.0)
        else:
            i_query = i_member * ROWS + o_row
            m_m = m_m & (i_query < n_q_tokens)
            n_valid = tl.maximum(tl.minimum(n_q_tokens - i_member * ROWS, ROWS), 1)
            b_share = tl.where(m_m, 1.0 / n_valid.to(tl.float32), 0.0)
        if HAS_HEADS:
            i_head = tl.load(p_heads + i_slot)
            i_group = tl.cast(tl.load(p_heads + i_z), tl.int64) // SHARED
        else:
            i_head = i_slot
            i_group = tl.cast(i_z, tl.int64) * PACKED // SHARED
        b_position = tl.where(m_m, i_query + (n_k_tokens - n_q_tokens), -1).to(tl.int32)
        # A tile without rows still makes one step, so that its means are stored as zeros.
        n_seen = tl.maximum(tl.max(b_position, 0), 0) // BLOCK_N + 1
        # Key tiles that every row sees whole need no mask.
        i_first = tl.min(tl.where(m_m, b_position, n_k_tokens - 1), 0)
        n_full = tl.minimum((i_first + 1) // BLOCK_N, n_seen)

        i_query = tl.cast(i_query, tl.int64)
        p_q_rows = p_q + tl.cast(i_head, tl.int64) * stride_qh + i_query * stride_qn
        p_k_tile = p_k + i_group * stride_kg + o_n[:, None] * stride_kn + o_d[None, :]
        p_v_tile = p_v + i_group * stride_vg + o_n[:, None] * stride_vn + o_dv[None, :]
        b_q = load_tile(
            p_q_rows[:, None] + o_d[None, :], m_m, o_d < HEAD_DIM, True, HEAD_DIM != BLOCK_D
        )
        b_acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
        b_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
        for MASKED in tl.static_range(2):
            b_acc, b_max, b_sum = _pool_keys(
                b_q,
                b_acc,
                b_max,
                b_sum,
                p_k_tile,
                p_v_tile,
                p_mass,
                n_full if MASKED else 0,
                n_seen if MASKED else n_full,
                b_position,
                n_k_tokens,
                stride_kn,
                stride_vn,
                scale_log2,
                HEAD_DIM,
                VALUE_DIM,
                BLOCK_D,
                BLOCK_DV,
                BLOCK_M,
                BLOCK_N,
                HAS_VALUE,
                MASKED,
                PRECISION,
            )

        # Rows outside the tile's segments may hold anything finite; +inf takes their mass away.
        b_divisor = tl.where(m_m, b_sum, 1.0)
        b_lse = tl.where(m_m, b_max + tl.log2(b_divisor), float("inf"))
        if HAS_VALUE:
            p_out_rows = p_out + tl.cast(i_slot, tl.int64) * stride_oh + i_query * stride_on
            tl.store(
                p_out_rows[:, None] + o_dv[None, :],
                (b_acc / b_divisor[:, None]).to(p_out.dtype.element_ty),
                mask=m_m[:, None] & (o_dv < VALUE_DIM)[None, :],
            )
        o_s = tl.arange(0, SEGMENTS)
        i_segment = (i_tile // PARTS) * SEGMENTS + o_s
        i_member = i_segment // PACKED
        i_slot = i_z * PACKED + i_segment % PACKED
        i_map = tl.cast(i_slot, tl.int64) * n_members + i_member
        p_map = p_maps + (i_map * PARTS + i_tile % PARTS) * n_k
        # Threads read what others of the program stored, and later store over it.
        tl.debug_barrier()
        _store_means(
            p_mass,
            p_map,
            i_member < n_members,
            b_lse,
            b_share,
            n_seen,
            n_k,
            SUBTILES,
            SEGMENTS,
            BLOCK_M,
            BLOCK_J,
        )
        tl.debug_barrier()
