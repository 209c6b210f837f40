"""Row-sampled exact maps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shareprefill.runtime.ops.blocks import count_blocks
from shareprefill.runtime.ops.pooled_attention import pooled_attention
from shareprefill.runtime.patterns import cumulative_pattern
from shareprefill.runtime.policies.base import LayerInputs, Selection
from shareprefill.runtime.policies.logits import (
    block_means,
    kv_heads,
    pieces,
    products,
    real_heads,
)


@dataclass(frozen=True)
class Sampled:
    """Each row's true softmax for `rows` evenly spaced rows of every query block, pooled by block.

    Attributes:
        rows: Query rows a block, the last one of the block among them.
    """

    rows: int = 8

    def select(self, inputs: LayerInputs, heads: Tensor, gamma: Tensor) -> Selection:
        """The smallest set of blocks of every query block whose estimated mass reaches gamma."""
        maps = sampled_maps(inputs, heads, self.rows)
        return Selection(cumulative_pattern(maps, gamma[:, None]), sampling_work(inputs, self.rows))


def sampling_work(inputs: LayerInputs, rows: int) -> float:
    """Work of `rows` rows a block: their share of the rows, logits alone."""
    return inputs.geometry.rows(rows).numel() / inputs.query.shape[1] / 2


def sampled_maps(inputs: LayerInputs, heads: Tensor, rows: int | None) -> Tensor:
    """Exact maps of sampled rows, float32 `[S, n_q, n_k]`.

    Args:
        inputs: The layer's inputs. Attention sinks are left out: they scale a row's masses alike.
        heads: int64 `[S]`; negative ones give the map of head 0.
        rows: Rows a block; None for all of them.
    """
    heads = real_heads(heads)
    block = inputs.geometry.block_size
    chosen = None if rows is None else inputs.geometry.rows(rows)
    if inputs.softcap is None:
        _, maps = pooled_attention(
            inputs.query,
            inputs.key,
            rows=chosen,
            block_size=block,
            scale=inputs.scale,
            heads=heads,
        )
        return maps
    n_query, n_key = inputs.query.shape[1], inputs.key.shape[1]
    if chosen is None:
        chosen = inputs.geometry.rows(block)
    n_k = count_blocks(n_key, block)
    maps = torch.empty((len(heads), len(chosen), n_k), device=heads.device)
    columns = torch.arange(n_key, device=heads.device)
    sizes = torch.full((n_k,), float(block), device=heads.device)
    sizes[-1] = n_key - (n_k - 1) * block
    for head in range(len(heads)):
        one = heads[head : head + 1]
        keys = inputs.key[kv_heads(inputs, one)]
        for some in pieces(len(chosen), 8 * chosen.shape[1] * n_key, heads.device):
            members = chosen[some].flatten()
            logits = products(inputs.query[one][:, members], keys, inputs)
            seen = columns[None, :] <= (members + (n_key - n_query))[:, None]
            weights = torch.softmax(logits.masked_fill_(~seen, -torch.inf), -1)
            means = weights.unflatten(1, (-1, chosen.shape[1])).mean(2)
            maps[head, some] = (block_means(means.mT, block).mT * sizes)[0].float()
    return maps

