"""Pooled attention with the full attention matrix of one head, written to be believed."""

from __future__ import annotations

import torch

from shareprefill.runtime.ops.blocks import count_blocks


def pool(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    rows: torch.Tensor | None,
    block_size: int,
    scale: float,
    heads: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Output and maps head by head; arguments as in `pooled_attention`."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    n_heads, n_q_tokens, _ = query.shape
    n_groups, n_k_tokens, _ = key.shape
    n_k = count_blocks(n_k_tokens, block_size)
    if rows is None:
        groups = list(torch.arange(n_q_tokens, device=query.device).split(block_size))
    else:
        groups = list(rows)
    positions = torch.arange(n_q_tokens, device=query.device) + (n_k_tokens - n_q_tokens)
    columns = torch.arange(n_k_tokens, device=query.device)
    mask = columns[None, :] <= positions[:, None]
    outs, maps = [], []
    for head in range(n_heads) if heads is None else heads.tolist():
        group = head // (n_heads // n_groups)
        logits = query[head].to(dtype) @ key[group].to(dtype).T * scale
        weights = torch.softmax(logits.masked_fill(~mask, -torch.inf), -1)
        if value is not None:
            outs.append((weights @ value[group].to(dtype)).to(query.dtype))
        mass = weights.new_zeros(n_q_tokens, n_k).index_add_(1, columns // block_size, weights)
        maps.append(torch.stack([mass[members].mean(0) for members in groups]))
    n_rows = len(groups)
    result = torch.stack(maps).float() if maps else query.new_zeros((0, n_rows, n_k)).float()
    if value is None:
        return None, result
    out = torch.stack(outs) if outs else query.new_zeros((0, n_q_tokens, value.shape[2]))
    return out, result
