"""The Hopper kernel of the masses of chosen rows: what `mass_kernel` does, by TMA and wgmma.

Two warpgroups have half of a tile's rows each. Each issues the next logits before it computes the
exponentials of the last, so the matrix units have work meanwhile.
Runs on Triton 3.6 and compiles on 3.9.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma_wait,
)

from shareprefill.runtime.ops.hopper.pipeline import (
    barrier,
    free_tile,
    issue_logits,
    load_keys,
    load_pages,
    make_barriers,
    max_of_rows,
    sum_of_threads,
    sum_within_threads,
    wait_free,
    wait_tile,
)


@gluon.jit
def _place_rows(
    place,
    o_m,
    PACKED: gl.constexpr,
    ROWS: gl.constexpr,
    PARTS: gl.constexpr,
    SEGMENTS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    HAS_ROWS: gl.constexpr,
    HAS_HEADS: gl.constexpr,
):
    """Head and query row of rows `o_m` of a tile, and their position among the keys, -1: none.

    As `triton_kernel.py` places them.
    """
    i_tile, i_z, p_rows, p_heads, n_members, n_q_tokens, n_k_tokens = place
    if ROWS == 0:
        b_entry = gl.load(p_rows + i_tile * BLOCK_M + o_m)
        m_row = b_entry >= 0
        b_entry = gl.where(m_row, b_entry, 0)
        i_head = gl.load(p_heads + (b_entry >> 32)).to(gl.int32)
        i_query = (b_entry & 0xFFFFFFFF).to(gl.int32)
        m_row = m_row & (i_head >= 0)
    else:
        TILE_ROWS: gl.constexpr = BLOCK_M // SEGMENTS
        i_segment = (i_tile // PARTS) * SEGMENTS + o_m // TILE_ROWS
        i_member = i_segment // PACKED
        i_head = i_z * PACKED + i_segment % PACKED
        o_row = (i_tile % PARTS) * TILE_ROWS + o_m % TILE_ROWS
        m_row = (o_row < ROWS) & (i_member < n_members)
        i_query = i_member * ROWS + o_row
        if HAS_ROWS:
            i_query = gl.load(p_rows + i_query, mask=m_row, other=0).to(gl.int32)
        else:
            m_row = m_row & (i_query < n_q_tokens)
        if HAS_HEADS:
            i_head = gl.load(p_heads + i_head).to(gl.int32)
            m_row = m_row & (i_head >= 0)
    return i_head, i_query, gl.where(m_row, i_query + (n_k_tokens - n_q_tokens), -1)


@gluon.jit
def _produce(
    i_warp,
    ring,
    k_desc,
    span,
    i_group,
    pages,
    n_k_tokens,
    BLOCK: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
):
    """One warp of two: loads every other key tile by TMA as their places in the ring get free.

    What lies behind the last token in its page is hidden with the keys that rows do not see.
    """
    _tiles, _ready, free = ring
    i_first, i_end, _full = span
    i_page = load_pages(pages, i_first + i_warp, n_k_tokens, BLOCK, PAGE_SIZE)
    for i_unit in range(i_first + i_warp, i_end, 2):
        i_next = load_pages(pages, i_unit + 2, n_k_tokens, BLOCK, PAGE_SIZE)
        wait_free(free, i_unit - i_first)
        load_keys(
            *(k_desc, ring, i_unit - i_first, pages, i_page, i_group, i_unit, n_k_tokens),
            *(False, BLOCK, PAGE_SIZE),
        )
        i_page = i_next


@gluon.jit
def _hide(b_logits, b_position, i_unit, i_full):
    """-inf where a key of a unit stands past its row."""
    BLOCK: gl.constexpr = b_logits.shape[1]
    if i_unit >= i_full:
        o_key = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, b_logits.type.layout))
        b_seen = o_key[None, :] <= (b_position - i_unit * BLOCK)[:, None]
        b_logits = gl.where(b_seen, b_logits, float("-inf"))
    return b_logits


@gluon.jit
def _add_unit(b_logits, b_max, b_sum, scale_log2, p_unit):
    """Store log2 of the rows' mass in a unit; their maxima, in units of log2, and sums with it."""
    layout: gl.constexpr = b_max.type.layout
    b_new = gl.maximum(b_max, max_of_rows(b_logits) * scale_log2)  # [M]
    # A row that has seen no key keeps a finite pivot: -inf - -inf would be NaN.
    b_pivot = gl.where(b_new == float("-inf"), 0.0, b_new)
    b_weights = gl.exp2(b_logits * scale_log2 - b_pivot[:, None])  # [M, N]
    b_mass = sum_of_threads(sum_within_threads(b_weights), layout)
    # Its error of 2^-22 is below what storing the logarithm costs.
    b_log = gl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=f,f", [b_mass], dtype=gl.float32, is_pure=True, pack=1
    )
    gl.store(p_unit, b_new + b_log)
    return b_new, b_sum * gl.exp2(b_max - b_pivot) + b_mass


@gluon.jit
def _consume(
    HALF: gl.constexpr,
    ring,
    q_tiles,
    span,
    place,
    source,
    results,
    PACKED: gl.constexpr,
    ROWS: gl.constexpr,
    PARTS: gl.constexpr,
    SEGMENTS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK: gl.constexpr,
    HAS_ROWS: gl.constexpr,
    HAS_HEADS: gl.constexpr,
):
    """One warpgroup: half of the rows against the keys that arrive."""
    k_tiles, k_ready, k_free = ring
    i_first, i_end, i_full = span
    p_q, stride_qh, stride_qn, scale_log2 = source
    p_mass, p_peaks = results
    HALF_M: gl.constexpr = q_tiles.shape[2]
    BLOCK_D: gl.constexpr = q_tiles.shape[3]
    copied: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)

    o_m = HALF * HALF_M + gl.arange(0, HALF_M, layout=gl.SliceLayout(1, copied))
    i_head, i_query, b_position = _place_rows(
        place, o_m, PACKED, ROWS, PARTS, SEGMENTS, BLOCK_M, HAS_ROWS, HAS_HEADS
    )
    o_d = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, copied))
    i_start = i_head.to(gl.int64) * stride_qh + i_query.to(gl.int64) * stride_qn
    m_q = (b_position >= 0)[:, None]
    if HEAD_DIM != BLOCK_D:
        m_q = m_q & (o_d < HEAD_DIM)[None, :]
    b_q = gl.load(p_q + i_start[:, None] + o_d[None, :], mask=m_q, other=0.0)  # [M, D]
    q_tiles.index(HALF).reshape([HALF_M, BLOCK_D]).store(b_q)
    fence_async_shared()
    barrier()

    o_m = HALF * HALF_M + gl.arange(0, HALF_M, layout=row_layout)
    _head, _query, b_position = _place_rows(
        place, o_m, PACKED, ROWS, PARTS, SEGMENTS, BLOCK_M, HAS_ROWS, HAS_HEADS
    )
    b_max = gl.full([HALF_M], float("-inf"), gl.float32, row_layout)
    b_sum = gl.zeros([HALF_M], gl.float32, row_layout)
    p_mass += o_m
    if i_first < i_end:
        wait_tile(k_ready, 0)
        b_logits = issue_logits(q_tiles, HALF, k_tiles, 0, s_layout)  # [M, N]
        b_logits = warpgroup_mma_wait(0, deps=[b_logits])
        free_tile(k_free, 0)
        b_logits = _hide(b_logits, b_position, i_first, i_full)
        for i_unit in range(i_first, i_end - 1):
            i_next = i_unit + 1 - i_first
            wait_tile(k_ready, i_next)
            b_next = issue_logits(q_tiles, HALF, k_tiles, i_next, s_layout)  # [M, N]
            b_max, b_sum = _add_unit(b_logits, b_max, b_sum, scale_log2, p_mass + i_unit * BLOCK_M)
            b_next = warpgroup_mma_wait(0, deps=[b_next])
            free_tile(k_free, i_next)
            b_logits = _hide(b_next, b_position, i_unit + 1, i_full)
        p_last = p_mass + (i_end - 1) * BLOCK_M
        b_max, b_sum = _add_unit(b_logits, b_max, b_sum, scale_log2, p_last)
    gl.store(p_peaks + o_m, b_max)
    gl.store(p_peaks + BLOCK_M + o_m, b_sum)


SIZES = [
    "n_members",
    "n_heads_z",
    "i_first_tile",
    "n_tiles",
    "n_units",
    "n_splits",
    "split_units",
    "n_q_tokens",
    "n_k_tokens",
    "page_step",
]


@gluon.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["p_rows", "p_heads", "p_table"])
def mass_hopper_kernel(
    p_q,
    k_desc,
    p_mass,
    p_peaks,
    p_rows,
    p_heads,
    p_table,
    stride_qh,
    stride_qn,
    n_members,
    n_heads_z,
    i_first_tile,
    n_tiles,
    n_units,
    n_splits,
    split_units,
    n_q_tokens,
    n_k_tokens,
    page_step,
    scale_log2,
    SHARED: gl.constexpr,
    PACKED: gl.constexpr,
    ROWS: gl.constexpr,
    PARTS: gl.constexpr,
    SEGMENTS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_ROWS: gl.constexpr,
    HAS_HEADS: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
):
    """One program: the log masses of one tile of rows in `split_units` tiles of keys.

    Also stores each row's maximum and sum over these. Programs that follow each other read the
    same keys.
    """
    DTYPE: gl.constexpr = k_desc.dtype
    i_program = gl.program_id(0)
    i_local = i_program % n_tiles
    i_split = (i_program // n_tiles) % n_splits
    i_z = i_program // n_tiles // n_splits
    place = (i_first_tile + i_local, i_z, p_rows, p_heads, n_members, n_q_tokens, n_k_tokens)
    o_m = gl.arange(0, BLOCK_M, layout=gl.BlockedLayout([1], [32], [4], [0]))
    _head, _query, b_position = _place_rows(
        place, o_m, PACKED, ROWS, PARTS, SEGMENTS, BLOCK_M, HAS_ROWS, HAS_HEADS
    )
    n_seen = (gl.max(b_position, 0) + BLOCK) // BLOCK
    # Key tiles that every row sees whole; rows that do not count see what they may.
    n_full = (gl.min(gl.where(b_position < 0, n_k_tokens - 1, b_position), 0) + 1) // BLOCK
    i_first = i_split * split_units
    i_group = i_z * PACKED // SHARED
    if HAS_HEADS:
        i_slot = i_z
        if ROWS == 0:
            i_slot = (gl.load(p_rows + (i_first_tile + i_local) * BLOCK_M) >> 32).to(gl.int32)
        i_group = gl.maximum(gl.load(p_heads + i_slot).to(gl.int32), 0) // SHARED

    q_tiles = gl.allocate_shared_memory(DTYPE, [2, 1, BLOCK_M // 2, BLOCK_D], k_desc.layout)
    k_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, 1, BLOCK, BLOCK_D], k_desc.layout)
    ring = (k_tiles, make_barriers(STAGES, 1), make_barriers(STAGES, 2))
    fence_async_shared()

    span = (i_first, gl.minimum(i_first + split_units, n_seen), n_full)
    source = (p_q, stride_qh, stride_qn, scale_log2)
    i_place = (i_z * n_tiles + i_local).to(gl.int64)
    p_mass += i_place * n_units * BLOCK_M
    p_peaks += (i_place * n_splits + i_split) * 2 * BLOCK_M
    results = (p_mass, p_peaks)
    pages = (p_table, page_step)
    # fmt: off
    gl.warp_specialize(
        [
            (_consume, (
                0, ring, q_tiles, span, place, source, results, PACKED, ROWS, PARTS, SEGMENTS,
                HEAD_DIM, BLOCK_M, BLOCK, HAS_ROWS, HAS_HEADS,
            )),
            (_consume, (
                1, ring, q_tiles, span, place, source, results, PACKED, ROWS, PARTS, SEGMENTS,
                HEAD_DIM, BLOCK_M, BLOCK, HAS_ROWS, HAS_HEADS,
            )),
            (_produce, (0, ring, k_desc, span, i_group, pages, n_k_tokens, BLOCK, PAGE_SIZE)),
            (_produce, (1, ring, k_desc, span, i_group, pages, n_k_tokens, BLOCK, PAGE_SIZE)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )
    # fmt: on
