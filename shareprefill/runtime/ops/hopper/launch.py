"""What the launches of the Gluon kernels for Hopper share."""

from __future__ import annotations

import importlib.metadata
from functools import cache, lru_cache
from typing import Any

import torch

from shareprefill.runtime.ops.triton_tiles import device_capability

HEAD_DIMS = (64, 96, 128)
BLOCK = 128  # query rows and keys of a tile


def unavailable(device: torch.device) -> str | None:
    """Why the kernels compute nothing on a device; None where they do."""
    if device.type != "cuda":
        return f"needs a Hopper GPU (compute capability 9.0), got {device}"
    capability = device_capability(device)
    if capability != (9, 0):
        return f"needs a Hopper GPU (compute capability 9.0), got {capability[0]}.{capability[1]}"
    found = _triton_version()
    if found is None:
        return "needs triton 3.6 or newer, which is not installed; get shareprefill[triton]"
    if tuple(int(part) for part in found.split(".")[:2]) < (3, 6):
        return f"needs triton 3.6 or newer, found {found}"
    return None


def refusal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block_size: int
) -> str | None:
    """Why the kernels do not take the tensors of a call; None where they do."""
    reason = unavailable(query.device)
    if reason is not None:
        return reason
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"computes float16 and bfloat16, got {query.dtype}"
    dims = (query.shape[2], value.shape[2])
    if dims[0] != dims[1] or dims[0] not in HEAD_DIMS:
        return f"takes one head_dim of 64, 96 or 128, got {dims[0]} and {dims[1]}"
    if block_size != BLOCK:
        return f"takes a block_size of {BLOCK} tokens, got {block_size}"
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        heads, tokens, _ = tile_strides(tensor)
        if tensor.data_ptr() % 16 or heads % 8 or tokens % 8 or heads <= 0 or tokens <= 0:
            return (
                f"takes {name} in rows that start at multiples of 16 bytes, got strides "
                f"{tensor.stride()} and an address of {tensor.data_ptr() % 16} modulo 16"
            )
    return None


def padded_head_dim(head_dim: int) -> int:
    """Columns of the tiles, of which those past the head dim are zero."""
    return 64 if head_dim <= 64 else 128


def describe_tiles(tensor: torch.Tensor, rows: int) -> Any:
    """A TMA descriptor of tiles of `rows` rows of `[H, N, D]`, which `refusal` lets pass."""
    shape = tensor.shape
    kind, fields = _described(rows, padded_head_dim(shape[2]), tensor.dtype)
    # A descriptor's own checks, which `refusal` has made, take longer than all the rest.
    descriptor = object.__new__(kind)
    descriptor.__dict__.update(fields, base=tensor, shape=list(shape), strides=tile_strides(tensor))
    return descriptor


@lru_cache(maxsize=64)
def _described(rows: int, columns: int, dtype: torch.dtype) -> tuple[type, dict[str, Any]]:
    """Class and fields of a descriptor of such tiles."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    one = torch.empty((1, rows, columns), dtype=dtype, device="cpu")
    strides = [rows * columns, columns, 1]
    descriptor = TensorDescriptor(one, list(one.shape), strides, [1, rows, columns], layout)
    return TensorDescriptor, vars(descriptor)


def tile_strides(tensor: torch.Tensor) -> list[int]:
    """Strides of `[heads, tokens, dim]`; what a dim of one element has is made valid."""
    heads, tokens, dim = tensor.shape
    head_stride, token_stride, _ = tensor.stride()
    return [dim if heads == 1 else head_stride, dim if tokens == 1 else token_stride, 1]


def heads_at_once(key: torch.Tensor, n_heads: int, l2_bytes: int) -> int:
    """Query heads that run at one time, so that their keys and values fit in `l2_bytes`."""
    n_groups, n_k_tokens, head_dim = key.shape
    group_bytes = 2 * n_k_tokens * head_dim * key.element_size()
    return max(1, min(n_groups, l2_bytes // group_bytes)) * (n_heads // n_groups)


def draw_counter(device: torch.device) -> torch.Tensor:
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


@cache
def _triton_version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None
