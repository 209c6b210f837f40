"""What a policy of one's own is made of: see docs/add-a-policy.md.

Derive a class from `BlockPolicy`, or from `SelectionPolicy`'s other kinds where they fit better:
`MapEstimator` for one estimate that serves many thresholds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shareprefill.runtime.ops.block_selection import select_blocks
from shareprefill.runtime.policies import make_policy
from shareprefill.runtime.policies.base import (
    BlockPolicy,
    LayerInputs,
    MapEstimator,
    Selection,
    SelectionPolicy,
)
from shareprefill.runtime.policies.pooled import pooled_maps, pooling_work
from shareprefill.runtime.policies.sampled import sampled_maps, sampling_work

__all__ = [
    "BlockPolicy",
    "LayerInputs",
    "MapEstimator",
    "Selection",
    "SelectionPolicy",
    "covering_blocks",
    "make_policy",
    "pooled_scores",
    "pooling_work",
    "sampled_scores",
    "sampling_work",
]


def pooled_scores(layer: LayerInputs) -> Tensor:
    """Estimated attention mass of every block, from queries on the blocks' mean keys.

    Costs `pooling_work(layer)`.

    Returns:
        float32 `[H, n_q, n_k]`; each query block's masses add up to 1.
    """
    return pooled_maps(layer, _every_head(layer))


def sampled_scores(layer: LayerInputs, rows: int) -> Tensor:
    """The same from the exact attention of a few query rows of every block.

    Costs `sampling_work(layer, rows)`.

    Args:
        layer: The layer.
        rows: Query rows a block, 1 to the block size.
    """
    return sampled_maps(layer, _every_head(layer), rows)


def covering_blocks(layer: LayerInputs, scores: Tensor, gamma: Tensor) -> Tensor:
    """The fewest blocks of every query block whose scores reach gamma of their sum.

    Args:
        layer: The layer.
        scores: float32 `[H, n_q, n_k]`, none negative, zero where a block is not causal.
        gamma: float32 `[H]`, in (0, 1].

    Returns:
        bool `[H, n_q, n_k]`.
    """
    return select_blocks(scores, gamma, **layer.geometry.sizes)


def _every_head(layer: LayerInputs) -> Tensor:
    return torch.arange(len(layer.query), device=layer.query.device)
