"""What launchers share: tiles, fixed per head dim, dtype and GPU generation; logits' factors."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from shareprefill.errors import UnsupportedError


@dataclass(frozen=True)
class Tiles:
    """Rows and keys of one step of a program, its warps and its pipeline depth."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def within(self, block_size: int) -> Tiles:
        """The tiles cut down to an attention block; a warp keeps at least 16 rows."""
        block_m = min(self.block_m, block_size)
        warps = max(1, min(self.num_warps, block_m // 16))
        return replace(
            self, block_m=block_m, block_n=min(self.block_n, block_size), num_warps=warps
        )

    def launch_options(self) -> dict[str, Any]:
        """Warps and pipeline depth as options of a launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


# Half precision, by the padded head dim. What bounds them is shared memory, which holds
# num_stages key and value tiles (2 * stages * block_n * dim * 2 bytes), and the accumulator
# (block_m * dim floats over 32 * num_warps threads of at most 255 registers).
# Hopper and Blackwell: 228 KB; 128 rows keep two warpgroups busy. Ampere (A100): 164 KB.
# Elsewhere (sm_86, sm_89, sm_120): 99 KB.
_DATACENTER = {
    64: Tiles(128, 128, 8, 3),
    128: Tiles(128, 128, 8, 2),
    256: Tiles(128, 64, 8, 2),
}
_AMPERE = {
    64: Tiles(128, 64, 4, 3),
    128: Tiles(128, 64, 8, 2),
    256: Tiles(64, 32, 4, 2),
}
_SMALL = {
    64: Tiles(128, 64, 4, 2),
    128: Tiles(64, 32, 4, 2),
    256: Tiles(64, 32, 4, 1),
}
# float32 runs without tensor cores (exact products): small tiles, registers decide.
_FLOAT32 = {
    64: Tiles(64, 32, 4, 2),
    128: Tiles(32, 32, 4, 2),
    256: Tiles(32, 16, 4, 1),
}


def padded_dim(dim: int) -> int:
    """Head dim of the tiles: a power of two, at least what a tensor core multiplies."""
    return max(16, 1 << (dim - 1).bit_length())


def select_tiles(dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tiles:
    """Tiles for a padded head dim (the larger of keys' and values').

    Raises:
        UnsupportedError: the head dim is above 256.
    """
    if dim > 256:
        raise UnsupportedError(
            f"the Triton kernels take a head_dim of at most 256, got {dim}; use impl='reference'"
        )
    if dtype == torch.float32:
        table = _FLOAT32
    elif capability[0] in (9, 10):
        table = _DATACENTER
    elif capability == (8, 0):
        table = _AMPERE
    else:
        table = _SMALL
    return table[max(dim, 64)]


def map_tiles(dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tiles:
    """Tiles of kernels without an accumulator, for a padded head dim.

    Each key tile is read by all tiles of rows: more rows in a tile mean less traffic in the L2
    cache, which bounds 64 rows on an H100. Two programs of these tiles fit on a multiprocessor.

    Raises:
        UnsupportedError: the head dim is above 256.
    """
    tiles = select_tiles(dim, dtype, capability)
    if dtype != torch.float32 and (capability[0] in (9, 10) or capability == (8, 0)):
        return Tiles(block_m=128, block_n=64, num_warps=8, num_stages=2)
    return tiles


@lru_cache(maxsize=64)
def device_capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; the interpreter counts as the smallest."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; the interpreter, which runs programs one by one, counts as two."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=64)
def overlaps(device: torch.device) -> bool:
    """Whether a launch may begin while the one before it ends (`triton_steps.wait_for_last`)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def check_tile_block_size(block_size: int) -> None:
    """Refuse block sizes that tiles cannot fill.

    Raises:
        UnsupportedError: not a power of two of at least 16.
    """
    if block_size < 16 or block_size & (block_size - 1):
        raise UnsupportedError(
            "the Triton kernels take a block_size that is a power of two of at least 16, "
            f"got {block_size}; use impl='reference'"
        )


def logit_factors(scale: float, softcap: float | None) -> tuple[float, float]:
    """The kernels' `scale_log2` and `softcap_log2`, by which logits are in units of log2.

    With a soft-cap the first one holds what `cap_logits` wants: `2 log2(e) / softcap`.
    """
    log2e = 1.0 / math.log(2.0)
    if softcap is None:
        return scale * log2e, 0.0
    return 2.0 * log2e * scale / softcap, softcap * log2e
