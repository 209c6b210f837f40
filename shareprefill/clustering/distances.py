"""Distances between heads: Jaccard of their γ-patterns, or cosine of their codes."""

from __future__ import annotations

import torch
from torch import Tensor

from shareprefill.runtime.ops.block_selection import select_blocks

# Pattern entries turned to float32 at a time: bounds the memory of the matrix product.
_CHUNK_ENTRIES = 1 << 24


def gamma_patterns(maps: Tensor, gamma: float) -> Tensor:
    """The γ-pattern of each map: per row the fewest blocks whose mass reaches γ.

    Of blocks with equal mass the one in the lower column comes first; blocks without mass are
    never taken (SharePrefill, arXiv 2505.19578, section 4).

    Args:
        maps: float32 `[K, n, n]`, causal attention mass of each block, rows sum to 1.
        gamma: Mass to reach, above 0 and at most 1.

    Returns:
        bool `[K, n, n]`.
    """
    n = maps.shape[1]
    gammas = torch.full((len(maps),), gamma, dtype=torch.float32, device="cpu")
    return select_blocks(maps, gammas, n_query=n, n_key=n, block_size=1)


def jaccard_distances(patterns: Tensor) -> Tensor:
    """One minus intersection over union of every two patterns; two empty patterns are equal.

    Args:
        patterns: bool `[K, n, n]`.

    Returns:
        float64 `[K, K]`, symmetric, zero on the diagonal.

    >>> patterns = torch.tensor([[[True, True]], [[True, False]], [[False, False]]])
    >>> jaccard_distances(patterns).tolist()
    [[0.0, 0.5, 1.0], [0.5, 0.0, 1.0], [1.0, 1.0, 0.0]]
    """
    heads = patterns.shape[0]
    flat = patterns.reshape(heads, -1)
    shared = torch.zeros(heads, heads, dtype=torch.float64, device="cpu")
    # Counts stay below 2^24 within a chunk, so the float32 products are exact.
    for columns in flat.split(max(1, _CHUNK_ENTRIES // heads), dim=1):
        dense = columns.float()
        shared += dense @ dense.T
    sizes = shared.diagonal()
    union = sizes[:, None] + sizes[None, :] - shared
    return torch.where(union > 0, 1.0 - shared / union.clamp_min(1.0), 0.0)


def code_distances(codes: Tensor) -> Tensor:
    """Cosine distance of every two codes.

    A zero code has no direction: it is at distance 0 from another zero code and 1 from the rest.

    Args:
        codes: `[K, Z]`.

    Returns:
        float64 `[K, K]`, symmetric, zero on the diagonal, between 0 and 2.
    """
    norms = codes.double().norm(dim=1, keepdim=True)
    unit = codes.double() / norms.where(norms > 0, 1.0)
    distances = (1.0 - unit @ unit.T).clamp(0.0, 2.0)
    distances = (distances + distances.T) / 2
    zero = norms[:, 0] == 0
    return distances.masked_fill(zero[:, None] & zero[None, :], 0.0).fill_diagonal_(0.0)
