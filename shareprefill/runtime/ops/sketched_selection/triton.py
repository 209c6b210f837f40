"""Launches of the Triton kernels that choose a decode step's blocks by a sketch of the keys."""

# The checker does not know what a launch of a kernel takes.
# pyright: reportCallIssue=false

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from shareprefill.errors import UnsupportedError
from shareprefill.runtime.ops.devices import device_of
from shareprefill.runtime.ops.sketched_selection.reference import MOST_BLOCKS, THRESHOLDS
from shareprefill.runtime.ops.sketched_selection.sketch import CODES, Basis
from shareprefill.runtime.ops.sketched_selection.triton_kernel import (
    query_kernel,
    score_kernel,
    select_kernel,
)
from shareprefill.runtime.ops.triton_tiles import (
    check_tile_block_size,
    logit_factors,
    multiprocessors,
    padded_dim,
)

# Keys of one step of the scores, and steps of a program: as many as leave so many programs for each
# multiprocessor.
_KEYS, _MOST_TILES, _PROGRAMS = 128, 8, 8
SCORE_OPTIONS: dict[str, Any] = {"num_warps": 4}


def score_constants(
    head_dim: int,
    shared: int,
    rank: int,
    tiles: int,
    block_size: int,
    local: int,
    *,
    has_lengths: bool,
    has_starts: bool,
) -> dict[str, Any]:
    """Compile-time arguments of `score_kernel`."""
    return {
        "SHARED": shared,
        # Twice as many fill a matrix unit.
        "ROWS": max(8, 1 << (shared - 1).bit_length()),
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded_dim(head_dim),
        "RANK": rank,
        "BLOCK_R": max(16, 1 << (rank - 1).bit_length()),
        "BLOCK_SIZE": block_size,
        "BLOCKS": max(1, _KEYS // block_size),
        "TILES": tiles,
        "LOCAL": local,
        "HAS_LENGTHS": has_lengths,
        "HAS_STARTS": has_starts,
    }


def select_constants(constants: dict[str, Any], n: int) -> dict[str, Any]:
    """Compile-time arguments of `select_kernel`, from those of `score_kernel`."""
    shared = ("SHARED", "BLOCK_SIZE", "LOCAL", "HAS_LENGTHS", "HAS_STARTS")
    return {name: constants[name] for name in shared} | {
        "BLOCK_N": 1 << max(4, (n - 1).bit_length()),
        "HALVINGS": THRESHOLDS.bit_length() - 1,
    }


def select_options(constants: dict[str, Any]) -> dict[str, Any]:
    """Warps of `select_kernel`: so many that a thread holds 32 blocks at most."""
    return {"num_warps": min(32, max(4, constants["BLOCK_N"] // 1024))}


@lru_cache(maxsize=64)
def choose_tiles(lists: int, tokens: int, processors: int) -> int:
    """Steps of one program of the scores, a power of two."""
    most = lists * tokens // (_KEYS * _PROGRAMS * processors)
    return max(1, min(1 << max(0, most.bit_length() - 1), _MOST_TILES))


def query_constants(constants: dict[str, Any]) -> dict[str, Any]:
    """Compile-time arguments of `query_kernel`, from those of `score_kernel`."""
    names = ("SHARED", "ROWS", "HEAD_DIM", "BLOCK_D", "RANK", "BLOCK_R")
    return {name: constants[name] for name in names}


def select(
    query: Tensor,
    key: Tensor,
    words: Tensor,
    basis: Basis,
    share: Tensor,
    worth: Tensor,
    block_size: int,
    local: int,
    lengths: Tensor | None,
    starts: Tensor | None,
    scale: float,
    blocks: Tensor,
    counts: Tensor,
) -> None:
    """Fill `blocks` and `counts`; arguments as in `select_blocks`.

    Raises:
        UnsupportedError: the block size is not one that tiles fill, or there are too many blocks.
    """
    check_tile_block_size(block_size)
    batch, heads, dim = query.shape
    groups, tokens = key.shape[1:3]
    n = blocks.shape[2]
    if n > MOST_BLOCKS:
        raise UnsupportedError(
            f"the Triton kernels choose among at most {MOST_BLOCKS} blocks, got {n}: "
            "take larger blocks, or impl='reference'"
        )
    shared, lists = heads // groups, batch * groups
    tiles = choose_tiles(lists, tokens, multiprocessors(query.device))
    constants = score_constants(
        *(dim, shared, words.shape[3] * CODES, tiles, block_size, local),
        has_lengths=lengths is not None,
        has_starts=starts is not None,
    )
    of_select = select_constants(constants, n)
    lse = torch.empty((lists, shared, n), dtype=torch.float32, device=query.device)
    exact = (local + block_size - 2) // block_size + 2
    programs = exact + -(-n // (constants["BLOCKS"] * tiles))
    rows = constants["ROWS"]
    parts = torch.empty(
        (lists, 2, rows, constants["BLOCK_R"]), dtype=torch.float16, device=query.device
    )
    const = torch.empty((lists, rows), dtype=torch.float32, device=query.device)
    scale_log2 = logit_factors(scale, None)[0]
    with device_of(query):
        query_kernel[(lists,)](
            *(query, basis.mean, basis.query, parts, const, *query.stride()[:2], groups),
            scale_log2,
            **query_constants(constants),
            **SCORE_OPTIONS,
        )
        score_kernel[(programs, lists)](
            *(query, key, words, parts, const, lengths, starts, lse),
            *(*query.stride()[:2], *key.stride()[:3], groups, tokens, words.shape[2], n),
            scale_log2,
            **constants,
            **SCORE_OPTIONS,
        )
        select_kernel[(lists,)](
            *(lse, share, worth, lengths, starts, blocks, counts, groups, tokens, n),
            **of_select,
            **select_options(of_select),
        )
