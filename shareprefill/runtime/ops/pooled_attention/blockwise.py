"""Pooled attention in chunks of rows, for CPUs."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from shareprefill.runtime.ops.blocks import count_blocks
from shareprefill.runtime.ops.inputs import padded_tokens

# Logits of one step over all heads of a KV group: they stay in a CPU's cache.
LOGIT_BYTES = 4 * 2**20
# Sampled rows of one step: more would compute many keys that lie past their diagonal.
SAMPLED_ROWS = 64


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
    """Output and maps chunk by chunk; arguments as in `pooled_attention`.

    Computes in float32 (float64 for float64 inputs): half-precision matmuls are slower on CPUs.
    Skipped heads cost nothing but their zeros.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    n_heads, n_q_tokens, _ = query.shape
    n_groups, n_k_tokens, _ = key.shape
    n_k = count_blocks(n_k_tokens, block_size)
    chosen = list(range(n_heads)) if heads is None else heads.tolist()
    if rows is None:
        members = torch.arange(n_q_tokens, device=query.device)
        owners = members // block_size
        largest = block_size
    else:
        members, owners = rows.flatten(), torch.arange(len(rows), device=rows.device)
        owners = owners.repeat_interleave(rows.shape[1])
        largest = SAMPLED_ROWS
    n_maps = count_blocks(n_q_tokens, block_size) if rows is None else len(rows)
    sums = query.new_zeros((len(chosen), n_maps, n_k), dtype=dtype)
    out = None if value is None else query.new_empty((len(chosen), n_q_tokens, value.shape[2]))
    slots: dict[int, list[int]] = {}
    for slot, head in enumerate(chosen):
        if head >= 0:
            slots.setdefault(head // (n_heads // n_groups), []).append(slot)
        elif out is not None:
            out[slot] = 0
    for group, some in slots.items():
        keys = padded_tokens(key[group], block_size, dtype)
        values = None if value is None else padded_tokens(value[group], block_size, dtype)
        queries = query[[chosen[slot] for slot in some]].to(dtype).mul_(scale)
        sink = None
        if sinks is not None and value is not None:
            sink = sinks[[chosen[slot] for slot in some]].to(dtype)[:, None]
        row_bytes = len(some) * n_k * block_size * dtype.itemsize
        at_once = max(1, min(largest, LOGIT_BYTES // row_bytes))
        for part in _chunks(len(members), at_once, largest):
            weights, kept = _attention(
                queries[:, members[part]],
                keys,
                members[part] + (n_k_tokens - n_q_tokens),
                block_size,
                softcap,
                sink,
            )
            mass = weights.unflatten(2, (-1, block_size)).sum(-1)
            for slot, head_mass in zip(some, mass, strict=True):
                sums[slot, :, : mass.shape[2]].index_add_(0, owners[part], head_mass)
            if out is not None and values is not None:
                product = weights @ values[: weights.shape[2]]
                if kept is not None:
                    product *= kept[:, :, None]
                out[some, part] = product.to(out.dtype)
    counts = torch.bincount(owners, minlength=n_maps).to(dtype)
    return out, sums.div_(counts[:, None]).float()


def _chunks(n_rows: int, at_once: int, boundary: int) -> Iterator[slice]:
    """Slices of at most `at_once` rows that do not cross a multiple of `boundary`."""
    for base in range(0, n_rows, boundary):
        end = min(base + boundary, n_rows)
        for start in range(base, end, at_once):
            yield slice(start, min(start + at_once, end))


def _attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    block_size: int,
    softcap: float | None,
    sink: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Softmax of rows `[S, r, D]` over whole key blocks up to the last visible: `[S, r, m]`.

    With a sink `[S, 1]` also the share `[S, r]` of the attention that goes to keys.
    """
    first, last = int(positions.min()), int(positions.max())
    n_tokens = (last // block_size + 1) * block_size
    logits = queries.reshape(-1, queries.shape[2]) @ keys[:n_tokens].T
    logits = logits.view(*queries.shape[:2], n_tokens)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    columns = torch.arange(first + 1, n_tokens, device=keys.device)
    logits[:, :, first + 1 :].masked_fill_(columns[None, :] > positions[:, None], -torch.inf)
    kept = None if sink is None else torch.sigmoid(torch.logsumexp(logits, -1) - sink)
    return torch.softmax(logits, -1, out=logits), kept
