"""The Triton kernels that round keys and values to e4m3 and lay them out, block by block."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tokens(p_tokens, stride_n, n_tokens, o_n, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Tokens `[N, D]` in float32, zeros past the last token and channel; where there are any."""
    o_d = tl.arange(0, BLOCK_D)
    mask = (o_n < n_tokens)[:, None] & (o_d < HEAD_DIM)[None, :]
    p_tile = p_tokens + o_n.to(tl.int64)[:, None] * stride_n + o_d[None, :]
    return tl.load(p_tile, mask=mask, other=0.0).to(tl.float32), mask


@triton.jit(do_not_specialize=["n_tokens"])
def peaks_kernel(
    p_k,
    p_v,
    p_peaks,
    stride_kh,
    stride_kn,
    stride_vh,
    stride_vn,
    n_tokens,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: the largest magnitudes of a block of keys and values of one KV head.

    As bits of float32, in whose order Inf is above all numbers and NaN above Inf.
    """
    i_group = tl.program_id(1).to(tl.int64)
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p_head = p_k + i_group * stride_kh
    b_k, _mask = _tokens(p_head, stride_kn, n_tokens, o_n, HEAD_DIM, BLOCK_D)
    tl.atomic_max(p_peaks + i_group * 2, tl.max(tl.abs(b_k).to(tl.int32, bitcast=True)))
    p_head = p_v + i_group * stride_vh
    b_v, _mask = _tokens(p_head, stride_vn, n_tokens, o_n, HEAD_DIM, BLOCK_D)
    tl.atomic_max(p_peaks + i_group * 2 + 1, tl.max(tl.abs(b_v).to(tl.int32, bitcast=True)))


@triton.jit
def _scale(p_peak, E4M3_MAX: tl.constexpr, TINY: tl.constexpr):
    peak = tl.load(p_peak).to(tl.float32, bitcast=True)
    return tl.maximum(peak / E4M3_MAX, TINY, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["n_tokens", "n_k"])
def round_kernel(
    p_k,
    p_v,
    p_small_k,
    p_small_v,
    p_centres,
    p_peaks,
    p_scales,
    stride_kh,
    stride_kn,
    stride_vh,
    stride_vn,
    n_tokens,
    n_k,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    E4M3_MAX: tl.constexpr,
    TINY: tl.constexpr,
):
    """One program: a block of keys and values of one KV head, as in `SmallOperands`."""
    i_block = tl.program_id(0)
    i_group = tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    o_n = tl.arange(0, BLOCK)
    i_row = (i_group * n_k + i_block) * BLOCK
    # A key less a mean of keys is at most twice as large as the largest.
    k_scale = 2.0 * _scale(p_peaks + i_group * 2, E4M3_MAX, TINY)
    v_scale = _scale(p_peaks + i_group * 2 + 1, E4M3_MAX, TINY)
    if i_block == 0:
        tl.store(p_scales + i_group * 2, k_scale)
        tl.store(p_scales + i_group * 2 + 1, v_scale)

    b_centre = tl.load(p_centres + i_group * HEAD_DIM + o_d, mask=o_d < HEAD_DIM, other=0.0)
    p_head = p_k + i_group * stride_kh
    b_k, mask = _tokens(p_head, stride_kn, n_tokens, i_block * BLOCK + o_n, HEAD_DIM, BLOCK_D)
    b_k = tl.where(mask, (b_k - b_centre[None, :]) / k_scale, 0.0).to(tl.float8e4nv)
    tl.store(p_small_k + (i_row + o_n)[:, None] * BLOCK_D + o_d[None, :], b_k)

    # Of 16 keys: 0, 1, 8, 9, 2, 3, 10, 11, ...
    o_key = o_n // 16 * 16 + (o_n // 2 % 2) * 8 + (o_n // 4 % 4) * 2 + o_n % 2
    p_head = p_v + i_group * stride_vh
    b_v, _mask = _tokens(p_head, stride_vn, n_tokens, i_block * BLOCK + o_key, HEAD_DIM, BLOCK_D)
    b_v = (b_v / v_scale).to(tl.float8e4nv)
    tl.store(p_small_v + (i_row + o_d)[:, None] * BLOCK + o_n[None, :], tl.trans(b_v))
