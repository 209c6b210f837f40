"""Pages of keys and values, as engines lay them out."""

from __future__ import annotations

from typing import Any

import torch

from shareprefill.runtime.ops.blocks import count_blocks
from shareprefill.runtime.ops.pages import PagedBatch

LAYOUTS = ("split, tokens first", "split, heads first", "joined, tokens first", "joined")


def empty_pools(
    layout: str, pages: int, size: int, groups: int, dim: int, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pools of keys and of values `[pages, G, page size, D]`, as engines lay them out, of NaN."""
    in_page = (size, groups) if "tokens first" in layout else (groups, size)
    if layout.startswith("split"):
        cache = torch.full((pages, 2, *in_page, dim), torch.nan, **options)
        halves = cache.unbind(1)
    else:
        halves = torch.full((pages, *in_page, 2 * dim), torch.nan, **options).chunk(2, -1)
    keys, values = (h.transpose(1, 2) if "tokens first" in layout else h for h in halves)
    return keys, values


def in_batch_pages(
    key: torch.Tensor, value: torch.Tensor, lengths: list[int], size: int, layout: str = "joined"
) -> tuple[PagedBatch, PagedBatch]:
    """Keys and values `[B, G, N, D]` of some lengths in pages in a random order.

    All that is behind a sequence's length, and pages of others, hold NaN; the tables name pages
    that are not there behind its last one.
    """
    batch, groups, tokens, dim = key.shape
    most = count_blocks(tokens, size)
    order = torch.randperm(batch * most + 5, device=key.device)
    kind = {"dtype": key.dtype, "device": key.device}
    pools = empty_pools(layout, len(order), size, groups, dim, **kind)
    if value.shape[3] != dim:
        pools = pools[0], empty_pools(layout, len(order), size, groups, value.shape[3], **kind)[1]
    tables = torch.full((batch, most + 2), -(10**6), dtype=torch.int32, device=key.device)
    for row, length in enumerate(lengths):
        mine = order[row * most :][: count_blocks(length, size)]
        tables[row, : len(mine)] = mine
        place = torch.arange(length, device=key.device)
        for pool, source in zip(pools, (key, value), strict=True):
            pool[mine[place // size], :, place % size] = source[row, :, :length].transpose(0, 1)
    keys, values = (PagedBatch(pool, tables, tokens) for pool in pools)
    return keys, values
