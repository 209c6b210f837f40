"""Vertical and slash profile, offset by offset, written to be believed."""

from __future__ import annotations

import torch

from shareprefill.runtime.ops.blocks import count_blocks


def profile_last_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    block_size: int,
    scale: float,
    heads: torch.Tensor | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both profiles head by head; arguments as in `vertical_slash_profile`."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    n_heads, n_q_tokens, _ = query.shape
    n_groups, n_k_tokens, _ = key.shape
    n_k = count_blocks(n_k_tokens, block_size)
    n_rows = min(block_size, n_q_tokens)
    chosen = list(range(n_heads)) if heads is None else heads.tolist()
    vertical = torch.zeros(len(chosen), n_k, dtype=dtype, device=query.device)
    slash = torch.zeros(len(chosen), n_k + 1, dtype=dtype, device=query.device)
    positions = torch.arange(n_k_tokens - n_rows, n_k_tokens, device=query.device)
    columns = torch.arange(n_k_tokens, device=query.device)
    offsets = positions[:, None] - columns[None, :]
    for slot, head in enumerate(chosen):
        if head < 0:
            continue
        group = head // (n_heads // n_groups)
        logits = query[head, -n_rows:].to(dtype) @ key[group].to(dtype).T * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        weights = torch.softmax(logits.masked_fill(offsets < 0, -torch.inf), -1) / n_rows
        for block in range(n_k):
            vertical[slot, block] = weights[:, columns // block_size == block].sum()
        for offset in range(n_k_tokens):
            whole, part = divmod(offset, block_size)
            mass = weights[offsets == offset].sum()
            slash[slot, whole] += mass * (block_size - part) / block_size
            slash[slot, whole + 1] += mass * part / block_size
    return vertical.float(), slash.float()
