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
    softcap: float | None,
    sinks: torch.Tensor | None,
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
        if head < 0:
            maps.append(query.new_zeros((len(groups), n_k), dtype=dtype))
            if value is not None:
                outs.append(query.new_zeros((n_q_tokens, value.shape[2])))
            continue
        group = head // (n_heads // n_groups)
        logits = query[head].to(dtype) @ key[group].to(dtype).T * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits.masked_fill(~mask, -torch.inf)
        weights = torch.softmax(logits, -1)
        if value is not None:
            kept = weights
            if sinks is not None:
                sink = sinks[head].to(dtype).expand(n_q_tokens, 1)
                kept = torch.softmax(torch.cat([logits, sink], 1), -1)[:, :-1]
            outs.append((kept @ value[group].to(dtype)).to(query.dtype))
        mass = weights.new_zeros(n_q_tokens, n_k).index_add_(1, columns // block_size, weights)
        maps.append(torch.stack([mass[members].mean(0) for members in groups]))
    n_rows = len(groups)
    result = torch.stack(maps).float() if maps else query.new_zeros((0, n_rows, n_k)).float()
    if value is None:
        return None, result
    out = torch.stack(outs) if outs else query.new_zeros((0, n_q_tokens, value.shape[2]))
    return out, result
