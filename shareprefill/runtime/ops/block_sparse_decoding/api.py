"""Attention of one decode step over listed key blocks: checks and choice of implementation."""

from __future__ import annotations

import torch

from shareprefill.errors import ConfigError
from shareprefill.runtime.ops.block_sparse_decoding import reference
from shareprefill.runtime.ops.blocks import count_blocks
from shareprefill.runtime.ops.dispatch import select_impl
from shareprefill.runtime.ops.inputs import (
    check_block_size,
    check_same_kind,
    check_tensor,
    logit_scale,
    unit_last_stride,
)
from shareprefill.runtime.ops.pages import Cached, lie_together

IMPLS = ("reference", "triton")


@torch.no_grad()
def block_sparse_decoding(
    query: torch.Tensor,
    key: Cached,
    value: Cached,
    blocks: torch.Tensor,
    counts: torch.Tensor,
    *,
    block_size: int,
    lengths: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    scale: float | None = None,
    out: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Softmax attention of each sequence's newest token over the keys of listed blocks.

    All query heads of a KV head read the blocks of its list, each once. Lists, their lengths and
    the sequences' lengths stay on the device: nothing waits for them, and a CUDA graph of the call
    may be replayed after they have changed. A list without a key gives zeros. No gradients.

    Args:
        query: `[B, H, D]`, float16, bfloat16, float32 or float64 (not Triton).
        key: `[B, G, N, D]`, G divides H; query head h reads KV head `h // (H // G)`. N may be the
            capacity of a cache. Keys and values may both lie in an engine's pages (`PagedBatch`).
        value: `[B, G, N, Dv]`.
        blocks: int32 `[B, G, m]`, contiguous: numbers of blocks in any order, none twice. On a CPU
            they are checked, on CUDA not.
        counts: int32 `[B, G]`, contiguous: how many of a list's entries are read; what is behind
            them may be anything.
        block_size: tokens in a block.
        lengths: int32 `[B]`: keys from there on are not read. None: N.
        starts: int32 `[B]`: first key of each sequence, which its blocks are counted from; at most
            its length. None: 0.
        scale: factor of the logits; None: `1 / sqrt(D)`.
        out: `[B, H, Dv]` of query's dtype, contiguous, written in place; None: a new one.
        impl: "auto" (on CUDA "triton", elsewhere "reference"), "reference" or "triton".

    Returns:
        `[B, H, Dv]` in query's dtype.

    Raises:
        ConfigError: shapes, dtypes, devices or lists do not belong together.
        UnsupportedError: the requested implementation cannot run here.
    """
    _check_shapes(query, key, value)
    check_block_size(block_size)
    batch, heads, head_dim = query.shape
    groups, tokens = key.shape[1:3]
    check_tensor("blocks", blocks, torch.int32, (batch, groups, "m"), query.device)
    check_tensor("counts", counts, torch.int32, (batch, groups), query.device)
    for name, places in (("lengths", lengths), ("starts", starts)):
        if places is not None:
            check_tensor(name, places, torch.int32, (batch,), query.device)
    scale = logit_scale(scale, head_dim)
    if query.device.type == "cpu":
        _check_values(blocks, counts, lengths, starts, tokens, block_size)
    shape = (batch, heads, value.shape[3])
    if out is None:
        out = query.new_empty(shape)
    check_tensor("out", out, query.dtype, shape, query.device)
    for name, tensor in (("out", out), ("blocks", blocks), ("counts", counts)):
        if not tensor.is_contiguous():
            raise ConfigError(f"{name} must be contiguous, got strides {tensor.stride()}")
    impl = select_impl(impl, IMPLS, query, "reference")
    query, key, value = unit_last_stride(query), unit_last_stride(key), unit_last_stride(value)
    decode = reference.decode
    if impl == "triton":
        from shareprefill.runtime.ops.block_sparse_decoding import triton

        decode = triton.decode
    decode(query, key, value, blocks, counts, block_size, lengths, starts, scale, out)
    return out


def _check_shapes(query: torch.Tensor, key: Cached, value: Cached) -> None:
    if query.ndim != 3 or key.ndim != 4 or value.ndim != 4:
        raise ConfigError(
            "query must be [batch, heads, head_dim], key and value [batch, KV heads, tokens, "
            f"head_dim], got shapes {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    check_same_kind(query, {"key": key, "value": value})
    batch, heads, head_dim = query.shape
    groups, tokens = key.shape[1:3]
    if batch < 1 or tokens < 1 or key.shape != (batch, groups, tokens, head_dim):
        raise ConfigError(
            f"key must be [{batch}, KV heads, tokens, {head_dim}] like query, with at least one "
            f"sequence and token, got {tuple(key.shape)}"
        )
    if groups < 1 or heads < 1 or heads % groups:
        raise ConfigError(f"{groups} KV heads do not divide {heads} query heads")
    if value.shape[:3] != key.shape[:3] or value.shape[3] < 1:
        raise ConfigError(
            f"value must be [{batch}, {groups}, {tokens}, Dv] like key, got {tuple(value.shape)}"
        )
    if not lie_together((key, value)):
        raise ConfigError(
            "key and value must both be tensors, or both lie in pages of one size that the same "
            f"tables name, got {type(key).__name__} and {type(value).__name__}"
        )


def _check_values(
    blocks: torch.Tensor,
    counts: torch.Tensor,
    lengths: torch.Tensor | None,
    starts: torch.Tensor | None,
    tokens: int,
    block_size: int,
) -> None:
    entries = blocks.shape[2]
    if int(counts.min()) < 0 or int(counts.max()) > entries:
        raise ConfigError(f"counts must lie in 0..{entries}, got {counts.tolist()}")
    if lengths is not None and (int(lengths.min()) < 0 or int(lengths.max()) > tokens):
        raise ConfigError(f"lengths must lie in 0..{tokens}, got {lengths.tolist()}")
    if starts is not None:
        ends = torch.full_like(starts, tokens) if lengths is None else lengths
        if int(starts.min()) < 0 or bool((starts > ends).any()):
            raise ConfigError(
                f"starts must lie in 0..lengths ({ends.tolist()}), got {starts.tolist()}"
            )
    places = torch.arange(entries, dtype=torch.int64, device=counts.device)
    read = blocks[places < counts[..., None]]
    n = count_blocks(tokens, block_size)
    if read.numel() and (int(read.min()) < 0 or int(read.max()) >= n):
        raise ConfigError(
            f"blocks must lie in 0..{n - 1}, got {int(read.min())}..{int(read.max())}"
        )
