"""The head's own exact map: what no estimate can beat with the same rule."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shareprefill.runtime.ops.block_selection import select_blocks
from shareprefill.runtime.policies.base import LayerInputs, MapEstimator
from shareprefill.runtime.policies.sampled import sampled_maps


@dataclass(frozen=True)
class Oracle(MapEstimator[Tensor]):
    """The smallest set of blocks of every query block whose true mass reaches gamma."""

    def estimate(self, inputs: LayerInputs, heads: Tensor) -> Tensor:
        """The exact maps."""
        return sampled_maps(inputs, heads, None)

    def choose(self, inputs: LayerInputs, estimate: Tensor, gamma: Tensor) -> Tensor:
        """The smallest set of blocks of every query block whose mass reaches gamma."""
        return select_blocks(estimate, gamma, **inputs.geometry.sizes)

    def work(self, inputs: LayerInputs) -> float:
        """All logits: half of dense attention."""
        return 0.5
