"""Few sampled rows, smoothed along the lines that attention follows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shareprefill.runtime.policies.base import LayerInputs, Selection
from shareprefill.runtime.policies.coverage import head_pattern
from shareprefill.runtime.policies.sampled import sampled_maps, sampling_work

# Weights of a block's own samples, of its neighbours on the same key block and on the same block
# diagonal (at distance 1, then 2), and of the means of its column and of its diagonal. Least
# squares on exact maps of three prompts (docs/findings.md); only their ratios matter.
_WEIGHTS = {
    1: (0.08, 0.13, 0.02, 0.00, 0.03, 0.01, 0.50),
    2: (0.14, 0.15, 0.02, 0.00, 0.04, 0.00, 0.45),
    4: (0.24, 0.16, 0.03, 0.00, 0.04, 0.00, 0.38),
}


@dataclass(frozen=True)
class Smoothed:
    """Exact maps of a few rows a block, averaged with the neighbouring query blocks' samples.

    Attention follows key blocks (verticals) and distances (diagonals), so the samples of other
    query blocks on the same lines tell about a block, at no cost. The blocks above one threshold a
    head are kept: the threshold at which the always-read blocks and the kept ones cover gamma.

    Attributes:
        rows: Query rows a block that are sampled.
    """

    rows: int = 2

    def select(self, inputs: LayerInputs, heads: Tensor, gamma: Tensor) -> Selection:
        """The blocks above a head's threshold; gamma is the share of the head's whole mass."""
        maps = sampled_maps(inputs, heads, self.rows)
        maps = smooth(maps, inputs.geometry.causal, self.rows)
        return Selection(head_pattern(maps, gamma), sampling_work(inputs, self.rows))


def smooth(maps: Tensor, causal: Tensor, rows: int) -> Tensor:
    """Estimates block maps from maps of few rows: weighted means over the lines of a block.

    Args:
        maps: Maps of the sampled rows `[S, n_q, n_k]`.
        causal: Causal blocks, bool `[n_q, n_k]`.
        rows: Sampled rows a block, which say how far a block's own sample is trusted.

    Returns:
        float32 `[S, n_q, n_k]`, in no particular scale; zero outside the causal blocks.
    """
    own, beside, along, beside2, along2, column, diagonal = _weights(rows)
    maps = maps.float()
    total = maps * own
    for distance, vertical, slanted in ((1, beside, along), (2, beside2, along2)):
        for weight, step in ((vertical, 0), (slanted, distance)):
            if weight > 0:
                total += weight * _neighbours(maps, causal, distance, step)
    if column > 0:
        total += column * (maps.sum(1) / causal.sum(0).clamp(min=1))[:, None, :]
    total += diagonal * _diagonal_means(maps, causal)
    return total.mul_(causal)


def _weights(rows: int) -> tuple[float, ...]:
    return _WEIGHTS[max(r for r in _WEIGHTS if r <= rows)]


def _neighbours(maps: Tensor, causal: Tensor, distance: int, step: int) -> Tensor:
    """Mean of the entries `distance` rows before and after, `step` columns before and after.

    An entry without such neighbours in the map stands for itself.
    """
    count = torch.zeros(causal.shape, device=maps.device)
    total = torch.zeros_like(maps)
    n_q, n_k = causal.shape
    if distance < n_q and step < n_k:
        early, late = slice(0, n_q - distance), slice(distance, n_q)
        left, right = slice(0, n_k - step), slice(step, n_k)
        total[:, late, right] += maps[:, early, left]
        count[late, right] += causal[early, left]
        total[:, early, left] += maps[:, late, right]
        count[early, left] += causal[late, right]
    return torch.where(count > 0, total / count.clamp(min=1), maps)


def _diagonal_means(maps: Tensor, causal: Tensor) -> Tensor:
    """Mean of every block diagonal, at each of its entries."""
    n_q, n_k = causal.shape
    line = torch.arange(n_k, device=maps.device) - torch.arange(n_q, device=maps.device)[:, None]
    line = (line + n_q - 1).flatten()
    sums = maps.new_zeros((len(maps), n_q + n_k - 1)).index_add_(1, line, maps.flatten(1))
    counts = maps.new_zeros(n_q + n_k - 1).index_add_(0, line, causal.flatten().float())
    return (sums / counts.clamp(min=1))[:, line].view_as(maps)
