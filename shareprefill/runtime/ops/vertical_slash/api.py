"""Vertical and slash profile: checks and choice of implementation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from shareprefill.runtime.ops.dispatch import on_gathered, select_impl, within_reach
from shareprefill.runtime.ops.inputs import (
    check_attention_inputs,
    check_below,
    check_block_size,
    check_tensor,
    facts,
    unit_last_stride,
)
from shareprefill.runtime.ops.pages import Tokens
from shareprefill.runtime.ops.prepared import Prepared
from shareprefill.runtime.ops.vertical_slash import profile, reference

IMPLS = ("reference", "torch", "triton")
# What calls run, by all that they depend on but values.
_calls = Prepared[Callable[..., Any]]()


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


def _prepare(
    query: torch.Tensor,
    key: Tokens,
    heads: torch.Tensor | None,
    block_size: int,
    scale: float | None,
    softcap: float | None,
    impl: str,
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

        compute = triton.prepare(query, read, block_size, scale, heads, softcap)
    else:
        module = reference if impl == "reference" else profile
        options: dict[str, Any] = {"block_size": block_size, "scale": scale, "softcap": softcap}
        compute = torch.no_grad()(partial(module.profile_last_rows, **options))
    return compute if read is key else on_gathered(compute)
