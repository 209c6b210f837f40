"""Capture of block-pooled attention maps, on the model's own attention inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from shareprefill.errors import DataError, UnsupportedError
from shareprefill.runtime.interface import AttentionCall, attached, dense_attention
from shareprefill.runtime.ops.pooled_attention import pooled_attention, sample_rows
from shareprefill.runtime.ops.vertical_slash import vertical_slash_profile

FULL, VERTICAL, SLASH = "full", "vertical", "slash"


def rows_key(rows: int) -> str:
    """Name of the maps taken from `rows` query rows a block."""
    return f"rows{rows}"


@dataclass(frozen=True)
class PromptMaps:
    """The attention of one prompt, pooled by block.

    Attributes:
        layers: Indices of the layers that were captured: those with full causal attention.
        tensors: `full` float16 `[L, H, n, n]`, the exact block maps; `rows<r>` the same from r
            query rows a block; `vertical` `[L, H, n]` and `slash` `[L, H, n + 1]`, the last query
            block's mass by key block and by block distance.
    """

    layers: tuple[int, ...]
    tensors: dict[str, Tensor]


class _Recorder:
    """Attention handler: the model's own attention, and its block maps beside it."""

    def __init__(self, block_size: int, rows: tuple[int, ...]) -> None:
        self.block_size, self.rows = block_size, rows
        self.layers: dict[int, dict[str, Tensor]] = {}

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
        pooled = {FULL: pooled_attention(query, key, **options)[1]}
        for rows in self.rows:
            chosen = sample_rows(query.shape[1], self.block_size, rows, query.device)
            pooled[rows_key(rows)] = pooled_attention(query, key, rows=chosen, **options)[1]
        pooled |= {VERTICAL: vertical, SLASH: slash}
        return {name: tensor.to("cpu", torch.float16) for name, tensor in pooled.items()}


@torch.no_grad()
def capture(
    model: torch.nn.Module, input_ids: Tensor, *, block_size: int, rows: tuple[int, ...]
) -> PromptMaps:
    """Runs one prompt through the model and records every full-attention layer's block maps.

    The model's output is that of dense attention, and its attention implementation is restored. No
    N x N tensor is made: memory grows with the blocks, `[H, n, n]` a layer.

    Args:
        model: A transformers decoder, in eval mode.
        input_ids: int64 `[N]`, on any device.
        block_size: Tokens a block.
        rows: Query rows a block of the row-sampled maps.

    Returns:
        The maps, on the CPU.

    Raises:
        DataError: queries or keys are not finite.
        UnsupportedError: the model has no full-attention layer that can be captured.
    """
    recorder = _Recorder(block_size, rows)
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
    return PromptMaps(
        layers, {name: torch.stack([recorder.layers[n][name] for n in layers]) for name in names}
    )
