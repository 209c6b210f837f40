"""What the launches of the Gluon kernels for Hopper share."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch

from shareprefill.runtime.ops.devices import stream_of_tables
from shareprefill.runtime.ops.pages import LEAST_PAGE, PagedTokens, Tokens
from shareprefill.runtime.ops.prepared import triton_version
from shareprefill.runtime.ops.triton_tiles import device_capability

HEAD_DIMS = (64, 96, 128)
BLOCK = 128  # query rows and keys of a tile
SWIZZLE_BYTES = 128  # of a row, in a band of columns of a tile in shared memory


def unavailable(device: torch.device) -> str | None:
    """Why the kernels compute nothing on a device; None where they do."""
    if device.type != "cuda":
        return f"needs a Hopper GPU (compute capability 9.0), got {device}"
    capability = device_capability(device)
    if capability != (9, 0):
        return f"needs a Hopper GPU (compute capability 9.0), got {capability[0]}.{capability[1]}"
    found = triton_version()
    if found is None:
        return "needs triton 3.6 or newer, which is not installed; get shareprefill[triton]"
    if tuple(int(part) for part in found.split(".")[:2]) < (3, 6):
        return f"needs triton 3.6 or newer, found {found}"
    return None


def refusal(query: torch.Tensor, key: Tokens, value: Tokens, block_size: int) -> str | None:
    """Why the kernels do not take the tensors of a call; None where they do.

    Of pages that they cannot read (`page_refusal`) the gathered tokens are meant.
    """
    dims = (query.shape[2], value.shape[2])
    reason = refusal_of_kind(query.device, query.dtype, dims, block_size)
    if reason is not None:
        return reason
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if isinstance(tensor, PagedTokens):
            continue
        heads, tokens, _ = tile_strides(tensor)
        if tensor.data_ptr() % 16 or heads % 8 or tokens % 8 or heads <= 0 or tokens <= 0:
            return (
                f"takes {name} in rows that start at multiples of 16 bytes, got strides "
                f"{tensor.stride()} and an address of {tensor.data_ptr() % 16} modulo 16"
            )
    return None


def refusal_of_kind(
    device: torch.device, dtype: torch.dtype, dims: tuple[int, int], block_size: int
) -> str | None:
    """Why the kernels take no tensors of a kind; None where they do.

    Args:
        device: The tensors'.
        dtype: The tensors'.
        dims: Head dims of queries and of values.
        block_size: Tokens in a block.
    """
    reason = unavailable(device)
    if reason is not None:
        return reason
    if dtype not in (torch.float16, torch.bfloat16):
        return f"computes float16 and bfloat16, got {dtype}"
    return refusal_of_sizes(dims, block_size)


def refusal_of_sizes(dims: tuple[int, int], block_size: int) -> str | None:
    """Why the kernels have no tiles for some head dims and block size; None where they have."""
    if dims[0] != dims[1] or dims[0] not in HEAD_DIMS:
        return f"takes one head_dim of 64, 96 or 128, got {dims[0]} and {dims[1]}"
    if block_size != BLOCK:
        return f"takes a block_size of {BLOCK} tokens, got {block_size}"
    return None


def page_refusal(tokens: PagedTokens) -> str | None:
    """Why the kernels do not read tokens in their pages; None where they do."""
    if tokens.page_size % LEAST_PAGE:
        return f"reads pages of a multiple of {LEAST_PAGE} tokens, got {tokens.page_size}"
    pool = tokens.pool
    pages, heads, rows, last = pool.stride()
    if last != 1 or pool.data_ptr() % 16 or any(step % 8 or step <= 0 for step in (pages, rows)):
        return f"reads pages in rows that start at multiples of 16 bytes, got {pool.stride()}"
    if len(tokens) > 1 and (heads % 8 or heads <= 0 or pages % heads):
        return f"reads heads that divide the step between pages, got strides {pool.stride()}"
    if len(pool) * page_step(tokens) >= 2**31:
        return f"reads fewer than 2**31 heads' steps of pages, got {len(pool)} pages"
    return None


def page_step(tokens: Tokens) -> int:
    """Steps between heads that one between pages is; 0 for a tensor.

    Whatever the order of dims in a pool, page p of head g starts at `p * page_step + g` steps. So
    a descriptor has one dim for both, most of whose places are of no tile and are never read.
    """
    if not isinstance(tokens, PagedTokens):
        return 0
    return 1 if len(tokens) == 1 else tokens.pool.stride(0) // tokens.pool.stride(1)


def padded_head_dim(head_dim: int) -> int:
    """Columns of the tiles, of which those past the head dim are zero."""
    return 64 if head_dim <= 64 else 128


def describe_tiles(tokens: Tokens, rows: int) -> Any:
    """A TMA descriptor of tiles of `rows` rows of `[H, N, D]`, which `refusal` lets pass.

    Of pages, which `page_refusal` lets pass, it is one of the whole pool, `[slots, page size, D]`:
    page p of head g is slot `p * page_step + g`. Where pages end within tiles it is one of parts of
    tiles, of the rows that both hold whole and of the columns that lie together in shared memory.
    """
    shape = list(tokens.shape)
    columns = padded_head_dim(shape[2])
    if isinstance(tokens, PagedTokens):
        pool, step = tokens.pool, page_step(tokens)
        shape = [(len(pool) - 1) * step + len(tokens), tokens.page_size, shape[2]]
        strides = [pool.stride(0) // step, pool.stride(2), 1]
        if tokens.page_size % rows:
            rows = math.gcd(tokens.page_size, rows)
            columns = SWIZZLE_BYTES // tokens.element_size()
    else:
        pool, strides = tokens, tile_strides(tokens)
    kind, fields = _described(rows, columns, tokens.dtype)
    # A descriptor's own checks, which `refusal` has made, take longer than all the rest.
    descriptor = object.__new__(kind)
    descriptor.__dict__.update(fields, base=pool, shape=shape, strides=strides)
    return descriptor


@lru_cache(maxsize=64)
def _described(rows: int, columns: int, dtype: torch.dtype) -> tuple[type, dict[str, Any]]:
    """Class and fields of a descriptor of such tiles."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = gl.NVMMASharedLayout(
        swizzle_byte_width=min(SWIZZLE_BYTES, columns * dtype.itemsize),
        element_bitwidth=8 * dtype.itemsize,
        rank=3,
    )
    one = torch.empty((1, rows, columns), dtype=dtype, device="cpu")
    strides = [rows * columns, columns, 1]
    descriptor = TensorDescriptor(one, list(one.shape), strides, [1, rows, columns], layout)
    return TensorDescriptor, vars(descriptor)


def tile_strides(tensor: torch.Tensor) -> list[int]:
    """Strides of `[heads, tokens, dim]`; what a dim of one element has is made valid."""
    heads, tokens, dim = tensor.shape
    head_stride, token_stride, _ = tensor.stride()
    return [dim if heads == 1 else head_stride, dim if tokens == 1 else token_stride, 1]


def heads_at_once(key: Tokens, n_heads: int, l2_bytes: int) -> int:
    """Query heads that run at one time, so that their keys and values fit in `l2_bytes`."""
    n_groups, n_k_tokens, head_dim = key.shape
    group_bytes = 2 * n_k_tokens * head_dim * key.element_size()
    return max(1, min(n_groups, l2_bytes // group_bytes)) * (n_heads // n_groups)


def draw_counter(device: torch.device) -> torch.Tensor:
    """An int32 zero for drawing tiles, at zero again after the launch.

    Launches on one stream follow one another and share theirs. A CUDA graph gets one of its own,
    as any stream may replay it.
    """
    stream = stream_of_tables(device)
    if stream is None:
        return torch.zeros(1, dtype=torch.int32, device=device)
    return _stream_counter(device, stream)


@lru_cache(maxsize=1024)
def _stream_counter(device: torch.device, stream: int) -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)
