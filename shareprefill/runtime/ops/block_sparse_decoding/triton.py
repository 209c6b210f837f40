"""Launches of the Triton kernels of a decode step's attention over listed key blocks."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from shareprefill.runtime.ops.block_sparse_decoding.triton_kernel import merge_kernel, split_kernel
from shareprefill.runtime.ops.pages import Cached, kernel_pages
from shareprefill.runtime.ops.prepared import Launch, Prepared
from shareprefill.runtime.ops.triton_tiles import (
    check_tile_block_size,
    logit_factors,
    multiprocessors,
    overlaps,
    padded_dim,
)

# Keys of a step: enough bytes on their way at once, few enough that short lists split evenly.
_KEYS = 64
# Programs for each multiprocessor: as many as it holds at once.
_PROGRAMS = 4
_MOST_SPLITS = 128
# Loads of keys wait for those of lists.
SPLIT_OPTIONS: dict[str, Any] = {"num_warps": 4, "num_stages": 3}
# Registers of a thread that finds pages, which would take more: only so are all programs held at
# once, where shared memory has room for their tiles.
_REGISTERS = 128
MERGE_OPTIONS: dict[str, Any] = {"num_warps": 4}
_prepared = Prepared[tuple[Launch, Launch]]()


def split_constants(
    head_dim: int,
    value_dim: int,
    shared: int,
    block_size: int,
    dtype: torch.dtype,
    *,
    has_lengths: bool,
    has_starts: bool,
    page_size: int,
    overlaps: bool,
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
        "HAS_LENGTHS": has_lengths,
        "HAS_STARTS": has_starts,
        "PAGE_SIZE": page_size,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "OVERLAPS": overlaps,
    }


def split_options(constants: dict[str, Any]) -> dict[str, Any]:
    """Options of the launch of `split_kernel`."""
    is_small = max(constants["BLOCK_D"], constants["BLOCK_DV"]) <= 128
    if constants["PAGE_SIZE"] and is_small and constants["PRECISION"] != "ieee":
        return SPLIT_OPTIONS | {"maxnreg": _REGISTERS}
    return SPLIT_OPTIONS


def merge_constants(constants: dict[str, Any], splits: int) -> dict[str, Any]:
    """Compile-time arguments of `merge_kernel`, from those of `split_kernel`."""
    names = ("SHARED", "VALUE_DIM", "BLOCK_DV", "OVERLAPS")
    return {name: constants[name] for name in names} | {"BLOCK_S": 1 << (splits - 1).bit_length()}


@lru_cache(maxsize=64)
def choose_splits(lists: int, entries: int, block_size: int, processors: int) -> int:
    """Parts that a list is split into: as many programs as the GPU holds at once.

    It goes by what lists may hold, not by what they do, which the host does not know.
    """
    wanted = max(1, _PROGRAMS * processors // lists)
    steps = max(1, entries * block_size // _KEYS)
    return min(wanted, steps, _MOST_SPLITS)


def decode(
    query: torch.Tensor,
    key: Cached,
    value: Cached,
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
        UnsupportedError: the block size is not one that tiles fill, or pages are not read.
    """
    check_tile_block_size(block_size)
    batch, heads, head_dim = query.shape
    groups, tokens = key.shape[1:3]
    shared, value_dim, entries = heads // groups, value.shape[3], blocks.shape[2]
    lists = batch * groups
    splits = choose_splits(lists, entries, block_size, multiprocessors(query.device))
    rows = lists * splits * shared
    parts = torch.empty(rows, value_dim, dtype=torch.float32, device=query.device)
    lse = torch.empty(rows, dtype=torch.float32, device=query.device)
    keys, tables, page_size, key_strides = kernel_pages(key)
    values, _, _, value_strides = kernel_pages(value)
    sizes = (batch, heads, groups, head_dim, value_dim, block_size, splits)
    strides = (*query.stride()[:2], *key_strides, *value_strides[1:])
    rules = (lengths is not None, starts is not None, page_size, scale)
    split, merge = _launches(query.device, query.dtype, sizes, strides, rules)
    places = (lengths, starts, tables)
    split(query, keys, values, blocks, counts, *places, parts, lse, entries, tokens, splits)
    merge(parts, lse, out, splits)


def _launches(
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    rules: tuple[bool, bool, int, float],
) -> tuple[Launch, Launch]:
    """Launches of both kernels, made once for all steps that differ in few tokens.

    Args:
        device: Of the tensors.
        dtype: Of all of them.
        sizes: Sequences, query and KV heads, their dims and those of values, block size, splits.
        strides: Of queries, tables of pages, keys and values.
        rules: Whether there are lengths and starts, tokens of a page, factor of the logits.
    """
    kind = (device, dtype, *sizes, *strides, *rules)
    found = _prepared.get(kind)
    if found is None:
        batch, heads, groups, head_dim, value_dim, block_size, splits = sizes
        has_lengths, has_starts, page_size, scale = rules
        constants = split_constants(
            *(head_dim, value_dim, heads // groups, block_size, dtype),
            has_lengths=has_lengths,
            has_starts=has_starts,
            page_size=page_size,
            overlaps=overlaps(device),
        )
        together = {"launch_pdl": constants["OVERLAPS"]}
        numbers = (*strides, groups, logit_factors(scale, None)[0])
        found = _prepared.keep(
            kind,
            (
                Launch(
                    *(split_kernel, device, (splits, batch * groups), numbers),
                    constants | split_options(constants) | together,
                ),
                Launch(
                    *(merge_kernel, device, (batch * heads,), ()),
                    merge_constants(constants, splits) | MERGE_OPTIONS | together,
                ),
            ),
        )
    return found
