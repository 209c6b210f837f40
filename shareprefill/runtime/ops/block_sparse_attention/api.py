"""Causal attention over listed key blocks: checks and choice of implementation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from shareprefill.errors import ConfigError
from shareprefill.runtime.ops.block_sparse_attention import blockwise, reference
from shareprefill.runtime.ops.blocks import BlockLists, count_blocks
from shareprefill.runtime.ops.dispatch import on_gathered, select_attention, within_reach
from shareprefill.runtime.ops.inputs import (
    check_attention_inputs,
    check_tensor,
    facts,
    lie_alike,
    unit_last_stride,
)
from shareprefill.runtime.ops.pages import PagedTokens, Tokens
from shareprefill.runtime.ops.prepared import Prepared

# What calls run, by all that they depend on but values.
_calls = Prepared[Callable[..., Any]]()


def block_sparse_attention(
    query: torch.Tensor,
    key: Tokens,
    value: Tokens,
    lists: BlockLists,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Softmax attention of each query row over the causal keys in its listed blocks.

    Query row i stands at absolute position `Nk - Nq + i`. Listed blocks past the diagonal
    contribute nothing; a row that sees no key gives zeros. No gradients.

    Args:
        query: `[H, Nq, D]`, float16, bfloat16, float32 or float64 (not Triton).
        key: `[G, Nk, D]`, G divides H; query head h reads KV head `h // (H // G)`.
        value: `[G, Nk, Dv]`. Keys and values may both lie in an engine's pages (`PagedTokens`).
        lists: the key blocks of each head's pattern; on query's device. On a CPU the values are
            checked, on CUDA only the shapes (call `lists.validate()` to check them).
        scale: factor of the logits; None: `1 / sqrt(D)`.
        softcap: bound c of the scaled logits, which become `c * tanh(logit / c)` (Gemma 2,
            arXiv 2408.00118, section 2); None: no bound.
        sinks: floating-point `[H]`, one more logit in each head's softmax, neither scaled nor
            bounded, whose key has no value (gpt-oss, arXiv 2508.10925, section 2.2): a head may
            attend to nothing. None: no sinks.
        out: `[H, Nq, Dv]` of query's dtype with a contiguous last dim, written in place; needed
            where a head's pattern is -1, as such a head's rows are left untouched.
        lse: float32 `[H, Nq]`, contiguous, written in place: the natural log-sum-exp of each row's
            logits, scaled and bounded. It counts the sink, so that `exp(logit - lse)` is the weight
            of a key, and is -inf for heads that are not computed and for rows that see no key (with
            sinks, such a row's is its sink). None: not wanted.
        impl: "auto" (the fastest that takes the call, see `ops.dispatch`), or one of
            "reference", "blockwise", "triton" and "hopper" (Hopper GPUs).

    Returns:
        `[H, Nq, Dv]` in query's dtype.

    Raises:
        ConfigError: shapes, dtypes, devices or lists do not belong together.
        UnsupportedError: the requested implementation cannot run here.
    """
    if lists.device.type == "cpu":
        lists.validate()
    tensors = (query, key, value, sinks, out, lse, lists.head_to_list)
    alike = isinstance(key, PagedTokens) and lie_alike(key, value)
    sizes = (lists.n_q, lists.n_k, lists.block_size)
    call = (*map(facts, tensors), alike, *sizes, scale, softcap, impl)
    attend = _calls.get(call)
    if attend is None:
        inputs = (query, key, value, lists, out, lse, sinks)
        attend = _calls.keep(call, _prepare(*inputs, scale, softcap, impl))
    if out is None:
        out = _new_output(query, value, lists)
    if lse is not None:
        lse.fill_(-torch.inf)
    query, key, value = unit_last_stride(query), unit_last_stride(key), unit_last_stride(value)
    sinks = None if sinks is None else sinks.detach().float().contiguous()
    attend(query, key, value, lists, out=out, lse=lse, sinks=sinks)
    return out


def _prepare(
    query: torch.Tensor,
    key: Tokens,
    value: Tokens,
    lists: BlockLists,
    out: torch.Tensor | None,
    lse: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float | None,
    softcap: float | None,
    impl: str,
) -> Callable[..., None]:
    """Checks a call and chooses what it runs, and those that are alike with it."""
    scale = check_attention_inputs(query, key, value, scale=scale, softcap=softcap, sinks=sinks)
    _check_lists(query, key, lists)
    impl = select_attention(impl, query, key, value, lists.block_size)
    shape = (query.shape[0], query.shape[1], value.shape[2])
    if out is not None:
        check_tensor("out", out, query.dtype, shape, query.device)
        if out.stride(-1) != 1:
            raise ConfigError(f"out must have a contiguous last dim, got strides {out.stride()}")
    if lse is not None:
        check_tensor("lse", lse, torch.float32, shape[:2], query.device)
        if not lse.is_contiguous():
            raise ConfigError(f"lse must be contiguous, got strides {lse.stride()}")
    query, key, value = unit_last_stride(query), unit_last_stride(key), unit_last_stride(value)
    read = within_reach(impl, key, value)
    attend = _prepared(impl, query, read[0], read[1], lists, out, lse, sinks, scale, softcap)
    return attend if read[0] is key else on_gathered(attend)


def _prepared(
    impl: str,
    query: torch.Tensor,
    key: Tokens,
    value: Tokens,
    lists: BlockLists,
    out: torch.Tensor | None,
    lse: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> Callable[..., None]:
    """What an implementation runs, for keys and values as it reads them."""
    if impl in ("reference", "blockwise"):
        attend = reference.attend if impl == "reference" else blockwise.attend
        return torch.no_grad()(partial(attend, scale=scale, softcap=softcap))
    shape = (query.shape[0], query.shape[1], value.shape[2])
    out = torch.empty(shape, dtype=query.dtype, device="meta") if out is None else out
    flags = (lse is not None, softcap is not None, sinks is not None)
    if impl == "hopper":
        from shareprefill.runtime.ops.block_sparse_attention import hopper

        return hopper.prepare(query, key, value, lists, out, flags, scale, softcap)
    from shareprefill.runtime.ops.block_sparse_attention import triton

    return triton.prepare(query, key, value, lists, out, flags, scale, softcap)


def _check_lists(query: torch.Tensor, key: Tokens, lists: BlockLists) -> None:
    n_q = count_blocks(query.shape[1], lists.block_size)
    n_k = count_blocks(key.shape[1], lists.block_size)
    if (lists.n_q, lists.n_k) != (n_q, n_k):
        raise ConfigError(
            f"lists are for {lists.n_q} x {lists.n_k} blocks of {lists.block_size} tokens, "
            f"query and key make {n_q} x {n_k}"
        )
    if len(lists.head_to_list) != query.shape[0]:
        raise ConfigError(
            f"lists.head_to_list must name a pattern for each of {query.shape[0]} query heads, "
            f"got {len(lists.head_to_list)}"
        )
    if lists.device != query.device:
        raise ConfigError(f"lists are on {lists.device}, query is on {query.device}")


def _new_output(query: torch.Tensor, value: Tokens, lists: BlockLists) -> torch.Tensor:
    shape = (query.shape[0], query.shape[1], value.shape[2])
    if query.device.type == "cpu":
        if bool((lists.head_to_list < 0).any()):
            raise ConfigError(
                "lists.head_to_list leaves heads out (-1); give `out`, whose rows they keep"
            )
        return query.new_empty(shape)
    # Reading the pattern would wait for the device: zeros keep left-out heads defined.
    return query.new_zeros(shape)
