"""Launches of the Triton kernel of block-sparse attention, prepared for calls that are alike."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import triton

from shareprefill.runtime.ops.block_sparse_attention.triton_kernel import block_sparse_kernel
from shareprefill.runtime.ops.blocks import BlockLists
from shareprefill.runtime.ops.pages import Tokens, memory, page_stride, page_table, page_tokens
from shareprefill.runtime.ops.prepared import Launch
from shareprefill.runtime.ops.triton_tiles import (
    Tiles,
    check_tile_block_size,
    device_capability,
    logit_factors,
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
    has_softcap: bool = False,
    has_sinks: bool = False,
    page_size: int = 0,
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
        "HAS_SOFTCAP": has_softcap,
        "HAS_SINKS": has_sinks,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "PAGE_SIZE": page_size,
    }


def prepare(
    query: torch.Tensor,
    key: Tokens,
    value: Tokens,
    lists: BlockLists,
    out: torch.Tensor,
    flags: tuple[bool, bool, bool],
    scale: float,
    softcap: float | None,
) -> Callable[..., None]:
    """Prepares calls that fill `out` (and `lse`) in one launch; as the Hopper version.

    Raises:
        UnsupportedError: the block size is not a power of two of at least 16, or the head dim is
            above 256.
    """
    (n_heads, n_q_tokens, head_dim), value_dim = query.shape, value.shape[2]
    capability, shared = device_capability(query.device), n_heads // len(key)
    sizes = (head_dim, value_dim, shared, lists.block_size)
    tiles, constants = _made_settings(capability, *sizes, query.dtype, flags, page_tokens(key))
    n_tiles = triton.cdiv(n_q_tokens, tiles.block_m)
    strides = (
        *(query.stride(0), query.stride(1)),
        *(page_stride(key), key.stride(0), key.stride(1)),
        *(page_stride(value), value.stride(0), value.stride(1)),
        *(out.stride(0), out.stride(1)),
    )
    launch = Launch(
        block_sparse_kernel,
        query.device,
        (n_tiles * n_heads,),
        (
            *(*strides, n_heads, n_tiles, lists.n_q, n_q_tokens, key.shape[1]),
            *logit_factors(scale, softcap),
        ),
        constants | tiles.launch_options(),
    )

    def attend(
        query: torch.Tensor,
        key: Tokens,
        value: Tokens,
        lists: BlockLists,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        sinks: torch.Tensor | None,
    ) -> None:
        launch(
            query,
            memory(key),
            memory(value),
            out,
            out if lse is None else lse,
            lists.offsets,
            lists.indices,
            lists.head_to_list,
            out if sinks is None else sinks,
            page_table(key),
        )

    return attend


@lru_cache(maxsize=256)
def _made_settings(
    capability: tuple[int, int],
    head_dim: int,
    value_dim: int,
    shared: int,
    block_size: int,
    dtype: torch.dtype,
    flags: tuple[bool, bool, bool],
    page_size: int,
) -> tuple[Tiles, dict[str, Any]]:
    """Made once for all layers."""
    check_tile_block_size(block_size)
    widest = max(padded_dim(head_dim), padded_dim(value_dim))
    tiles = select_tiles(widest, dtype, capability).within(block_size)
    has_lse, has_softcap, has_sinks = flags
    constants = kernel_constants(
        head_dim,
        value_dim,
        shared,
        block_size,
        tiles,
        dtype,
        has_lse=has_lse,
        has_softcap=has_softcap,
        has_sinks=has_sinks,
        page_size=page_size,
    )
    return tiles, constants
