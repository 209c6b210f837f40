"""MInference's vertical-slash pattern, in blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shareprefill.runtime.ops.block_selection import SparseGuard, vertical_slash_blocks
from shareprefill.runtime.ops.vertical_slash import (
    vertical_slash_patterns,
    vertical_slash_profile,
)
from shareprefill.runtime.policies.base import InPlacePolicy, LayerInputs


@dataclass(frozen=True)
class VerticalSlash(InPlacePolicy[tuple[Tensor, Tensor]]):
    """Key blocks and block diagonals that each cover gamma of the last query block's attention.

    After MInference (arXiv 2407.02490, section 3.2).
    """

    fills_nonfinite = True

    def estimate(self, inputs: LayerInputs, heads: Tensor) -> tuple[Tensor, Tensor]:
        """Last query block's mass by key block and by block distance."""
        return profiles(inputs, heads)

    def choose(self, inputs: LayerInputs, estimate: tuple[Tensor, Tensor], gamma: Tensor) -> Tensor:
        """The lines of the last query block, drawn through all query blocks."""
        return vertical_slash_blocks(*estimate, gamma, **inputs.geometry.sizes)

    def write(self, inputs: LayerInputs, heads: Tensor, gamma: Tensor, out: Tensor) -> Tensor:
        """The same blocks, and those that are always read."""
        finite = torch.empty_like(gamma, dtype=torch.bool)
        write_patterns(inputs, heads, gamma, out, finite)
        return finite

    def work(self, inputs: LayerInputs) -> float:
        """Logits of the last rows: they read all keys, about twice as many as a row of a prompt."""
        n_query, n_key = inputs.query.shape[1], inputs.keys.shape[1]
        pairs = n_query * (n_key - (n_query - 1) / 2)
        return min(0.5, min(inputs.geometry.block_size, n_query) * n_key / pairs / 2)


def profiles(inputs: LayerInputs, heads: Tensor) -> tuple[Tensor, Tensor]:
    """Last query block's mass by key block and by block distance."""
    return vertical_slash_profile(
        inputs.query,
        inputs.keys,
        block_size=inputs.geometry.block_size,
        scale=inputs.scale,
        heads=heads,
        softcap=inputs.softcap,
    )


def write_patterns(
    inputs: LayerInputs,
    heads: Tensor,
    gamma: Tensor,
    out: Tensor,
    finite: Tensor,
    requested: Tensor | None = None,
    guard: SparseGuard | None = None,
) -> Tensor | None:
    """Writes patterns; and gives what a guard makes of what is requested, as in `sparse_heads`.

    Args:
        inputs: The layer's inputs.
        heads: int64 `[S]`.
        gamma: float32 `[S]`.
        out: Where patterns are written, bool `[S, n_q, n_k]`.
        finite: Where it is written whether they rest on numbers, bool `[S]`.
        requested: What heads read, and what is asked for; None where nothing is to be decided.
        guard: Leaves the patterns to highly sparse heads, with `requested`.
    """
    reads = inputs.geometry.reads
    return vertical_slash_patterns(
        inputs.query,
        inputs.keys,
        gamma,
        block_size=reads["block_size"],
        sink_blocks=reads["sink_blocks"],
        local_blocks=reads["local_blocks"],
        out=out,
        finite=finite,
        scale=inputs.scale,
        heads=heads,
        softcap=inputs.softcap,
        requested=requested,
        guard=guard,
    )[1]
