"""Launch of the Hopper kernel of pooled attention."""

# The checker does not know what a launch of a kernel takes.
# pyright: reportCallIssue=false

from __future__ import annotations

from typing import Any

import torch

from shareprefill.runtime.ops.blocks import count_blocks
from shareprefill.runtime.ops.devices import device_of
from shareprefill.runtime.ops.hopper import launch
from shareprefill.runtime.ops.pages import Tokens, page_table
from shareprefill.runtime.ops.pooled_attention.launches import Attended, Division, Masses
from shareprefill.runtime.ops.triton_tiles import logit_factors, multiprocessors

# Keys and values of heads that run at one time should stay in the 50 MB of L2.
L2_BYTES = 32 * 2**20
DIVISION = Division(programs=1, least=8, most=256)


def kernel_constants(
    head_dim: int, *, has_heads: bool, has_sinks: bool, page_blocks: int = 0
) -> dict[str, Any]:
    """Compile-time arguments of `pooled_hopper_kernel`."""
    block_d = launch.padded_head_dim(head_dim)
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK": launch.BLOCK,
        "STAGES": 256 // block_d,
        "HAS_HEADS": has_heads,
        "HAS_SINKS": has_sinks,
        "PAGE_BLOCKS": page_blocks,
    }


def mass_constants(constants: dict[str, Any], page_blocks: int = 0) -> dict[str, Any]:
    """Compile-time arguments of `mass_hopper_kernel`, from those of `mass_kernel`."""
    shared = ("SHARED", "PACKED", "ROWS", "PARTS", "SEGMENTS", "HEAD_DIM", "BLOCK_M")
    block_d = launch.padded_head_dim(constants["HEAD_DIM"])
    return {name: constants[name] for name in (*shared, "HAS_ROWS", "HAS_HEADS")} | {
        "BLOCK_D": block_d,
        "BLOCK": launch.BLOCK,
        "STAGES": 512 // block_d,
        "PAGE_BLOCKS": page_blocks,
    }


def refusal(
    query: torch.Tensor,
    key: Tokens,
    value: Tokens | None,
    block_size: int,
    softcap: float | None,
) -> str | None:
    """Why `pool` does not take a call; None where it does."""
    if softcap is not None:
        return "has no soft-cap"
    return launch.refusal(query, key, key if value is None else value, block_size)


def pool(
    query: torch.Tensor,
    key: Tokens,
    value: Tokens | None,
    rows: torch.Tensor | None,
    block_size: int,
    scale: float,
    heads: torch.Tensor | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Output and maps of all rows in one launch, or maps of chosen rows in two.

    Arguments as in `pooled_attention`, for calls that `refusal` lets pass.
    """
    assert softcap is None
    heads = None if heads is None else heads.contiguous()
    with device_of(query):
        if value is not None:
            return _pool_all(query, key, value, block_size, scale, heads, sinks)
        from shareprefill.runtime.ops.pooled_attention.triton import pool_maps

        rows = None if rows is None else rows.contiguous()
        attended = Attended(query, key, rows, heads, block_size, scale, None)
        return None, pool_maps(attended, _launch_masses, DIVISION)


def _launch_masses(attended: Attended, masses: Masses) -> None:
    """Starts `mass_hopper_kernel`."""
    from shareprefill.runtime.ops.pooled_attention.hopper_mass_kernel import mass_hopper_kernel

    query = attended.query
    mass_hopper_kernel[(masses.n_programs,)](
        query,
        launch.describe_tiles(attended.key, launch.BLOCK),
        masses.mass,
        masses.peaks,
        *masses.chosen,
        page_table(attended.key),
        query.stride(0),
        query.stride(1),
        *masses.sizes,
        launch.page_step(attended.key),
        attended.logit_factors()[0],
        **mass_constants(masses.constants, launch.blocks_of_page(attended.key)),
        num_warps=4,
    )


def _pool_all(
    query: torch.Tensor,
    key: Tokens,
    value: Tokens,
    block_size: int,
    scale: float,
    heads: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and maps of all rows."""
    from shareprefill.runtime.ops.pooled_attention.hopper_kernel import pooled_hopper_kernel

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
    pooled_hopper_kernel[(programs,)](
        launch.describe_tiles(query, launch.BLOCK // 2),
        launch.describe_tiles(key, launch.BLOCK),
        launch.describe_tiles(value, launch.BLOCK),
        out,
        maps,
        mass,
        unused if heads is None else heads,
        unused if sinks is None else sinks,
        page_table(key),
        launch.draw_counter(query.device),
        out.stride(0),
        out.stride(1),
        n_slots,
        n_heads // len(key),
        launch.heads_at_once(key, n_heads, L2_BYTES),
        n_q,
        n_k,
        n_q_tokens,
        n_k_tokens,
        launch.page_step(key),
        logit_factors(scale, None)[0],
        **kernel_constants(
            head_dim,
            has_heads=heads is not None,
            has_sinks=sinks is not None,
            page_blocks=launch.blocks_of_page(key),
        ),
        num_warps=4,
    )
    return out, maps
