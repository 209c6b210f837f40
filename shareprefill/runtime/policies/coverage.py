"""Patterns that cover a head's mass over all of its query blocks together."""

from __future__ import annotations

import torch
from torch import Tensor

from shareprefill.runtime.geometry import Geometry
from shareprefill.runtime.ops.block_selection import head_blocks
from shareprefill.runtime.ops.block_selection.reference import blocks_above_threshold


def head_pattern(maps: Tensor, gamma: Tensor) -> Tensor:
    """The blocks above one threshold a head whose mass is the share `gamma` of the head's mass.

    Where a pattern that covers `gamma` of every row spends as much on rows of even attention as
    they ask for, one threshold for the head spends every block where it gains most: of all
    patterns of as many blocks it has the largest recall, which is a mean over rows. FlexPrefill
    (arXiv 2502.20766, algorithm 4) ranks its query-aware blocks over the whole map, too.

    The threshold is that of the operator `head_blocks`, which adds what is always read.

    Args:
        maps: Block maps `[S, n_q, n_k]`; zero where nothing may be read.
        gamma: Share of the mass `[S]`, in (0, 1]; 1 keeps every block that holds any.

    Returns:
        bool `[S, n_q, n_k]`; equal blocks are kept or left together.

    >>> maps = torch.tensor([[[1.0, 0.0], [0.6, 0.4]]])
    >>> head_pattern(maps, torch.tensor([0.75]))
    tensor([[[ True, False],
             [ True, False]]])
    """
    return blocks_above_threshold(maps.float(), gamma.to(maps.device))


def covering_blocks(geometry: Geometry, maps: Tensor, gamma: Tensor) -> Tensor:
    """The causal blocks of `head_pattern`, by the operator.

    Args:
        geometry: Of the maps.
        maps: Block maps, float32 `[S, n_q, n_k]`.
        gamma: Share of the mass, float32 `[S]`.

    Returns:
        bool `[S, n_q, n_k]`; every causal block of a map that holds NaN or Inf.
    """
    return head_blocks(maps, gamma, **geometry.sizes)[0]


def densest_blocks(maps: Tensor, causal: Tensor, density: float) -> Tensor:
    """The blocks of most mass, as many as a share of the causal blocks: `[S, n_q, n_k]` bool.

    Args:
        maps: Block maps `[S, n_q, n_k]`.
        causal: Causal blocks, bool `[n_q, n_k]`.
        density: Share of the causal blocks, in (0, 1].
    """
    flat = torch.where(causal, maps.float(), -1.0).flatten(1)
    order = flat.argsort(dim=1, descending=True, stable=True)
    place = torch.empty_like(order).scatter_(
        1, order, torch.arange(flat.shape[1], device=maps.device).expand_as(order)
    )
    return (place < causal.sum() * density).view_as(maps) & causal
