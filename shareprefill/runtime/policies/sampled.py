"""Row-sampled exact maps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shareprefill.runtime.geometry import SampledRows
from shareprefill.runtime.ops.block_selection import select_blocks
from shareprefill.runtime.ops.pooled_attention import pooled_attention, table_height, two_maps
from shareprefill.runtime.policies.base import InPlacePolicy, LayerInputs


@dataclass(frozen=True)
class Sampled(InPlacePolicy[Tensor]):
    """Each row's true softmax for `rows` evenly spaced rows of every query block, pooled by block.

    Attributes:
        rows: Query rows a block, the last one of the block among them.
    """

    rows: int = 8

    def estimate(self, inputs: LayerInputs, heads: Tensor) -> Tensor:
        """Maps of the sampled rows."""
        return sampled_maps(inputs, heads, self.rows)

    def choose(self, inputs: LayerInputs, estimate: Tensor, gamma: Tensor) -> Tensor:
        """The smallest set of blocks of every query block whose estimated mass reaches gamma."""
        return select_blocks(estimate, gamma, **inputs.geometry.sizes)

    def write(self, inputs: LayerInputs, heads: Tensor, gamma: Tensor, out: Tensor) -> Tensor:
        """The same blocks, and those that are always read."""
        return self.cut(inputs, sampled_maps(inputs, heads, self.rows), gamma, out)

    def cut(self, inputs: LayerInputs, maps: Tensor, gamma: Tensor, out: Tensor) -> Tensor:
        """`write`, from the maps of the sampled rows."""
        finite = torch.empty(out.shape[:2], dtype=torch.bool, device=out.device)
        select_blocks(maps, gamma, out=out, finite=finite, **inputs.geometry.reads)
        return finite

    def work(self, inputs: LayerInputs) -> float:
        """The share of the rows that are sampled, logits alone."""
        return sampling_work(inputs, self.rows)


def two_sampled_maps(
    inputs: LayerInputs, heads: Tensor, n_first: int, rows: tuple[SampledRows, SampledRows]
) -> tuple[Tensor, Tensor]:
    """`sampled_maps` of two groups of heads, in the launches of one.

    Args:
        inputs: The layer's inputs.
        heads: int64 `[S]`, of both groups; the maps of negative ones are zeros.
        n_first: Heads of the first group.
        rows: Of each group.
    """
    geometry, height = inputs.geometry, table_height(inputs.query)
    groups = ((n_first, *rows[0]), (len(heads) - n_first, *rows[1]))
    return two_maps(
        inputs.query,
        inputs.keys,
        (geometry.rows_of(*rows[0]), geometry.rows_of(*rows[1])),
        None if height is None else geometry.row_table(*groups, height),
        heads,
        n_first,
        block_size=geometry.block_size,
        scale=inputs.scale,
        softcap=inputs.softcap,
    )


def sampling_work(inputs: LayerInputs, rows: int | Tensor) -> float:
    """Work of `rows` rows a block, or of chosen ones: their share of the rows, logits alone."""
    count = rows.numel() if isinstance(rows, Tensor) else inputs.geometry.rows(rows).numel()
    return count / inputs.query.shape[1] / 2


def sampled_maps(inputs: LayerInputs, heads: Tensor, rows: int | Tensor | None) -> Tensor:
    """Exact maps of sampled rows, float32 `[S, n_q, n_k]`.

    Args:
        inputs: The layer's inputs. Attention sinks are left out: they scale a row's masses alike.
        heads: int64 `[S]`; the maps of negative ones are zeros.
        rows: Rows a block; None for all of them; or chosen rows, int64 `[m, r]`, for a map of m
            rows.
    """
    if isinstance(rows, int):
        rows = inputs.geometry.rows(rows)
    _, maps = pooled_attention(
        inputs.query,
        inputs.keys,
        rows=rows,
        block_size=inputs.geometry.block_size,
        scale=inputs.scale,
        heads=heads,
        softcap=inputs.softcap,
    )
    return maps
