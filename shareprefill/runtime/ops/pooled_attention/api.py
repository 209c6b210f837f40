"""Attention and its block map in one pass: checks and choice of implementation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from shareprefill.errors import ConfigError, UnsupportedError
from shareprefill.runtime.ops.dispatch import on_gathered, select_impl, within_reach
from shareprefill.runtime.ops.inputs import (
    check_attention_inputs,
    check_below,
    check_block_size,
    check_tensor,
    facts,
    lie_alike,
    unit_last_stride,
)
from shareprefill.runtime.ops.pages import PagedTokens, Tokens, page_tokens
from shareprefill.runtime.ops.pooled_attention import blockwise, hopper, reference
from shareprefill.runtime.ops.pooled_attention.launches import Attended
from shareprefill.runtime.ops.prepared import Prepared
from shareprefill.runtime.ops.triton_tiles import device_capability

IMPLS = ("reference", "blockwise", "triton", "hopper")
# What calls run, by all that they depend on but values.
_calls = Prepared[Any]()


def pooled_attention(
    query: torch.Tensor,
    key: Tokens,
    value: Tokens | None = None,
    *,
    rows: torch.Tensor | None = None,
    block_size: int,
    scale: float | None = None,
    heads: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Exact causal attention of chosen query rows, averaged over row groups and key blocks.

    Query row i stands at absolute position `Nk - Nq + i`. A map entry is the mean, over the rows
    of a group, of the softmax mass that falls on a key block; each map row sums to 1. No tensor
    of Nq x Nk entries is made. No gradients.

    Args:
        query: `[H, Nq, D]`, float16, bfloat16, float32 or float64 (not Triton).
        key: `[G, Nk, D]`, G divides H; query head h reads KV head `h // (H // G)`.
        value: `[G, Nk, Dv]`; only with `rows=None`: also compute the attention output. Keys and
            values may both lie in an engine's pages (`PagedTokens`).
        rows: int64 `[n_g, r]` query rows, a group per map row (see `sample_rows`); None: all rows,
            one group per query block. On CUDA their range is not checked.
        block_size: tokens in a block.
        scale: factor of the logits; None: `1 / sqrt(D)`.
        heads: int64 `[S]`, query heads to compute, in the order of the result; None: all H. A slot
            below 0 is skipped on the device: its map and output are zeros. On CUDA their range is
            not checked.
        softcap: c of a soft-cap of the scaled logits, `c * tanh(logit / c)`; None: none.
        sinks: `[H]`, floating point: for each head one logit more in the softmax, without a value;
            it is neither scaled nor capped. None: none. What goes to a sink is missing in the
            output; the map is of the attention that goes to keys, so its rows still sum to 1 and
            do not depend on sinks.
        impl: "auto" (on CUDA "hopper" where it can compute this, else "triton"; elsewhere
            "blockwise"), "reference", "blockwise", "triton", or "hopper": Hopper GPUs,
            blocks of 128, half precision, head dims 64, 96 and 128, no soft-cap.

    Returns:
        `(out, maps)`: `out` is `[S, Nq, Dv]` in query's dtype, or None without `value`; `maps` is
        float32 `[S, n_g, n_k]`.

    Raises:
        ConfigError: shapes, dtypes, devices or ranges do not belong together.
        UnsupportedError: the requested implementation cannot run here.
    """
    inputs = (query, key, value, rows, heads, sinks)
    alike = isinstance(key, PagedTokens) and value is not None and lie_alike(key, value)
    call = (*map(facts, inputs), alike, block_size, scale, softcap, impl)
    pool = _calls.get(call)
    if pool is None:
        pool = _calls.keep(call, _prepare(*inputs, block_size, scale, softcap, impl))
    if rows is not None:
        check_below("rows", rows, query.shape[1], start=0)
    if heads is not None:
        check_below("heads", heads, len(query))
    query, key = unit_last_stride(query), unit_last_stride(key)
    value = None if value is None else unit_last_stride(value)
    return pool(query, key, value, rows, heads=heads, sinks=sinks)


def two_maps(
    query: torch.Tensor,
    key: Tokens,
    rows: tuple[torch.Tensor, torch.Tensor],
    table: torch.Tensor | None,
    heads: torch.Tensor,
    n_first: int,
    *,
    block_size: int,
    scale: float | None = None,
    softcap: float | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`pooled_attention` of chosen rows for two groups of heads, in the launches of one.

    Args:
        query: as in `pooled_attention`, as the others that are not named here.
        key: likewise.
        rows: of each group; int64 `[m, r]`.
        table: the same rows as `row_table` has them, `table_height` rows in a tile; it is not
            looked at where that is None. On CUDA its values are not checked.
        heads: int64 `[S]`, of both groups one after the other; as in `pooled_attention`.
        n_first: heads of the first group.
        block_size: tokens in a block.
        scale: as in `pooled_attention`.
        softcap: likewise.
        impl: likewise.

    Returns:
        The maps of each group, float32 `[S_g, m, n_k]`.

    Raises:
        ConfigError: shapes, dtypes, devices or ranges do not belong together.
        UnsupportedError: the requested implementation cannot run here.
    """
    if table is not None:
        options = (n_first, block_size, scale, softcap, impl)
        call = ("two", *map(facts, (query, key, *rows, table, heads)), *options)
        if call not in _calls:
            _calls.keep(call, _prepare_two(query, key, rows, table, heads, *options))
        run = _calls[call]
        if run is not None:
            return run(query, key, table, heads)
    named: dict[str, Any] = {"block_size": block_size, "scale": scale, "softcap": softcap}
    named["impl"] = impl
    _, first = pooled_attention(query, key, rows=rows[0], heads=heads[:n_first], **named)
    _, second = pooled_attention(query, key, rows=rows[1], heads=heads[n_first:], **named)
    return first, second


def table_height(query: torch.Tensor, impl: str = "auto") -> int | None:
    """Rows of a tile of the kernels that take rows from a table; None where none does."""
    kind = ("height", query.device, query.dtype, query.shape[2], impl)
    if kind in _calls:
        return _calls[kind]
    height = None
    if select_impl(impl, IMPLS, query, "blockwise") in ("triton", "hopper"):
        from shareprefill.runtime.ops.pooled_attention import triton

        capability = device_capability(query.device)
        height = triton.mass_tiles(query.shape[2], query.dtype, capability).block_m
    return _calls.keep(kind, height)


def _prepare_two(
    query: torch.Tensor,
    key: Tokens,
    rows: tuple[torch.Tensor, torch.Tensor],
    table: torch.Tensor,
    heads: torch.Tensor,
    n_first: int,
    block_size: int,
    scale: float | None,
    softcap: float | None,
    impl: str,
) -> Callable[..., Any] | None:
    """Checks a call; what it runs, None where the groups are to be computed one by one."""
    scale = check_attention_inputs(query, key, None, scale=scale, softcap=softcap)
    check_block_size(block_size)
    for group in rows:
        _check_rows(group, query, None)
    check_tensor("heads", heads, torch.int64, ("S",), query.device)
    n_second = len(heads) - n_first
    if n_first < 1 or n_second < 1:
        raise ConfigError(f"each group needs a head, got {n_first} and {n_second}")
    height = table_height(query, impl)
    if height is None:
        return None
    check_tensor("table", table, torch.int64, ("tiles", height), query.device)
    impl = _chosen(impl, query, key, None, block_size, softcap)
    (read,) = within_reach(impl, key)
    is_plain = query.stride(-1) == 1 and table.is_contiguous() and heads.is_contiguous()
    if max(group.shape[1] for group in rows) > table.shape[1] or not is_plain or read is not key:
        return None
    from shareprefill.runtime.ops.pooled_attention import triton

    if unit_last_stride(key) is not key:
        return None
    module = hopper if impl == "hopper" else triton
    attended = Attended(query, key, table, heads, block_size, scale, softcap)
    shapes = [(len(group), group.shape[1]) for group in rows]
    groups = ((n_first, *shapes[0]), (n_second, *shapes[1]))
    shape = (query.device, query.dtype, query.shape[2], attended.shared, page_tokens(key))
    kind = ("one by one", *shape, block_size, softcap is None, impl, *(r for _, _, r in groups))
    if query.device.type == "cuda" and kind not in _calls:
        # The first prompt whose groups do not fit together then finds its kernels compiled.
        _calls.keep(kind, True)
        for some, mine in zip(rows, (heads[:1], heads[n_first : n_first + 1]), strict=True):
            alone = Attended(query, key, some, mine, block_size, scale, softcap)
            _prepared(impl, alone, None, None)(query, key, None, some, heads=mine, sinks=None)
    return triton.prepare_two_maps(attended, groups, module.prepare_masses, module.DIVISION)


def _prepare(
    query: torch.Tensor,
    key: Tokens,
    value: Tokens | None,
    rows: torch.Tensor | None,
    heads: torch.Tensor | None,
    sinks: torch.Tensor | None,
    block_size: int,
    scale: float | None,
    softcap: float | None,
    impl: str,
) -> Callable[..., tuple[torch.Tensor | None, torch.Tensor]]:
    """Checks a call and chooses what it runs, and those that are alike with it."""
    scale = check_attention_inputs(query, key, value, scale=scale, softcap=softcap, sinks=sinks)
    check_block_size(block_size)
    if rows is not None:
        _check_rows(rows, query, value)
    if heads is not None:
        check_tensor("heads", heads, torch.int64, ("S",), query.device)
    query, key = unit_last_stride(query), unit_last_stride(key)
    value = None if value is None else unit_last_stride(value)
    impl = _chosen(impl, query, key, value, block_size, softcap)
    read = within_reach(impl, *(key,) if value is None else (key, value))
    attended = Attended(query, read[0], rows, heads, block_size, scale, softcap)
    pool = _prepared(impl, attended, None if value is None else read[1], sinks)
    return pool if read[0] is key else on_gathered(pool)


def _prepared(
    impl: str, attended: Attended, value: Tokens | None, sinks: torch.Tensor | None
) -> Callable[..., tuple[torch.Tensor | None, torch.Tensor]]:
    """What an implementation runs, for keys and values as it reads them."""
    if impl in ("reference", "blockwise"):
        pool = reference.pool if impl == "reference" else blockwise.pool
        names = ("block_size", "scale", "softcap")
        options: dict[str, Any] = {name: getattr(attended, name) for name in names}
        return torch.no_grad()(partial(pool, **options))
    if impl == "hopper":
        return hopper.prepare(attended, value, sinks)
    from shareprefill.runtime.ops.pooled_attention import triton

    return triton.prepare(attended, value, sinks)


def _chosen(
    impl: str,
    query: torch.Tensor,
    key: Tokens,
    value: Tokens | None,
    block_size: int,
    softcap: float | None,
) -> str:
    """The implementation that a call takes."""
    is_free = impl == "auto"
    impl = select_impl(impl, IMPLS, query, "blockwise")
    if impl == "hopper" or (is_free and impl == "triton"):
        missing = hopper.refusal(query, key, value, block_size, softcap)
        if missing is None:
            return "hopper"
        if impl == "hopper":
            raise UnsupportedError(f"impl='hopper' {missing}; or use impl='auto'")
    return impl


def _check_rows(rows: torch.Tensor, query: torch.Tensor, value: Tokens | None) -> None:
    if value is not None:
        raise ConfigError(
            "value needs rows=None: the output is computed for all rows or not at all"
        )
    check_tensor("rows", rows, torch.int64, ("n_g", "r"), query.device)
    if rows.numel() == 0:
        raise ConfigError(f"rows must not be empty, got shape {tuple(rows.shape)}")
