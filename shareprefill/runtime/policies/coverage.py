"""Patterns that cover a head's mass over all of its query blocks together."""

from __future__ import annotations

import torch
from torch import Tensor

# Halvings of the threshold's range of 40 octaves: to 4e-5 octaves.
_STEPS = 20
_OCTAVES = 40.0


def head_pattern(maps: Tensor, gamma: Tensor) -> Tensor:
    """The blocks above one threshold a head whose mass is the share `gamma` of the head's mass.

    Where a pattern that covers `gamma` of every row spends as much on rows of even attention as
    they ask for, one threshold for the head spends every block where it gains most: of all
    patterns of as many blocks it has the largest recall, which is a mean over rows. FlexPrefill
    (arXiv 2502.20766, algorithm 4) ranks its query-aware blocks over the whole map, too.

    The threshold is found by halving its logarithm, without sorting.

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
    maps = maps.float()
    total = maps.sum((1, 2))
    # A sum of float32 values that should reach gamma exactly may miss it by rounding.
    wanted = gamma.to(maps.device) * total * (1 - 1e-6)
    high = maps.amax((1, 2)).clamp(min=torch.finfo(torch.float32).tiny).log2()
    low = high - _OCTAVES
    for _ in range(_STEPS):
        middle = (low + high) / 2
        kept = torch.where(maps >= middle.exp2()[:, None, None], maps, 0.0).sum((1, 2))
        enough = kept >= wanted
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    threshold = torch.where(gamma.to(maps.device) >= 1, 0.0, low.exp2())
    return (maps >= threshold[:, None, None]) & (maps > 0)


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
