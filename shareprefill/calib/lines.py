"""What the weights of an estimator of block maps are fitted to, taken while maps are captured."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from shareprefill.runtime.ops.block_selection import LineWeights, smooth_maps
from shareprefill.runtime.plan import default_geometry

LINE_NAMES = tuple(field.name for field in fields(LineWeights))

# Heads whose seven lines are in memory at once.
_HEADS = 8


def line_products(sampled: Tensor, full: Tensor, n_tokens: int, block_size: int) -> Tensor:
    """Sums of products of the lines of sampled maps, and of the exact maps, over a layer's blocks.

    Least squares needs nothing else: `[:7, :7]` are the normal equations' matrix and `[:7, 7]`
    their right side, and those of layers and prompts add up. Blocks that are always read are left
    out: nobody asks an estimate about them.

    Args:
        sampled: Maps of sampled rows, float32 `[H, n, n]`.
        full: Maps of all rows, likewise.
        n_tokens: Tokens of the prompt.
        block_size: Tokens a block.

    Returns:
        float64 `[8, 8]`, in the order of `LineWeights`, the exact map last.
    """
    geometry = default_geometry(n_tokens, block_size, full.device)
    free = geometry.causal & ~geometry.always
    total = torch.zeros(8, 8, dtype=torch.float64, device=full.device)
    for few, exact in zip(sampled.split(_HEADS), full.split(_HEADS), strict=True):
        lines = [
            smooth_maps(few, LineWeights(**{"itself": 0.0, name: 1.0}), **geometry.sizes)
            for name in LINE_NAMES
        ]
        values = torch.stack([t[:, free] for t in (*lines, exact)]).flatten(1).double()
        total += values @ values.T
    return total
