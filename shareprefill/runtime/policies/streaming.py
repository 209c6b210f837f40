"""Sink and local blocks: what StreamingLLM reads."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shareprefill.errors import require
from shareprefill.runtime.ops.blocks import always_blocks
from shareprefill.runtime.policies.base import LayerInputs, Selection


@dataclass(frozen=True)
class Streaming:
    """The first blocks and the last causal ones, whatever the input. After arXiv 2309.17453.

    A plan whose heads all follow it reads no others.

    Attributes:
        sink_blocks: First key blocks.
        local_blocks: Last causal key blocks, the diagonal one among them.
    """

    sink_blocks: int = 1
    local_blocks: int = 8

    def __post_init__(self) -> None:
        require(self.sink_blocks >= 0, "sink_blocks", self.sink_blocks, "0 or more")
        require(self.local_blocks >= 1, "local_blocks", self.local_blocks, "at least 1")

    def select(self, inputs: LayerInputs, heads: Tensor, gamma: Tensor) -> Selection:
        """One pattern for all heads; gamma is not used."""
        pattern = always_blocks(
            inputs.geometry.n_query,
            inputs.geometry.n_key - inputs.geometry.n_query,
            inputs.geometry.block_size,
            sink_blocks=self.sink_blocks,
            local_blocks=self.local_blocks,
            device=heads.device,
        )
        return Selection(pattern.expand(len(heads), -1, -1), 0.0)
