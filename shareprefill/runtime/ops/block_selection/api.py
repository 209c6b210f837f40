"""Choice of blocks on the device: checks and choice of implementation.

No function here waits for a CUDA device, and a new length compiles nothing. Calls alike are checked
once: what they run is kept by all that they depend on but values.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch

from shareprefill.errors import ConfigError
from shareprefill.runtime.ops.block_selection import reference
from shareprefill.runtime.ops.block_selection.weights import LineWeights
from shareprefill.runtime.ops.blocks import BlockLists, count_blocks, count_causal_blocks
from shareprefill.runtime.ops.dispatch import select_impl
from shareprefill.runtime.ops.inputs import check_below, check_block_size, check_tensor, facts
from shareprefill.runtime.ops.prepared import Prepared


class SparseGuard(NamedTuple):
    """What `sparse_heads` is told.

    Attributes:
        n_heads: Heads, H.
        delta: The distance above which a head is highly sparse.
        first: The first of the patterns that highly sparse heads read.
        otherwise: The first of those that are read by the others, in the same order.
        place: Where the heads of the latter begin in what is requested.
    """

    n_heads: int
    delta: float
    first: int
    otherwise: int
    place: int


IMPLS = ("reference", "triton")
MAX_ENTRIES = 2**31 - 1
# What calls run, by operator and kind.
_calls = Prepared[Callable[..., Any]]()


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
    finite: torch.Tensor | None = None,
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
        finite: bool `[S, n_q]`, contiguous: is written to be False where the sum of a row is NaN or
            Inf, whose causal blocks are all taken.
        impl: "auto" (Triton on CUDA, the reference elsewhere), "reference" or "triton".

    Returns:
        bool `[S, n_q, n_k]`, causal.

    Raises:
        ConfigError: shapes, dtypes, devices or ranges do not belong together.
    """
    sizes = (n_query, n_key, block_size, sink_blocks, local_blocks)
    call = ("select", facts(maps), facts(gamma), facts(out), facts(finite), sizes, impl)
    run = _calls.get(call)
    if run is None:
        n_q, n_k = _check_sizes(*sizes)
        check_tensor("maps", maps, torch.float32, ("S", n_q, n_k), maps.device)
        check_tensor("gamma", gamma, torch.float32, (len(maps),), maps.device)
        _check_out("out", out, maps.shape, maps.device)
        _check_out("finite", finite, maps.shape[:2], maps.device)
        run = _calls.keep(call, _prepare("select_blocks", impl, (maps, gamma), *sizes))
    return run(maps, gamma, out=out, finite=finite)


def head_blocks(
    maps: torch.Tensor,
    gamma: torch.Tensor,
    index: torch.Tensor | None = None,
    *,
    weights: LineWeights | None = None,
    n_query: int,
    n_key: int,
    block_size: int,
    sink_blocks: int = 0,
    local_blocks: int = 0,
    out: torch.Tensor | None = None,
    finite: torch.Tensor | None = None,
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
        weights: by which maps are first smoothed, as by `smooth_maps`; None: they are not.
        n_query: query rows, in tokens; query row i is at position `n_key - n_query + i`.
        n_key: keys, in tokens.
        block_size: tokens in a block.
        sink_blocks: as in `select_blocks`.
        local_blocks: as in `select_blocks`.
        out: bool `[P, n_q, n_k]`, as in `select_blocks`.
        finite: bool `[P]`, contiguous: where `is_finite` is written; None: a new tensor.
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
    sizes = (n_query, n_key, block_size, sink_blocks, local_blocks)
    places = (facts(index), facts(out), facts(finite))
    call = ("head", facts(maps), facts(gamma), places, weights, sizes, impl)
    run = _calls.get(call)
    if run is None:
        n_q, n_k = _check_sizes(*sizes)
        check_tensor("maps", maps, torch.float32, ("S", n_q, n_k), maps.device)
        if index is not None:
            check_tensor("index", index, torch.int64, ("P",), maps.device)
        n_patterns = len(maps) if index is None else len(index)
        check_tensor("gamma", gamma, torch.float32, (n_patterns,), maps.device)
        _check_out("out", out, (n_patterns, n_q, n_k), maps.device)
        _check_out("finite", finite, (n_patterns,), maps.device)
        run = _calls.keep(
            call, _prepare("head_blocks", impl, (maps, gamma, index), weights, *sizes)
        )
    if index is not None:
        check_below("index", index, len(maps))
    return run(maps, gamma, index, out=out, finite=finite)


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
    call = ("smooth", facts(maps), weights, n_query, n_key, block_size, impl)
    run = _calls.get(call)
    if run is None:
        n_q, n_k = _check_sizes(n_query, n_key, block_size)
        check_tensor("maps", maps, torch.float32, ("S", n_q, n_k), maps.device)
        options = (weights, n_query, n_key, block_size)
        run = _calls.keep(call, _prepare("smooth_maps", impl, (maps,), *options))
    return run(maps)


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
    finite: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Key blocks and block diagonals that each cover gamma of the last rows' attention.

    A chosen key block is read by all query blocks; a chosen distance by the blocks that lie at it
    from the first or from the last row of a query block. After MInference (arXiv 2407.02490,
    section 3.2) and FlexPrefill (arXiv 2502.20766, section 4.2), in blocks. Where the masses by key
    block sum to NaN or Inf, every causal block is taken.

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
        finite: bool `[S]`, contiguous: is written to be False where that is so.
        impl: as in `select_blocks`.

    Returns:
        bool `[S, n_q, n_k]`, causal.

    Raises:
        ConfigError: shapes, dtypes, devices or ranges do not belong together.
    """
    sizes = (n_query, n_key, block_size, sink_blocks, local_blocks)
    masses = (facts(vertical), facts(slash), facts(gamma))
    call = ("vertical-slash", masses, facts(out), facts(finite), sizes, impl)
    run = _calls.get(call)
    if run is None:
        n_q, n_k = _check_sizes(*sizes)
        n_patterns, device = len(vertical), vertical.device
        check_tensor("vertical", vertical, torch.float32, ("S", n_k), device)
        check_tensor("slash", slash, torch.float32, (n_patterns, n_k + 1), device)
        check_tensor("gamma", gamma, torch.float32, (n_patterns,), device)
        _check_out("out", out, (n_patterns, n_q, n_k), device)
        _check_out("finite", finite, (n_patterns,), device)
        samples = (vertical, slash, gamma)
        run = _calls.keep(call, _prepare("vertical_slash_blocks", impl, samples, *sizes))
    return run(vertical, slash, gamma, out=out, finite=finite)


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
    call = ("js", facts(maps), facts(pivots), facts(index), impl)
    run = _calls.get(call)
    if run is None:
        device = maps.device
        check_tensor("maps", maps, torch.float32, ("S", "n_q", "n_k"), device)
        check_tensor("pivots", pivots, torch.float32, ("P", *maps.shape[1:]), device)
        check_tensor("index", index, torch.int64, (len(maps),), device)
        run = _calls.keep(call, _prepare("js_distances", impl, (maps, pivots, index)))
    check_below("index", index, len(pivots))
    return run(maps, pivots, index)


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
    call = ("covered", facts(maps), facts(patterns), facts(index), impl)
    run = _calls.get(call)
    if run is None:
        device = maps.device
        check_tensor("maps", maps, torch.float32, ("S", "n_q", "n_k"), device)
        check_tensor("patterns", patterns, torch.bool, ("P", *maps.shape[1:]), device)
        check_tensor("index", index, torch.int64, (len(maps),), device)
        run = _calls.keep(call, _prepare("covered_mass", impl, (maps, patterns, index)))
    check_below("index", index, len(patterns))
    return run(maps, patterns, index)


def check_heads(
    maps: torch.Tensor,
    patterns: torch.Tensor,
    pattern_of_head: torch.Tensor,
    rows: torch.Tensor,
    least: torch.Tensor,
    is_finite: torch.Tensor,
    check_of: torch.Tensor,
    on_pass: torch.Tensor,
    on_fail: torch.Tensor,
    *,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Checks heads against patterns, and decides by it what they read.

    A check passes where enough of a head's attention lies inside its pattern (`covered_mass`), and
    the pattern rests on numbers. Every entry is one number where the check of its head passes, and
    another where it fails.

    Args:
        maps: float32 `[S, m, n_k]`, block distributions of some query blocks of each checked head.
        patterns: bool `[N, n_q, n_k]`.
        pattern_of_head: int64 `[S]`, the pattern of each. On CUDA its range is not checked, like
            those of `rows` and `check_of`.
        rows: int64 `[m]`, the row of a pattern that each row of a map is.
        least: float32 `[S]`, mass inside the pattern from which on a check passes.
        is_finite: bool `[N]`, whether patterns rest on numbers.
        check_of: int64 `[T]`, the check of every entry.
        on_pass: int64 `[T]`, the entry where it passes.
        on_fail: int64 `[T]`, the entry where it fails.
        impl: as in `select_blocks`.

    Returns:
        `(decided, mass, found)`: int64 `[T]`, the entries; float32 `[S]`, the mass of each check;
        and bool `[S]`, `is_finite` of its pattern.

    Raises:
        ConfigError: shapes, dtypes, devices or ranges do not belong together.
    """
    heads = (maps, patterns, pattern_of_head, rows, least, is_finite)
    tensors = (*heads, check_of, on_pass, on_fail)
    call = ("check", *map(facts, tensors), impl)
    run = _calls.get(call)
    if run is None:
        device, (n_checks, n_rows, n_k) = maps.device, maps.shape
        check_tensor("maps", maps, torch.float32, ("S", "m", "n_k"), device)
        check_tensor("patterns", patterns, torch.bool, ("N", "n_q", n_k), device)
        check_tensor("pattern_of_head", pattern_of_head, torch.int64, (n_checks,), device)
        check_tensor("rows", rows, torch.int64, (n_rows,), device)
        check_tensor("least", least, torch.float32, (n_checks,), device)
        check_tensor("is_finite", is_finite, torch.bool, (len(patterns),), device)
        for name, tensor in (("check_of", check_of), ("on_pass", on_pass), ("on_fail", on_fail)):
            check_tensor(name, tensor, torch.int64, (len(check_of),), device)
        run = _calls.keep(call, _prepare("check_heads", impl, tensors))
    check_below("pattern_of_head", pattern_of_head, len(patterns))
    return run(*tensors)


def sparse_heads(
    vertical: torch.Tensor,
    requested: torch.Tensor,
    guard: SparseGuard,
    *,
    impl: str = "auto",
) -> torch.Tensor:
    """Lets the heads of some patterns that are not highly sparse read others instead.

    A head is highly sparse where the Jensen-Shannon distance of its attention by key block to an
    even one is above delta (FlexPrefill, arXiv 2502.20766, section 4.1).

    Args:
        vertical: float32 `[S, n_k]`, attention by key block for the guard's first S patterns, each
            of which one head reads.
        requested: int64 `[H + T]`, the pattern that every head reads, and the heads that further
            patterns are asked for.
        guard: which patterns these are, and the distance.
        impl: as in `select_blocks`.

    Returns:
        int64 `[H + T]`: what heads read; and what is asked for, -1 for the latter patterns of heads
        that are highly sparse.

    Raises:
        ConfigError: shapes, dtypes, devices or places do not belong together.
    """
    call = ("sparse", facts(vertical), facts(requested), guard, impl)
    run = _calls.get(call)
    if run is None:
        check_tensor("vertical", vertical, torch.float32, ("S", "n_k"), vertical.device)
        check_guard(guard, requested, len(vertical), vertical.device)
        run = _calls.keep(call, _prepare("sparse_heads", impl, (vertical, requested), *guard))
    return run(vertical, requested)


def check_guard(
    guard: SparseGuard, requested: torch.Tensor, n_patterns: int, device: torch.device
) -> None:
    """Refuse entries that do not belong to the patterns of a guard.

    Raises:
        ConfigError: it says what was expected and what came.
    """
    check_tensor("requested", requested, torch.int64, ("H + T",), device)
    if not 0 <= guard.n_heads <= guard.place <= len(requested) - n_patterns:
        raise ConfigError(
            f"place must lie between {guard.n_heads} heads and the last {n_patterns} of "
            f"{len(requested)} entries, got {guard.place}"
        )


def list_blocks(
    bitmap: torch.Tensor,
    head_to_list: torch.Tensor,
    block_size: int,
    *,
    n_query: int,
    n_key: int,
    max_density: float | None = None,
    shared: torch.Tensor | None = None,
    source: torch.Tensor | None = None,
    finite: torch.Tensor | None = None,
    first: int = 0,
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
        shared: bool `[N, n_q, n_k]`, contiguous: patterns of another bitmap; None for none.
        source: int64 `[S]`, numbers of those of them that come first, before the bitmap's: P is S
            more then. On CUDA the range is not checked.
        finite: bool `[S, m]`, flags of the patterns `first .. first + S - 1`: the heads of one
            whose flags are not all set read every causal block, as those of one with more blocks
            than `max_density`, which it needs; None for none.
        first: the first of these patterns.
        impl: as in `select_blocks`.

    Returns:
        The lists; with `max_density` their pattern P is the dense one.

    Raises:
        ConfigError: shapes, dtypes, devices or ranges do not belong together, or there is no room
            for the bound in 32-bit offsets.
    """
    sizes, patterns = (n_query, n_key, block_size), (facts(bitmap), facts(shared), facts(source))
    call = ("list", patterns, *map(facts, (head_to_list, finite)), sizes, max_density, first, impl)
    run = _calls.get(call)
    if run is None:
        tensors = (bitmap, head_to_list, shared, source)
        max_blocks = _check_lists(*tensors, *sizes, max_density)
        _check_flags(finite, first, bitmap, source, max_blocks)
        options = (*sizes, max_blocks, first)
        run = _calls.keep(call, _prepare("list_blocks", impl, (*tensors, finite), *options))
    n_patterns = len(bitmap) + (0 if source is None else len(source))
    check_below("head_to_list", head_to_list, n_patterns + (max_density is not None))
    return run(bitmap, head_to_list, shared, source, finite)


def _check_flags(
    finite: torch.Tensor | None,
    first: int,
    bitmap: torch.Tensor,
    source: torch.Tensor | None,
    max_blocks: int | None,
) -> None:
    """Refuse flags of patterns that are not there, or without a list for their heads."""
    if finite is None:
        return
    check_tensor("finite", finite, torch.bool, ("S", "m"), bitmap.device)
    n_patterns = len(bitmap) + (0 if source is None else len(source))
    if not 0 <= first <= n_patterns - len(finite):
        raise ConfigError(
            f"finite is of {len(finite)} patterns from {first} on, there are {n_patterns}"
        )
    if max_blocks is None:
        raise ConfigError("finite needs max_density, with which there is a list of every block")


def _check_lists(
    bitmap: torch.Tensor,
    head_to_list: torch.Tensor,
    shared: torch.Tensor | None,
    source: torch.Tensor | None,
    n_query: int,
    n_key: int,
    block_size: int,
    max_density: float | None,
) -> int | None:
    """Refuse patterns and heads that do not belong together.

    Returns:
        The blocks that a pattern may have; None: any.
    """
    n_q, n_k = _check_sizes(n_query, n_key, block_size)
    check_tensor("bitmap", bitmap, torch.bool, ("P", n_q, n_k), bitmap.device)
    if (shared is None) != (source is None):
        raise ConfigError("give shared and source, or neither")
    n_patterns = len(bitmap)
    if shared is not None and source is not None:
        check_tensor("shared", shared, torch.bool, ("N", n_q, n_k), bitmap.device)
        check_tensor("source", source, torch.int64, ("S",), bitmap.device)
        check_below("source", source, len(shared))
        n_patterns += len(source)
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
    most = count_causal_blocks(n_query, n_key - n_query, block_size)
    max_blocks = None
    if max_density is not None:
        if not 0.0 < max_density <= 1.0:
            raise ConfigError(f"max_density must lie in (0, 1], got {max_density}")
        max_blocks = int(max_density * most)
    each, dense = (most, 0) if max_blocks is None else (max_blocks, most)
    capacity = max(1, min(n_patterns, len(head_to_list)) * each + dense)
    if capacity > MAX_ENTRIES:
        raise ConfigError(
            f"{n_patterns} patterns of up to {each} blocks need {capacity} list entries, and "
            f"offsets hold {MAX_ENTRIES}; lower max_density or list fewer patterns at once"
        )
    return max_blocks


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


def _check_out(
    name: str, place: torch.Tensor | None, shape: Sequence[int], device: torch.device
) -> None:
    """Refuse a place for results that is not a contiguous bool tensor of this shape."""
    if place is not None:
        check_tensor(name, place, torch.bool, shape, device)
        if not place.is_contiguous():
            raise ConfigError(f"{name} must be contiguous, got strides {place.stride()}")


def _prepare(
    name: str, impl: str, tensors: tuple[torch.Tensor | None, ...], *options: Any
) -> Callable[..., Any]:
    """What calls of an operator run that are like this one.

    Args:
        name: The operator's function in an implementation.
        impl: As the operator was asked for.
        tensors: Of one call.
        options: What follows them.
    """
    first = tensors[0]
    assert first is not None
    if select_impl(impl, IMPLS, first, "reference") == "reference":
        function = getattr(reference, name)
        names = inspect.signature(function).parameters
        given = dict(zip([*names][len(tensors) :], options, strict=False))
        return torch.no_grad()(partial(function, **given))
    from shareprefill.runtime.ops.block_selection import triton

    return getattr(triton, name)(*tensors, *options)
