"""Choice of blocks on the device: checks and choice of implementation.

No function here waits for a CUDA device, and a new length compiles nothing.
"""

from __future__ import annotations

from types import ModuleType

import torch

from shareprefill.errors import ConfigError
from shareprefill.runtime.ops.blocks import BlockLists, count_blocks, count_causal_blocks
from shareprefill.runtime.ops.inputs import check_block_size, select_impl
from shareprefill.runtime.ops.selection import reference

IMPLS = ("reference", "triton")
MAX_ENTRIES = 2**31 - 1


@torch.no_grad()
def select_blocks(
    maps: torch.Tensor,
    gamma: torch.Tensor,
    *,
    n_query: int,
    n_key: int,
    block_size: int,
    sink_blocks: int = 0,
    local_blocks: int = 0,
    impl: str = "auto",
) -> torch.Tensor:
    """The smallest set of blocks of every row that covers gamma, and the blocks always read.

    Mass on blocks that are not causal is left out of account, and blocks without mass are never
    taken for their mass; a row that holds less than gamma takes every block with mass. Of equal
    blocks the one with the lower column comes first. A sum within 1e-6 of gamma counts as reaching
    it. SharePrefill's pattern (arXiv 2505.19578, section 4).

    Args:
        maps: float32 `[S, n_q, n_k]`, block distributions.
        gamma: float32 `[S]`, mass to cover, in (0, 1].
        n_query: query rows, in tokens; query row i is at position `n_key - n_query + i`.
        n_key: keys, in tokens.
        block_size: tokens in a block.
        sink_blocks: leading key blocks that every row reads.
        local_blocks: trailing causal key blocks that every row reads: the one of its first token,
            `local_blocks - 1` before it, and those after it; 0: none of these.
        impl: "auto" (Triton on CUDA, the reference elsewhere), "reference" or "triton".

    Returns:
        bool `[S, n_q, n_k]`, causal.

    Raises:
        ConfigError: shapes, dtypes, devices or ranges do not belong together.
    """
    _check_maps("maps", maps)
    _check_geometry(maps, n_query, n_key, block_size)
    _check_always(sink_blocks, local_blocks)
    _check_vector("gamma", gamma, torch.float32, len(maps), maps.device)
    module = _implementation(impl, maps)
    return module.select_blocks(maps, gamma, n_query, n_key, block_size, sink_blocks, local_blocks)


@torch.no_grad()
def vertical_slash_blocks(
    vertical: torch.Tensor,
    slash: torch.Tensor,
    gamma: torch.Tensor,
    *,
    n_query: int,
    n_key: int,
    block_size: int,
    sink_blocks: int = 0,
    local_blocks: int = 0,
    impl: str = "auto",
) -> torch.Tensor:
    """Key blocks and block diagonals that each cover gamma of the last rows' attention.

    A chosen key block is read by all query blocks; a chosen distance by the blocks that lie at it
    from the first or from the last row of a query block. After MInference (arXiv 2407.02490,
    section 3.2) and FlexPrefill (arXiv 2502.20766, section 4.2), in blocks.

    Args:
        vertical: float32 `[S, n_k]`, mass by key block (see `vertical_slash_profile`).
        slash: float32 `[S, n_k + 1]`, mass by block distance to the diagonal.
        gamma: float32 `[S]`, mass that each of the two sets covers.
        n_query: query rows, in tokens.
        n_key: keys, in tokens.
        block_size: tokens in a block.
        sink_blocks: as in `select_blocks`.
        local_blocks: as in `select_blocks`.
        impl: as in `select_blocks`.

    Returns:
        bool `[S, n_q, n_k]`, causal.

    Raises:
        ConfigError: shapes, dtypes, devices or ranges do not belong together.
    """
    n_k = count_blocks(n_key, block_size) if block_size > 0 else 0
    for name, profile, width in (("vertical", vertical, n_k), ("slash", slash, n_k + 1)):
        if (
            profile.dtype != torch.float32
            or profile.shape != (len(vertical), width)
            or profile.device != vertical.device
        ):
            raise ConfigError(
                f"{name} must be float32 [{len(vertical)}, {width}] on {vertical.device}, "
                f"got {profile.dtype} of shape {tuple(profile.shape)} on {profile.device}"
            )
    _check_geometry(None, n_query, n_key, block_size)
    _check_always(sink_blocks, local_blocks)
    _check_vector("gamma", gamma, torch.float32, len(vertical), vertical.device)
    module = _implementation(impl, vertical)
    return module.vertical_slash_blocks(
        vertical, slash, gamma, n_query, n_key, block_size, sink_blocks, local_blocks
    )


@torch.no_grad()
def js_distances(
    maps: torch.Tensor, pivots: torch.Tensor, index: torch.Tensor, *, impl: str = "auto"
) -> torch.Tensor:
    """Mean over rows of the Jensen-Shannon distance of every map to its pivot's.

    The distance is the square root of the divergence, natural logarithm: 0 to sqrt(ln 2); NaN only
    where a map or its pivot's holds NaN or Inf. No map is copied.

    Args:
        maps: float32 `[S, n_q, n_k]`, block distributions.
        pivots: float32 `[P, n_q, n_k]`.
        index: int64 `[S]`, the pivot of each map; below 0: none, and the distance is infinite. On
            CUDA its range is not checked.
        impl: as in `select_blocks`.

    Returns:
        float32 `[S]`.

    Raises:
        ConfigError: shapes, dtypes, devices or ranges do not belong together.
    """
    _check_maps("maps", maps)
    _check_maps("pivots", pivots)
    _check_partners("pivots", pivots, maps, index)
    return _implementation(impl, maps).js_distances(maps, pivots, index)


@torch.no_grad()
def covered_mass(
    maps: torch.Tensor, patterns: torch.Tensor, index: torch.Tensor, *, impl: str = "auto"
) -> torch.Tensor:
    """Mean over rows of the mass of every map inside its pattern: the recall, for exact maps.

    A map that holds NaN covers NaN, which reaches no limit.

    Args:
        maps: float32 `[S, n_q, n_k]`, block distributions.
        patterns: bool `[P, n_q, n_k]`.
        index: int64 `[S]`, the pattern of each map; below 0: all blocks. On CUDA its range is not
            checked.
        impl: as in `select_blocks`.

    Returns:
        float32 `[S]`, at most 1.

    Raises:
        ConfigError: shapes, dtypes, devices or ranges do not belong together.
    """
    _check_maps("maps", maps)
    _check_bitmap("patterns", patterns)
    _check_partners("patterns", patterns, maps, index)
    return _implementation(impl, maps).covered_mass(maps, patterns, index)


@torch.no_grad()
def list_blocks(
    bitmap: torch.Tensor,
    pattern: torch.Tensor,
    block_size: int,
    *,
    n_query: int,
    n_key: int,
    max_density: float | None = None,
    impl: str = "auto",
) -> BlockLists:
    """Lists of the causal set entries of a bitmap, without waiting for the device.

    The host cannot know how many entries there are, so it makes room for a bound and no block is
    ever lost. Without `max_density` that is every causal block of `min(P, H)` patterns. With it,
    it is `max_density` of them, and one more list P of all causal blocks: the heads of a pattern
    with more blocks than that point at list P, and the pattern's own rows are empty.

    Args:
        bitmap: bool `[P, n_q, n_k]`. Rows of a pattern that no head points at are left empty;
            entries that are not causal are left out.
        pattern: integer `[H]`, on the bitmap's device: index into P; -1: the head is not computed;
            with `max_density` also P: the head reads all causal blocks. On CUDA the range is not
            checked.
        block_size: tokens in a block.
        n_query: query rows, in tokens; query row i is at position `n_key - n_query + i`.
        n_key: keys, in tokens.
        max_density: share of the causal blocks, in (0, 1], that a pattern may have; None: any.
        impl: as in `select_blocks`.

    Returns:
        The lists; with `max_density` their pattern P is the dense one.

    Raises:
        ConfigError: shapes, dtypes, devices or ranges do not belong together, or there is no room
            for the bound in 32-bit offsets.
    """
    _check_bitmap("bitmap", bitmap)
    _check_geometry(bitmap, n_query, n_key, block_size)
    if pattern.ndim != 1 or pattern.dtype.is_floating_point or pattern.device != bitmap.device:
        raise ConfigError(
            f"pattern must be integers [H] on {bitmap.device}, "
            f"got {pattern.dtype} of shape {tuple(pattern.shape)} on {pattern.device}"
        )
    n_lists = len(bitmap) + (max_density is not None)
    if pattern.device.type == "cpu" and len(pattern) and int(pattern.max()) >= n_lists:
        raise ConfigError(f"pattern must lie below {n_lists}, got {int(pattern.max())}")
    most = count_causal_blocks(n_query, n_key - n_query, block_size)
    max_blocks = None
    if max_density is not None:
        if not 0.0 < max_density <= 1.0:
            raise ConfigError(f"max_density must lie in (0, 1], got {max_density}")
        max_blocks = int(max_density * most)
    each, dense = (most, 0) if max_blocks is None else (max_blocks, most)
    capacity = max(1, min(len(bitmap), len(pattern)) * each + dense)
    if capacity > MAX_ENTRIES:
        raise ConfigError(
            f"{len(bitmap)} patterns of up to {each} blocks need {capacity} list entries, and "
            f"offsets hold {MAX_ENTRIES}; lower max_density or list fewer patterns at once"
        )
    module = _implementation(impl, bitmap)
    return module.list_blocks(bitmap, pattern, n_query, n_key, block_size, max_blocks)


def _implementation(impl: str, tensor: torch.Tensor) -> ModuleType:
    if select_impl(impl, IMPLS, tensor, "reference") == "reference":
        return reference
    from shareprefill.runtime.ops.selection import triton

    return triton


def _check_maps(name: str, maps: torch.Tensor) -> None:
    if maps.dtype != torch.float32 or maps.ndim != 3:
        raise ConfigError(
            f"{name} must be float32 [S, n_q, n_k], got {maps.dtype} of shape {tuple(maps.shape)}"
        )


def _check_bitmap(name: str, bitmap: torch.Tensor) -> None:
    if bitmap.dtype != torch.bool or bitmap.ndim != 3:
        raise ConfigError(
            f"{name} must be bool [P, n_q, n_k], got {bitmap.dtype} of shape {tuple(bitmap.shape)}"
        )


def _check_geometry(maps: torch.Tensor | None, n_query: int, n_key: int, block_size: int) -> None:
    check_block_size(block_size)
    if not 1 <= n_query <= n_key:
        raise ConfigError(f"need 1 <= n_query <= n_key, got {n_query} and {n_key}")
    wanted = (count_blocks(n_query, block_size), count_blocks(n_key, block_size))
    if maps is not None and maps.shape[1:] != wanted:
        raise ConfigError(
            f"{n_query} queries and {n_key} keys in blocks of {block_size} make maps "
            f"[.., {wanted[0]}, {wanted[1]}], got shape {tuple(maps.shape)}"
        )


def _check_always(sink_blocks: int, local_blocks: int) -> None:
    if sink_blocks < 0 or local_blocks < 0:
        raise ConfigError(
            f"sink_blocks and local_blocks must be at least 0, got {sink_blocks}, {local_blocks}"
        )


def _check_vector(
    name: str, vector: torch.Tensor, dtype: torch.dtype, length: int, device: torch.device
) -> None:
    if vector.dtype != dtype or vector.shape != (length,) or vector.device != device:
        raise ConfigError(
            f"{name} must be {dtype} [{length}] on {device}, "
            f"got {vector.dtype} of shape {tuple(vector.shape)} on {vector.device}"
        )


def _check_partners(
    name: str, partners: torch.Tensor, maps: torch.Tensor, index: torch.Tensor
) -> None:
    if partners.shape[1:] != maps.shape[1:] or partners.device != maps.device:
        raise ConfigError(
            f"{name} must be [P, {maps.shape[1]}, {maps.shape[2]}] on {maps.device} like maps, "
            f"got shape {tuple(partners.shape)} on {partners.device}"
        )
    _check_vector("index", index, torch.int64, len(maps), maps.device)
    if index.device.type == "cpu" and len(index) and int(index.max()) >= len(partners):
        raise ConfigError(f"index must lie below {len(partners)}, got {int(index.max())}")
