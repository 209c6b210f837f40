"""One threshold for the blocks of all heads and layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shareprefill.runtime.policies.base import LayerInputs
from shareprefill.runtime.policies.smoothed import FewRows


@dataclass(frozen=True)
class GlobalThreshold(FewRows):
    """The estimate of `smoothed`, and one threshold for the blocks of all heads and layers.

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
