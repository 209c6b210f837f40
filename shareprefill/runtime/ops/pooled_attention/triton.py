"""Launches of the Triton kernels of pooled attention, prepared for calls that are alike."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import triton

from shareprefill.runtime.ops.pages import Tokens, memory, page_stride, page_table, page_tokens
from shareprefill.runtime.ops.pooled_attention.launches import Attended, Division, Masses
from shareprefill.runtime.ops.pooled_attention.rows import row_width
from shareprefill.runtime.ops.pooled_attention.triton_kernel import (
    mass_kernel,
    means_kernel,
    pooled_kernel,
    table_means_kernel,
)
from shareprefill.runtime.ops.prepared import Launch
from shareprefill.runtime.ops.triton_tiles import (
    Tiles,
    check_tile_block_size,
    device_capability,
    map_tiles,
    multiprocessors,
    padded_dim,
    select_tiles,
)

# Two programs fit on a multiprocessor.
PROGRAMS_PER_PROCESSOR = 2
# Masses in memory: of all programs with an output, and of one pair of launches without.
PRIVATE_BYTES = 2**30
WAVE_BYTES = 2**28
MEANS_OPTIONS: dict[str, Any] = {"num_warps": 4}
DIVISION = Division(programs=PROGRAMS_PER_PROCESSOR, least=8, most=64)
# Programs whose maxima and sums are put together at a time.
SPLITS = 32


def row_tiling(rows: int, block_m: int) -> tuple[int, int]:
    """How segments of `rows` rows fill tiles: segments in a tile, tiles of a segment."""
    padded = row_width(rows)
    return max(1, block_m // padded), max(1, padded // block_m)


def kernel_constants(
    head_dim: int,
    value_dim: int,
    shared: int,
    block_size: int,
    tiles: Tiles,
    dtype: torch.dtype,
    *,
    has_heads: bool,
    has_softcap: bool = False,
    has_sinks: bool = False,
    page_size: int = 0,
) -> dict[str, Any]:
    """Compile-time arguments of `pooled_kernel`."""
    segments, parts = row_tiling(block_size, tiles.block_m)
    block_n = min(tiles.block_n, block_size)
    # About 4096 masses are turned into means at a time.
    mean_blocks = max(1, 4096 // (tiles.block_m * (block_size // block_n)))
    return {
        "SHARED": shared,
        "PACKED": 1 if has_heads else shared,
        "ROWS": block_size,
        "PARTS": parts,
        "SEGMENTS": segments,
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_D": padded_dim(head_dim),
        "BLOCK_DV": padded_dim(value_dim),
        "BLOCK_SIZE": block_size,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": block_n,
        "STEPS": 1,
        "BLOCK_J": mean_blocks,
        "HAS_HEADS": has_heads,
        "HAS_SOFTCAP": has_softcap,
        "HAS_SINKS": has_sinks,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "PAGE_SIZE": page_size,
    }


def mass_constants(
    head_dim: int,
    shared: int,
    rows: int,
    block_size: int,
    tiles: Tiles,
    dtype: torch.dtype,
    *,
    has_rows: bool,
    has_heads: bool,
    has_softcap: bool = False,
    page_size: int = 0,
) -> dict[str, Any]:
    """Compile-time arguments of `mass_kernel`."""
    segments, parts = row_tiling(rows, tiles.block_m)
    block_n = min(tiles.block_n, block_size)
    return {
        "SHARED": shared,
        "PACKED": 1 if has_heads else shared,
        "ROWS": rows,
        "PARTS": parts,
        "SEGMENTS": segments,
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded_dim(head_dim),
        "BLOCK_SIZE": block_size,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": block_n,
        # Two key tiles a stored mass: half the memory traffic of the masses.
        "STEPS": min(2, block_size // block_n),
        "HAS_ROWS": has_rows,
        "HAS_HEADS": has_heads,
        "HAS_SOFTCAP": has_softcap,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "PAGE_SIZE": page_size,
    }


def means_constants(constants: dict[str, Any]) -> dict[str, Any]:
    """Compile-time arguments of `means_kernel`, from those of `mass_kernel`."""
    shared = ("PACKED", "ROWS", "PARTS", "SEGMENTS", "BLOCK_SIZE", "BLOCK_M")
    unit = constants["BLOCK_N"] * constants["STEPS"]
    pieces = constants["BLOCK_SIZE"] // unit
    rows = constants["BLOCK_M"] // constants["SEGMENTS"]
    return {name: constants[name] for name in (*shared, "HAS_ROWS", "HAS_HEADS")} | {
        "UNIT": unit,
        "BLOCK_J": max(1, 2048 // (rows * pieces)),
        "BLOCK_S": max(1, min(SPLITS, 2048 // rows)),
    }


def pooled_tiles(
    head_dim: int, value_dim: int, dtype: torch.dtype, capability: tuple[int, int]
) -> Tiles:
    """Tiles of `pooled_kernel`."""
    return select_tiles(padded_dim(max(head_dim, value_dim)), dtype, capability)


def mass_tiles(head_dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tiles:
    """Tiles of `mass_kernel`."""
    return map_tiles(padded_dim(head_dim), dtype, capability)


@lru_cache(maxsize=256)
def _pooled_settings(
    capability: tuple[int, int],
    head_dim: int,
    value_dim: int,
    shared: int,
    block_size: int,
    dtype: torch.dtype,
    flags: tuple[bool, bool, bool],
    page_size: int,
) -> tuple[Tiles, dict[str, Any]]:
    """Tiles and compile-time arguments of `pooled_kernel`, made once for all layers."""
    tiles = pooled_tiles(head_dim, value_dim, dtype, capability)
    has_heads, has_softcap, has_sinks = flags
    constants = kernel_constants(
        head_dim,
        value_dim,
        shared,
        block_size,
        tiles,
        dtype,
        has_heads=has_heads,
        has_softcap=has_softcap,
        has_sinks=has_sinks,
        page_size=page_size,
    )
    return tiles, constants


@lru_cache(maxsize=256)
def _mass_settings(
    capability: tuple[int, int],
    head_dim: int,
    shared: int,
    rows: int,
    block_size: int,
    dtype: torch.dtype,
    flags: tuple[bool, bool, bool],
    page_size: int,
) -> tuple[Tiles, dict[str, Any], dict[str, Any]]:
    """Tiles and compile-time arguments of `mass_kernel` and of `means_kernel`, made once."""
    tiles = mass_tiles(head_dim, dtype, capability)
    has_rows, has_heads, has_softcap = flags
    constants = mass_constants(
        head_dim,
        shared,
        rows,
        block_size,
        tiles,
        dtype,
        has_rows=has_rows,
        has_heads=has_heads,
        has_softcap=has_softcap,
        page_size=page_size,
    )
    return tiles, constants, means_constants(constants)


def prepare(
    attended: Attended, value: Tokens | None, sinks: torch.Tensor | None
) -> Callable[..., tuple[torch.Tensor | None, torch.Tensor]]:
    """Output and maps in one launch, or maps in two.

    The heads of a KV head read its keys once per tile; with a `heads` subset, whose grouping only
    the device knows, each head reads them for itself.

    Args:
        attended: What is computed.
        value: As in `pooled_attention`.
        sinks: As in `pooled_attention`.

    Returns:
        Takes query, key, value, rows, heads and sinks of calls that are alike.

    Raises:
        UnsupportedError: the block size is not a power of two of at least 16, or the head dim is
            above 256.
    """
    check_tile_block_size(attended.block_size)
    if value is None:
        return prepare_maps(attended, prepare_masses, DIVISION)
    return _prepare_output(attended, value, sinks)


def _prepare_output(
    attended: Attended, value: Tokens, sinks: torch.Tensor | None
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Output and maps of all rows."""
    query, key = attended.query, attended.key
    n_q_tokens, head_dim, value_dim = query.shape[1], query.shape[2], value.shape[2]
    tiles, constants = _pooled_settings(
        device_capability(query.device),
        head_dim,
        value_dim,
        attended.shared,
        attended.block_size,
        query.dtype,
        (attended.heads is not None, attended.softcap is not None, sinks is not None),
        page_tokens(key),
    )
    n_slots, n_members, n_k = attended.n_slots, attended.n_members, attended.n_k
    packed, parts = constants["PACKED"], constants["PARTS"]
    n_heads_z = n_slots // packed
    n_tiles = triton.cdiv(n_members * packed, constants["SEGMENTS"]) * parts
    unit = constants["BLOCK_N"] * constants["STEPS"]
    stride_mass = n_k * (attended.block_size // unit) * tiles.block_m
    most = max(1, PRIVATE_BYTES // (stride_mass * 4))
    n_programs = min(
        n_tiles * n_heads_z, PROGRAMS_PER_PROCESSOR * multiprocessors(query.device), most
    )
    numbers = (
        *(query.stride(0), query.stride(1), *_strides(key), *_strides(value)),
        *(n_q_tokens * value_dim, value_dim, stride_mass, n_members, n_heads_z, n_tiles),
        *(n_q_tokens, key.shape[1], n_k, *attended.logit_factors()),
    )
    options = constants | tiles.launch_options()
    launch = Launch(pooled_kernel, query.device, (n_programs,), numbers, options)

    def run(
        query: torch.Tensor,
        key: Tokens,
        value: Tokens,
        _rows: None,
        heads: torch.Tensor | None,
        sinks: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out = query.new_empty((n_slots, n_q_tokens, value_dim))
        maps = query.new_empty((n_slots, n_members, parts, n_k), dtype=torch.float32)
        if n_slots == 0:
            return out, maps[:, :, 0]
        mass = query.new_empty(n_programs * stride_mass, dtype=torch.float32)
        # The maps stand in for tensors that the kernel does not touch.
        heads = maps if heads is None else heads.contiguous()
        sinks = maps if sinks is None else sinks
        tokens = (memory(key), memory(value))
        launch(query, *tokens, out, maps, mass, heads, sinks, page_table(key))
        return out, maps.sum(2) if parts > 1 else maps[:, :, 0]

    return run


def _strides(tokens: Tokens) -> tuple[int, int, int]:
    """Strides between pages, heads and tokens."""
    return page_stride(tokens), tokens.stride(0), tokens.stride(1)


def prepare_maps(
    attended: Attended,
    prepare_masses: Callable[[Attended, Masses], Callable[..., None]],
    division: Division,
) -> Callable[..., tuple[None, torch.Tensor]]:
    """Maps alone, of all or of chosen rows, in waves of tiles whose masses fit in `WAVE_BYTES`.

    Args:
        attended: What is computed.
        prepare_masses: Prepares launches of the kernel of the masses, which take query, key, masses
            and peaks, rows and heads.
        division: How its programs share the keys.
    """
    query, key, device = attended.query, attended.key, attended.query.device
    tiles, constants, mean_constants = _mass_settings(
        device_capability(device),
        query.shape[2],
        attended.shared,
        attended.block_size if attended.rows is None else attended.rows.shape[1],
        attended.block_size,
        query.dtype,
        (attended.rows is not None, attended.heads is not None, attended.softcap is not None),
        page_tokens(key),
    )
    n_slots, n_members, n_k = attended.n_slots, attended.n_members, attended.n_k
    packed, parts, segments = constants["PACKED"], constants["PARTS"], constants["SEGMENTS"]
    shape = (n_slots, n_members, n_k) if parts == 1 else (n_slots, n_members, parts, n_k)
    n_heads_z = n_slots // packed
    n_tiles = triton.cdiv(n_members * packed, segments) * parts
    n_units = n_k * (attended.block_size // mean_constants["UNIT"])
    heads_z = max(1, n_heads_z)
    wave = max(1, min(n_tiles, WAVE_BYTES // (4 * n_units * tiles.block_m * heads_z)))
    split_units = division.units(wave * n_heads_z * n_units, device)
    n_splits = triton.cdiv(n_units, split_units)
    n_mass = wave * n_heads_z * n_units * tiles.block_m
    n_peaks = wave * n_heads_z * n_splits * 2 * tiles.block_m
    tokens, launches = (query.shape[1], key.shape[1]), []
    for end in range(n_tiles, 0, -wave):
        start = max(0, end - wave)
        n_wave = end - start
        split = (start, n_wave, n_units, n_splits, split_units, *tokens)
        masses = Masses(
            sizes=(n_members, n_heads_z, *split),
            n_programs=n_wave * n_splits * n_heads_z,
            constants=constants,
        )
        grid, numbers = (n_wave * n_heads_z * segments,), (n_members, *split, n_k)
        options = mean_constants | MEANS_OPTIONS
        means = Launch(means_kernel, device, grid, numbers, options)
        launches.append((prepare_masses(attended, masses), means))

    def run(
        query: torch.Tensor,
        key: Tokens,
        _value: None,
        rows: torch.Tensor | None,
        heads: torch.Tensor | None,
        sinks: torch.Tensor | None,
    ) -> tuple[None, torch.Tensor]:
        del sinks  # They change no map.
        maps = query.new_empty(shape, dtype=torch.float32)
        if n_slots == 0:
            return None, query.new_empty((0, n_members, n_k), dtype=torch.float32)
        mass = query.new_empty(n_mass, dtype=torch.float32)
        peaks = query.new_empty(n_peaks, dtype=torch.float32)
        # The maps stand in for tensors that the kernels do not touch.
        rows = maps if rows is None else rows.contiguous()
        heads = maps if heads is None else heads.contiguous()
        for sum_masses, means in launches:
            sum_masses(query, key, mass, peaks, rows, heads)
            means(mass, peaks, maps, rows, heads)
        return None, maps.sum(2) if parts > 1 else maps

    return run


def prepare_two_maps(
    attended: Attended,
    groups: tuple[tuple[int, int, int], tuple[int, int, int]],
    prepare_masses: Callable[[Attended, Masses], Callable[..., None]],
    division: Division,
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]] | None:
    """Maps of two groups of heads, of rows in a table, in two launches.

    Args:
        attended: What is computed, with the table for rows.
        groups: Heads, rows of a map and query rows of one of these, of each group.
        prepare_masses: As in `prepare_maps`.
        division: As in `prepare_maps`.

    Returns:
        Takes query, key, table and heads of calls that are alike. None where the masses are more
        than `WAVE_BYTES`.
    """
    query, key, device, table = attended.query, attended.key, attended.query.device, attended.rows
    assert table is not None
    n_tiles, height = table.shape
    _, constants, _ = _mass_settings(
        *(device_capability(device), query.shape[2], attended.shared, 1, attended.block_size),
        *(query.dtype, (True, True, attended.softcap is not None), page_tokens(key)),
    )
    assert height == constants["BLOCK_M"]
    widths = [row_width(r) for _, _, r in groups]
    options = means_constants(constants | {"SEGMENTS": height // max(widths)})
    n_k, unit = attended.n_k, options["UNIT"]
    n_units = n_k * (attended.block_size // unit)
    n_mass = n_tiles * n_units * height
    if 4 * n_mass > WAVE_BYTES:
        return None
    split_units = division.units(n_tiles * n_units, device)
    n_splits = triton.cdiv(n_units, split_units)
    split = (n_units, n_splits, split_units, query.shape[1], key.shape[1])
    # A table has its places itself.
    constants = constants | {"ROWS": 0, "PARTS": 1, "SEGMENTS": 1}
    masses = Masses((0, 1, 0, n_tiles, *split), n_tiles * n_splits, constants)
    sum_masses = prepare_masses(attended, masses)
    (first, members, rows), (second, members_second, rows_second) = groups
    tiles = [triton.cdiv(m * w, height) for (_, m, _), w in zip(groups, widths, strict=True)]
    means = Launch(
        table_means_kernel,
        device,
        (first * members + second * members_second,),
        (first, members, members_second, rows, rows_second, *widths, *tiles, *split, n_k),
        {name: options[name] for name in ("BLOCK_SIZE", "BLOCK_M", "UNIT", "BLOCK_J", "BLOCK_S")}
        | {"WIDTH": max(widths)}
        | MEANS_OPTIONS,
    )

    def run(
        query: torch.Tensor, key: Tokens, table: torch.Tensor, heads: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        maps = query.new_empty((first, members, n_k), dtype=torch.float32)
        others = query.new_empty((second, members_second, n_k), dtype=torch.float32)
        mass = query.new_empty(n_mass, dtype=torch.float32)
        peaks = query.new_empty(n_tiles * n_splits * 2 * height, dtype=torch.float32)
        sum_masses(query, key, mass, peaks, table, heads)
        means(mass, peaks, maps, others, table, heads)
        return maps, others

    return run


def prepare_masses(attended: Attended, masses: Masses) -> Callable[..., None]:
    """Launches of `mass_kernel`."""
    query, key = attended.query, attended.key
    tiles = mass_tiles(query.shape[2], query.dtype, device_capability(query.device))
    strides = (query.stride(0), query.stride(1), *_strides(key))
    launch = Launch(
        mass_kernel,
        query.device,
        (masses.n_programs,),
        (*strides, *masses.sizes, *attended.logit_factors()),
        masses.constants | tiles.launch_options(),
    )

    def run(query: torch.Tensor, key: Tokens, *others: torch.Tensor) -> None:
        launch(query, memory(key), *others, page_table(key))

    return run
