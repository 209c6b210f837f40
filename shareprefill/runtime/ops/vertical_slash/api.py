"""Vertical and slash profile: checks and choice of implementation."""

from __future__ import annotations

from collections.abc import Callable

import torch

from shareprefill.runtime.ops.dispatch import select_impl, within_reach
from shareprefill.runtime.ops.inputs import (
    check_attention_inputs,
    check_block_size,
    check_tensor,
    unit_last_stride,
)
from shareprefill.runtime.ops.pages import Tokens
from shareprefill.runtime.ops.vertical_slash import profile, reference

IMPLS = ("reference", "torch", "triton")


@torch.no_grad()
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
    scale = check_attention_inputs(query, key, scale=scale, softcap=softcap)
    check_block_size(block_size)
    if heads is not None:
        check_tensor("heads", heads, torch.int64, ("S",), query.device, below=len(query))
    impl = select_impl(impl, IMPLS, query, "torch")
    query, key = unit_last_stride(query), unit_last_stride(key)
    (key,) = within_reach(impl, key)
    compute: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    if impl == "reference":
        compute = reference.profile_last_rows
    elif impl == "torch":
        compute = profile.profile_last_rows
    else:
        from shareprefill.runtime.ops.vertical_slash import triton

        compute = triton.profile_last_rows
    return compute(query, key, block_size, scale, heads, softcap)
