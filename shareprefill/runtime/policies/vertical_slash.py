"""MInference's vertical-slash pattern, in blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shareprefill.runtime.ops.vertical_slash import vertical_slash_profile
from shareprefill.runtime.patterns import vertical_slash_pattern
from shareprefill.runtime.policies.base import LayerInputs, Selection
from shareprefill.runtime.policies.logits import real_heads


@dataclass(frozen=True)
class VerticalSlash:
    """Key blocks and block diagonals that each cover gamma of the last query block's attention.

    After MInference (arXiv 2407.02490, section 3.2).
    """

    def select(self, inputs: LayerInputs, heads: Tensor, gamma: Tensor) -> Selection:
        """The lines of the last query block, drawn through all query blocks."""
        vertical, slash, work = profiles(inputs, real_heads(heads))
        return Selection(slashes(inputs, vertical, slash, gamma), work)


def profiles(inputs: LayerInputs, heads: Tensor) -> tuple[Tensor, Tensor, float]:
    """Last query block's mass by key block and by block distance, and the work of both."""
    block, n_query = inputs.geometry.block_size, inputs.query.shape[1]
    vertical, slash = vertical_slash_profile(
        inputs.query, inputs.key, block_size=block, scale=inputs.scale, heads=heads
    )
    # The last rows read all keys, twice as many as a row does on average, for logits alone.
    return vertical, slash, min(block, n_query) / n_query


def slashes(inputs: LayerInputs, vertical: Tensor, slash: Tensor, gamma: Tensor) -> Tensor:
    """The vertical-slash pattern of some profiles, bool `[S, n_q, n_k]`."""
    return vertical_slash_pattern(
        vertical,
        slash,
        gamma.to(torch.float32),
        inputs.query.shape[1],
        inputs.key.shape[1],
        inputs.geometry.block_size,
    )
