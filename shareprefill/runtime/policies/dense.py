"""Every causal block."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shareprefill.runtime.policies.base import LayerInputs, Selection


@dataclass(frozen=True)
class Dense:
    """Full causal attention, as a pattern."""

    def select(self, inputs: LayerInputs, heads: Tensor, gamma: Tensor) -> Selection:
        """All causal blocks; gamma is not used."""
        return Selection(inputs.geometry.causal.expand(len(heads), -1, -1), 0.0)
