"""FlashPrefill: tile energies on mean keys, and the mean correction of what is skipped."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

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
from shareprefill.runtime.policies.pooled import pooling_work


@dataclass(frozen=True)
class Flash(MapEstimator[Tensor]):
    """Energy of a tile, E[I, J] = sum over the rows of I of 2^(s - max), on mean keys.

    `max` is one number a query block, over its rows and key blocks. Blocks with E of at least
    alpha times the largest E of their query block are kept. After FlashPrefill.

    Attributes:
        alpha: Share of the largest energy; None takes 1 - gamma.
    """

    alpha: float | None = None

    def estimate(self, inputs: LayerInputs, heads: Tensor) -> Tensor:
        """Tile energies."""
        return _energies(inputs, real_heads(heads))

    def choose(self, inputs: LayerInputs, estimate: Tensor, gamma: Tensor) -> Tensor:
        """The blocks of enough energy; gamma sets alpha = 1 - gamma where none is given."""
        alpha = 1 - gamma if self.alpha is None else torch.full_like(gamma, self.alpha)
        least = alpha[:, None, None] * estimate.amax(-1, keepdim=True)
        return (estimate >= least) & (estimate > 0)

    def work(self, inputs: LayerInputs) -> float:
        """One product a block instead of one a key, logits alone."""
        return pooling_work(inputs)


def _energies(inputs: LayerInputs, heads: Tensor) -> Tensor:
    """Tile energies, float32 `[S, n_q, n_k]`, zero where a block is not causal."""
    block = inputs.geometry.block_size
    n_query, n_key = inputs.query.shape[1], inputs.keys.shape[1]
    n_q, n_k = count_blocks(n_query, block), count_blocks(n_key, block)
    means = block_means(inputs.key, block)
    where = positions(inputs)
    energies = torch.empty((len(heads), n_q, n_k), device=heads.device, dtype=torch.float32)
    for blocks in pieces(n_q, 8 * block * n_k, heads.device):
        rows = query_blocks(inputs, blocks)
        seen = visible_counts(where[rows], n_key, block) > 0
        for some in pieces(len(heads), 8 * seen.numel(), heads.device):
            keys = means[kv_heads(inputs, heads[some])]
            logits = products(inputs.query[heads[some], rows], keys, inputs)
            logits = logits.mul_(1 / math.log(2)).masked_fill_(~seen, -torch.inf)
            top = _block_maximum(logits.amax(-1), block)
            energy = torch.exp2(logits - top[..., None])
            # Means, not sums: the same order within a query block.
            energies[some, blocks] = mean_over_blocks(energy, block).float()
    return energies


def _block_maximum(rows: Tensor, block: int) -> Tensor:
    """The largest value of every block of rows, at each of its rows: `[S, r]`."""
    n_rows = rows.shape[1]
    padded = torch.nn.functional.pad(rows, (0, -n_rows % block), value=-torch.inf)
    return padded.unflatten(1, (-1, block)).amax(2).repeat_interleave(block, 1)[:, :n_rows]
