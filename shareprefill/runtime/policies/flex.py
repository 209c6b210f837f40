"""FlexPrefill: each head is query-aware or vertical-slash, by how well pooling tells its last block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shareprefill.runtime.patterns import js_distance
from shareprefill.runtime.policies.base import LayerInputs, Selection
from shareprefill.runtime.policies.coverage import head_pattern
from shareprefill.runtime.policies.logits import (
    block_means,
    kv_heads,
    products,
    real_heads,
)
from shareprefill.runtime.policies.vertical_slash import profiles, slashes


@dataclass(frozen=True)
class Flex:
    """Query-aware where mean queries and keys tell the last block's distribution, else fixed lines.

    The test is the JS distance between the last query block's estimated distribution (mean query,
    mean keys) and its true one. Under tau a head takes the blocks of the estimated map, ranked over
    all query blocks together, that cover gamma; otherwise the vertical and slash lines of its last
    query block that cover gamma. After FlexPrefill (arXiv 2502.20766, section 3).

    Attributes:
        tau: JS distance under which a head is query-aware.
    """

    tau: float = 0.1

    def select(self, inputs: LayerInputs, heads: Tensor, gamma: Tensor) -> Selection:
        """The pattern of the kind that a head's last block asks for, covering gamma."""
        heads = real_heads(heads)
        vertical, slash, work = profiles(inputs, heads)
        maps = _mean_maps(inputs, heads)
        aware = js_distance(vertical, maps[:, -1]) < self.tau
        pattern = torch.where(
            aware[:, None, None], head_pattern(maps, gamma), slashes(inputs, vertical, slash, gamma)
        )
        return Selection(pattern, work + 1 / (2 * inputs.geometry.block_size**2))


def _mean_maps(inputs: LayerInputs, heads: Tensor) -> Tensor:
    """Softmax of mean queries on mean keys, float32 `[S, n_q, n_k]`: one product a block."""
    block = inputs.geometry.block_size
    queries = block_means(inputs.query[heads], block)
    keys = block_means(inputs.key, block)[kv_heads(inputs, heads)]
    logits = products(queries, keys, inputs).masked_fill_(~inputs.geometry.causal, -torch.inf)
    return torch.softmax(logits, -1).float()
