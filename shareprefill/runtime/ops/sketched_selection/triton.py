"""Launches of the Triton kernels that choose a decode step's blocks by a sketch of the keys."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from shareprefill.errors import UnsupportedError
from shareprefill.runtime.ops.prepared import Launch, Prepared
from shareprefill.runtime.ops.sketched_selection.reference import MOST_BLOCKS
from shareprefill.runtime.ops.sketched_selection.sketch import CODES, Basis
from shareprefill.runtime.ops.sketched_selection.triton_kernel import (
    list_kernel,
    place_kernel,
    query_kernel,
    score_kernel,
)
from shareprefill.runtime.ops.triton_tiles import (
    check_tile_block_size,
    logit_factors,
    overlaps,
    padded_dim,
)

# Keys of one program of the scores: eight of a thread, which are two loads of each word.
_KEYS = 1024
# Chunks of blocks that a KV head's list is made of, at most, and blocks of one at least: each of
# their programs reads the whole head's scores.
_CHUNKS, _LEAST_CHUNK = 8, 128
QUERY_OPTIONS: dict[str, Any] = {"num_warps": 4}
SCORE_OPTIONS: dict[str, Any] = {"num_warps": 4}
_prepared = Prepared[tuple[Launch, ...]]()


def score_constants(
    head_dim: int,
    shared: int,
    rank: int,
    block_size: int,
    local: int,
    *,
    has_lengths: bool,
    has_starts: bool,
    packed: bool,
    overlaps: bool,
) -> dict[str, Any]:
    """Compile-time arguments of `score_kernel`."""
    return {
        "SHARED": shared,
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded_dim(head_dim),
        "RANK": rank,
        "BLOCK_SIZE": block_size,
        "BLOCKS": max(1, _KEYS // block_size),
        "LOCAL": local,
        "HAS_LENGTHS": has_lengths,
        "HAS_STARTS": has_starts,
        "PACKED": packed,
        "OVERLAPS": overlaps,
    }


def place_constants(constants: dict[str, Any], n: int) -> dict[str, Any]:
    """Compile-time arguments of `place_kernel`, from those of `score_kernel`."""
    names = ("SHARED", "BLOCK_SIZE", "LOCAL", "HAS_LENGTHS", "HAS_STARTS", "PACKED", "OVERLAPS")
    return {name: constants[name] for name in names} | {
        "ROWS": 1 << (constants["SHARED"] - 1).bit_length(),
        "CHUNK": max(_LEAST_CHUNK, (1 << (n - 1).bit_length()) // _CHUNKS),
    }


def list_constants(constants: dict[str, Any]) -> dict[str, Any]:
    """Compile-time arguments of `list_kernel`, from those of `place_kernel`."""
    names = ("BLOCK_SIZE", "CHUNK", "HAS_LENGTHS", "HAS_STARTS", "OVERLAPS")
    return {name: constants[name] for name in names} | {"CHUNKS": _CHUNKS}


def chunk_options(constants: dict[str, Any]) -> dict[str, Any]:
    """Warps of programs for a chunk: so many that a thread holds 8 blocks, if there can be."""
    return {"num_warps": min(16, max(4, constants["CHUNK"] // 256))}


def query_constants(constants: dict[str, Any]) -> dict[str, Any]:
    """Compile-time arguments of `query_kernel`, from those of `score_kernel`."""
    names = ("SHARED", "HEAD_DIM", "BLOCK_D", "RANK", "OVERLAPS")
    rank = constants["RANK"]
    return {name: constants[name] for name in names} | {
        "BLOCK_R": max(8, 1 << (rank - 1).bit_length())
    }


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
    sizes = (batch, heads, groups, dim, words.shape[2] * CODES, words.shape[3], tokens, n)
    strides = (*query.stride()[:2], *key.stride()[:3])
    rules = (block_size, local, lengths is not None, starts is not None, scale)
    of_query, score, place, write = _launches(query.device, query.dtype, sizes, strides, rules)
    lists, shared, rank = batch * groups, heads // groups, sizes[4]
    make = partial(torch.empty, device=query.device)
    lse = make((lists, shared, n), dtype=torch.float32)
    # Of each query, eight bytes for every word of codes.
    parts = make((batch * heads, rank // 4), dtype=torch.int32)
    factors = make((batch * heads, 2), dtype=torch.float32)
    of_query(query, basis.mean, basis.query, parts, factors)
    score(query, key, words, parts, factors, lengths, starts, lse, tokens, n)
    places = make((lists, n), dtype=torch.int8)
    of_chunks = make((lists, place.grid[0], 64), dtype=torch.int32)
    place(lse, share, lengths, starts, places, of_chunks, tokens, n)
    write(places, of_chunks, worth, lengths, starts, blocks, counts, tokens, n)


def _launches(
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    rules: tuple[int, int, bool, bool, float],
) -> tuple[Launch, ...]:
    """Launches of the four kernels, made once for all steps that differ in few tokens.

    Args:
        device: Of the tensors.
        dtype: Of queries and keys.
        sizes: Sequences, query and KV heads, their dims, coordinates, room of the codes, tokens,
            and blocks.
        strides: Of queries and keys.
        rules: Block size, newest tokens, whether there are lengths and starts, the logits' factor.
    """
    batch, heads, groups, dim, rank, room, _, n = sizes
    block_size, local, has_lengths, has_starts, scale = rules
    constants = score_constants(
        *(dim, heads // groups, rank, block_size, local),
        has_lengths=has_lengths,
        has_starts=has_starts,
        packed=device.type == "cuda",
        overlaps=overlaps(device),
    )
    of_place = place_constants(constants, n)
    chunks = -(-n // of_place["CHUNK"])
    exact = (local + block_size - 2) // block_size + 2
    programs = exact + -(-n // constants["BLOCKS"])
    kind = (device, dtype, *sizes[:6], programs, of_place["CHUNK"], chunks, *strides, *rules)
    found = _prepared.get(kind)
    if found is None:
        lists, scale_log2 = batch * groups, logit_factors(scale, None)[0]
        together = {"launch_pdl": constants["OVERLAPS"]}
        found = _prepared.keep(
            kind,
            (
                Launch(
                    *(query_kernel, device, (batch * heads,), (*strides[:2], heads, scale_log2)),
                    query_constants(constants) | QUERY_OPTIONS | together,
                ),
                Launch(
                    *(
                        score_kernel,
                        device,
                        (programs, lists),
                        (*strides, groups, room, scale_log2),
                    ),
                    constants | SCORE_OPTIONS | together,
                ),
                Launch(
                    *(place_kernel, device, (chunks, lists), (groups,)),
                    of_place | chunk_options(of_place) | together,
                ),
                Launch(
                    *(list_kernel, device, (chunks, lists), (groups,)),
                    list_constants(of_place) | chunk_options(of_place) | together,
                ),
            ),
        )
    return found
