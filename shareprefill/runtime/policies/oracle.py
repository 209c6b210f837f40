"""The head's own exact map: what no estimate can beat with the same rule."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shareprefill.runtime.patterns import cumulative_pattern
from shareprefill.runtime.policies.base import LayerInputs, Selection
from shareprefill.runtime.policies.sampled import sampled_maps


@dataclass(frozen=True)
class Oracle:
    """The smallest set of blocks of every query block whose true mass reaches gamma."""

    def select(self, inputs: LayerInputs, heads: Tensor, gamma: Tensor) -> Selection:
        """Chooses on the exact map; its work is that of all logits."""
        maps = sampled_maps(inputs, heads, None)
        return Selection(cumulative_pattern(maps, gamma[:, None]), 0.5)
