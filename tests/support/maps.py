"""Random block maps of a geometry."""

from __future__ import annotations

import torch

from shareprefill.runtime.ops.blocks import causal_blocks

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
