"""Few sampled rows, smoothed along the lines that attention follows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from shareprefill.runtime.ops.block_selection import LineWeights, head_blocks, smooth_maps
from shareprefill.runtime.policies.base import LayerInputs
from shareprefill.runtime.policies.estimating import Estimating, Placing
from shareprefill.runtime.policies.sampled import sampled_maps, sampling_work

# By sampled rows, of which more make a block's own samples better. Least squares on exact maps of
# three prompts (docs/findings.md); only their ratios matter.
_WEIGHTS = {
    1: LineWeights(own=0.08, beside=0.13, along=0.02, along2=0.03, column=0.01, diagonal=0.50),
    2: LineWeights(own=0.14, beside=0.15, along=0.02, along2=0.04, diagonal=0.45),
    4: LineWeights(own=0.24, beside=0.16, along=0.03, along2=0.04, diagonal=0.38),
}


@dataclass(frozen=True)
class _FewRows(Estimating[Tensor]):
    """Exact maps of a few rows a block, averaged with the neighbouring query blocks' samples.

    Attributes:
        rows: Query rows a block that are sampled.
    """

    rows: int = 2

    def estimate(self, inputs: LayerInputs, heads: Tensor) -> Tensor:
        """Smoothed maps."""
        return smoothed_maps(inputs, heads, self.rows)

    def work(self, inputs: LayerInputs) -> float:
        """The share of the rows that are sampled, logits alone."""
        return sampling_work(inputs, self.rows)


@dataclass(frozen=True)
class Smoothed(_FewRows, Placing):
    """Exact maps of a few rows a block, averaged with the neighbouring query blocks' samples.

    Attention follows key blocks (verticals) and distances (diagonals), so the samples of other
    query blocks on the same lines tell about a block, at no cost. The blocks above one threshold a
    head are kept: the threshold at which the always-read blocks and the kept ones cover gamma.
    """

    def choose(self, inputs: LayerInputs, estimate: Tensor, gamma: Tensor) -> Tensor:
        """The blocks above a head's threshold; gamma is the share of the head's whole mass."""
        return head_blocks(estimate, gamma, **inputs.geometry.sizes)[0]

    def place(self, inputs: LayerInputs, heads: Tensor, gamma: Tensor, out: Tensor) -> Tensor:
        """The same blocks, and those that are always read."""
        estimate = self.estimate(inputs, heads)
        return head_blocks(estimate, gamma, out=out, **inputs.geometry.reads)[1]


@dataclass(frozen=True)
class Level(_FewRows):
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


def smoothed_maps(inputs: LayerInputs, heads: Tensor, rows: int) -> Tensor:
    """Maps of sampled rows, smoothed: float32 `[S, n_q, n_k]`.

    Args:
        inputs: The layer's inputs.
        heads: int64 `[S]`; the maps of negative ones are zeros.
        rows: Rows a block.
    """
    maps = sampled_maps(inputs, heads, rows)
    return smooth_maps(maps, line_weights(rows), **inputs.geometry.sizes)


@lru_cache(maxsize=64)
def line_weights(rows: int) -> LineWeights:
    """The weights of maps of `rows` sampled rows a block."""
    return _WEIGHTS[max(r for r in _WEIGHTS if r <= rows)]
