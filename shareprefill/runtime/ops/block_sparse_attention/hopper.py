"""Launch of the Hopper kernel of block-sparse attention."""

from __future__ import annotations

from typing import Any

import torch

from shareprefill.runtime.ops.blocks import BlockLists
from shareprefill.runtime.ops.devices import device_of
from shareprefill.runtime.ops.hopper import launch
from shareprefill.runtime.ops.pages import Tokens, page_table
from shareprefill.runtime.ops.triton_tiles import logit_factors, multiprocessors

# Keys and values of the heads that run at one time: of the 50 MB of L2, which queries and outputs
# pass through as well.
L2_BYTES = 16 * 2**20


def supports(query: torch.Tensor, key: Tokens, value: Tokens, block_size: int) -> str | None:
    """Why `attend` does not take a call; None where it does."""
    return launch.refusal(query, key, value, block_size)


def kernel_constants(
    head_dim: int,
    *,
    has_lse: bool,
    has_softcap: bool = False,
    has_sinks: bool = False,
    page_blocks: int = 0,
) -> dict[str, Any]:
    """Compile-time arguments of `block_sparse_hopper_kernel`."""
    block_d = launch.padded_head_dim(head_dim)
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK": launch.BLOCK,
        "STAGES": 256 // block_d,
        "HAS_LSE": has_lse,
        "HAS_SOFTCAP": has_softcap,
        "HAS_SINKS": has_sinks,
        "PAGE_BLOCKS": page_blocks,
    }


def launch_options() -> dict[str, Any]:
    """Options of a launch; the warps are one consumer's, to which the kernel adds eight."""
    return {"num_warps": 4, "enable_fp_fusion": True}


def attend(
    query: torch.Tensor,
    key: Tokens,
    value: Tokens,
    lists: BlockLists,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """Fill `out` (and `lse`) in one launch; arguments as in `block_sparse_attention`.

    For calls that `supports` takes. Nothing is compiled for a new length or number of heads.
    """
    from shareprefill.runtime.ops.block_sparse_attention.hopper_kernel import (
        block_sparse_hopper_kernel,
    )

    n_heads, n_q_tokens, head_dim = query.shape
    constants = kernel_constants(
        head_dim,
        has_lse=lse is not None,
        has_softcap=softcap is not None,
        has_sinks=sinks is not None,
        page_blocks=launch.blocks_of_page(key),
    )
    with device_of(query):
        block_sparse_hopper_kernel[(min(lists.n_q * n_heads, multiprocessors(query.device)),)](
            launch.describe_tiles(query, launch.BLOCK // 2),
            launch.describe_tiles(key, launch.BLOCK),
            launch.describe_tiles(value, launch.BLOCK),
            out,
            out if lse is None else lse,
            out if sinks is None else sinks,
            lists.offsets,
            lists.indices,
            lists.head_to_list,
            page_table(key),
            launch.draw_counter(query.device),
            out.stride(0),
            out.stride(1),
            n_heads,
            n_heads // len(key),
            launch.heads_at_once(key, n_heads, L2_BYTES),
            lists.n_q,
            n_q_tokens,
            key.shape[1],
            launch.page_step(key),
            *logit_factors(scale, softcap),
            **constants,
            **launch_options(),
        )
