"""Choice of blocks on the device: checks and choice of implementation.

No function here waits for a CUDA device, and a new length compiles nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType

import torch

from shareprefill.errors import ConfigError
from shareprefill.runtime.ops.block_selection import reference
from shareprefill.runtime.ops.block_selection.weights import LineWeights
from shareprefill.runtime.ops.blocks import BlockLists, count_blocks, count_causal_blocks
from shareprefill.runtime.ops.dispatch import select_impl
from shareprefill.runtime.ops.inputs import check_below, check_block_size, check_tensor

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
    out: torch.Tensor | None = None,
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
        out: bool `[S, n_q, n_k]`, contiguous: where the result is written; None: a new tensor.
        impl: "auto" (Triton on CUDA, the reference elsewhere), "reference" or "triton".

    Returns:
        bool `[S, n_q, n_k]`, causal.

    Raises:
        ConfigError: shapes, dtypes, devices or ranges do not belong together.
    """
    n_q, n_k = _check_sizes(n_query, n_key, block_size, sink_blocks, local_blocks)
    check_tensor("maps", maps, torch.float32, ("S", n_q, n_k), maps.device)
    check_tensor("gamma", gamma, torch.float32, (len(maps),), maps.device)
    _check_out(out, maps.shape, maps.device)
    module = _implementation(impl, maps)
    return module.select_blocks(
        maps, gamma, n_query, n_key, block_size, sink_blocks, local_blocks, out
    )


@torch.no_grad()
def head_blocks(
    maps: torch.Tensor,
    gamma: torch.Tensor,
    index: torch.Tensor | None = None,
    *,
    n_query: int,
    n_key: int,
    block_size: int,
    sink_blocks: int = 0,
    local_blocks: int = 0,
    out: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The blocks of every map at or above one threshold, and the blocks always read.

    Where `select_blocks` covers gamma of every row, this covers gamma of a map's whole mass: of all
    patterns of as many blocks it has the largest recall, which is a mean over rows. FlexPrefill
    (arXiv 2502.20766, algorithm 4) ranks its query-aware blocks over the whole map, too.

    The threshold is the highest at which the blocks that reach it hold gamma of the mass, among
    the float32 numbers of 14 bits after the point (steps of 6e-5 of it, at most) down to 2^-40 of
    the largest mass. So blocks of equal mass are taken or left together. A sum within 1e-6 of
    what is wanted, in relation to it, counts as reaching it. Blocks without mass are not taken for
    their mass; a gamma of 1 or more takes all others. Mass on blocks that are not causal is left
    out of account. Where a map's sum is NaN or Inf, every causal block is taken.

    Args:
        maps: float32 `[S, n_q, n_k]`, block maps in any scale, none negative.
        gamma: float32 `[P]`, share of the map's mass that each pattern covers.
        index: int64 `[P]`, the map of each pattern; below 0: none, and only what is always read is
            taken. On CUDA its range is not checked. None: P is S, and each has its own.
        n_query: query rows, in tokens; query row i is at position `n_key - n_query + i`.
        n_key: keys, in tokens.
        block_size: tokens in a block.
        sink_blocks: as in `select_blocks`.
        local_blocks: as in `select_blocks`.
        out: bool `[P, n_q, n_k]`, as in `select_blocks`.
        impl: as in `select_blocks`.

    Returns:
        `(patterns, is_finite)`: bool `[P, n_q, n_k]`, causal; and bool `[P]`, False where the sum
        of the pattern's map is NaN or Inf.

    Raises:
        ConfigError: shapes, dtypes, devices or ranges do not belong together.

    >>> maps = torch.tensor([[[1.0, 0.0], [0.6, 0.4]]])
    >>> head_blocks(maps, torch.tensor([0.75]), n_query=8, n_key=8, block_size=4)[0]
    tensor([[[ True, False],
             [ True, False]]])
    """
    n_q, n_k = _check_sizes(n_query, n_key, block_size, sink_blocks, local_blocks)
    check_tensor("maps", maps, torch.float32, ("S", n_q, n_k), maps.device)
    if index is not None:
        check_tensor("index", index, torch.int64, ("P",), maps.device, below=len(maps))
    n_patterns = len(maps) if index is None else len(index)
    check_tensor("gamma", gamma, torch.float32, (n_patterns,), maps.device)
    _check_out(out, (n_patterns, n_q, n_k), maps.device)
    module = _implementation(impl, maps)
    return module.head_blocks(
        maps, gamma, index, n_query, n_key, block_size, sink_blocks, local_blocks, out
    )


@torch.no_grad()
def smooth_maps(
    maps: torch.Tensor,
    weights: LineWeights,
    *,
    n_query: int,
    n_key: int,
    block_size: int,
    impl: str = "auto",
) -> torch.Tensor:
    """Weighted means over the lines of a map that each block lies on.

    Attention follows key blocks (verticals) and distances (diagonals), so that the samples of other
    query blocks on the same lines tell about a block. Means are over causal blocks of the map; a
    neighbourhood without any is stood for by the block itself.

    Args:
        maps: float32 `[S, n_q, n_k]`, block maps.
        weights: what the block, its neighbours and its lines count.
        n_query: query rows, in tokens; query row i is at position `n_key - n_query + i`.
        n_key: keys, in tokens.
        block_size: tokens in a block.
        impl: as in `select_blocks`.

    Returns:
        float32 `[S, n_q, n_k]`, in the scale of the weights' sum; zero where not causal.

    Raises:
        ConfigError: shapes, dtypes, devices or ranges do not belong together.
    """
    n_q, n_k = _check_sizes(n_query, n_key, block_size)
    check_tensor("maps", maps, torch.float32, ("S", n_q, n_k), maps.device)
    return _implementation(impl, maps).smooth_maps(maps, weights, n_query, n_key, block_size)


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
    out: torch.Tensor | None = None,
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
        out: as in `select_blocks`.
        impl: as in `select_blocks`.

    Returns:
        bool `[S, n_q, n_k]`, causal.

    Raises:
        ConfigError: shapes, dtypes, devices or ranges do not belong together.
    """
    n_q, n_k = _check_sizes(n_query, n_key, block_size, sink_blocks, local_blocks)
    n_patterns, device = len(vertical), vertical.device
    check_tensor("vertical", vertical, torch.float32, ("S", n_k), device)
    check_tensor("slash", slash, torch.float32, (n_patterns, n_k + 1), device)
    check_tensor("gamma", gamma, torch.float32, (n_patterns,), device)
    _check_out(out, (n_patterns, n_q, n_k), device)
    module = _implementation(impl, vertical)
    return module.vertical_slash_blocks(
        vertical, slash, gamma, n_query, n_key, block_size, sink_blocks, local_blocks, out
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
    device = maps.device
    check_tensor("maps", maps, torch.float32, ("S", "n_q", "n_k"), device)
    check_tensor("pivots", pivots, torch.float32, ("P", *maps.shape[1:]), device)
    check_tensor("index", index, torch.int64, (len(maps),), device, below=len(pivots))
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
    device = maps.device
    check_tensor("maps", maps, torch.float32, ("S", "n_q", "n_k"), device)
    check_tensor("patterns", patterns, torch.bool, ("P", *maps.shape[1:]), device)
    check_tensor("index", index, torch.int64, (len(maps),), device, below=len(patterns))
    return _implementation(impl, maps).covered_mass(maps, patterns, index)


@torch.no_grad()
def list_blocks(
    bitmap: torch.Tensor,
    head_to_list: torch.Tensor,
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
        head_to_list: integer `[H]`, on the bitmap's device: the pattern in P that each head reads;
            -1: the head is not computed; with `max_density` also P: the head reads all causal
            blocks. On CUDA the range is not checked.
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
    n_q, n_k = _check_sizes(n_query, n_key, block_size)
    check_tensor("bitmap", bitmap, torch.bool, ("P", n_q, n_k), bitmap.device)
    if (
        head_to_list.ndim != 1
        or head_to_list.dtype.is_floating_point
        or head_to_list.device != bitmap.device
    ):
        raise ConfigError(
            f"head_to_list must be integers [H] on {bitmap.device}, "
            f"got {head_to_list.dtype} of shape {tuple(head_to_list.shape)} "
            f"on {head_to_list.device}"
        )
    n_lists = len(bitmap) + (max_density is not None)
    check_below("head_to_list", head_to_list, n_lists)
    most = count_causal_blocks(n_query, n_key - n_query, block_size)
    max_blocks = None
    if max_density is not None:
        if not 0.0 < max_density <= 1.0:
            raise ConfigError(f"max_density must lie in (0, 1], got {max_density}")
        max_blocks = int(max_density * most)
    each, dense = (most, 0) if max_blocks is None else (max_blocks, most)
    capacity = max(1, min(len(bitmap), len(head_to_list)) * each + dense)
    if capacity > MAX_ENTRIES:
        raise ConfigError(
            f"{len(bitmap)} patterns of up to {each} blocks need {capacity} list entries, and "
            f"offsets hold {MAX_ENTRIES}; lower max_density or list fewer patterns at once"
        )
    module = _implementation(impl, bitmap)
    return module.list_blocks(bitmap, head_to_list, n_query, n_key, block_size, max_blocks)


@lru_cache(maxsize=64)
def _check_sizes(
    n_query: int, n_key: int, block_size: int, sink_blocks: int = 0, local_blocks: int = 0
) -> tuple[int, int]:
    """Refuse sizes that are none of a map.

    Returns:
        Query blocks and key blocks, n_q and n_k.
    """
    check_block_size(block_size)
    if not 1 <= n_query <= n_key:
        raise ConfigError(f"need 1 <= n_query <= n_key, got {n_query} and {n_key}")
    if sink_blocks < 0 or local_blocks < 0:
        raise ConfigError(
            f"sink_blocks and local_blocks must be at least 0, got {sink_blocks}, {local_blocks}"
        )
    return count_blocks(n_query, block_size), count_blocks(n_key, block_size)


def _check_out(out: torch.Tensor | None, shape: Sequence[int], device: torch.device) -> None:
    """Refuse a place for patterns that is not a contiguous bool tensor of this shape."""
    if out is not None:
        check_tensor("out", out, torch.bool, shape, device)
        if not out.is_contiguous():
            raise ConfigError(f"out must be contiguous, got strides {out.stride()}")


def _implementation(impl: str, tensor: torch.Tensor) -> ModuleType:
    if select_impl(impl, IMPLS, tensor, "reference") == "reference":
        return reference
    from shareprefill.runtime.ops.block_selection import triton

    return triton
