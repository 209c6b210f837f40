"""Launches of attention with operands of e4m3 on Hopper."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from shareprefill.runtime.ops.block_sparse_attention.hopper import L2_BYTES, launch_options
from shareprefill.runtime.ops.blocks import BlockLists, count_blocks
from shareprefill.runtime.ops.fp8_attention.reference import E4M3_MAX, TINY, centres
from shareprefill.runtime.ops.hopper import launch as hopper
from shareprefill.runtime.ops.prepared import Launch
from shareprefill.runtime.ops.triton_tiles import logit_factors, multiprocessors

BLOCK = hopper.BLOCK
# Options of the launches that round.
ROUNDING: dict[str, Any] = {"num_warps": 4}


class SmallOperands(NamedTuple):
    """Keys and values in e4m3 as the kernel reads them; d is the head dim padded to 64 or 128.

    Attributes:
        key: `[G, n_k * 128, d]`, keys less their mean, divided by their scale.
        value: `[G, n_k * 128, 128]`: the first d of 128 rows are a block's values, divided by their
            scale and transposed to `[d, 128]`, as the matrix unit wants them. Each 16 keys stand in
            the order in which a thread's logits are its operands of the next product.
        scales: float32 `[G, 2]`, of keys and of values.
    """

    key: torch.Tensor
    value: torch.Tensor
    scales: torch.Tensor


def tile_constants(head_dim: int) -> dict[str, Any]:
    """Compile-time arguments of all kernels."""
    return {"HEAD_DIM": head_dim, "BLOCK_D": hopper.padded_head_dim(head_dim), "BLOCK": BLOCK}


def kernel_constants(head_dim: int) -> dict[str, Any]:
    """Compile-time arguments of `fp8_attention_kernel`."""
    constants = tile_constants(head_dim)
    return {**constants, "STAGES": 512 // constants["BLOCK_D"]}


def small_operands(key: torch.Tensor, value: torch.Tensor) -> SmallOperands:
    """Keys and values `[G, N, D]` rounded, and laid out for the kernel."""
    from shareprefill.runtime.ops.fp8_attention.rounding_kernel import peaks_kernel, round_kernel

    n_groups, n_tokens, head_dim = key.shape
    constants = tile_constants(head_dim)
    n_k = count_blocks(n_tokens, BLOCK)
    numbers = (key.stride(0), key.stride(1), value.stride(0), value.stride(1), n_tokens)
    grid, device = (n_k, n_groups), key.device
    peaks = torch.zeros((n_groups, 2), dtype=torch.int32, device=device)
    Launch(peaks_kernel, device, grid, numbers, {**constants, **ROUNDING})(key, value, peaks)
    small = [
        key.new_empty((n_groups, n_k * BLOCK, columns), dtype=torch.float8_e4m3fn)
        for columns in (constants["BLOCK_D"], BLOCK)
    ]
    scales = key.new_empty((n_groups, 2), dtype=torch.float32)
    options = {**constants, "E4M3_MAX": E4M3_MAX, "TINY": TINY, **ROUNDING}
    start = Launch(round_kernel, device, grid, (*numbers, n_k), options)
    start(key, value, *small, centres(key), peaks, scales)
    return SmallOperands(small[0], small[1], scales)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lists: BlockLists,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Fill `out`; arguments as in `fp8_attention`, for calls that `launch.refusal` lets pass.

    Nothing is compiled for a new length or number of heads.
    """
    attend_small(query, small_operands(key, value), key.shape[1], lists, scale, out)


def attend_small(
    query: torch.Tensor,
    small: SmallOperands,
    n_k_tokens: int,
    lists: BlockLists,
    scale: float,
    out: torch.Tensor,
) -> None:
    """The same from keys and values that were rounded before."""
    from shareprefill.runtime.ops.fp8_attention.hopper_kernel import fp8_attention_kernel

    (n_heads, n_q_tokens, head_dim), device = query.shape, query.device
    constants = kernel_constants(head_dim)
    numbers = (
        *(out.stride(0), out.stride(1), n_heads, n_heads // len(small.key)),
        *(hopper.heads_at_once(small.key, n_heads, L2_BYTES), lists.n_q, n_q_tokens, n_k_tokens),
        logit_factors(scale, None)[0],
    )
    grid = (min(lists.n_q * n_heads, multiprocessors(device)),)
    start = Launch(fp8_attention_kernel, device, grid, numbers, constants | launch_options())
    start(
        hopper.describe_tiles(query, BLOCK // 2),
        hopper.describe_tiles(small.key, BLOCK),
        hopper.describe_tiles(small.value, constants["BLOCK_D"]),
        small.scales,
        out,
        lists.offsets,
        lists.indices,
        lists.head_to_list,
        hopper.draw_counter(device),
    )
