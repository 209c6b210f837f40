"""Random block maps of a geometry."""

from __future__ import annotations

import torch

from shareprefill.runtime.ops.block_selection import LineWeights, head_blocks, smooth_maps
from shareprefill.runtime.ops.blocks import causal_blocks
from shareprefill.runtime.policies.smoothed import UNFITTED

# (n_query, n_key, block size)
Shape = tuple[int, int, int]


def random_maps(n_maps: int, shape: Shape, levels: int = 0, device: str = "cpu") -> torch.Tensor:
    """Peaked causal maps; with `levels`, multiples of 1 / levels whose sums are exact."""
    causal = causal_blocks(shape[0], shape[1] - shape[0], shape[2], device=device)
    maps = torch.rand(n_maps, *causal.shape, device=device) ** 6 * causal
    if levels:
        return (maps * levels / 8).round() / levels
    return maps / maps.sum(-1, keepdim=True)


def geometry(shape: Shape) -> dict[str, int]:
    """The sizes as the operators take them."""
    return dict(zip(("n_query", "n_key", "block_size"), shape, strict=True))


def sizes_of(maps: torch.Tensor) -> dict[str, int]:
    """Sizes of maps `[.., n_q, n_k]` whose blocks are of one token."""
    return geometry((maps.shape[-2], maps.shape[-1], 1))


def recall(maps: torch.Tensor, pattern: torch.Tensor) -> torch.Tensor:
    """Mass inside a pattern, mean over query blocks."""
    return (maps * pattern).sum(-1).mean(-1)


def head_pattern(maps: torch.Tensor, gamma: float | torch.Tensor) -> torch.Tensor:
    """The blocks above one threshold a map, by the operator, without any that is always read."""
    gammas = gamma if isinstance(gamma, torch.Tensor) else torch.full((len(maps),), gamma)
    return head_blocks(maps, gammas, **sizes_of(maps))[0]


def smooth(maps: torch.Tensor, weights: LineWeights = UNFITTED) -> torch.Tensor:
    """What maps of sampled rows are smoothed to."""
    return smooth_maps(maps, weights, **sizes_of(maps))
