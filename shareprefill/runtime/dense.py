"""Dense attention of plain tensors, by what is fastest for them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from shareprefill.runtime.ops import hopper
from shareprefill.runtime.ops.block_sparse_attention import block_sparse_attention
from shareprefill.runtime.ops.blocks import causal_lists, count_blocks
from shareprefill.runtime.ops.implementations import has_fast_kernel
from shareprefill.runtime.ops.tiles import multiprocessors

# Rows of a masked dense attention computed at once: bounds the mask at this many rows of all keys.
_DENSE_ROWS = 1024


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None = None
) -> Tensor:
    """Dense causal attention of one sequence whose last query row is its last key.

    Args:
        query: `[H, Nq, D]`.
        key: `[G, Nk, D]`, Nk >= Nq.
        value: `[G, Nk, Dv]`.
        scale: Factor on the logits.
        window: Keys that a query sees, itself among them; None for all.

    Returns:
        `[H, Nq, Dv]`.
    """
    n_query, n_key = query.shape[1], key.shape[1]
    if n_query == n_key and window is None:
        return sdpa(query[None], key[None], value[None], None, True, scale)[0]
    if window is None and _is_faster_in_blocks(query, key, value):
        lists = causal_lists(n_query, n_key - n_query, hopper.BLOCK, len(query), query.device)
        # Tokens first, as the model reads it.
        out = query.new_empty((n_query, len(query), value.shape[2])).transpose(0, 1)
        return block_sparse_attention(query, key, value, lists, scale=scale, out=out)
    if window is None and _has_lower_right_kernel(query, key, value):
        # It imports torch's compiler: seconds, at the first call instead of at every start.
        from torch.nn.attention.bias import causal_lower_right

        bias = causal_lower_right(n_query, n_key)
        return F.scaled_dot_product_attention(
            query[None], key[None], value[None], attn_mask=bias, scale=scale, enable_gqa=True
        )[0]
    pieces = []
    for start in range(0, n_query, _DENSE_ROWS):
        rows = torch.arange(start, min(start + _DENSE_ROWS, n_query), device=query.device)
        positions = rows + (n_key - n_query)
        low = 0 if window is None else max(0, start + n_key - n_query - window + 1)
        high = int(n_key - n_query + start + len(rows))
        columns = torch.arange(low, high, device=query.device)
        mask = columns[None, :] <= positions[:, None]
        if window is not None:
            mask &= columns[None, :] > positions[:, None] - window
        piece = query[None, :, start : start + len(rows)]
        pieces.append(
            sdpa(piece, key[None, :, low:high], value[None, :, low:high], mask, False, scale)[0]
        )
    return torch.cat(pieces, dim=1)


def _is_faster_in_blocks(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether lists of all causal blocks take less time than SDPA does for fewer rows than keys.

    SDPA has FlashAttention-2 for them (docs/performance.md), which divides the keys among programs
    where query tiles are too few for a GPU.
    """
    if not has_fast_kernel(query, key, value, hopper.BLOCK):
        return False
    tiles = len(query) * count_blocks(query.shape[1], hopper.BLOCK)
    return tiles >= multiprocessors(query.device)


def _has_lower_right_kernel(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether a GPU's flash kernel takes fewer queries than keys, aligned at the end."""
    if query.device.type != "cuda" or query.shape[-1] != value.shape[-1]:
        return False
    parts = (query[None], key[None], value[None])
    return can_use_flash_attention(SDPAParams(*parts, None, 0.0, False, True))


def sdpa(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """`F.scaled_dot_product_attention` with shared KV heads.

    Args:
        query: `[B, H, Lq, D]`.
        key: `[B, G, Lk, D]`.
        value: `[B, G, Lk, Dv]`.
        mask: bool or additive, `[B or 1, 1, Lq, Lk]`; None for none.
        causal: Whether row i reads the keys 0 .. i alone, where there are several rows.
        scale: Factor on the logits.

    Returns:
        `[B, H, Lq, Dv]`.
    """
    _, heads, rows, _ = query.shape
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=causal and rows > 1,
        scale=scale,
        enable_gqa=heads != key.shape[1],
    )
