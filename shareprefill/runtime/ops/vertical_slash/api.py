"""Vertical and slash profile: checks and choice of implementation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from shareprefill.errors import ConfigError
from shareprefill.runtime.ops.block_selection import (
    SparseGuard,
    check_guard,
    sparse_heads,
    vertical_slash_blocks,
)
from shareprefill.runtime.ops.blocks import count_blocks
from shareprefill.runtime.ops.dispatch import on_gathered, select_impl, within_reach
from shareprefill.runtime.ops.inputs import (
    check_attention_inputs,
    check_below,
    check_block_size,
    check_tensor,
    facts,
    unit_last_stride,
)
from shareprefill.runtime.ops.pages import Tokens, page_tokens
from shareprefill.runtime.ops.prepared import Prepared
from shareprefill.runtime.ops.vertical_slash import profile, reference

IMPLS = ("reference", "torch", "triton")
# What calls run, by all that they depend on but values.
_calls = Prepared[Any]()


def vertical_slash_profile(
    query: torch.Tensor,
    key: Tokens,
    *,
    block_size: int,
    scale: float | None = None,
    heads: torch.Tensor | None = None,
    softcap: float | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention mass of the last query rows by key block and by block diagonal.

    The rows are the last `min(block_size, Nq)` queries. A token offset `o = i - j` (both absolute)
    of `f * B + e` touches two block diagonals: its mass counts `(B - e) / B` for block offset f
    and `e / B` for f + 1. Both profiles sum to 1 in each head: they are of the attention that goes
    to keys, so that attention sinks do not change them. No gradients. After the last-query
    estimate of MInference (arXiv 2407.02490, section 3.2).

    Args:
        query: `[H, Nq, D]`, floating point.
        key: `[G, Nk, D]`, G divides H; query head h reads KV head `h // (H // G)`. It may lie in an
            engine's pages (`PagedTokens`).
        block_size: tokens in a block, B.
        scale: factor of the logits; None: `1 / sqrt(D)`.
        heads: int64 `[S]`, query heads to compute, in the order of the result; None: all H. A slot
            below 0 is skipped on the device: its profiles are zeros. On CUDA their range is not
            checked.
        softcap: c of a soft-cap of the scaled logits, `c * tanh(logit / c)`; None: none.
        impl: "auto" (Triton on CUDA, torch elsewhere), "reference", "torch" or "triton".

    Returns:
        `(vertical, slash)`: float32 `[S, n_k]` by key block and float32 `[S, n_k + 1]` by block
        offset, means over the rows.

    Raises:
        ConfigError: shapes, dtypes, devices or ranges do not belong together.
        UnsupportedError: the requested implementation cannot run here.
    """
    call = (facts(query), facts(key), facts(heads), block_size, scale, softcap, impl)
    compute = _calls.get(call)
    if compute is None:
        prepared = _prepare(query, key, heads, block_size, scale, softcap, impl)
        compute = _calls.keep(call, prepared)
    if heads is not None:
        check_below("heads", heads, len(query))
    return compute(unit_last_stride(query), unit_last_stride(key), heads=heads)


def vertical_slash_patterns(
    query: torch.Tensor,
    key: Tokens,
    gamma: torch.Tensor,
    *,
    block_size: int,
    sink_blocks: int,
    local_blocks: int,
    out: torch.Tensor,
    finite: torch.Tensor,
    scale: float | None = None,
    heads: torch.Tensor | None = None,
    softcap: float | None = None,
    requested: torch.Tensor | None = None,
    guard: SparseGuard | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The profiles, and what `vertical_slash_blocks` and `sparse_heads` make of them.

    Args:
        query: as in `vertical_slash_profile`, like the others that are not named here.
        key: likewise.
        gamma: float32 `[S]`, mass that key blocks and diagonals each cover.
        block_size: tokens in a block.
        sink_blocks: as in `vertical_slash_blocks`.
        local_blocks: likewise.
        out: bool `[S, n_q, n_k]`, contiguous: where patterns are written.
        finite: bool `[S]`, contiguous: is written to be False where a head's profile sums to NaN
            or Inf, whose causal blocks are all taken.
        scale: factor of the logits.
        heads: int64 `[S]`.
        softcap: of the logits.
        requested: as in `sparse_heads`; None where nothing is to be decided.
        guard: likewise, with `requested`.
        impl: likewise.

    Returns:
        `(vertical, decided)`: the profile by key block, float32 `[S, n_k]`; and the result of
        `sparse_heads`, None where it is not asked for.

    Raises:
        ConfigError: shapes, dtypes, devices or ranges do not belong together.
        UnsupportedError: the requested implementation cannot run here.
    """
    sizes = (block_size, scale, softcap, impl, sink_blocks, local_blocks, guard)
    tensors = (query, key, heads, gamma, out, finite, requested)
    call = ("patterns", *map(facts, tensors), *sizes)
    if call not in _calls:
        _calls.keep(call, _prepare_patterns(*tensors, *sizes))
    return _calls[call](*tensors)


def _prepare_patterns(
    query: torch.Tensor,
    key: Tokens,
    heads: torch.Tensor | None,
    gamma: torch.Tensor,
    out: torch.Tensor,
    finite: torch.Tensor,
    requested: torch.Tensor | None,
    block_size: int,
    scale: float | None,
    softcap: float | None,
    impl: str,
    sink_blocks: int,
    local_blocks: int,
    guard: SparseGuard | None,
) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    """What calls of patterns run that are like this one."""
    n_query, n_key = query.shape[1], key.shape[1]
    n_slots, n_k = (len(query) if heads is None else len(heads)), count_blocks(n_key, block_size)
    shape = (n_slots, count_blocks(n_query, block_size), n_k)
    check_tensor("gamma", gamma, torch.float32, (n_slots,), query.device)
    for name, place, sizes in (("out", out, shape), ("finite", finite, shape[:1])):
        check_tensor(name, place, torch.bool, sizes, query.device)
        if not place.is_contiguous():
            raise ConfigError(f"{name} must be contiguous, got strides {place.stride()}")
    if (requested is None) != (guard is None):
        raise ConfigError("give requested and guard, or neither")
    if requested is not None and guard is not None:
        check_guard(guard, requested, n_slots, query.device)

    def separate(
        query: torch.Tensor,
        key: Tokens,
        heads: Any,
        gamma: torch.Tensor,
        out: torch.Tensor,
        finite: torch.Tensor,
        requested: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        options: dict[str, Any] = {"block_size": block_size, "scale": scale, "softcap": softcap}
        masses = vertical_slash_profile(query, key, heads=heads, impl=impl, **options)
        reads: dict[str, Any] = {"n_query": n_query, "n_key": n_key, "block_size": block_size}
        reads |= {"sink_blocks": sink_blocks, "local_blocks": local_blocks}
        vertical_slash_blocks(*masses, gamma, out=out, finite=finite, **reads)
        if requested is None or guard is None:
            return masses[0], None
        return masses[0], sparse_heads(masses[0], requested, guard)

    chosen = select_impl(impl, IMPLS, query, "torch")
    if chosen == "triton" and gamma.is_contiguous():
        from shareprefill.runtime.ops.vertical_slash import triton

        n_entries = 0 if requested is None else len(requested)
        options = (block_size, scale, softcap, impl, (sink_blocks, local_blocks), guard, n_entries)
        compute = _prepare(query, key, heads, *options)
        if n_k <= triton.SHORT_BLOCKS:
            kind = (query.dtype, query.shape[2], len(query) // key.shape[0], page_tokens(key))
            flags = (heads is None, softcap is None, guard is None)
            kind = ("long", query.device, *kind, block_size, *flags)
            if query.device.type == "cuda" and kind not in _calls:
                # The first long prompt then finds its kernels compiled.
                _calls.keep(kind, True)
                places = (torch.empty_like(out), torch.empty_like(finite))
                separate(query, key, heads, gamma, *places, requested)

            def cut(
                query: torch.Tensor, key: Tokens, heads: Any, *places: Any
            ) -> tuple[torch.Tensor, torch.Tensor | None]:
                *written, requested = places
                decided = None
                if requested is not None:
                    requested = requested.contiguous()
                    decided = torch.empty_like(requested)
                read = unit_last_stride(query), unit_last_stride(key)
                return compute(*read, heads, *written, requested, decided)[0], decided

            return cut

    return separate


def _prepare(
    query: torch.Tensor,
    key: Tokens,
    heads: torch.Tensor | None,
    block_size: int,
    scale: float | None,
    softcap: float | None,
    impl: str,
    *of_patterns: Any,
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Checks a call and chooses what it runs, and those that are alike with it."""
    scale = check_attention_inputs(query, key, scale=scale, softcap=softcap)
    check_block_size(block_size)
    if heads is not None:
        check_tensor("heads", heads, torch.int64, ("S",), query.device)
    impl = select_impl(impl, IMPLS, query, "torch")
    query, key = unit_last_stride(query), unit_last_stride(key)
    (read,) = within_reach(impl, key)
    if impl == "triton":
        from shareprefill.runtime.ops.vertical_slash import triton

        compute = triton.prepare(query, read, block_size, scale, heads, softcap, *of_patterns)
    else:
        module = reference if impl == "reference" else profile
        options: dict[str, Any] = {"block_size": block_size, "scale": scale, "softcap": softcap}
        compute = torch.no_grad()(partial(module.profile_last_rows, **options))
    return compute if read is key else on_gathered(compute)
