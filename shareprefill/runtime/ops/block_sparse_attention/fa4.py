"""Block-sparse attention by FlashAttention-4's forward kernel, where it is installed.

The package `flash-attn-4` (BSD-3-Clause) is a beta whose forward function is not yet public under
its final name, so one version is taken and no other.
"""

# An optional package, see `unavailable`.
# pyright: reportMissingImports=false

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from shareprefill.runtime.ops.blocks import BlockLists
from shareprefill.runtime.ops.devices import device_of

VERSION = "4.0.0b36"
# Largest working memory of a call: the lists of a launch, and the rows of heads that it must keep.
WORK_BYTES = 512 * 2**20
# Keys of a tile of its kernel, by the largest head dim that the tile serves on compute
# capability 9: what it would choose itself, as far as a power of two.
_TILES = {128: 128, 256: 64}


@cache
def _installed_version() -> str | None:
    try:
        return importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def _is_whole() -> bool:
    """Whether the compiler that its kernels are written for is there to be imported."""
    return importlib.util.find_spec("cutlass") is not None


def unavailable(device: torch.device) -> str | None:
    """Why FlashAttention-4 computes nothing on a device; None where it does."""
    if device.type != "cuda":
        return f"needs a CUDA GPU of compute capability 9, got {device}"
    found = _installed_version()
    if found is None:
        return f"needs flash-attn-4 {VERSION}, which is not installed; get shareprefill[fa4]"
    if found != VERSION:
        return f"needs flash-attn-4 {VERSION}, found {found}; get shareprefill[fa4]"
    if not _is_whole():
        return "needs nvidia-cutlass-dsl, which cannot be imported; get shareprefill[fa4] anew"
    capability = torch.cuda.get_device_capability(device)
    # Its Blackwell kernel takes lists for 256 query rows at a time, its others take none.
    if capability[0] != 9:
        return f"needs compute capability 9, got {capability[0]}.{capability[1]}"
    return None


def supports(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block_size: int
) -> str | None:
    """Why `attend` does not take a call; None where it does."""
    refusal = unavailable(query.device)
    if refusal is not None:
        return refusal
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"computes float16 and bfloat16, got {query.dtype}"
    dims = (query.shape[2], value.shape[2])
    if dims != (256, 256) and not all(8 <= dim <= 128 and dim % 8 == 0 for dim in dims):
        return f"takes a head_dim of 256 or a multiple of 8 up to 128, got {dims[0]} and {dims[1]}"
    if block_size not in (128, 256):
        return f"takes a block_size of 128 or 256 tokens, got {block_size}"
    return None


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
    """Fill `out` (and `lse`); arguments as in `block_sparse_attention`.

    Its lists are a padded array `[H, rows, tiles]`, so query blocks go in launches whose arrays
    fit `WORK_BYTES`. A head without blocks gets zeros from it: rows of heads that are left out are
    kept aside meanwhile, as only the device knows which they are.
    """
    if not _aligned(out):
        aligned = out.contiguous()
        attend(query, key, value, lists, scale, aligned, lse, softcap, sinks)
        out.copy_(aligned)
        return
    heads, n_q_tokens, _ = query.shape
    n_k_tokens, value_dim = value.shape[1:]
    size = lists.block_size
    tile = _TILES[128 if max(query.shape[2], value_dim) <= 128 else 256]
    width = -(-n_k_tokens // tile)
    row_bytes = heads * (width * 4 + size * value_dim * out.itemsize)
    at_once = min(lists.n_q, max(1, WORK_BYTES // row_bytes))
    # Counts, zeros and tiles in one allocation, each from a multiple of 16 bytes on.
    zeros_at = -(-heads * at_once // 4) * 4
    tiles_at = zeros_at + -(-at_once // 4) * 4
    work = torch.empty(tiles_at + heads * at_once * width, dtype=torch.int32, device=query.device)
    kept = out.new_empty((heads, min(at_once * size, n_q_tokens), value_dim))
    offset = n_k_tokens - n_q_tokens
    for first in range(0, lists.n_q, at_once):
        rows = min(at_once, lists.n_q - first)
        begin, end = first * size, min((first + rows) * size, n_q_tokens)
        keys = offset + end
        width = -(-keys // tile)
        counts = work[: heads * rows].view(1, heads, rows)
        nothing = work[zeros_at : zeros_at + rows]
        tiles = work[tiles_at : tiles_at + heads * rows * width].view(1, heads, rows, width)
        step = _Step(lists, first, rows, n_q_tokens, n_k_tokens)
        step.prepare(counts, nothing, tiles, tile, out, kept)
        whole = rows == lists.n_q
        _forward(
            query if whole else query[:, begin:end],
            key if whole else key[:, :keys],
            value if whole else value[:, :keys],
            counts,
            tiles,
            nothing,
            (size, tile),
            scale,
            out if whole else out[:, begin:end],
            lse if whole or lse is None else lse[:, begin:end],
            softcap,
            sinks,
        )
        step.restore(out, kept)
    if lse is not None and sinks is not None:
        # It counts the sinks of heads that are left out, too.
        lse.masked_fill_((lists.head_to_list < 0)[:, None], -torch.inf)


def _aligned(out: torch.Tensor) -> bool:
    """Whether its kernel can write here: rows start at multiples of 16 bytes."""
    strides = (stride * out.itemsize for stride in out.stride()[:-1])
    return out.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in strides)


@dataclass(frozen=True)
class _Step:
    """What goes before and after a launch of its kernel for query blocks from `first` on."""

    lists: BlockLists
    first: int
    rows: int
    n_q_tokens: int
    n_k_tokens: int

    def prepare(
        self,
        counts: torch.Tensor,
        nothing: torch.Tensor,
        tiles: torch.Tensor,
        tile: int,
        out: torch.Tensor,
        kept: torch.Tensor,
    ) -> None:
        """Fill the lists of key tiles, and keep the rows of heads that are left out.

        Args:
            counts: int32 `[1, H, rows]`, tiles of each query block.
            nothing: int32 `[rows]`, becomes zeros.
            tiles: int32 `[1, H, rows, width]`.
            tile: keys in a tile.
            out: `[H, Nq, Dv]`.
            kept: `[H, N, Dv]`, N at least the rows' tokens.
        """
        from shareprefill.runtime.ops.block_sparse_attention.fa4_kernel import prepare_kernel

        lists = self.lists
        with device_of(out):
            prepare_kernel[(counts.numel(),)](
                lists.offsets,
                lists.indices,
                lists.head_to_list,
                counts,
                nothing,
                tiles,
                out,
                kept,
                out.stride(0),
                out.stride(1),
                kept.stride(0),
                kept.stride(1),
                self.first,
                self.rows,
                lists.n_q,
                self.n_q_tokens,
                self.n_k_tokens,
                tiles.shape[3],
                **self._constants(out, TILE=tile, BLOCK=256),
            )

    def restore(self, out: torch.Tensor, kept: torch.Tensor) -> None:
        """Put back what was kept."""
        from shareprefill.runtime.ops.block_sparse_attention.fa4_kernel import restore_kernel

        with device_of(out):
            restore_kernel[(len(out) * self.rows,)](
                self.lists.head_to_list,
                out,
                kept,
                out.stride(0),
                out.stride(1),
                kept.stride(0),
                kept.stride(1),
                self.first,
                self.rows,
                self.n_q_tokens,
                **self._constants(out),
            )

    def _constants(self, out: torch.Tensor, **others: int) -> dict[str, Any]:
        dim = out.shape[2]
        return {
            **others,
            "BLOCK_SIZE": self.lists.block_size,
            "DIM": dim,
            "BLOCK_D": max(16, 1 << (dim - 1).bit_length()),
            "BLOCK_M": 32,
            "num_warps": 4,
        }


def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    counts: torch.Tensor,
    tiles: torch.Tensor,
    nothing: torch.Tensor,
    block_size: tuple[int, int],
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> None:
    """One launch of its forward kernel, which wants `[1, N, H, D]`.

    All tiles go into its list of masked ones, and `nothing`, zeros `[rows]`, is its list of full
    ones: with `causal` the kernel masks both alike, and without it starts with the cheapest rows.
    """
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import _flash_attn_fwd

    with device_of(query):
        _flash_attn_fwd(
            *(tensor.transpose(0, 1)[None] for tensor in (query, key, value)),
            softmax_scale=scale,
            causal=True,
            softcap=softcap,
            learnable_sink=sinks,
            block_sparse_tensors=BlockSparseTensorsTorch(
                mask_block_cnt=counts,
                mask_block_idx=tiles,
                full_block_cnt=nothing[None, None],
                full_block_idx=nothing[None, None, :, None],
                block_size=block_size,
            ),
            out=out.transpose(0, 1)[None],
            lse=None if lse is None else lse[None],
        )
