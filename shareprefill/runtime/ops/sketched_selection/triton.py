"""Launches of the Triton kernels that choose a decode step's blocks by a sketch of the keys."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from shareprefill.errors import UnsupportedError
from shareprefill.runtime.ops.pages import Cached, check_kernel_pages, kernel_pages
from shareprefill.runtime.ops.prepared import Launch, Prepared
from shareprefill.runtime.ops.sketched_selection.reference import MOST_BLOCKS
from shareprefill.runtime.ops.sketched_selection.sketch import CODES, Basis
from shareprefill.runtime.ops.sketched_selection.triton_kernel import (
    list_kernel,
    place_kernel,
    query_kernel,
    score_kernel,
    sketch_kernel,
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
# Keys of one program of the codes.
_SLOTS = 16
SKETCH_OPTIONS: dict[str, Any] = {"num_warps": 4}
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
    page_size: int,
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
        "PAGE_SIZE": page_size,
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
    key: Cached,
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
        UnsupportedError: the block size is not one that tiles fill, there are too many blocks, or
            pages are not read.
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
    keys, tables, page_size, key_strides = kernel_pages(key)
    strides = (*query.stride()[:2], *key_strides)
    has_places = (lengths is not None, starts is not None)
    rules = (block_size, local, *has_places, page_size, len(basis.mean) > 1, scale)
    of_query, score, place, write = _launches(query.device, query.dtype, sizes, strides, rules)
    lists, shared, rank = batch * groups, heads // groups, sizes[4]
    make = partial(torch.empty, device=query.device)
    lse = make((lists, shared, n), dtype=torch.float32)
    # Of each query, eight bytes for every word of codes.
    parts = make((batch * heads, rank // 4), dtype=torch.int32)
    factors = make((batch * heads, 2), dtype=torch.float32)
    of_query(query, basis.mean, basis.query, parts, factors)
    score(query, keys, words, parts, factors, lengths, starts, tables, lse, tokens, n)
    places = make((lists, n), dtype=torch.int8)
    of_chunks = make((lists, place.grid[0], 64), dtype=torch.int32)
    place(lse, share, lengths, starts, places, of_chunks, tokens, n)
    write(places, of_chunks, worth, lengths, starts, blocks, counts, tokens, n)


def sketch_constants(head_dim: int, rank: int, page_size: int) -> dict[str, Any]:
    """Compile-time arguments of `sketch_kernel`."""
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded_dim(head_dim),
        "RANK": rank,
        "BLOCK_R": max(16, 1 << (rank - 1).bit_length()),
        "BLOCK_N": _SLOTS,
        "PAGE_SIZE": page_size,
    }


def write(key: Tensor, slots: Tensor, basis: Basis, words: Tensor) -> None:
    """Fill `words`; arguments as in `write_codes`."""
    check_kernel_pages(key)
    _, groups, page_size, dim = key.shape
    rank = basis.key.shape[1]
    constants = sketch_constants(dim, rank, page_size)
    programs = -(-len(slots) // _SLOTS)
    strides = key.stride()[:3]
    kind = ("write", key.device, key.dtype, *key.shape[1:], rank, programs, *strides)
    found = _prepared.get(kind)
    if found is None:
        grid = (programs, groups)
        launch = Launch(
            sketch_kernel, key.device, grid, (*strides, groups), constants | SKETCH_OPTIONS
        )
        found = _prepared.keep(kind, (launch,))
    found[0](key, slots, basis.mean, basis.key, words, len(slots))


def _launches(
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    rules: tuple[int, int, bool, bool, int, bool, float],
) -> tuple[Launch, ...]:
    """Launches of the four kernels, made once for all steps that differ in few tokens.

    Args:
        device: Of the tensors.
        dtype: Of queries and keys.
        sizes: Sequences, query and KV heads, their dims, coordinates, room of the codes, tokens,
            and blocks.
        strides: Of queries, tables of pages and keys.
        rules: Block size, newest tokens, whether there are lengths and starts, tokens of a page,
            whether sequences have bases of their own, the logits' factor.
    """
    batch, heads, groups, dim, rank, room, _, n = sizes
    block_size, local, has_lengths, has_starts, page_size, own_bases, scale = rules
    constants = score_constants(
        *(dim, heads // groups, rank, block_size, local),
        has_lengths=has_lengths,
        has_starts=has_starts,
        page_size=page_size,
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
                    *(query_kernel, device, (batch * heads,)),
                    (*strides[:2], heads, lists if own_bases else groups, scale_log2),
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
