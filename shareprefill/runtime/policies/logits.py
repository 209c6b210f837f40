"""What policies need to form a few logits: pieces that bound memory, mean keys, visible counts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from shareprefill.runtime.ops.blocks import count_blocks
from shareprefill.runtime.policies.base import LayerInputs

# Logits of one step: what fills a GPU, or a CPU's cache.
PIECE_BYTES = {"cuda": 256 * 2**20, "cpu": 8 * 2**20}


def pieces(total: int, bytes_each: int, device: torch.device) -> Iterator[slice]:
    """Slices of `range(total)` whose items of `bytes_each` bytes fit one step's memory."""
    budget = PIECE_BYTES.get(device.type, PIECE_BYTES["cuda"])
    step = max(1, budget // max(1, bytes_each))
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def real_heads(heads: Tensor) -> Tensor:
    """Heads to compute: a head without need of a pattern is computed as head 0."""
    return heads.clamp(min=0)


def kv_heads(inputs: LayerInputs, heads: Tensor) -> Tensor:
    """KV head of each query head, int64 `[S]`."""
    return heads // (inputs.query.shape[0] // inputs.keys.shape[0])


def products(rows: Tensor, keys: Tensor, inputs: LayerInputs) -> Tensor:
    """The model's logits of rows and keys, `[S, r, m]` in at least float32.

    Args:
        rows: Queries `[S, r, D]`.
        keys: Keys, or means of keys, `[S, m, D]`.
        inputs: Scale and soft-cap.
    """
    return as_logits(inner_products(rows, keys), inputs)


def inner_products(rows: Tensor, keys: Tensor) -> Tensor:
    """`rows @ keys^T`, `[S, r, m]` in at least float32."""
    if rows.device.type == "cuda" and rows.dtype in (torch.float16, torch.bfloat16):
        return torch.bmm(rows, keys.to(rows.dtype).mT, out_dtype=torch.float32)
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return rows.to(dtype) @ keys.to(dtype).mT


def as_logits(raw: Tensor, inputs: LayerInputs) -> Tensor:
    """Scales and soft-caps inner products, in place."""
    raw.mul_(inputs.scale)
    if inputs.softcap is not None:
        raw.div_(inputs.softcap).tanh_().mul_(inputs.softcap)
    return raw


def block_means(tokens: Tensor, size: int) -> Tensor:
    """Means of every `size` tokens, `[S, n, D]` in at least float32; the last may have fewer."""
    n_tokens = tokens.shape[1]
    wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    sums = pad(wide, (0, 0, 0, -n_tokens % size)).unflatten(1, (-1, size)).sum(2)
    starts = torch.arange(0, n_tokens, size, device=tokens.device)
    return sums / (n_tokens - starts).clamp(max=size)[:, None]


def positions(inputs: LayerInputs) -> Tensor:
    """Absolute position of every query row, int64 `[Nq]`."""
    n_query, n_key = inputs.query.shape[1], inputs.keys.shape[1]
    return torch.arange(n_key - n_query, n_key, device=inputs.query.device)


def visible_counts(rows: Tensor, n_keys: int, size: int) -> Tensor:
    """Keys of every block of `size` that rows at these positions see, float32 `[r, n]`."""
    starts = torch.arange(count_blocks(n_keys, size), device=rows.device) * size
    return (rows[:, None] + 1 - starts[None, :]).clamp(min=0, max=size).float()


def query_blocks(inputs: LayerInputs, step: slice) -> slice:
    """Query rows of some query blocks."""
    block = inputs.geometry.block_size
    return slice(step.start * block, min(step.stop * block, inputs.query.shape[1]))


def mean_over_blocks(rows: Tensor, block_size: int) -> Tensor:
    """Means over every block's rows: `[S, r, m]` to `[S, n, m]`; the last may have fewer rows."""
    n_rows = rows.shape[1]
    if n_rows % block_size == 0:
        return rows.unflatten(1, (-1, block_size)).mean(2)
    return block_means(rows, block_size)
