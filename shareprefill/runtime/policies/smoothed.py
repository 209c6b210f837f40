"""Few sampled rows, smoothed along the lines that attention follows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from shareprefill.runtime.policies.base import LayerInputs
from shareprefill.runtime.policies.coverage import head_pattern
from shareprefill.runtime.policies.estimating import Estimating
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
class Smoothed(Estimating[Tensor]):
    """Exact maps of a few rows a block, averaged with the neighbouring query blocks' samples.

    Attention follows key blocks (verticals) and distances (diagonals), so the samples of other
    query blocks on the same lines tell about a block, at no cost. The blocks above one threshold a
    head are kept: the threshold at which the always-read blocks and the kept ones cover gamma.

    Attributes:
        rows: Query rows a block that are sampled.
    """

    rows: int = 2

    def estimate(self, inputs: LayerInputs, heads: Tensor) -> Tensor:
        """Smoothed maps."""
        maps = sampled_maps(inputs, heads, self.rows)
        return smooth(maps, inputs.geometry.causal, self.rows)

    def choose(self, inputs: LayerInputs, estimate: Tensor, gamma: Tensor) -> Tensor:
        """The blocks above a head's threshold; gamma is the share of the head's whole mass."""
        return head_pattern(estimate, gamma)

    def work(self, inputs: LayerInputs) -> float:
        """The share of the rows that are sampled, logits alone."""
        return sampling_work(inputs, self.rows)


@dataclass(frozen=True)
class Level(Smoothed):
    """The same estimate, and one threshold for the blocks of all heads and layers.

    A block is kept if its estimated mass is at least -ln(gamma) times an even share, which is 1
    over the mean number of causal blocks of a query block. Every head then works at the same gain
    of recall by a block: of all patterns of as many blocks, these have the largest mean recall over
    heads, and heads of even attention the least. A row skips -ln(gamma) of its estimated mass at
    most, near 1 - gamma.
    """

    def choose(self, inputs: LayerInputs, estimate: Tensor, gamma: Tensor) -> Tensor:
        """The blocks of at least -ln(gamma) even shares."""
        n_q = inputs.geometry.causal.shape[0]
        mass = estimate.sum((1, 2)).clamp(min=torch.finfo(torch.float32).tiny) / n_q
        even = mass * (n_q / inputs.geometry.causal_count)
        least = -gamma.to(estimate.device).log() * even
        return (estimate >= least[:, None, None]) & (estimate > 0)


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
    means = _line_sums(maps) / _line_sums(causal[None].float()).clamp(min=1)
    line = torch.arange(n_k, device=maps.device) - torch.arange(n_q, device=maps.device)[:, None]
    return means[:, line + (n_q - 1)]


def _line_sums(maps: Tensor) -> Tensor:
    """Sums over diagonals `[S, n_q + n_k - 1]`, from the lowest left entry to the upper right."""
    n_maps, n_q, n_k = maps.shape
    # Each row of the padded map, read at one column less, starts one further to the right.
    padded = pad(maps.flip(1), (0, n_q)).flatten(1)
    return padded[:, : n_q * (n_q + n_k - 1)].view(n_maps, n_q, -1).sum(1)
