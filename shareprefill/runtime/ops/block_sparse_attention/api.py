"""Causal attention over listed key blocks: checks and choice of implementation."""

from __future__ import annotations

from typing import Literal, overload

import torch

from shareprefill.errors import ConfigError
from shareprefill.runtime.ops.block_sparse_attention import blockwise, reference
from shareprefill.runtime.ops.blocks import BlockLists, count_blocks
from shareprefill.runtime.ops.inputs import (
    check_attention_inputs,
    resolve_scale,
    select_impl,
    unit_last_stride,
)

IMPLS = ("reference", "blockwise", "triton")


@overload
def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lists: BlockLists,
    *,
    scale: float | None = None,
    out: torch.Tensor | None = None,
    return_lse: Literal[False] = False,
    impl: str = "auto",
) -> torch.Tensor: ...


@overload
def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lists: BlockLists,
    *,
    scale: float | None = None,
    out: torch.Tensor | None = None,
    return_lse: Literal[True],
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]: ...


@torch.no_grad()
def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lists: BlockLists,
    *,
    scale: float | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of each query row over the causal keys in its listed blocks.

    Query row i stands at absolute position `Nk - Nq + i`. Listed blocks past the diagonal
    contribute nothing; a row that sees no key gives zeros. No gradients.

    Args:
        query: `[H, Nq, D]`, float16, bfloat16, float32 or float64 (not Triton).
        key: `[G, Nk, D]`, G divides H; query head h reads KV head `h // (H // G)`.
        value: `[G, Nk, Dv]`.
        lists: the key blocks of each head's pattern; on query's device. On a CPU the values are
            checked, on CUDA only the shapes (call `lists.validate()` to check them).
        scale: factor of the logits; None: `1 / sqrt(D)`.
        out: `[H, Nq, Dv]` of query's dtype with a contiguous last dim, written in place; needed
            where a head's pattern is -1, as such a head's rows are left untouched.
        return_lse: also return the natural log-sum-exp of each row's scaled logits.
        impl: "auto" (Triton on CUDA, blockwise elsewhere), "reference", "blockwise" or "triton".

    Returns:
        `[H, Nq, Dv]` in query's dtype; with `return_lse` also float32 `[H, Nq]`, -inf for rows
        that see no key and for heads that are not computed.

    Raises:
        ConfigError: shapes, dtypes, devices or lists do not belong together.
        UnsupportedError: the requested implementation cannot run here.
    """
    check_attention_inputs(query, key, value)
    _check_lists(query, key, lists)
    impl = select_impl(impl, IMPLS, query, "blockwise")
    shape = (query.shape[0], query.shape[1], value.shape[2])
    if out is None:
        out = _new_output(query, shape, lists)
    elif out.shape != shape or out.dtype != query.dtype or out.device != query.device:
        raise ConfigError(
            f"out must be {query.dtype} of shape {shape} on {query.device}, "
            f"got {out.dtype} of shape {tuple(out.shape)} on {out.device}"
        )
    elif out.stride(-1) != 1:
        raise ConfigError(f"out must have a contiguous last dim, got strides {out.stride()}")
    lse = None
    if return_lse:
        lse = torch.full(shape[:2], -torch.inf, dtype=torch.float32, device=query.device)
    query, key, value = unit_last_stride(query), unit_last_stride(key), unit_last_stride(value)
    scale = resolve_scale(scale, query.shape[2])
    if impl == "reference":
        reference.attend(query, key, value, lists, scale, out, lse)
    elif impl == "blockwise":
        blockwise.attend(query, key, value, lists, scale, out, lse)
    else:
        from shareprefill.runtime.ops.block_sparse_attention import triton

        triton.attend(query, key, value, lists, scale, out, lse)
    return out if lse is None else (out, lse)


def _check_lists(query: torch.Tensor, key: torch.Tensor, lists: BlockLists) -> None:
    n_q = count_blocks(query.shape[1], lists.block_size)
    n_k = count_blocks(key.shape[1], lists.block_size)
    if (lists.n_q, lists.n_k) != (n_q, n_k):
        raise ConfigError(
            f"lists are for {lists.n_q} x {lists.n_k} blocks of {lists.block_size} tokens, "
            f"query and key make {n_q} x {n_k}"
        )
    if len(lists.pattern) != query.shape[0]:
        raise ConfigError(
            f"lists.pattern must name a pattern for each of {query.shape[0]} query heads, "
            f"got {len(lists.pattern)}"
        )
    if lists.device != query.device:
        raise ConfigError(f"lists are on {lists.device}, query is on {query.device}")
    if lists.device.type == "cpu":
        lists.validate()


def _new_output(
    query: torch.Tensor, shape: tuple[int, int, int], lists: BlockLists
) -> torch.Tensor:
    if query.device.type == "cpu":
        if bool((lists.pattern < 0).any()):
            raise ConfigError(
                "lists.pattern leaves heads out (-1); give `out`, whose rows they keep"
            )
        return query.new_empty(shape)
    # Reading the pattern would wait for the device: zeros keep left-out heads defined.
    return query.new_zeros(shape)
