"""The Triton kernels of pooled attention: one pass over the keys gives output and block means.

The mass of a row in a run of keys is known at once, its share of the whole row only when all keys
have been seen. Hence the masses are kept as logarithms, one float a row and run, until then. Where
an output is made, a fixed number of programs share all work and each has a private piece of memory
for its rows (`pooled_kernel`). Where it is not, programs share the keys of a row as well
(`mass_kernel`), and a second launch turns masses into means (`means_kernel`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from shareprefill.runtime.ops.triton_steps import (
    cap_logits,
    find_tile,
    load_tile,
    rows_in_page,
    sum_peaks,
)


@triton.jit
def _place_rows(
    i_tile,
    i_z,
    p_rows,
    p_heads,
    n_members,
    n_q_tokens,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_HEADS: tl.constexpr,
):
    """Slot, head, query row and share of its mean for each row of a tile, and which rows count.

    A segment is the rows of one map row of one head (`ROWS` of them). A tile holds `SEGMENTS`
    segments, or one of the `PARTS` of a segment. Segments run through the `PACKED` heads of a KV
    head fastest, so that these meet each key tile together. Rows that count have an output; those
    of a skipped head have no keys and share 0.
    """
    TILE_ROWS: tl.constexpr = BLOCK_M // SEGMENTS
    o_m = tl.arange(0, BLOCK_M)
    i_segment = (i_tile // PARTS) * SEGMENTS
    if SEGMENTS > 1:
        i_segment += o_m // TILE_ROWS
    i_member = i_segment // PACKED
    i_slot = i_z * PACKED + i_segment % PACKED
    o_row = (i_tile % PARTS) * TILE_ROWS + o_m % TILE_ROWS
    m_m = o_row < tl.where(i_member < n_members, ROWS, 0)
    if HAS_ROWS:
        i_query = tl.load(p_rows + i_member * ROWS + o_row, mask=m_m, other=0).to(tl.int32)
        b_share = tl.where(m_m, 1.0 / ROWS, 0.0)
    else:
        i_query = i_member * ROWS + o_row
        m_m = m_m & (i_query < n_q_tokens)
        n_valid = tl.maximum(tl.minimum(n_q_tokens - i_member * ROWS, ROWS), 1)
        b_share = tl.where(m_m, 1.0 / n_valid.to(tl.float32), 0.0)
    i_head = i_slot
    if HAS_HEADS:
        i_head = tl.load(p_heads + i_slot).to(tl.int32)
        b_share = tl.where(i_head >= 0, b_share, 0.0)
    return i_slot, i_head, i_query, b_share, m_m


@triton.jit
def _place_entries(
    p_tile,
    o_m,
    m_m,
    p_heads,
):
    """Head of a tile of a table, query rows of its entries `o_m`, and which of them count.

    An entry is the slot of the tile's head times 2^32, and the query row; below 0: none.
    """
    i_head = tl.load(p_heads + (tl.load(p_tile) >> 32)).to(tl.int32)
    b_entry = tl.load(p_tile + o_m, mask=m_m, other=-1)
    m_m = b_entry >= 0
    return i_head, (tl.where(m_m, b_entry, 0) & 0xFFFFFFFF).to(tl.int32), m_m


@triton.jit
def _count_keys(b_position, m_m, n_k_tokens, UNIT: tl.constexpr):
    """Runs of `UNIT` keys that some row sees, and those before that every row sees whole."""
    n_seen = (tl.max(b_position, 0) + UNIT) // UNIT
    i_first = tl.min(tl.where(m_m, b_position, n_k_tokens - 1), 0)
    return n_seen, tl.minimum((i_first + 1) // UNIT, n_seen)


@triton.jit
def _pool_keys(
    b_q,
    b_acc,
    b_max,
    b_sum,
    p_k_tile,
    p_v_tile,
    p_mass,
    pages,
    i_first,
    i_end,
    b_position,
    n_k_tokens,
    stride_kn,
    stride_vn,
    scale_log2,
    softcap_log2,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEPS: tl.constexpr,
    HAS_VALUE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    """Runs `i_first .. i_end - 1` of `STEPS` key tiles; stores log2 of each row's mass in each.

    An online softmax in base 2 with unnormalised masses. The scale meets the logits only in the
    exponent, where it costs no instruction.
    """
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    m_d = tl.arange(0, BLOCK_D) < HEAD_DIM
    m_dv = tl.arange(0, BLOCK_DV) < VALUE_DIM
    p_table, stride_kp, stride_vp = pages
    for i_unit in range(i_first, i_end):
        b_unit = tl.zeros([BLOCK_M], dtype=tl.float32)  # [M]
        for STEP in tl.static_range(STEPS):
            i_key = (i_unit * STEPS + STEP) * BLOCK_N
            o_keys = i_key + o_n
            m_n = o_keys < n_k_tokens
            o_tile = find_tile(i_key, o_n, n_k_tokens, p_table, stride_kp, stride_kn, PAGE_SIZE)
            b_k = load_tile(p_k_tile + o_tile, m_n, m_d, MASKED, HEAD_DIM != BLOCK_D)
            b_logits = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION, out_dtype=tl.float32)
            factor = scale_log2
            if HAS_SOFTCAP:
                b_logits = cap_logits(b_logits * scale_log2, softcap_log2)
                factor = 1.0
            if MASKED:
                b_logits = tl.where(o_keys[None, :] <= b_position[:, None], b_logits, float("-inf"))
            b_new = tl.maximum(b_max, tl.max(b_logits, 1) * factor)  # [M]
            # A row that has seen no key keeps a finite pivot: -inf - -inf would be NaN.
            b_pivot = tl.where(b_new == float("-inf"), 0.0, b_new) if MASKED else b_new
            b_weights = tl.exp2(b_logits * factor - b_pivot[:, None])  # [M, N]
            b_mass = tl.sum(b_weights, 1)  # [M]
            b_rescale = tl.exp2(b_max - b_pivot)
            b_max = b_new
            b_sum = b_sum * b_rescale + b_mass
            b_unit = b_unit * b_rescale + b_mass
            if HAS_VALUE:
                b_acc = b_acc * b_rescale[:, None]  # [M, Dv]
                o_tile = find_tile(i_key, o_n, n_k_tokens, p_table, stride_vp, stride_vn, PAGE_SIZE)
                b_v = load_tile(
                    p_v_tile + o_tile, m_n, m_dv, MASKED, VALUE_DIM != BLOCK_DV
                )  # [N, Dv]
                b_acc = tl.dot(
                    b_weights.to(b_v.dtype),
                    b_v,
                    b_acc,
                    input_precision=PRECISION,
                    out_dtype=tl.float32,
                )
        # -inf for a row without mass here: log2(0) is -inf, and neither term is +inf.
        tl.store(p_mass + i_unit * BLOCK_M + o_m, b_max + tl.log2(b_unit))
    return b_acc, b_max, b_sum


@triton.jit
def _store_means(
    p_mass,
    o_m,
    p_map,
    m_map,
    b_lse,
    b_share,
    n_seen,
    n_k,
    stride_unit,
    PIECES: tl.constexpr,
    SEGMENTS: tl.constexpr,
    ROWS_HERE: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Sum `share * 2^(log mass - lse)` over each segment's rows `o_m`, for every key block."""
    o_t = tl.arange(0, BLOCK_J * PIECES)
    o_j = tl.arange(0, BLOCK_J)
    for i_block in range(0, n_k, BLOCK_J):
        i_units = i_block * PIECES + o_t
        b_log = tl.load(
            p_mass + i_units[:, None] * stride_unit + o_m[None, :],
            mask=(i_units < n_seen)[:, None],
            other=float("-inf"),
        )  # [J * pieces, rows]
        b_mass = tl.exp2(b_log - b_lse[None, :]) * b_share[None, :]  # [J * pieces, rows]
        b_mass = tl.reshape(b_mass, [BLOCK_J * PIECES, SEGMENTS, ROWS_HERE // SEGMENTS])
        b_mass = tl.reshape(tl.sum(b_mass, 2), [BLOCK_J, PIECES, SEGMENTS])  # [J, pieces, segments]
        b_mass = tl.sum(b_mass, 1)  # [J, segments]
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
    ],
    do_not_specialize_on_alignment=["p_heads"],
)
def pooled_kernel(
    p_q,
    p_k,
    p_v,
    p_out,
    p_maps,
    p_mass,
    p_heads,
    p_sinks,
    p_table,
    stride_qh,
    stride_qn,
    stride_kp,
    stride_kg,
    stride_kn,
    stride_vp,
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
    softcap_log2,
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
    STEPS: tl.constexpr,
    BLOCK_J: tl.constexpr,
    HAS_HEADS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    """One program: tiles `program, program + programs, ...` of all query rows, output and means.

    Tiles run from the last rows to the first, as late rows have the most keys.
    """
    UNIT: tl.constexpr = BLOCK_N * STEPS
    i_program = tl.program_id(0).to(tl.int64)
    p_mass += i_program * stride_mass
    o_rows = rows_in_page(tl.arange(0, BLOCK_N), PAGE_SIZE)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    for i_work in range(i_program, n_tiles * n_heads_z, tl.num_programs(0)):
        i_tile = (n_tiles - 1 - i_work // n_heads_z).to(tl.int32)
        i_z = (i_work % n_heads_z).to(tl.int32)
        i_slot, i_head, i_query, b_share, m_m = _place_rows(
            i_tile,
            i_z,
            p_q,
            p_heads,
            n_members,
            n_q_tokens,
            PACKED,
            ROWS,
            PARTS,
            SEGMENTS,
            BLOCK_M,
            False,
            HAS_HEADS,
        )
        b_position = tl.where(b_share > 0.0, i_query + (n_k_tokens - n_q_tokens), -1)
        n_seen, n_full = _count_keys(b_position, m_m, n_k_tokens, UNIT)
        if HAS_HEADS:
            i_group = tl.cast(tl.load(p_heads + i_z), tl.int64) // SHARED
        else:
            i_group = tl.cast(i_z, tl.int64) * PACKED // SHARED
        i_query = tl.cast(i_query, tl.int64)
        p_q_rows = p_q + tl.cast(i_head, tl.int64) * stride_qh + i_query * stride_qn
        p_k_tile = p_k + i_group * stride_kg + o_rows[:, None] * stride_kn + o_d[None, :]
        p_v_tile = p_v + i_group * stride_vg + o_rows[:, None] * stride_vn + o_dv[None, :]
        b_q = load_tile(
            p_q_rows[:, None] + o_d[None, :],
            b_position >= 0,
            o_d < HEAD_DIM,
            True,
            HEAD_DIM != BLOCK_D,
        )  # [M, D]
        b_acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)  # [M, Dv]
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
                (p_table, stride_kp, stride_vp),
                n_full if MASKED else 0,
                n_seen if MASKED else n_full,
                b_position,
                n_k_tokens,
                stride_kn,
                stride_vn,
                scale_log2,
                softcap_log2,
                HEAD_DIM,
                VALUE_DIM,
                BLOCK_D,
                BLOCK_DV,
                BLOCK_M,
                BLOCK_N,
                STEPS,
                True,
                HAS_SOFTCAP,
                MASKED,
                PRECISION,
                PAGE_SIZE,
            )

        # Rows that see no key may hold anything finite; +inf takes their mass away.
        m_seen = b_position >= 0
        b_divisor = tl.where(m_seen, b_sum, 1.0)
        b_lse = tl.where(m_seen, b_max + tl.log2(b_divisor), float("inf"))
        b_factor = tl.where(m_seen, 1.0 / b_divisor, 0.0)
        if HAS_SINKS:
            LOG2E: tl.constexpr = 1.4426950408889634
            b_sink = tl.load(p_sinks + tl.maximum(i_head, 0)).to(tl.float32) * LOG2E
            # The share of the attention that goes to keys; b_lse may be +inf.
            b_factor = b_factor / (1.0 + tl.exp2(b_sink - b_lse))
        p_out_rows = p_out + tl.cast(i_slot, tl.int64) * stride_oh + i_query * stride_on
        tl.store(
            p_out_rows[:, None] + o_dv[None, :],
            (b_acc * b_factor[:, None]).to(p_out.dtype.element_ty),
            mask=m_m[:, None] & (o_dv < VALUE_DIM)[None, :],
        )
        i_segment = (i_tile // PARTS) * SEGMENTS + tl.arange(0, SEGMENTS)
        i_member = i_segment // PACKED
        i_map = tl.cast(i_z * PACKED + i_segment % PACKED, tl.int64) * n_members + i_member
        # Threads read what others of the program stored, and later store over it.
        tl.debug_barrier()
        _store_means(
            p_mass,
            tl.arange(0, BLOCK_M),
            p_maps + (i_map * PARTS + i_tile % PARTS) * n_k,
            i_member < n_members,
            b_lse,
            b_share,
            n_seen,
            n_k,
            BLOCK_M,
            BLOCK_SIZE // UNIT,
            SEGMENTS,
            BLOCK_M,
            BLOCK_J,
        )
        tl.debug_barrier()


@triton.jit(
    do_not_specialize=[
        "n_members",
        "n_heads_z",
        "i_first_tile",
        "n_tiles",
        "n_units",
        "n_splits",
        "split_units",
        "n_q_tokens",
        "n_k_tokens",
    ],
    do_not_specialize_on_alignment=["p_heads"],
)
def mass_kernel(
    p_q,
    p_k,
    p_mass,
    p_peaks,
    p_rows,
    p_heads,
    p_table,
    stride_qh,
    stride_qn,
    stride_kp,
    stride_kg,
    stride_kn,
    n_members,
    n_heads_z,
    i_first_tile,
    n_tiles,
    n_units,
    n_splits,
    split_units,
    n_q_tokens,
    n_k_tokens,
    scale_log2,
    softcap_log2,
    SHARED: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEPS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_HEADS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    """One program: the log masses of one tile of rows in `split_units` runs of keys.

    Also stores each row's maximum and sum over these runs. Programs that follow each other read
    the same keys. `ROWS` 0: `p_rows` is a table of tiles (see `_place_entries`), all in one z.
    """
    UNIT: tl.constexpr = BLOCK_N * STEPS
    i_program = tl.program_id(0)
    i_local = i_program % n_tiles
    i_split = (i_program // n_tiles) % n_splits
    i_z = i_program // n_tiles // n_splits
    o_m = tl.arange(0, BLOCK_M)
    o_rows = rows_in_page(tl.arange(0, BLOCK_N), PAGE_SIZE)
    o_d = tl.arange(0, BLOCK_D)
    if ROWS == 0:
        p_tile = p_rows + (i_first_tile + i_local) * BLOCK_M
        i_head, i_query, m_m = _place_entries(p_tile, o_m, o_m >= 0, p_heads)
        b_share = tl.where(m_m & (i_head >= 0), 1.0, 0.0)
    else:
        _slot, i_head, i_query, b_share, m_m = _place_rows(
            i_first_tile + i_local,
            i_z,
            p_rows,
            p_heads,
            n_members,
            n_q_tokens,
            PACKED,
            ROWS,
            PARTS,
            SEGMENTS,
            BLOCK_M,
            HAS_ROWS,
            HAS_HEADS,
        )
    b_position = tl.where(b_share > 0.0, i_query + (n_k_tokens - n_q_tokens), -1)
    n_seen, n_full = _count_keys(b_position, m_m, n_k_tokens, UNIT)
    i_first = i_split * split_units
    if i_first < n_seen:
        i_end = tl.minimum(i_first + split_units, n_seen)
        i_full = tl.maximum(tl.minimum(n_full, i_end), i_first)
        if ROWS == 0:
            i_group = tl.cast(i_head, tl.int64) // SHARED
        elif HAS_HEADS:
            i_group = tl.cast(tl.load(p_heads + i_z), tl.int64) // SHARED
        else:
            i_group = tl.cast(i_z, tl.int64) * PACKED // SHARED
        p_q_rows = p_q + tl.cast(i_head, tl.int64) * stride_qh
        p_q_rows += tl.cast(i_query, tl.int64) * stride_qn
        p_k_tile = p_k + i_group * stride_kg + o_rows[:, None] * stride_kn + o_d[None, :]
        b_q = load_tile(
            p_q_rows[:, None] + o_d[None, :],
            b_position >= 0,
            o_d < HEAD_DIM,
            True,
            HEAD_DIM != BLOCK_D,
        )  # [M, D]
        i_place = tl.cast(i_z * n_tiles + i_local, tl.int64)
        p_mass += i_place * n_units * BLOCK_M
        b_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
        for MASKED in tl.static_range(2):
            _acc, b_max, b_sum = _pool_keys(
                b_q,
                b_sum,
                b_max,
                b_sum,
                p_k_tile,
                p_k_tile,
                p_mass,
                (p_table, stride_kp, stride_kp),
                i_full if MASKED else i_first,
                i_end if MASKED else i_full,
                b_position,
                n_k_tokens,
                stride_kn,
                stride_kn,
                scale_log2,
                softcap_log2,
                HEAD_DIM,
                HEAD_DIM,
                BLOCK_D,
                BLOCK_D,
                BLOCK_M,
                BLOCK_N,
                STEPS,
                False,
                HAS_SOFTCAP,
                MASKED,
                PRECISION,
                PAGE_SIZE,
            )
        p_peaks += (i_place * n_splits + i_split) * 2 * BLOCK_M
        tl.store(p_peaks + o_m, b_max)
        tl.store(p_peaks + BLOCK_M + o_m, b_sum)


@triton.jit(
    do_not_specialize=[
        "n_members",
        "i_first_tile",
        "n_tiles",
        "n_units",
        "n_splits",
        "split_units",
        "n_q_tokens",
        "n_k_tokens",
        "n_k",
    ],
    do_not_specialize_on_alignment=["p_heads"],
)
def means_kernel(
    p_mass,
    p_peaks,
    p_maps,
    p_rows,
    p_heads,
    n_members,
    i_first_tile,
    n_tiles,
    n_units,
    n_splits,
    split_units,
    n_q_tokens,
    n_k_tokens,
    n_k,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_S: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_HEADS: tl.constexpr,
):
    """One program: the means of one segment, from what `mass_kernel` left."""
    TILE_ROWS: tl.constexpr = BLOCK_M // SEGMENTS
    i_place = tl.program_id(0) // SEGMENTS
    i_tile = i_first_tile + i_place % n_tiles
    i_z = i_place // n_tiles
    i_inner = tl.program_id(0) % SEGMENTS
    # A segment of its own is a tile of one segment, `SEGMENTS` times as many of them.
    _slot, _head, i_query, b_share, m_m = _place_rows(
        i_tile * SEGMENTS + i_inner,
        i_z,
        p_rows,
        p_heads,
        n_members,
        n_q_tokens,
        PACKED,
        ROWS,
        PARTS,
        1,
        TILE_ROWS,
        HAS_ROWS,
        HAS_HEADS,
    )
    b_position = tl.where(b_share > 0.0, i_query + (n_k_tokens - n_q_tokens), -1)
    n_seen, _full = _count_keys(b_position, m_m, n_k_tokens, UNIT)
    o_m = tl.arange(0, TILE_ROWS)
    i_place = tl.cast(i_place, tl.int64)
    p_peaks += i_place * n_splits * 2 * BLOCK_M + i_inner * TILE_ROWS
    n_live = (n_seen + split_units - 1) // split_units
    b_lse = sum_peaks(p_peaks, o_m, b_position, n_live, BLOCK_M, BLOCK_S)

    i_segment = (i_tile // PARTS) * SEGMENTS + i_inner + tl.arange(0, 1)
    i_member = i_segment // PACKED
    i_map = tl.cast(i_z * PACKED + i_segment % PACKED, tl.int64) * n_members + i_member
    _store_means(
        p_mass + i_place * n_units * BLOCK_M + i_inner * TILE_ROWS,
        o_m,
        p_maps + (i_map * PARTS + i_tile % PARTS) * n_k,
        i_member < n_members,
        b_lse,
        b_share,
        n_seen,
        n_k,
        BLOCK_M,
        BLOCK_SIZE // UNIT,
        1,
        TILE_ROWS,
        BLOCK_J,
    )


@triton.jit(
    do_not_specialize=[
        *("n_first", "members", "members_second", "rows", "rows_second", "width", "width_second"),
        *("tiles", "tiles_second", "n_units", "n_splits", "split_units"),
        *("n_q_tokens", "n_k_tokens", "n_k"),
    ],
    do_not_specialize_on_alignment=["p_heads"],
)
def table_means_kernel(
    p_mass,
    p_peaks,
    p_maps,
    p_maps_second,
    p_table,
    p_heads,
    n_first,
    members,
    members_second,
    rows,
    rows_second,
    width,
    width_second,
    tiles,
    tiles_second,
    n_units,
    n_splits,
    split_units,
    n_q_tokens,
    n_k_tokens,
    n_k,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One program: a row of a map, of the first `n_first` heads or of the others.

    Each has `members` map rows, means over `rows` rows that take `width` places of `tiles` tiles.
    """
    i_program = tl.program_id(0)
    i_row = i_program - n_first * members
    i_tile = n_first * tiles
    p_map = p_maps_second
    if i_row < 0:
        i_row = i_program
        i_tile = 0
        p_map = p_maps
        members_second = members
        rows_second = rows
        width_second = width
        tiles_second = tiles
    i_member = i_row % members_second
    n_inner = BLOCK_M // width_second
    i_tile += i_row // members_second * tiles_second + i_member // n_inner
    i_start = i_member % n_inner * width_second
    o_w = tl.arange(0, WIDTH)
    # Past its own places a row reads its last one again, which counts nothing.
    o_m = i_start + tl.minimum(o_w, width_second - 1)
    p_tile = p_table + i_tile * BLOCK_M
    i_head, i_query, m_m = _place_entries(p_tile, o_m, o_w < width_second, p_heads)
    b_share = tl.where(m_m & (i_head >= 0), 1.0 / rows_second, 0.0)
    b_position = tl.where(b_share > 0.0, i_query + (n_k_tokens - n_q_tokens), -1)
    n_seen, _full = _count_keys(b_position, m_m, n_k_tokens, UNIT)
    n_live = (n_seen + split_units - 1) // split_units
    i_place = tl.cast(i_tile, tl.int64)
    p_peaks += i_place * n_splits * 2 * BLOCK_M
    b_lse = sum_peaks(p_peaks, o_m, b_position, n_live, BLOCK_M, BLOCK_S)
    _store_means(
        p_mass + i_place * n_units * BLOCK_M,
        o_m,
        p_map + tl.cast(i_row, tl.int64) * n_k + tl.arange(0, 1),
        tl.arange(0, 1) == 0,
        b_lse,
        b_share,
        n_seen,
        n_k,
        BLOCK_M,
        BLOCK_SIZE // UNIT,
        1,
        WIDTH,
        BLOCK_J,
    )
