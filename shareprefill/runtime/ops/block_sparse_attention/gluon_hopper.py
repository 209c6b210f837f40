"""Launch of the Hopper kernel of block-sparse attention."""

from __future__ import annotations

import importlib.metadata
import math
from functools import cache, lru_cache
from typing import Any

import torch

from shareprefill.runtime.ops.blocks import BlockLists

HEAD_DIMS = (64, 96, 128)
BLOCK = 128
# Keys and values of the heads that run at one time: of the 50 MB of L2, which queries and outputs
# pass through as well.
L2_BYTES = 16 * 2**20


def unavailable(device: torch.device) -> str | None:
    """Why the kernel computes nothing on a device; None where it does."""
    if device.type != "cuda":
        return f"needs a Hopper GPU (compute capability 9.0), got {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return f"needs a Hopper GPU (compute capability 9.0), got {capability[0]}.{capability[1]}"
    found = _triton_version()
    if found is None:
        return "needs triton 3.6 or newer, which is not installed; get shareprefill[triton]"
    if tuple(int(part) for part in found.split(".")[:2]) < (3, 6):
        return f"needs triton 3.6 or newer, found {found}"
    return None


def supports(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lists: BlockLists
) -> str | None:
    """Why `attend` does not take a call; None where it does."""
    refusal = unavailable(query.device)
    if refusal is not None:
        return refusal
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"computes float16 and bfloat16, got {query.dtype}"
    dims = (query.shape[2], value.shape[2])
    if dims[0] != dims[1] or dims[0] not in HEAD_DIMS:
        return f"takes one head_dim of 64, 96 or 128, got {dims[0]} and {dims[1]}"
    if lists.block_size != BLOCK:
        return f"takes a block_size of {BLOCK} tokens, got {lists.block_size}"
    for name, tensor in {"query": query, "key": key, "value": value}.items():
        if tensor.data_ptr() % 16 or any(s <= 0 or s % 8 for s in _tma_strides(tensor)[:2]):
            return (
                f"takes {name} in rows that start at multiples of 16 bytes, got strides "
                f"{tensor.stride()} and an address of {tensor.data_ptr() % 16} modulo 16"
            )
    return None


def kernel_constants(
    head_dim: int, *, has_lse: bool, has_softcap: bool = False, has_sinks: bool = False
) -> dict[str, Any]:
    """Compile-time arguments of `block_sparse_hopper_kernel`."""
    block_d = 64 if head_dim <= 64 else 128
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK": BLOCK,
        "STAGES": 256 // block_d,
        "HAS_LSE": has_lse,
        "HAS_SOFTCAP": has_softcap,
        "HAS_SINKS": has_sinks,
    }


def launch_options() -> dict[str, Any]:
    """Options of a launch; the warps are one consumer's, to which the kernel adds eight."""
    return {"num_warps": 4, "enable_fp_fusion": True}


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
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
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from shareprefill.runtime.ops.block_sparse_attention.gluon_kernel import (
        block_sparse_hopper_kernel,
    )

    n_heads, n_q_tokens, head_dim = query.shape
    n_groups, n_k_tokens, _ = key.shape
    shared = n_heads // n_groups
    constants = kernel_constants(
        head_dim,
        has_lse=lse is not None,
        has_softcap=softcap is not None,
        has_sinks=sinks is not None,
    )
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    q_desc, k_desc, v_desc = (
        TensorDescriptor(
            tensor,
            list(tensor.shape),
            _tma_strides(tensor),
            [1, rows, constants["BLOCK_D"]],
            layout,
        )
        for tensor, rows in ((query, BLOCK // 2), (key, BLOCK), (value, BLOCK))
    )
    group_bytes = 2 * n_k_tokens * head_dim * key.element_size()
    n_at_once = max(1, min(n_groups, L2_BYTES // group_bytes)) * shared
    log2e = 1.0 / math.log(2.0)
    with torch.cuda.device_of(query):
        block_sparse_hopper_kernel[(min(lists.n_q * n_heads, _multiprocessors(query.device)),)](
            q_desc,
            k_desc,
            v_desc,
            out,
            out if lse is None else lse,
            out if sinks is None else sinks,
            lists.offsets,
            lists.indices,
            lists.pattern,
            _counter(query.device),
            out.stride(0),
            out.stride(1),
            n_heads,
            shared,
            n_at_once,
            lists.n_q,
            n_q_tokens,
            n_k_tokens,
            scale * log2e if softcap is None else 2.0 * log2e * scale / softcap,
            0.0 if softcap is None else softcap * log2e,
            **constants,
            **launch_options(),
        )


@cache
def _triton_version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


@lru_cache(maxsize=64)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _tma_strides(tensor: torch.Tensor) -> list[int]:
    """Strides of `[heads, tokens, dim]`; what a dim of one element has is made valid."""
    strides = [
        tensor.shape[2] if size == 1 else stride
        for size, stride in zip(tensor.shape[:2], tensor.stride()[:2], strict=True)
    ]
    return [*strides, 1]


def _counter(device: torch.device) -> torch.Tensor:
    """An int32 zero for drawing tiles, at zero again after the launch.

    Launches on one stream follow one another and share theirs. A CUDA graph gets one of its own,
    as any stream may replay it.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device)
    return _stream_counter(stream.device, stream.cuda_stream)


@lru_cache(maxsize=1024)
def _stream_counter(device: torch.device, stream: int) -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)
