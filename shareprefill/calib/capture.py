"""Capture of block-pooled attention maps, on the model's own attention inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from shareprefill.calib.lines import line_products
from shareprefill.config import CalibrateConfig
from shareprefill.errors import DataError, UnsupportedError
from shareprefill.runtime.interface import AttentionCall, attached, dense_attention
from shareprefill.runtime.ops.pooled_attention import pooled_attention, sample_rows
from shareprefill.runtime.ops.vertical_slash import vertical_slash_profile

FULL, VERTICAL, SLASH, LINES = "full", "vertical", "slash", "lines"
ROWS = "rows"


def rows_key(rows: int) -> str:
    """Name of the maps taken from `rows` query rows a block."""
    return f"{ROWS}{rows}"


def map_names(config: CalibrateConfig) -> tuple[str, ...]:
    """Names of the maps and profiles that a calibration keeps, which have a row for every head."""
    return FULL, VERTICAL, SLASH, *(rows_key(rows) for rows in config.rows)


@dataclass(frozen=True)
class PromptMaps:
    """The attention of one prompt, pooled by block.

    Attributes:
        layers: Indices of the layers that were captured: those with full causal attention.
        tensors: `full` float16 `[L, H, n, n]`, the exact block maps; `rows<r>` the same from r
            query rows a block; `vertical` `[L, H, n]` and `slash` `[L, H, n + 1]`, the last query
            block's mass by key block and by block distance; `lines` float64 `[R, 8, 8]`, for each
            count of rows the products that an estimator of the exact maps is fitted to (see
            `line_products`), at the model's own blocks.
    """

    layers: tuple[int, ...]
    tensors: dict[str, Tensor]


class _Recorder:
    """Attention handler: the model's own attention, and its block maps beside it."""

    def __init__(self, block_size: int, rows: tuple[int, ...], map_block: int) -> None:
        self.block_size, self.rows, self.map_block = block_size, rows, map_block
        self.layers: dict[int, dict[str, Tensor]] = {}
        self.products = torch.zeros(len(rows), 8, 8, dtype=torch.float64, device="cpu")

    def __call__(self, call: AttentionCall) -> Tensor:
        if call.is_shareable:
            self.layers[call.layer] = self._pool(call)
        return dense_attention(call)

    def _pool(self, call: AttentionCall) -> dict[str, Tensor]:
        query, key = call.query[0], call.key[0]
        if not bool(torch.isfinite(query).all() & torch.isfinite(key).all()):
            raise DataError(
                "the model's queries or keys are not finite; load it in float32 (--dtype float32)"
            )
        options: dict[str, Any] = {
            "block_size": self.block_size,
            "scale": call.scale,
            "softcap": call.softcap,
        }
        vertical, slash = vertical_slash_profile(query, key, **options)
        full = pooled_attention(query, key, **options)[1]
        pooled = {FULL: full}
        for number, rows in enumerate(self.rows):
            chosen = sample_rows(query.shape[1], self.block_size, rows, query.device)
            sampled = pooled_attention(query, key, rows=chosen, **options)[1]
            pooled[rows_key(rows)] = sampled
            self.products[number] += line_products(
                sampled, full, query.shape[1], self.block_size
            ).cpu()
        factor = self.map_block // self.block_size
        pooled = {name: coarsen(maps, factor) for name, maps in pooled.items()}
        pooled |= {VERTICAL: _join(vertical, factor), SLASH: _join_distances(slash, factor)}
        return {name: tensor.to("cpu", torch.float16) for name, tensor in pooled.items()}


def coarsen(maps: Tensor, factor: int) -> Tensor:
    """Block maps at blocks that many times as large.

    Args:
        maps: `[H, n, n]`: attention of the mean row of a query block to a key block.
        factor: Blocks that become one; the last one may be of fewer.

    Returns:
        `[H, n', n']`, n' = ceil(n / factor); rows keep their sums.

    >>> coarsen(torch.tensor([[[1.0, 0, 0], [0.5, 0.5, 0], [0.25, 0.25, 0.5]]]), 2)
    tensor([[[1.0000, 0.0000],
             [0.5000, 0.5000]]])
    """
    if factor == 1:
        return maps
    columns = _join(maps, factor)
    return torch.stack([rows.mean(1) for rows in columns.split(factor, dim=1)], 1)


def _join(masses: Tensor, factor: int) -> Tensor:
    """Masses by key block, `[..., n]`, summed over runs of blocks."""
    return torch.stack([run.sum(-1) for run in masses.split(factor, dim=-1)], -1)


def _join_distances(slash: Tensor, factor: int) -> Tensor:
    """Masses by block distance, `[H, n + 1]`, at larger blocks: `[H, ceil(n / factor) + 1]`."""
    joined = _join(slash[:, :-1], factor)
    return torch.cat([joined, slash[:, -1:]], 1)


@torch.no_grad()
def capture(
    model: torch.nn.Module,
    input_ids: Tensor,
    *,
    block_size: int,
    rows: tuple[int, ...],
    map_block: int | None = None,
) -> PromptMaps:
    """Runs one prompt through the model and records every full-attention layer's block maps.

    The model's output is that of dense attention, and its attention implementation is restored. No
    N x N tensor is made: memory grows with the blocks, `[H, n, n]` a layer.

    Args:
        model: A transformers decoder, in eval mode.
        input_ids: int64 `[N]`, on any device.
        block_size: Tokens a block.
        rows: Query rows a block of the row-sampled maps.
        map_block: Tokens a block of the maps that are kept, a multiple of `block_size`; None: the
            same.

    Returns:
        The maps, on the CPU.

    Raises:
        DataError: queries or keys are not finite.
        UnsupportedError: the model has no full-attention layer that can be captured.
    """
    recorder = _Recorder(block_size, rows, map_block or block_size)
    with attached(model, recorder):
        device = cast(Any, model).get_input_embeddings().weight.device
        cast(Any, model)(input_ids=input_ids[None].to(device), use_cache=False, logits_to_keep=1)
    if not recorder.layers:
        raise UnsupportedError(
            f"{type(model).__name__} has no layer with full causal attention that could be shared; "
            "run it without a session (sp doctor --model tells what its layers are)"
        )
    layers = tuple(sorted(recorder.layers))
    names = recorder.layers[layers[0]]
    tensors = {name: torch.stack([recorder.layers[n][name] for n in layers]) for name in names}
    return PromptMaps(layers, {**tensors, LINES: recorder.products})
