"""Launch of the Triton kernel of pooled attention."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import triton

from shareprefill.runtime.ops.blocks import count_blocks
from shareprefill.runtime.ops.pooled_attention.kernel import pooled_kernel
from shareprefill.runtime.ops.tiles import (
    Tiles,
    check_tile_block_size,
    device_capability,
    padded_dim,
    select_tiles,
)

# Two programs fit on a multiprocessor with the smaller tiles; where only one fits, they queue.
PROGRAMS_PER_PROCESSOR = 2
# Private memory of all programs; 2 GPU programs per processor at 1M keys still fit.
MASS_BYTES = 2**30
# Rows in a tile of sampled rows.
SAMPLED_BLOCK_M = 64
# Programs in the interpreter, which runs them one after another.
INTERPRETED_PROGRAMS = 3


def row_tiling(rows: int, block_m: int) -> tuple[int, int]:
    """How segments of `rows` rows fill tiles: segments in a tile, tiles of a segment."""
    padded = 1 << (rows - 1).bit_length()
    return max(1, block_m // padded), max(1, padded // block_m)


def kernel_constants(
    head_dim: int,
    value_dim: int | None,
    shared: int,
    rows: int,
    block_size: int,
    tiles: Tiles,
    dtype: torch.dtype,
    *,
    has_rows: bool,
    has_heads: bool,
) -> dict[str, Any]:
    """Compile-time arguments of `pooled_kernel`."""
    segments, parts = row_tiling(rows, tiles.block_m)
    block_n = min(tiles.block_n, block_size)
    # About 4096 masses are turned into means at a time.
    mean_blocks = max(1, 4096 // (tiles.block_m * (block_size // block_n)))
    return {
        "SHARED": shared,
        "PACKED": 1 if has_heads else shared,
        "ROWS": rows,
        "PARTS": parts,
        "SEGMENTS": segments,
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim or 16,
        "BLOCK_D": padded_dim(head_dim),
        "BLOCK_DV": padded_dim(value_dim or 16),
        "BLOCK_SIZE": block_size,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": block_n,
        "BLOCK_J": mean_blocks,
        "HAS_ROWS": has_rows,
        "HAS_HEADS": has_heads,
        "HAS_VALUE": value_dim is not None,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }


def pooled_tiles(
    head_dim: int,
    value_dim: int | None,
    dtype: torch.dtype,
    capability: tuple[int, int],
    *,
    sampled: bool,
) -> Tiles:
    """Tiles of `pooled_kernel`.

    Sampled rows are few: smaller tiles give every processor several and keep the rows of a tile
    close to one diagonal.
    """
    tiles = select_tiles(padded_dim(max(head_dim, value_dim or 1)), dtype, capability)
    if sampled and tiles.block_m > SAMPLED_BLOCK_M:
        tiles = replace(tiles, block_m=SAMPLED_BLOCK_M, num_warps=4)
    return tiles


def pool(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    rows: torch.Tensor | None,
    block_size: int,
    scale: float,
    heads: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Output and maps in one launch; arguments as in `pooled_attention`.

    The heads of a KV head read its keys once per tile; with a `heads` subset, whose grouping only
    the device knows, each head reads them for itself.

    Raises:
        UnsupportedError: the block size is not a power of two of at least 16, or the head dim is
            above 256.
    """
    check_tile_block_size(block_size)
    n_heads, n_q_tokens, head_dim = query.shape
    n_groups, n_k_tokens, _ = key.shape
    value_dim = None if value is None else value.shape[2]
    n_slots = n_heads if heads is None else len(heads)
    n_k = count_blocks(n_k_tokens, block_size)
    n_members = count_blocks(n_q_tokens, block_size) if rows is None else len(rows)
    tiles = pooled_tiles(
        head_dim,
        value_dim,
        query.dtype,
        device_capability(query.device),
        sampled=rows is not None,
    )
    constants = kernel_constants(
        head_dim,
        value_dim,
        n_heads // n_groups,
        block_size if rows is None else rows.shape[1],
        block_size,
        tiles,
        query.dtype,
        has_rows=rows is not None,
        has_heads=heads is not None,
    )
    packed, parts = constants["PACKED"], constants["PARTS"]
    out = None if value_dim is None else query.new_empty((n_slots, n_q_tokens, value_dim))
    maps = query.new_empty((n_slots, n_members, parts, n_k), dtype=torch.float32)
    if n_slots == 0:
        return out, maps[:, :, 0]
    n_heads_z = n_slots // packed
    n_tiles = triton.cdiv(n_members * packed, constants["SEGMENTS"]) * parts
    stride_mass = n_k * (block_size // constants["BLOCK_N"]) * tiles.block_m
    n_programs = min(n_tiles * n_heads_z, _most_programs(query.device, stride_mass * 4))
    mass = query.new_empty(n_programs * stride_mass, dtype=torch.float32)
    unused = maps  # stands in for tensors that the kernel does not touch
    with torch.cuda.device_of(query):
        pooled_kernel[(n_programs,)](
            query,
            key,
            unused if value is None else value,
            unused if out is None else out,
            maps,
            mass,
            unused if rows is None else rows.contiguous(),
            unused if heads is None else heads.contiguous(),
            query.stride(0),
            query.stride(1),
            key.stride(0),
            key.stride(1),
            0 if value is None else value.stride(0),
            0 if value is None else value.stride(1),
            0 if out is None else out.stride(0),
            0 if out is None else out.stride(1),
            stride_mass,
            n_members,
            n_heads_z,
            n_tiles,
            n_q_tokens,
            n_k_tokens,
            n_k,
            scale / math.log(2.0),
            **constants,
            **tiles.launch_options(),
        )
    return out, maps.sum(2) if parts > 1 else maps[:, :, 0]


def _most_programs(device: torch.device, program_bytes: int) -> int:
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(processors * PROGRAMS_PER_PROCESSOR, MASS_BYTES // program_bytes))
