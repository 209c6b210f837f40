"""XAttention: sums of logits along antidiagonals of small tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from shareprefill.errors import ConfigError
from shareprefill.runtime.ops.block_selection import select_blocks
from shareprefill.runtime.ops.blocks import count_blocks
from shareprefill.runtime.policies.base import LayerInputs, MapEstimator
from shareprefill.runtime.policies.logits import (
    as_logits,
    inner_products,
    kv_heads,
    pieces,
    real_heads,
)


@dataclass(frozen=True)
class Antidiagonal(MapEstimator[Tensor]):
    """Mean logit on the antidiagonal of every `stride` x `stride` tile, softmax, sums by block.

    Every key and every query is on the antidiagonal of some tile, so no vertical and no slash is
    missed. After XAttention (arXiv 2503.16428, section 2.1). A soft-cap is laid on the mean.

    Attributes:
        stride: Side of a tile; it divides the block size.
    """

    stride: int = 16

    def estimate(self, inputs: LayerInputs, heads: Tensor) -> Tensor:
        """Estimated maps.

        Raises:
            ConfigError: the stride does not divide the block size.
        """
        if self.stride < 1 or inputs.geometry.block_size % self.stride:
            raise ConfigError(
                f"stride must divide the block size ({inputs.geometry.block_size}), "
                f"got {self.stride}"
            )
        return self._maps(inputs, real_heads(heads))

    def choose(self, inputs: LayerInputs, estimate: Tensor, gamma: Tensor) -> Tensor:
        """The smallest set of blocks of every query block whose estimated mass reaches gamma."""
        return select_blocks(estimate, gamma, **inputs.geometry.sizes)

    def work(self, inputs: LayerInputs) -> float:
        """One product of a tile's `stride` antidiagonal pairs out of stride^2, logits alone."""
        return 1 / (2 * self.stride)

    def _maps(self, inputs: LayerInputs, heads: Tensor) -> Tensor:
        stride, block = self.stride, inputs.geometry.block_size
        n_query, n_key = inputs.query.shape[1], inputs.keys.shape[1]
        n_q, n_k = count_blocks(n_query, block), count_blocks(n_key, block)
        part = block // stride  # tiles of a block
        rows, held_rows = _tile_sizes(n_q * part, stride, n_query, heads.device)
        first, held_keys = _tile_sizes(n_k * part, stride, n_key, heads.device)
        last = rows + held_rows + (n_key - n_query - 1)
        hidden = (first[None, :] > last[:, None]) | (held_keys == 0)[None, :]
        pairs = (held_rows[:, None] + held_keys[None, :] - stride).clamp(min=1)
        # Tiles beyond the last row count for nothing.
        weight = (held_rows > 0).float()
        weight = weight / weight.view(n_q, part).sum(1).repeat_interleave(part)
        maps = torch.empty((len(heads), n_q, n_k), device=heads.device, dtype=torch.float32)
        for head in range(len(heads)):
            one = heads[head : head + 1]
            keys = _tiles(inputs.key[kv_heads(inputs, one)], n_k * part, stride)
            queries = _tiles(inputs.query[one], n_q * part, stride, reverse=True)
            for some in pieces(n_q, 8 * len(first) * part, heads.device):
                tiles = slice(some.start * part, some.stop * part)
                logits = as_logits(inner_products(queries[:, tiles], keys) / pairs[tiles], inputs)
                weights = torch.softmax(logits.masked_fill_(hidden[tiles], -torch.inf), -1)
                mass = weights.unflatten(2, (n_k, part)).sum(-1) * weight[tiles, None]
                maps[head, some] = mass.unflatten(1, (-1, part)).sum(2)[0].float()
        return maps


def _tile_sizes(
    n_tiles: int, stride: int, n_tokens: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """First token of every tile, and how many of its tokens there are."""
    first = torch.arange(n_tiles, device=device) * stride
    return first, (n_tokens - first).clamp(min=0, max=stride)


def _tiles(tokens: Tensor, n_tiles: int, stride: int, *, reverse: bool = False) -> Tensor:
    """Tokens `[1, N, D]` as tiles laid end to end, `[1, n_tiles, stride * D]`, padded with 0."""
    padded = pad(tokens, (0, 0, 0, n_tiles * stride - tokens.shape[1])).unflatten(1, (-1, stride))
    return (padded.flip(2) if reverse else padded).flatten(2)
