"""Checks of what the operators of selection are given."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shareprefill.errors import ConfigError
from shareprefill.runtime.ops.blocks import count_blocks
from shareprefill.runtime.ops.inputs import check_block_size


def check_maps(name: str, maps: torch.Tensor) -> None:
    """Refuse what is not float32 `[S, n_q, n_k]`.

    Raises:
        ConfigError: says what was expected and what came; so do all checks here.
    """
    if maps.dtype != torch.float32 or maps.ndim != 3:
        raise ConfigError(
            f"{name} must be float32 [S, n_q, n_k], got {maps.dtype} of shape {tuple(maps.shape)}"
        )


def check_bitmap(name: str, bitmap: torch.Tensor) -> None:
    """Refuse what is not bool `[P, n_q, n_k]`."""
    if bitmap.dtype != torch.bool or bitmap.ndim != 3:
        raise ConfigError(
            f"{name} must be bool [P, n_q, n_k], got {bitmap.dtype} of shape {tuple(bitmap.shape)}"
        )


def check_geometry(maps: torch.Tensor | None, n_query: int, n_key: int, block_size: int) -> None:
    """Refuse sizes that are no geometry, and maps `[.., n_q, n_k]` that are not of it."""
    check_block_size(block_size)
    if not 1 <= n_query <= n_key:
        raise ConfigError(f"need 1 <= n_query <= n_key, got {n_query} and {n_key}")
    wanted = (count_blocks(n_query, block_size), count_blocks(n_key, block_size))
    if maps is not None and maps.shape[1:] != wanted:
        raise ConfigError(
            f"{n_query} queries and {n_key} keys in blocks of {block_size} make maps "
            f"[.., {wanted[0]}, {wanted[1]}], got shape {tuple(maps.shape)}"
        )


def check_always(sink_blocks: int, local_blocks: int) -> None:
    """Refuse negative numbers of blocks."""
    if sink_blocks < 0 or local_blocks < 0:
        raise ConfigError(
            f"sink_blocks and local_blocks must be at least 0, got {sink_blocks}, {local_blocks}"
        )


def check_vector(
    name: str, vector: torch.Tensor, dtype: torch.dtype, length: int, device: torch.device
) -> None:
    """Refuse what is not a `dtype` `[length]` on `device`."""
    if vector.dtype != dtype or vector.shape != (length,) or vector.device != device:
        raise ConfigError(
            f"{name} must be {dtype} [{length}] on {device}, "
            f"got {vector.dtype} of shape {tuple(vector.shape)} on {vector.device}"
        )


def check_range(name: str, index: torch.Tensor, end: int) -> None:
    """Refuse numbers from `end` on; only on a CPU, as a GPU would be waited for."""
    if index.device.type == "cpu" and len(index) and int(index.max()) >= end:
        raise ConfigError(f"{name} must lie below {end}, got {int(index.max())}")


def check_partners(
    name: str, partners: torch.Tensor, maps: torch.Tensor, index: torch.Tensor
) -> None:
    """Refuse `[P, n_q, n_k]` that do not go with maps, or no int64 `[S]` of them."""
    if partners.shape[1:] != maps.shape[1:] or partners.device != maps.device:
        raise ConfigError(
            f"{name} must be [P, {maps.shape[1]}, {maps.shape[2]}] on {maps.device} like maps, "
            f"got shape {tuple(partners.shape)} on {partners.device}"
        )
    check_vector("index", index, torch.int64, len(maps), maps.device)
    check_range("index", index, len(partners))


def check_out(
    out: torch.Tensor, dtype: torch.dtype, shape: Sequence[int], device: torch.device
) -> None:
    """Refuse an `out` that is not a contiguous `dtype` tensor of this shape on `device`."""
    if out.dtype != dtype or out.shape != tuple(shape) or out.device != device:
        raise ConfigError(
            f"out must be {dtype} of shape {tuple(shape)} on {device}, "
            f"got {out.dtype} of shape {tuple(out.shape)} on {out.device}"
        )
    if not out.is_contiguous():
        raise ConfigError(f"out must be contiguous, got strides {out.stride()}")
