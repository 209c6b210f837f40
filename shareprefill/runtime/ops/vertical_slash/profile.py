"""Vertical and slash profile in torch, on any device and without waiting for it."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from shareprefill.runtime.ops.blocks import count_blocks

# Weights of one step, `[heads, rows, keys]` in float32: what fills a GPU, or a CPU's cache.
WEIGHT_BYTES = {"cuda": 256 * 2**20, "cpu": 4 * 2**20}


def profile_last_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    block_size: int,
    scale: float,
    heads: torch.Tensor | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both profiles by chunks of heads; arguments as in `vertical_slash_profile`."""
    if heads is None:
        return _profile_heads(query, key, block_size, scale, heads, softcap)
    if heads.device.type == "cpu":
        # Skipped heads are not computed at all; elsewhere that would wait for the device.
        wanted = heads >= 0
        some = _profile_heads(query, key, block_size, scale, heads[wanted], softcap)
        zeros = [part.new_zeros(len(heads), part.shape[1]) for part in some]
        for whole, part in zip(zeros, some, strict=True):
            whole[wanted] = part
        return zeros[0], zeros[1]
    vertical, slash = _profile_heads(query, key, block_size, scale, heads.clamp(min=0), softcap)
    skipped = (heads < 0)[:, None]
    return vertical.masked_fill_(skipped, 0.0), slash.masked_fill_(skipped, 0.0)


def _profile_heads(
    query: torch.Tensor,
    key: torch.Tensor,
    block_size: int,
    scale: float,
    heads: torch.Tensor | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both profiles of heads of which none is skipped."""
    n_heads, n_q_tokens, _ = query.shape
    n_groups, n_k_tokens, _ = key.shape
    n_rows = min(block_size, n_q_tokens)
    rows = query[:, -n_rows:].flip(1)
    shared = n_heads // n_groups
    if heads is None:
        # Heads of a group are adjacent: their rows meet the keys in one product.
        rows = rows.reshape(n_groups, shared * n_rows, -1)
        groups = torch.arange(n_groups, device=key.device)
    else:
        rows, groups, shared = rows[heads], heads // shared, 1
    budget = WEIGHT_BYTES.get(query.device.type, WEIGHT_BYTES["cuda"])
    step = max(1, budget // (4 * shared * n_rows * n_k_tokens))
    parts = []
    for start in range(0, len(rows), step):
        some = slice(start, start + step)
        keys = key[some] if heads is None else key[groups[some]]
        logits = _products(rows[some], keys).view(-1, n_rows, n_k_tokens).mul_(scale)
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        parts.append(_profile(logits, block_size))
    if not parts:
        n_k = count_blocks(n_k_tokens, block_size)
        return key.new_zeros((0, n_k)).float(), key.new_zeros((0, n_k + 1)).float()
    vertical, slash = zip(*parts, strict=True)
    return torch.cat(vertical).float(), torch.cat(slash).float()


def _products(rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """`rows @ keys^T` in at least float32."""
    if rows.device.type == "cuda" and rows.dtype in (torch.float16, torch.bfloat16):
        return torch.bmm(rows, keys.mT, out_dtype=torch.float32)
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return rows.to(dtype) @ keys.to(dtype).mT


def _profile(logits: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Profiles of logits `[S, r, Nk]` whose rows run from the last query backwards."""
    n_heads, n_rows, n_k_tokens = logits.shape
    positions = n_k_tokens - 1 - torch.arange(n_rows, device=logits.device)
    columns = torch.arange(n_k_tokens, device=logits.device)
    logits.masked_fill_(columns[None, :] > positions[:, None], -torch.inf)
    weights = torch.softmax(logits, -1).div_(n_rows)
    missing = -n_k_tokens % block_size
    by_key = pad(weights.sum(1), (0, missing)).unflatten(1, (-1, block_size))
    # Row t and key j are t + j = Nk - 1 - offset: with rows one longer than the stride between
    # them, a diagonal of the padded weights is a column of the strided view.
    padded = pad(weights, (0, n_rows)).contiguous()
    width = n_k_tokens + n_rows
    diagonals = padded.as_strided((n_heads, n_rows, n_k_tokens), (n_rows * width, width - 1, 1))
    by_offset = pad(diagonals.sum(1).flip(1), (0, missing)).unflatten(1, (-1, block_size))
    part = torch.arange(block_size, device=logits.device, dtype=by_offset.dtype) / block_size
    slash = pad((by_offset * (1 - part)).sum(-1), (0, 1))
    slash[:, 1:] += (by_offset * part).sum(-1)
    return by_key.sum(-1), slash
