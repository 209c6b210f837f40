"""Launches of the Hopper kernels of pooled attention, prepared for calls that are alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from shareprefill.runtime.ops.hopper import launch as hopper
from shareprefill.runtime.ops.hopper.launch import (
    BLOCK,
    describe_tiles,
    draw_counter,
    heads_at_once,
    padded_head_dim,
    page_step,
)
from shareprefill.runtime.ops.pages import Tokens, page_table, page_tokens
from shareprefill.runtime.ops.pooled_attention.launches import Attended, Division, Masses
from shareprefill.runtime.ops.prepared import Launch
from shareprefill.runtime.ops.triton_tiles import multiprocessors

# Keys and values of heads that run at one time should stay in the 50 MB of L2.
L2_BYTES = 32 * 2**20
DIVISION = Division(programs=1, least=8, most=256)
# Rows of a tile of queries, keys and values.
ROWS = (BLOCK // 2, BLOCK, BLOCK)


def kernel_constants(
    head_dim: int, *, has_heads: bool, has_sinks: bool, page_size: int = 0
) -> dict[str, Any]:
    """Compile-time arguments of `pooled_hopper_kernel`."""
    block_d = padded_head_dim(head_dim)
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK": BLOCK,
        "STAGES": 256 // block_d,
        "HAS_HEADS": has_heads,
        "HAS_SINKS": has_sinks,
        "PAGE_SIZE": page_size,
    }


def mass_constants(constants: dict[str, Any], page_size: int = 0) -> dict[str, Any]:
    """Compile-time arguments of `mass_hopper_kernel`, from those of `mass_kernel`."""
    shared = ("SHARED", "PACKED", "ROWS", "PARTS", "SEGMENTS", "HEAD_DIM", "BLOCK_M")
    block_d = padded_head_dim(constants["HEAD_DIM"])
    return {name: constants[name] for name in (*shared, "HAS_ROWS", "HAS_HEADS")} | {
        "BLOCK_D": block_d,
        "BLOCK": BLOCK,
        "STAGES": 512 // block_d,
        "PAGE_SIZE": page_size,
    }


def refusal(
    query: torch.Tensor,
    key: Tokens,
    value: Tokens | None,
    block_size: int,
    softcap: float | None,
) -> str | None:
    """Why `prepare` does not take a call; None where it does."""
    if softcap is not None:
        return "has no soft-cap"
    return hopper.refusal(query, key, key if value is None else value, block_size)


def prepare(
    attended: Attended, value: Tokens | None, sinks: torch.Tensor | None
) -> Callable[..., tuple[torch.Tensor | None, torch.Tensor]]:
    """Output and maps of all rows in one launch, or maps of chosen rows in two.

    Arguments and result as in the Triton version's, for calls that `refusal` lets pass.
    """
    assert attended.softcap is None
    if value is None:
        from shareprefill.runtime.ops.pooled_attention.triton import prepare_maps

        return prepare_maps(attended, prepare_masses, DIVISION)
    return _prepare_output(attended, sinks)


def prepare_masses(attended: Attended, masses: Masses) -> Callable[..., None]:
    """Launches of `mass_hopper_kernel`."""
    from shareprefill.runtime.ops.pooled_attention.hopper_mass_kernel import mass_hopper_kernel

    query = attended.query
    launch = Launch(
        mass_hopper_kernel,
        query.device,
        (masses.n_programs,),
        (
            *(query.stride(0), query.stride(1), *masses.sizes),
            *(page_step(attended.key), attended.logit_factors()[0]),
        ),
        mass_constants(masses.constants, page_tokens(attended.key)) | {"num_warps": 4},
    )

    def run(query: torch.Tensor, key: Tokens, *others: torch.Tensor) -> None:
        launch(query, describe_tiles(key, BLOCK), *others, page_table(key))

    return run


def _prepare_output(
    attended: Attended, sinks: torch.Tensor | None
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Output and maps of all rows."""
    from shareprefill.runtime.ops.pooled_attention.hopper_kernel import pooled_hopper_kernel

    query, key, device = attended.query, attended.key, attended.query.device
    n_heads, n_q_tokens, head_dim = query.shape
    n_slots, n_q, n_k = attended.n_slots, attended.n_members, attended.n_k
    programs = min(n_q * n_slots, multiprocessors(device))
    numbers = (
        *(n_q_tokens * head_dim, head_dim, n_slots, attended.shared),
        *(heads_at_once(key, n_heads, L2_BYTES), n_q, n_k, n_q_tokens, key.shape[1]),
        *(page_step(key), attended.logit_factors()[0]),
    )
    has_heads, has_sinks = attended.heads is not None, sinks is not None
    pages = page_tokens(key)
    constants = kernel_constants(
        head_dim, has_heads=has_heads, has_sinks=has_sinks, page_size=pages
    )
    options = constants | {"num_warps": 4}
    launch = Launch(pooled_hopper_kernel, device, (programs,), numbers, options)

    def run(
        query: torch.Tensor,
        key: Tokens,
        value: Tokens,
        _rows: None,
        heads: torch.Tensor | None,
        sinks: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out = query.new_empty((n_slots, n_q_tokens, head_dim))
        maps = query.new_empty((n_slots, n_q, n_k), dtype=torch.float32)
        if n_slots == 0:
            return out, maps
        mass = query.new_empty(programs * n_k * BLOCK, dtype=torch.float32)
        # The maps stand in for tensors that the kernel does not touch.
        chosen = (maps if heads is None else heads.contiguous(), maps if sinks is None else sinks)
        tiles = (describe_tiles(t, rows) for t, rows in zip((query, key, value), ROWS, strict=True))
        launch(*tiles, out, maps, mass, *chosen, page_table(key), draw_counter(device))
        return out, maps

    return run
