"""FlexPrefill: query-aware blocks where pooling tells a head's last block, else fixed lines."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shareprefill.runtime.ops.block_selection import (
    head_blocks,
    js_distances,
    vertical_slash_blocks,
)
from shareprefill.runtime.policies.base import LayerInputs, MapEstimator
from shareprefill.runtime.policies.logits import (
    block_means,
    kv_heads,
    products,
    real_heads,
)
from shareprefill.runtime.policies.vertical_slash import VerticalSlash, profiles


@dataclass(frozen=True)
class Flex(MapEstimator[tuple[Tensor, Tensor, Tensor]]):
    """Query-aware where mean queries and keys tell the last block's distribution, else fixed lines.

    The test is the JS distance between the last query block's estimated distribution (mean query,
    mean keys) and its true one. Under tau a head takes the blocks of the estimated map, ranked over
    all query blocks together, that cover gamma; otherwise the vertical and slash lines of its last
    query block that cover gamma. After FlexPrefill (arXiv 2502.20766, section 3).

    Attributes:
        tau: JS distance under which a head is query-aware.
    """

    tau: float = 0.1

    def estimate(self, inputs: LayerInputs, heads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The last query block's profiles, and the estimated maps."""
        heads = real_heads(heads)
        return *profiles(inputs, heads), _mean_maps(inputs, heads)

    def choose(
        self, inputs: LayerInputs, estimate: tuple[Tensor, Tensor, Tensor], gamma: Tensor
    ) -> Tensor:
        """The pattern of the kind that a head's last block asks for, covering gamma."""
        vertical, slash, maps = estimate
        every = torch.arange(len(maps), device=maps.device)
        apart = js_distances(vertical[:, None], maps[:, -1:].contiguous(), every)
        return torch.where(
            (apart < self.tau)[:, None, None],
            head_blocks(maps, gamma, **inputs.geometry.sizes)[0],
            vertical_slash_blocks(vertical, slash, gamma, **inputs.geometry.sizes),
        )

    def work(self, inputs: LayerInputs) -> float:
        """The last query block's logits, and one product a pair of blocks."""
        return VerticalSlash().work(inputs) + 1 / (2 * inputs.geometry.block_size**2)


def _mean_maps(inputs: LayerInputs, heads: Tensor) -> Tensor:
    """Softmax of mean queries on mean keys, float32 `[S, n_q, n_k]`: one product a block."""
    block = inputs.geometry.block_size
    queries = block_means(inputs.query[heads], block)
    keys = block_means(inputs.key, block)[kv_heads(inputs, heads)]
    logits = products(queries, keys, inputs).masked_fill_(~inputs.geometry.causal, -torch.inf)
    return torch.softmax(logits, -1).float()
