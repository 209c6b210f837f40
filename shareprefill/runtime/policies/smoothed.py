"""Few sampled rows, smoothed along the lines that attention follows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from shareprefill.runtime.ops.block_selection import LineWeights, head_blocks, smooth_maps
from shareprefill.runtime.policies.base import InPlacePolicy, LayerInputs, MapEstimator
from shareprefill.runtime.policies.sampled import sampled_maps, sampling_work

# By sampled rows, of which more make a block's own samples better. Least squares on exact maps of
# three prompts (docs/findings-record.md); only their ratios matter.
_WEIGHTS = {
    1: LineWeights(
        itself=0.08, vertical1=0.13, diagonal1=0.02, diagonal2=0.03, column=0.01, diagonal=0.50
    ),
    2: LineWeights(itself=0.14, vertical1=0.15, diagonal1=0.02, diagonal2=0.04, diagonal=0.45),
    4: LineWeights(itself=0.24, vertical1=0.16, diagonal1=0.03, diagonal2=0.04, diagonal=0.38),
}


@dataclass(frozen=True)
class FewRows(MapEstimator[Tensor]):
    """What is chosen from exact maps of a few rows a block, smoothed along their lines.

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
class Smoothed(FewRows, InPlacePolicy[Tensor]):
    """Exact maps of a few rows a block, averaged with the neighbouring query blocks' samples.

    Attention follows key blocks (verticals) and distances (diagonals), so the samples of other
    query blocks on the same lines tell about a block, at no cost. The blocks above one threshold a
    head are kept: the threshold at which the always-read blocks and the kept ones cover gamma.
    """

    fills_nonfinite = True

    def choose(self, inputs: LayerInputs, estimate: Tensor, gamma: Tensor) -> Tensor:
        """The blocks above a head's threshold; gamma is the share of the head's whole mass."""
        return head_blocks(estimate, gamma, **inputs.geometry.sizes)[0]

    def write(self, inputs: LayerInputs, estimate: Tensor, gamma: Tensor, out: Tensor) -> Tensor:
        """The same blocks, and those that are always read."""
        return head_blocks(estimate, gamma, out=out, **inputs.geometry.reads)[1]


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
