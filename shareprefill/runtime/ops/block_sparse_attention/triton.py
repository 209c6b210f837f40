"""Launch of the Triton kernel of block-sparse attention."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton

from shareprefill.runtime.ops.block_sparse_attention.kernel import block_sparse_kernel
from shareprefill.runtime.ops.blocks import BlockLists
from shareprefill.runtime.ops.tiles import (
    Tiles,
    check_tile_block_size,
    device_capability,
    padded_dim,
    select_tiles,
)


def kernel_constants(
    head_dim: int,
    value_dim: int,
    shared: int,
    block_size: int,
    tiles: Tiles,
    dtype: torch.dtype,
    *,
    has_lse: bool,
) -> dict[str, Any]:
    """Compile-time arguments of `block_sparse_kernel`."""
    return {
        "SHARED": shared,
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_D": padded_dim(head_dim),
        "BLOCK_DV": padded_dim(value_dim),
        "BLOCK_SIZE": block_size,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "HAS_LSE": has_lse,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lists: BlockLists,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """Fill `out` (and `lse`) in one launch; arguments as in `block_sparse_attention`.

    Raises:
        UnsupportedError: the block size is not a power of two of at least 16, or the head dim is
            above 256.
    """
    check_tile_block_size(lists.block_size)
    n_heads, n_q_tokens, head_dim = query.shape
    n_groups, n_k_tokens, value_dim = value.shape
    widest = max(padded_dim(head_dim), padded_dim(value_dim))
    tiles = select_tiles(widest, query.dtype, device_capability(query.device))
    tiles = tiles.within(lists.block_size)
    n_tiles = triton.cdiv(n_q_tokens, tiles.block_m)
    constants = kernel_constants(
        head_dim,
        value_dim,
        n_heads // n_groups,
        lists.block_size,
        tiles,
        query.dtype,
        has_lse=lse is not None,
    )
    with torch.cuda.device_of(query):
        block_sparse_kernel[(n_tiles * n_heads,)](
            query,
            key,
            value,
            out,
            out if lse is None else lse,
            lists.offsets,
            lists.indices,
            lists.pattern,
            query.stride(0),
            query.stride(1),
            key.stride(0),
            key.stride(1),
            value.stride(0),
            value.stride(1),
            out.stride(0),
            out.stride(1),
            n_heads,
            n_tiles,
            lists.n_q,
            n_q_tokens,
            n_k_tokens,
            scale / math.log(2.0),
            **constants,
            **tiles.launch_options(),
        )
