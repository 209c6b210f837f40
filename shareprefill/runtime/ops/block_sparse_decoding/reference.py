"""A decode step over listed key blocks with an explicit mask, written to be believed."""

from __future__ import annotations

import torch

from shareprefill.runtime.ops.pages import Cached, batch_gathered


def decode(
    query: torch.Tensor,
    key: Cached,
    value: Cached,
    blocks: torch.Tensor,
    counts: torch.Tensor,
    block_size: int,
    lengths: torch.Tensor | None,
    starts: torch.Tensor | None,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Fill `out`; arguments as in `block_sparse_decoding`."""
    key, value = batch_gathered(key), batch_gathered(value)
    dtype = torch.promote_types(query.dtype, torch.float32)
    groups, tokens = key.shape[1:3]
    places = torch.arange(tokens, device=key.device)
    for batch in range(len(query)):
        for group in range(groups):
            listed = blocks[batch, group, : int(counts[batch, group])]
            start = 0 if starts is None else int(starts[batch])
            read = torch.isin((places - start).div(block_size, rounding_mode="floor"), listed)
            if lengths is not None:
                read &= places < lengths[batch]
            keys, values = (t[batch, group, read].to(dtype) for t in (key, value))
            heads = slice(group * query.shape[1] // groups, (group + 1) * query.shape[1] // groups)
            # Of no key: the softmax is empty, and the product gives zeros.
            weights = (query[batch, heads].to(dtype) @ keys.T * scale).softmax(-1)
            out[batch, heads] = (weights @ values).to(out.dtype)
