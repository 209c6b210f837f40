"""Mean keys with a softmax per row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shareprefill.runtime.ops.block_selection import select_blocks
from shareprefill.runtime.ops.blocks import count_blocks
from shareprefill.runtime.policies.base import LayerInputs, MapEstimator
from shareprefill.runtime.policies.logits import (
    block_means,
    kv_heads,
    mean_over_blocks,
    pieces,
    positions,
    products,
    query_blocks,
    real_heads,
    visible_counts,
)


@dataclass(frozen=True)
class Pooled(MapEstimator[Tensor]):
    """Every query row against the mean key of every block, its own softmax, then means by block.

    One softmax a row, not one maximum a tile: a row of large logits does not hide the others.
    """

    def estimate(self, inputs: LayerInputs, heads: Tensor) -> Tensor:
        """Estimated maps."""
        return pooled_maps(inputs, heads)

    def choose(self, inputs: LayerInputs, estimate: Tensor, gamma: Tensor) -> Tensor:
        """The smallest set of blocks of every query block whose estimated mass reaches gamma."""
        return select_blocks(estimate, gamma, **inputs.geometry.sizes)

    def work(self, inputs: LayerInputs) -> float:
        """One product a block instead of one a key, logits alone."""
        return pooling_work(inputs)


def pooling_work(inputs: LayerInputs) -> float:
    """One product a block instead of one a key, logits alone."""
    return 1 / (2 * inputs.geometry.block_size)


def pooled_maps(inputs: LayerInputs, heads: Tensor) -> Tensor:
    """Estimated block maps, float32 `[S, n_q, n_k]`.

    A block counts with the number of its keys that the row sees; its mean is that of all its keys.

    Args:
        inputs: The layer's inputs; attention sinks are left out.
        heads: int64 `[S]`; negative ones give the map of head 0.
    """
    heads = real_heads(heads)
    block = inputs.geometry.block_size
    n_query, n_key = inputs.query.shape[1], inputs.keys.shape[1]
    n_q, n_k = count_blocks(n_query, block), count_blocks(n_key, block)
    means = block_means(inputs.key, block)
    where = positions(inputs)
    maps = torch.empty((len(heads), n_q, n_k), device=heads.device, dtype=torch.float32)
    for blocks in pieces(n_q, 8 * block * n_k, heads.device):
        rows = query_blocks(inputs, blocks)
        counts = visible_counts(where[rows], n_key, block).log()
        for some in pieces(len(heads), 8 * counts.numel(), heads.device):
            keys = means[kv_heads(inputs, heads[some])]
            logits = products(inputs.query[heads[some], rows], keys, inputs)
            weights = torch.softmax(logits.add_(counts), -1)
            maps[some, blocks] = mean_over_blocks(weights, block).float()
    return maps
