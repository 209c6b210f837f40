"""Launch of the Hopper kernel of pooled attention."""

# The checker does not know that a Gluon kernel takes launch options.
# pyright: reportCallIssue=false

from __future__ import annotations

import importlib.util
import math
from functools import lru_cache
from importlib.metadata import version
from typing import Any

import torch

from shareprefill.runtime.ops.blocks import count_blocks
from shareprefill.runtime.ops.tiles import device_capability, multiprocessors

HEAD_DIMS = (64, 96, 128)
BLOCK = 128
# Keys and values of heads that run at one time should stay in the 50 MB of L2.
L2_BYTES = 32 * 2**20


def kernel_constants(
    head_dim: int, shared: int, *, has_heads: bool, has_sinks: bool
) -> dict[str, Any]:
    """Compile-time arguments of `pooled_hopper_kernel`."""
    block_d = 64 if head_dim <= 64 else 128
    return {
        "SHARED": shared,
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK": BLOCK,
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
    """Why the kernel cannot run on these inputs; None if it can."""
    if query.device.type != "cuda" or device_capability(query.device) != (9, 0):
        return "it runs on Hopper GPUs (compute capability 9.0)"
    if not _has_gluon():
        return "it needs triton >= 3.6"
    if value is None:
        return "it computes maps with an output; without value there is impl='triton'"
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"it computes bfloat16 and float16, got {query.dtype}"
    if query.shape[2] not in HEAD_DIMS or value.shape[2] != query.shape[2]:
        return (
            f"it takes equal head dims of {', '.join(map(str, HEAD_DIMS))}, "
            f"got {query.shape[2]} for keys and {value.shape[2]} for values"
        )
    if block_size != BLOCK:
        return f"it takes a block_size of {BLOCK}, got {block_size}"
    if softcap is not None:
        return "it has no soft-cap"
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        strides = _tma_strides(tensor)
        if tensor.data_ptr() % 16 or any(stride % 8 or stride <= 0 for stride in strides[:2]):
            return (
                f"TMA takes 16-byte-aligned rows, got {name} with strides {tensor.stride()} "
                f"at an address of {tensor.data_ptr() % 16} modulo 16"
            )
    return None


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
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from shareprefill.runtime.ops.pooled_attention.gluon_kernel import pooled_hopper_kernel

    n_heads, n_q_tokens, head_dim = query.shape
    n_groups, n_k_tokens, _ = key.shape
    n_q, n_k = count_blocks(n_q_tokens, block_size), count_blocks(n_k_tokens, block_size)
    shared = n_heads // n_groups
    n_slots = n_heads if heads is None else len(heads)
    out = query.new_empty((n_slots, n_q_tokens, head_dim))
    maps = query.new_empty((n_slots, n_q, 2, n_k), dtype=torch.float32)
    if n_slots == 0:
        return out, maps[:, :, 0]
    constants = kernel_constants(
        head_dim, shared, has_heads=heads is not None, has_sinks=sinks is not None
    )
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    descriptors = [
        TensorDescriptor(
            tensor,
            list(tensor.shape),
            _tma_strides(tensor),
            [1, rows, constants["BLOCK_D"]],
            layout,
        )
        for tensor, rows in ((query, BLOCK // 2), (key, BLOCK), (value, BLOCK))
    ]
    group_bytes = 2 * n_k_tokens * head_dim * key.element_size()
    n_at_once = max(1, min(n_groups, L2_BYTES // group_bytes)) * shared
    programs = min(n_q * n_slots, multiprocessors(query.device))
    mass = query.new_empty(programs * n_k * BLOCK, dtype=torch.float32)
    unused = maps  # stands in for tensors that the kernel does not touch
    with torch.cuda.device_of(query):
        pooled_hopper_kernel[(programs,)](
            *descriptors,
            out,
            maps,
            mass,
            unused if heads is None else heads.contiguous(),
            unused if sinks is None else sinks,
            out.stride(0),
            out.stride(1),
            n_slots,
            n_at_once,
            n_q,
            n_k,
            n_q_tokens,
            n_k_tokens,
            scale / math.log(2.0),
            **constants,
            num_warps=4,
        )
    return out, maps.sum(2)


@lru_cache(maxsize=1)
def _has_gluon() -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    return tuple(int(part) for part in version("triton").split(".")[:2]) >= (3, 6)


def _tma_strides(tensor: torch.Tensor) -> list[int]:
    """Strides, where those of dims with one element are made valid."""
    rows = tensor.stride(1) if tensor.shape[1] > 1 else tensor.shape[2]
    heads = tensor.stride(0) if tensor.shape[0] > 1 else tensor.shape[2]
    return [heads, rows, 1]
