"""Blocks that a decode step reads, chosen by a sketch of the keys: checks and implementations."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shareprefill.errors import ConfigError
from shareprefill.runtime.ops.dispatch import select_impl
from shareprefill.runtime.ops.inputs import (
    FLOAT_DTYPES,
    check_below,
    check_block_size,
    check_tensor,
    unit_last_stride,
)
from shareprefill.runtime.ops.pages import Cached, PagedBatch
from shareprefill.runtime.ops.sketched_selection import reference
from shareprefill.runtime.ops.sketched_selection.sketch import CODES, Basis

IMPLS = ("reference", "triton")


@torch.no_grad()
def select_blocks(
    query: Tensor,
    key: Cached,
    words: Tensor,
    basis: Basis,
    share: Tensor,
    worth: Tensor,
    *,
    block_size: int,
    local: int = 64,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    scale: float | None = None,
    counts: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Key blocks that each sequence's newest token reads, as many as pay for themselves.

    The sketch tells each block's attention m; the first block and those of the newest `local`
    tokens, which are always read, have their keys' own. A KV head's harm is its effect times the
    square of the attention that it loses, so that a block more takes away 2 * effect * lost * m. It
    is read where this is at least the price of a block: `lost * m >= worth / n`, with `worth` the
    price of all n blocks over twice the effect. The threshold on m is a power of 1 / sqrt(2), and
    blocks between two powers count alike, so that their numbers tell it. Nothing waits for the
    device.

    Args:
        query: `[B, H, D]`.
        key: `[B, G, N, D]`, of the same dtype, G divides H; or in an engine's pages.
        words: Codes of each sequence's keys (`sketch_keys`), int32 `[B, G, r / 8, M]`, contiguous,
            M at least N. Of keys in pages, codes beside them (`write_codes`): int32
            `[pages, G, r / 8, page size]`. Those of blocks that are always read may be anything.
        basis: Of the codes, its tensors `[B, G, ...]`, or `[1, G, ...]` for all, contiguous.
        share: float32 `[H]`: weights of query heads in their KV head, of sum 1 over it.
        worth: float32 `[B, G]`; where it is 0, every block is read, whatever the sketch says.
        block_size: Tokens in a block.
        local: Newest tokens whose blocks are always read.
        lengths: int32 `[B]`: keys from there on are not read; 0 for a sequence that reads nothing.
            None: N.
        starts: int32 `[B]`: first key of each sequence, which its blocks and codes are counted
            from; less than its length. None: 0, as always in pages.
        scale: Factor of the logits; None: `1 / sqrt(D)`.
        counts: int32 `[B, G]`, contiguous, written in place; None: a new one.
        impl: "auto" (on CUDA "triton", elsewhere "reference"), "reference" or "triton".

    Returns:
        `(blocks, counts)`: int32 `[B, G, n]`, whose first entries are the blocks in their order and
        whose others are anything, and int32 `[B, G]`, for `block_sparse_decoding`.

    Raises:
        ConfigError: shapes, dtypes or devices do not belong together.
        UnsupportedError: the requested implementation cannot run here.
    """
    if query.ndim != 3 or key.ndim != 4:
        raise ConfigError(
            "query must be [batch, heads, head_dim] and key [batch, KV heads, tokens, head_dim], "
            f"got shapes {tuple(query.shape)} and {tuple(key.shape)}"
        )
    batch, heads, dim = query.shape
    groups, tokens = key.shape[1:3]
    if query.dtype not in FLOAT_DTYPES or groups < 1 or heads % groups:
        raise ConfigError(
            f"query must be floating-point with heads that {groups} KV heads divide, "
            f"got {query.dtype} of {heads} heads"
        )
    check_block_size(block_size)
    check_tensor("key", key, query.dtype, (batch, groups, "N", dim), query.device)
    in_pages = isinstance(key, PagedBatch)
    room = (len(key.pool), key.page_size) if in_pages else (batch, "M")
    check_tensor("words", words, torch.int32, (room[0], groups, "r / 8", room[1]), query.device)
    bases = 1 if len(basis.mean) == 1 else batch
    axes = (bases, groups, CODES * words.shape[2], dim)
    check_tensor("basis.mean", basis.mean, torch.float32, (bases, groups, dim), query.device)
    check_tensor("basis.query", basis.query, torch.float32, axes, query.device)
    check_tensor("share", share, torch.float32, (heads,), query.device)
    check_tensor("worth", worth, torch.float32, (batch, groups), query.device)
    for name, places in (("lengths", lengths), ("starts", starts)):
        if places is not None:
            check_tensor(name, places, torch.int32, (batch,), query.device)
    if local < 1 or tokens < 1:
        raise ConfigError(f"local and the keys must be at least 1 token, got {local} and {tokens}")
    if in_pages and starts is not None:
        raise ConfigError("sequences in pages begin with their first token: leave starts out")
    if not in_pages and words.shape[3] < tokens:
        raise ConfigError(f"words must be of at least {tokens} keys, got {words.shape[3]}")
    if scale is not None and not 0.0 < scale < math.inf:
        raise ConfigError(f"scale must be a positive number, got {scale}")
    scale = 1.0 / math.sqrt(dim) if scale is None else float(scale)
    for name, tensor in (
        *(() if counts is None else (("counts", counts),)),
        ("words", words),
        ("basis.mean", basis.mean),
        ("basis.query", basis.query),
    ):
        if not tensor.is_contiguous():
            raise ConfigError(f"{name} must be contiguous, got strides {tensor.stride()}")
    blocks = torch.empty(
        (batch, groups, -(-tokens // block_size)), dtype=torch.int32, device=query.device
    )
    if counts is None:
        counts = torch.empty((batch, groups), dtype=torch.int32, device=query.device)
    check_tensor("counts", counts, torch.int32, (batch, groups), query.device)
    impl = select_impl(impl, IMPLS, query, "reference")
    query, key = unit_last_stride(query), unit_last_stride(key)
    select = reference.select
    if impl == "triton":
        from shareprefill.runtime.ops.sketched_selection import triton

        select = triton.select
    select(
        *(query, key, words, basis, share.contiguous(), worth.contiguous()),
        *(block_size, local, lengths, starts, scale, blocks, counts),
    )
    return blocks, counts


@torch.no_grad()
def write_codes(
    key: Tensor, slots: Tensor, basis: Basis, words: Tensor, *, impl: str = "auto"
) -> None:
    """Writes codes of keys that lie in pages beside them; nothing waits for the device.

    Args:
        key: Pages of keys `[pages, G, page size, D]`, in any strides.
        slots: int64 `[T]`: the keys, page times page size plus the place in it; negative: none. On
            CUDA they are not checked.
        basis: Its tensors `[G, ...]`, contiguous.
        words: int32 `[pages, G, r / 8, page size]`, contiguous, written in place.
        impl: "auto" (on CUDA "triton", elsewhere "reference"), "reference" or "triton".

    Raises:
        ConfigError: shapes, dtypes or devices do not belong together.
        UnsupportedError: the requested implementation cannot run here.
    """
    if key.ndim != 4 or key.dtype not in FLOAT_DTYPES:
        raise ConfigError(
            "pages of keys must be floating-point [pages, KV heads, page size, head_dim], got "
            f"{key.dtype} of shape {tuple(key.shape)}"
        )
    pages, groups, size, dim = key.shape
    check_tensor("slots", slots, torch.int64, ("T",), key.device)
    check_below("slots", slots, pages * size)
    check_tensor("words", words, torch.int32, (pages, groups, "r / 8", size), key.device)
    axes = (groups, CODES * words.shape[2], dim)
    check_tensor("basis.mean", basis.mean, torch.float32, (groups, dim), key.device)
    check_tensor("basis.key", basis.key, torch.float32, axes, key.device)
    for name, tensor in (
        *(("words", words), ("slots", slots)),
        *(("basis.mean", basis.mean), ("basis.key", basis.key)),
    ):
        if not tensor.is_contiguous():
            raise ConfigError(f"{name} must be contiguous, got strides {tensor.stride()}")
    if not len(slots):
        return
    impl = select_impl(impl, IMPLS, key, "reference")
    write = reference.write
    if impl == "triton":
        from shareprefill.runtime.ops.sketched_selection import triton

        write = triton.write
    write(key, slots, basis, words)
