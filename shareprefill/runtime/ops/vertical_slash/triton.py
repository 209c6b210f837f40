"""Launches of the Triton kernels of the vertical and slash profile, prepared for calls alike."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import triton

from shareprefill.runtime.ops.block_selection import SparseGuard
from shareprefill.runtime.ops.block_selection.reference import ROUNDING
from shareprefill.runtime.ops.blocks import count_blocks
from shareprefill.runtime.ops.pages import Tokens, memory, page_stride, page_table, page_tokens
from shareprefill.runtime.ops.prepared import Launch
from shareprefill.runtime.ops.triton_tiles import (
    Tiles,
    check_tile_block_size,
    device_capability,
    logit_factors,
    map_tiles,
    padded_dim,
)
from shareprefill.runtime.ops.vertical_slash.pattern_kernel import pattern_kernel
from shareprefill.runtime.ops.vertical_slash.triton_kernel import profiles_kernel, sums_kernel

# Key blocks of one program: few enough to keep all processors busy, enough for a pipeline.
LEAST_BLOCKS, MOST_BLOCKS = 4, 64
PROGRAMS = 2048
# Entries of the profiles that a program makes at a time, and splits that it reads at a time.
PROFILE_BLOCKS, SPLITS = 16, 16
PROFILE_OPTIONS: dict[str, Any] = {"num_warps": 4}
# Up to so many key blocks, those of 16K tokens, one program makes a head's pattern.
SHORT_BLOCKS = 128
PATTERN_OPTIONS: dict[str, Any] = {
    "ROUNDING": ROUNDING,
    "ENTRIES": 128,
    "LENGTH": 256,  # of a profile, at least SHORT_BLOCKS + 1
    "STEP": 16,
    "ROWS": 32,
    "CHUNK": 128,
    "num_warps": 8,
}


def kernel_constants(
    head_dim: int,
    shared: int,
    block_size: int,
    tiles: Tiles,
    dtype: torch.dtype,
    *,
    has_heads: bool,
    has_softcap: bool = False,
    page_size: int = 0,
) -> dict[str, Any]:
    """Compile-time arguments of `sums_kernel`."""
    block_m = min(tiles.block_m, block_size)
    return {
        "SHARED": shared,
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded_dim(head_dim),
        "BLOCK_SIZE": block_size,
        "BLOCK_M": block_m,
        "BLOCK_N": min(tiles.block_n, block_size),
        "PARTS": block_size // block_m,
        "HAS_HEADS": has_heads,
        "HAS_SOFTCAP": has_softcap,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "PAGE_SIZE": page_size,
    }


def profile_constants(constants: dict[str, Any]) -> dict[str, Any]:
    """Compile-time arguments of `profiles_kernel`, from those of `sums_kernel`."""
    names = ("BLOCK_SIZE", "BLOCK_M", "PARTS", "HAS_HEADS")
    return {name: constants[name] for name in names} | {
        "BLOCK_J": PROFILE_BLOCKS,
        "BLOCK_S": SPLITS,
    }


def profile_tiles(
    head_dim: int, block_size: int, dtype: torch.dtype, capability: tuple[int, int]
) -> Tiles:
    """Tiles of `sums_kernel`."""
    return map_tiles(padded_dim(head_dim), dtype, capability).within(block_size)


@lru_cache(maxsize=256)
def _settings(
    capability: tuple[int, int],
    head_dim: int,
    shared: int,
    block_size: int,
    dtype: torch.dtype,
    has_heads: bool,
    has_softcap: bool,
    page_size: int,
) -> tuple[Tiles, dict[str, Any], dict[str, Any]]:
    """Tiles and compile-time arguments of both kernels, made once for all layers."""
    tiles = profile_tiles(head_dim, block_size, dtype, capability)
    constants = kernel_constants(
        head_dim,
        shared,
        block_size,
        tiles,
        dtype,
        has_heads=has_heads,
        has_softcap=has_softcap,
        page_size=page_size,
    )
    return tiles, constants, profile_constants(constants)


def prepare(
    query: torch.Tensor,
    key: Tokens,
    block_size: int,
    scale: float,
    heads: torch.Tensor | None,
    softcap: float | None,
    always: tuple[int, int] = (0, 0),
    guard: SparseGuard | None = None,
    n_entries: int = 0,
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Both profiles in two launches, and their patterns where these are asked for.

    Arguments as in `vertical_slash_profile`; `always` are leading and trailing blocks, `guard` and
    the `n_entries` that it is given as in `vertical_slash_patterns`.

    Returns:
        Takes query, key and heads of calls that are alike; and gamma, where patterns and whether
        they rest on numbers are written, what is requested and where what is decided of it is
        written, for at most `SHORT_BLOCKS` key blocks.

    Raises:
        UnsupportedError: the block size is not a power of two of at least 16, or the head dim is
            above 256.
    """
    check_tile_block_size(block_size)
    n_heads, n_q_tokens, head_dim = query.shape
    (n_groups, n_k_tokens, _), device = key.shape, query.device
    n_slots = n_heads if heads is None else len(heads)
    n_k = count_blocks(n_k_tokens, block_size)
    tiles, constants, means = _settings(
        device_capability(device),
        head_dim,
        n_heads // n_groups,
        block_size,
        query.dtype,
        heads is not None,
        softcap is not None,
        page_tokens(key),
    )
    block_m, places = constants["BLOCK_M"], n_slots * constants["PARTS"]
    split_blocks = max(LEAST_BLOCKS, min(MOST_BLOCKS, places * n_k // PROGRAMS))
    n_splits = triton.cdiv(n_k, split_blocks)
    n_sums, n_peaks = places * n_k * 4 * block_m, places * n_splits * 2 * block_m
    sizes = (n_splits, split_blocks, n_q_tokens, n_k_tokens, n_k)
    strides = (
        *(query.stride(0), query.stride(1)),
        *(page_stride(key), key.stride(0), key.stride(1)),
    )
    add_up = Launch(
        sums_kernel,
        device,
        (places * n_splits,),
        (*strides, n_slots, *sizes, *logit_factors(scale, softcap)),
        constants | tiles.launch_options(),
    )
    grid = (triton.cdiv(n_k + 1, PROFILE_BLOCKS), n_slots)
    average = Launch(profiles_kernel, device, grid, sizes, means | PROFILE_OPTIONS)
    n_q = count_blocks(n_q_tokens, block_size)
    options = means | PATTERN_OPTIONS | {"HAS_GUARD": guard is not None}
    decides = (0, 0, 0, 0, 0, 0.0)
    if guard is not None:
        decides = (guard.n_heads, n_entries, guard.first, guard.otherwise, guard.place, guard.delta)
    cut = Launch(pattern_kernel, device, (n_slots,), (*sizes, n_q, *always, *decides), options)

    def run(
        query: torch.Tensor,
        key: Tokens,
        heads: torch.Tensor | None,
        gamma: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        finite: torch.Tensor | None = None,
        requested: torch.Tensor | None = None,
        decided: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        vertical = query.new_empty((n_slots, n_k), dtype=torch.float32)
        slash = query.new_empty((n_slots, n_k + 1), dtype=torch.float32)
        if n_slots:
            sums = query.new_empty(n_sums, dtype=torch.float32)
            peaks = query.new_empty(n_peaks, dtype=torch.float32)
            # Without a choice of heads the kernels do not touch it.
            heads = vertical if heads is None else heads.contiguous()
            add_up(query, memory(key), sums, peaks, heads, page_table(key))
            if gamma is None:
                average(sums, peaks, vertical, slash, heads)
            else:
                columns = query.new_empty((n_slots, n_k), dtype=torch.uint8)
                distances = query.new_empty((n_slots, n_k + 1), dtype=torch.uint8)
                if requested is None or decided is None:
                    requested = decided = heads  # Without a guard it is not touched.
                places = (columns, distances, out, finite, decided)
                cut(sums, peaks, gamma, heads, requested, vertical, slash, *places)
        return vertical, slash

    return run
