"""Launches of the Triton kernels of a decode step's attention over listed key blocks."""

# The checker does not know what a launch of a kernel takes.
# pyright: reportCallIssue=false

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from shareprefill.runtime.ops.block_sparse_decoding.triton_kernel import merge_kernel, split_kernel
from shareprefill.runtime.ops.devices import device_of
from shareprefill.runtime.ops.triton_tiles import (
    check_tile_block_size,
    logit_factors,
    multiprocessors,
    padded_dim,
)

# Keys of a step: enough bytes on their way at once, few enough that short lists split evenly.
_KEYS = 64
# Programs for each multiprocessor: so many hide each other's latency.
_PROGRAMS = 4
_MOST_SPLITS = 128
SPLIT_OPTIONS: dict[str, Any] = {"num_warps": 4, "num_stages": 3}
MERGE_OPTIONS: dict[str, Any] = {"num_warps": 4}


def split_constants(
    head_dim: int,
    value_dim: int,
    shared: int,
    block_size: int,
    splits: int,
    dtype: torch.dtype,
    *,
    has_lengths: bool,
    has_starts: bool,
) -> dict[str, Any]:
    """Compile-time arguments of `split_kernel`."""
    return {
        "SHARED": shared,
        "ROWS": padded_dim(shared),
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_D": padded_dim(head_dim),
        "BLOCK_DV": padded_dim(value_dim),
        "BLOCK_SIZE": block_size,
        "BLOCK_N": _KEYS,
        "SPLITS": splits,
        "HAS_LENGTHS": has_lengths,
        "HAS_STARTS": has_starts,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }


def merge_constants(constants: dict[str, Any]) -> dict[str, Any]:
    """Compile-time arguments of `merge_kernel`, from those of `split_kernel`."""
    return {name: constants[name] for name in ("SHARED", "VALUE_DIM", "BLOCK_DV", "SPLITS")}


@lru_cache(maxsize=64)
def choose_splits(lists: int, entries: int, block_size: int, processors: int) -> int:
    """Parts that a list is split into: as many programs as keep the GPU busy, a power of two.

    It goes by what lists may hold, not by what they do, which the host does not know.
    """
    wanted = max(1, _PROGRAMS * processors // lists)
    steps = max(1, entries * block_size // _KEYS)
    return min(1 << (min(wanted, steps) - 1).bit_length(), _MOST_SPLITS)


def decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    blocks: torch.Tensor,
    counts: torch.Tensor,
    block_size: int,
    lengths: torch.Tensor | None,
    starts: torch.Tensor | None,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Fill `out`; arguments as in `block_sparse_decoding`.

    Raises:
        UnsupportedError: the block size is not one that tiles fill.
    """
    check_tile_block_size(block_size)
    batch, heads, head_dim = query.shape
    groups, tokens = key.shape[1:3]
    shared, value_dim, entries = heads // groups, value.shape[3], blocks.shape[2]
    lists = batch * groups
    splits = choose_splits(lists, entries, block_size, multiprocessors(query.device))
    constants = split_constants(
        *(head_dim, value_dim, shared, block_size, splits, query.dtype),
        has_lengths=lengths is not None,
        has_starts=starts is not None,
    )
    rows = lists * splits * shared
    parts = torch.empty(rows, value_dim, dtype=torch.float32, device=query.device)
    lse = torch.empty(rows, dtype=torch.float32, device=query.device)
    with device_of(query):
        split_kernel[(splits, lists)](
            *(query, key, value, blocks, counts, lengths, starts, parts, lse),
            *(*query.stride()[:2], *key.stride()[:3], *value.stride()[:3]),
            *(groups, entries, tokens, logit_factors(scale, None)[0]),
            **constants,
            **SPLIT_OPTIONS,
        )
        merge_kernel[(batch * heads,)](
            parts, lse, out, **merge_constants(constants), **MERGE_OPTIONS
        )
