"""Block-sparse attention with an explicit mask, written to be believed."""

from __future__ import annotations

import torch

from shareprefill.runtime.ops.blocks import BlockLists


def listed_mask(lists: BlockLists, pattern: int, n_q_tokens: int, n_k_tokens: int) -> torch.Tensor:
    """Keys that each row of a pattern may see: listed and causal, bool `[Nq, Nk]`."""
    blocks = lists.to_bitmap()[pattern]
    tokens = blocks.repeat_interleave(lists.block_size, 0).repeat_interleave(lists.block_size, 1)
    rows = torch.arange(n_q_tokens, device=lists.device) + (n_k_tokens - n_q_tokens)
    columns = torch.arange(n_k_tokens, device=lists.device)
    return tokens[:n_q_tokens, :n_k_tokens] & (columns[None, :] <= rows[:, None])


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lists: BlockLists,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """Fill `out` (and `lse`) head by head; arguments as in `block_sparse_attention`."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    heads_per_group = query.shape[0] // key.shape[0]
    for head, pattern in enumerate(lists.head_to_list.tolist()):
        if pattern < 0:
            continue
        group = head // heads_per_group
        mask = listed_mask(lists, pattern, query.shape[1], key.shape[1])
        logits = query[head].to(dtype) @ key[group].to(dtype).T * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits.masked_fill(~mask, -torch.inf)
        if sinks is not None:
            sink = sinks[head].to(dtype).expand(len(logits), 1)
            logits = torch.cat([logits, sink], -1)
        # softmax of a row without keys is NaN; such a row gives zeros.
        weights = torch.softmax(logits, -1)[:, : mask.shape[1]].masked_fill(~mask, 0.0)
        out[head] = (weights @ value[group].to(dtype)).to(out.dtype)
        if lse is not None:
            lse[head] = torch.logsumexp(logits, -1).float()
