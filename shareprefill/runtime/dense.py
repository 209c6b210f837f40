"""Dense attention of plain tensors, by what is fastest for them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from shareprefill.runtime.ops.block_sparse_attention import block_sparse_attention
from shareprefill.runtime.ops.blocks import causal_lists, count_blocks, count_causal_blocks
from shareprefill.runtime.ops.dispatch import has_fast_kernel
from shareprefill.runtime.ops.hopper import launch
from shareprefill.runtime.ops.triton_tiles import device_capability, multiprocessors

# Rows of a masked dense attention computed at once: bounds the mask at this many rows of all keys.
_DENSE_ROWS = 1024

# From where on lists of all causal blocks are taken for whole sequences on Hopper GPUs. Beside
# FlashAttention-2 they take the host 60 us more, and the device half the time: 70 us instead of
# 170 for 32 / 8 heads, D=128, at 2027 tokens (one H200, 7d97b39). Fewer or smaller heads need as
# much work, D times the causal blocks of all heads. Where heads are as wide as these, linear layers
# hide the host from fewer tokens on: an 8B shape's pass of 1024 takes 31.6 ms instead of 32.6.
_WHOLE_TOKENS, _WIDE_TOKENS, _WIDTH = 2048, 1024, 32 * 128
_WHOLE_WORK = _WIDTH * count_causal_blocks(_WHOLE_TOKENS, 0, launch.BLOCK)
# First number of the compute capability of GPUs on which SDPA's plans were measured.
_PLANS = 9


def whole_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Dense causal attention of rows that are one whole sequence each.

    Args:
        query: `[B, H, N, D]`.
        key: `[B, G, N, D]`.
        value: `[B, G, N, Dv]`.
        scale: Factor on the logits.

    Returns:
        `[B, H, N, Dv]`.
    """
    if _is_faster_in_blocks(query, key, value):
        return _in_blocks(query, key, value, scale)
    if _is_plan_longer(query, key, value):
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, 0.0, True, False, scale=scale)[0]
    return sdpa(query, key, value, None, True, scale)


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
    if window is None:
        row = query[None], key[None], value[None]
        if n_query == n_key:
            return whole_attention(*row, scale)[0]
        if _is_faster_in_blocks(*row):
            return _in_blocks(*row, scale)[0]
        if _has_lower_right_kernel(*row):
            # It imports torch's compiler: seconds, at the first call instead of at every start.
            from torch.nn.attention.bias import causal_lower_right

            bias = causal_lower_right(n_query, n_key)
            return F.scaled_dot_product_attention(
                *row, attn_mask=bias, scale=scale, enable_gqa=True
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
    """Whether lists of all causal blocks take less time than SDPA and FlashAttention-2.

    For whole sequences SDPA has cuDNN's kernel, which is slower from some work on. For fewer rows
    than keys it has FlashAttention-2 (docs/performance.md), which divides the keys among programs
    where query tiles are too few for a GPU.

    Args:
        query: `[B, H, Nq, D]`.
        key: `[B, G, Nk, D]`, Nk >= Nq.
        value: `[B, G, Nk, Dv]`.
    """
    _, heads, n_query, dim = query.shape
    if n_query < key.shape[2]:
        tiles = heads * count_blocks(n_query, launch.BLOCK)
        is_enough = tiles >= multiprocessors(query.device)
    elif n_query < _WIDE_TOKENS:
        is_enough = False
    else:
        is_enough = heads * dim >= _WIDTH or _work(query) >= _WHOLE_WORK
    return is_enough and has_fast_kernel(query[0], key[0], value[0], launch.BLOCK)


def _work(query: Tensor) -> int:
    """D times the causal blocks of all heads of a whole sequence."""
    _, heads, n_query, dim = query.shape
    return dim * heads * count_causal_blocks(n_query, 0, launch.BLOCK)


def _is_plan_longer(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether SDPA would plan for longer than attention of whole sequences takes.

    On Hopper GPUs it prefers cuDNN's kernel, which is planned for every length anew: once in a
    process, for 60 ms (docs/performance.md). FlashAttention-2 needs no plan.
    """
    is_planned = device_capability(query.device)[0] == _PLANS
    if not is_planned or query.shape[2] == 1 or query.shape[-1] != value.shape[-1]:
        return False
    is_shared = query.shape[1] != key.shape[1]
    return _work(query) < _WHOLE_WORK and can_use_flash_attention(
        SDPAParams(query, key, value, None, 0.0, True, is_shared)
    )


def _in_blocks(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Dense causal attention over lists of all causal blocks; shapes as above, `[B, H, Nq, Dv]`."""
    rows, heads, n_query, _ = query.shape
    lists = causal_lists(n_query, key.shape[2] - n_query, launch.BLOCK, heads, query.device)
    # Tokens first, as the model reads it.
    out = query.new_empty((rows, n_query, heads, value.shape[3])).transpose(1, 2)
    for row in range(rows):
        block_sparse_attention(query[row], key[row], value[row], lists, scale=scale, out=out[row])
    return out


def _has_lower_right_kernel(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether a GPU's flash kernel takes fewer queries than keys, aligned at the end."""
    if query.device.type != "cuda" or query.shape[-1] != value.shape[-1]:
        return False
    return can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, False, True))


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
