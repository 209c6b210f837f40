"""Few sampled rows, smoothed along the lines that attention follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from shareprefill.runtime.ops.block_selection import LineWeights, head_blocks, smooth_maps
from shareprefill.runtime.policies.base import InPlacePolicy, LayerInputs, MapEstimator
from shareprefill.runtime.policies.sampled import sampled_maps, sampling_work

# Where no weights were fitted to the model: a block's own samples, and those of the query blocks
# beside it, alike.
UNFITTED = LineWeights(itself=0.5, vertical1=0.5)


@dataclass(frozen=True)
class FewRows(MapEstimator[Tensor]):
    """What is chosen from exact maps of a few rows a block, smoothed along their lines.

    Attributes:
        rows: Query rows a block that are sampled.
        weights: What the lines through a block count.
    """

    rows: int = 2
    weights: LineWeights = UNFITTED

    def estimate(self, inputs: LayerInputs, heads: Tensor) -> Tensor:
        """Smoothed maps, float32 `[S, n_q, n_k]`; zeros for negative heads."""
        maps = sampled_maps(inputs, heads, self.rows)
        return smooth_maps(maps, self.weights, **inputs.geometry.sizes)

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

    def write(self, inputs: LayerInputs, heads: Tensor, gamma: Tensor, out: Tensor) -> Tensor:
        """The same blocks, and those that are always read."""
        return self.cut(inputs, sampled_maps(inputs, heads, self.rows), gamma, out)

    def cut(self, inputs: LayerInputs, maps: Tensor, gamma: Tensor, out: Tensor) -> Tensor:
        """`write`, from the maps of the sampled rows."""
        reads = inputs.geometry.reads
        return head_blocks(maps, gamma, weights=self.weights, out=out, **reads)[1]


def line_weights(estimator: Mapping[str, Sequence[float]] | None, rows: int) -> LineWeights:
    """The weights for maps of `rows` sampled rows a block.

    Args:
        estimator: An artifact's. Of counts that it does not have, the next lower one is taken, or
            the lowest.
        rows: Rows a block.
    """
    if not estimator:
        return UNFITTED
    counts = [int(count) for count in estimator]
    known = [count for count in counts if count <= rows] or [min(counts)]
    return LineWeights.of(estimator[str(max(known))])
