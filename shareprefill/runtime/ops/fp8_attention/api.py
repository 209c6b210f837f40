"""Attention over listed key blocks with operands of e4m3: checks and choice of implementation."""

from __future__ import annotations

import torch

from shareprefill.errors import ConfigError, UnsupportedError
from shareprefill.runtime.ops.blocks import BlockLists, count_blocks
from shareprefill.runtime.ops.fp8_attention import reference
from shareprefill.runtime.ops.hopper import launch
from shareprefill.runtime.ops.inputs import check_attention_inputs, check_tensor, unit_last_stride

IMPLS = ("auto", "reference", "hopper")


@torch.no_grad()
def fp8_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lists: BlockLists,
    *,
    out: torch.Tensor,
    scale: float | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """`block_sparse_attention` of e4m3: queries, keys less their mean, weights and values.

    Sums are of float32. The output is off by some percent (docs/performance.md). As keys lose a
    vector, logits are known up to a number a row: there are no soft-cap, sinks and log-sum-exp. NaN
    or Inf in the keys or values of a KV head makes all outputs of its query heads NaN.

    Args:
        query: `[H, Nq, D]`, float16 or bfloat16 (any, by the reference); D is 64, 96 or 128.
        key: `[G, Nk, D]`, G divides H.
        value: `[G, Nk, D]`.
        lists: the key blocks of each head's pattern, of 128 tokens.
        out: `[H, Nq, D]` of query's dtype with a contiguous last dim, written in place, but for
            heads whose pattern is -1.
        scale: factor of the logits; None: `1 / sqrt(D)`.
        impl: "auto" and "hopper" (Hopper GPUs), or "reference".

    Returns:
        `out`.

    Raises:
        ConfigError: shapes, dtypes, devices or lists do not belong together.
        UnsupportedError: it cannot be computed here, with the reason.
    """
    if impl not in IMPLS:
        raise ConfigError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    scale = check_attention_inputs(query, key, value, scale=scale, softcap=None)
    blocks = tuple(count_blocks(t.shape[1], lists.block_size) for t in (query, key))
    if (lists.n_q, lists.n_k) != blocks or len(lists.head_to_list) != len(query):
        raise ConfigError(
            f"lists are for {len(lists.head_to_list)} heads and {lists.n_q} x {lists.n_k} blocks "
            f"of {lists.block_size} tokens, query and key make {len(query)} and "
            f"{blocks[0]} x {blocks[1]}"
        )
    check_tensor("out", out, query.dtype, (*query.shape[:2], value.shape[2]), query.device)
    query, key, value = unit_last_stride(query), unit_last_stride(key), unit_last_stride(value)
    if impl == "reference":
        dims = (query.shape[2], value.shape[2])
        reason = launch.refusal_of_sizes(dims, lists.block_size)
    else:
        reason = launch.refusal(query, key, value, lists.block_size)
    refuse(reason)
    if impl == "reference":
        reference.attend(query, key, value, lists, scale, out)
    else:
        from shareprefill.runtime.ops.fp8_attention import hopper

        hopper.attend(query, key, value, lists, scale, out)
    return out


def refuse(reason: str | None) -> None:
    """Says why FP8 attention cannot be computed; does nothing where there is no reason.

    Raises:
        UnsupportedError: there is one.
    """
    if reason is not None:
        raise UnsupportedError(f"FP8 attention {reason}; use precision='model'")
