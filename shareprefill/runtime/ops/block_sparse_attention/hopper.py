"""Launches of the Hopper kernel of block-sparse attention, prepared for calls that are alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from shareprefill.runtime.ops.blocks import BlockLists
from shareprefill.runtime.ops.hopper import launch as hopper
from shareprefill.runtime.ops.pages import Tokens, page_table, page_tokens
from shareprefill.runtime.ops.prepared import Launch
from shareprefill.runtime.ops.triton_tiles import logit_factors, multiprocessors

# Keys and values of the heads that run at one time: of the 50 MB of L2, which queries and outputs
# pass through as well.
L2_BYTES = 16 * 2**20


def supports(query: torch.Tensor, key: Tokens, value: Tokens, block_size: int) -> str | None:
    """Why `prepare` does not take a call; None where it does."""
    return hopper.refusal(query, key, value, block_size)


def kernel_constants(
    head_dim: int,
    *,
    has_lse: bool,
    has_softcap: bool = False,
    has_sinks: bool = False,
    page_size: int = 0,
) -> dict[str, Any]:
    """Compile-time arguments of `block_sparse_hopper_kernel`."""
    block_d = hopper.padded_head_dim(head_dim)
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK": hopper.BLOCK,
        "STAGES": 256 // block_d,
        "HAS_LSE": has_lse,
        "HAS_SOFTCAP": has_softcap,
        "HAS_SINKS": has_sinks,
        "PAGE_SIZE": page_size,
    }


def launch_options() -> dict[str, Any]:
    """Options of a launch; the warps are one consumer's, to which the kernel adds eight."""
    return {"num_warps": 4, "enable_fp_fusion": True}


def prepare(
    query: torch.Tensor,
    key: Tokens,
    value: Tokens,
    lists: BlockLists,
    out: torch.Tensor,
    flags: tuple[bool, bool, bool],
    scale: float,
    softcap: float | None,
) -> Callable[..., None]:
    """Prepares calls that fill `out` (and `lse`) in one hopper.

    Nothing is compiled for a new length or number of heads.

    Args:
        query: As in `block_sparse_attention`, as the next three; for calls that `supports` takes.
        key: Of one of the calls.
        value: Likewise.
        lists: Likewise.
        out: Of the strides of outputs.
        flags: Whether there are `lse`, a soft-cap and sinks.
        scale: As in `block_sparse_attention`.
        softcap: As in `block_sparse_attention`.

    Returns:
        Takes query, key, value, lists, out, lse and sinks.
    """
    from shareprefill.runtime.ops.block_sparse_attention.hopper_kernel import (
        block_sparse_hopper_kernel,
    )

    (n_heads, n_q_tokens, head_dim), device = query.shape, query.device
    has_lse, has_softcap, has_sinks = flags
    constants = kernel_constants(
        head_dim,
        has_lse=has_lse,
        has_softcap=has_softcap,
        has_sinks=has_sinks,
        page_size=page_tokens(key),
    )
    numbers = (
        *(out.stride(0), out.stride(1), n_heads, n_heads // len(key)),
        *(hopper.heads_at_once(key, n_heads, L2_BYTES), lists.n_q, n_q_tokens, key.shape[1]),
        *(hopper.page_step(key), *logit_factors(scale, softcap)),
    )
    grid = (min(lists.n_q * n_heads, multiprocessors(device)),)
    options = constants | launch_options()
    launch = Launch(block_sparse_hopper_kernel, device, grid, numbers, options)

    def attend(
        query: torch.Tensor,
        key: Tokens,
        value: Tokens,
        lists: BlockLists,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        sinks: torch.Tensor | None,
    ) -> None:
        launch(
            hopper.describe_tiles(query, hopper.BLOCK // 2),
            hopper.describe_tiles(key, hopper.BLOCK),
            hopper.describe_tiles(value, hopper.BLOCK),
            out,
            out if lse is None else lse,
            out if sinks is None else sinks,
            lists.offsets,
            lists.indices,
            lists.head_to_list,
            page_table(key),
            hopper.draw_counter(device),
        )

    return attend
