"""Launch of the Hopper kernel of pooled attention."""

# The checker does not know that a Gluon kernel takes launch options.
# pyright: reportCallIssue=false

from __future__ import annotations

import math
from typing import Any

import torch

from shareprefill.runtime.ops import hopper
from shareprefill.runtime.ops.blocks import count_blocks
from shareprefill.runtime.ops.devices import device_of
from shareprefill.runtime.ops.tiles import multiprocessors

# Keys and values of heads that run at one time should stay in the 50 MB of L2.
L2_BYTES = 32 * 2**20


def kernel_constants(head_dim: int, *, has_heads: bool, has_sinks: bool) -> dict[str, Any]:
    """Compile-time arguments of `pooled_hopper_kernel`."""
    block_d = hopper.padded_head_dim(head_dim)
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK": hopper.BLOCK,
        "STAGES": 256 // block_d,
        "HAS_HEADS": has_heads,
        "HAS_SINKS": has_sinks,
    }


def refusal(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    block_size: int,
    softcap: float | None,
) -> str | None:
    """Why `pool` does not take a call; None where it does."""
    if value is None:
        return "computes maps with an output; without value there is impl='triton'"
    if softcap is not None:
        return "has no soft-cap"
    return hopper.refusal(query, key, value, block_size)


def pool(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_size: int,
    scale: float,
    heads: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and maps of all rows in one launch; arguments as in `pooled_attention`."""
    from shareprefill.runtime.ops.pooled_attention.gluon_kernel import pooled_hopper_kernel

    n_heads, n_q_tokens, head_dim = query.shape
    n_k_tokens = key.shape[1]
    n_q, n_k = count_blocks(n_q_tokens, block_size), count_blocks(n_k_tokens, block_size)
    n_slots = n_heads if heads is None else len(heads)
    out = query.new_empty((n_slots, n_q_tokens, head_dim))
    maps = query.new_empty((n_slots, n_q, n_k), dtype=torch.float32)
    if n_slots == 0:
        return out, maps
    programs = min(n_q * n_slots, multiprocessors(query.device))
    mass = query.new_empty(programs * n_k * block_size, dtype=torch.float32)
    unused = maps  # stands in for tensors that the kernel does not touch
    with device_of(query):
        pooled_hopper_kernel[(programs,)](
            *hopper.describe_tiles(query, key, value),
            out,
            maps,
            mass,
            unused if heads is None else heads.contiguous(),
            unused if sinks is None else sinks,
            hopper.draw_counter(query.device),
            out.stride(0),
            out.stride(1),
            n_slots,
            n_heads // len(key),
            hopper.heads_at_once(key, n_heads, L2_BYTES),
            n_q,
            n_k,
            n_q_tokens,
            n_k_tokens,
            scale / math.log(2.0),
            **kernel_constants(head_dim, has_heads=heads is not None, has_sinks=sinks is not None),
            num_warps=4,
        )
    return out, maps
