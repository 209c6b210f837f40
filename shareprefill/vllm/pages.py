"""Keys and values of one request in an engine's pages.

A page holds some tokens of every KV head. How it is laid out differs by backend and version; each
layout is a function here, tested against a cache that is written token by token. The operators read
plain layouts where they are; what is laid out for an instruction set is gathered.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shareprefill.errors import UnsupportedError
from shareprefill.runtime.ops.pages import PagedTokens


def request_table(tables: Tensor, row: int) -> Tensor:
    """The table of one request, where it starts at a multiple of 16 bytes.

    Kernels are compiled for such addresses, and anew for others. A row of an engine's tables starts
    at any, so it is copied, once a step.

    Args:
        tables: int `[requests, pages of a request]` and more, at a multiple of 16 bytes.
        row: The request's.
    """
    return tables[row].clone() if row else tables[0]


def split_pages(cache: Tensor, table: Tensor, n_key: int) -> tuple[PagedTokens, PagedTokens]:
    """Keys and values that lie in two halves of a page.

    Args:
        cache: `[pages, 2, page size, G, D]`, in any strides.
        table: int `[pages of the request]` and more, in the order of its tokens.
        n_key: Tokens of the request.

    Returns:
        Keys and values `[G, n_key, D]`, where they are.
    """
    keys, values = (PagedTokens(half.transpose(1, 2), table, n_key) for half in cache.unbind(1))
    return keys, values


def joined_pages(cache: Tensor, table: Tensor, n_key: int) -> tuple[PagedTokens, PagedTokens]:
    """Keys and values that lie one behind the other in every token's row.

    Args:
        cache: `[pages, G, page size, 2 D]`, in any strides.
        table: int `[pages of the request]` and more, in the order of its tokens.
        n_key: Tokens of the request.

    Returns:
        Keys and values `[G, n_key, D]`, where they are.
    """
    keys, values = (PagedTokens(half, table, n_key) for half in cache.chunk(2, dim=-1))
    return keys, values


def all_pages(cache: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of all pages, where they are.

    Args:
        cache: As in `split_pages`, or as in `joined_pages`.

    Returns:
        Keys and values `[pages, G, page size, D]`.
    """
    if cache.ndim == 5:
        keys, values = cache.transpose(2, 3).unbind(1)
    else:
        keys, values = cache.chunk(2, dim=-1)
    return keys, values


def gather_ordered(
    cache: Tensor, table: Tensor, n_key: int, orders: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Keys and values of pages whose inside is laid out for an instruction set.

    Args:
        cache: `[pages, G, page size, 2 D]`, contiguous: a page of a head is all keys, then all
            values.
        table: int `[pages of the request]` and more, in the order of its tokens.
        n_key: Tokens of the request.
        orders: For keys and for values, int64 `[page size, D]`: where each number of a page's half
            lies in it (`page_order` finds that out).

    Returns:
        Keys and values `[G, n_key, D]`, contiguous.
    """
    n_pages, groups, size, width = cache.shape
    halves = cache.view(n_pages, groups, 2, size * width // 2)
    pages = table[: -(-n_key // size)].long()
    keys, values = (
        _in_order(halves[pages, :, half], order).transpose(0, 1).reshape(groups, -1, width // 2)
        for half, order in enumerate(orders)
    )
    return keys[:, :n_key], values[:, :n_key]


def ordered_pages(cache: Tensor, orders: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values of all pages of a cache that is laid out for an instruction set, as views.

    Args:
        cache: As in `gather_ordered`.
        orders: As in `gather_ordered`.

    Returns:
        Keys and values `[pages, G, page size, D]`.

    Raises:
        UnsupportedError: strides do not describe the layout.
    """
    halves = cache.view(*cache.shape[:2], 2, -1)
    keys, values = (_view(halves[:, :, half], order) for half, order in enumerate(orders))
    if keys is None or values is None:
        raise UnsupportedError(
            "sparse decode steps cannot read the engine's pages of keys and values where they are, "
            'as this CPU and dtype lay them out: take another dtype, or leave out "decode"'
        )
    return keys, values


def page_order(rows: Tensor, columns: Tensor) -> Tensor:
    """Where each number of a page's half lies, from what the engine itself wrote there.

    Args:
        rows: `[page size * D]`, the half after a write in which every number was its token's place
            in the page.
        columns: The same, every number its place in the head's vector.

    Returns:
        int64 `[page size, D]`.

    Raises:
        UnsupportedError: the half does not hold every number once.
    """
    row, column = rows.long(), columns.long()
    size, dim = int(row.max()) + 1, int(column.max()) + 1
    order = torch.full((size, dim), -1, device=rows.device, dtype=torch.int64)
    order[row, column] = torch.arange(len(row), device=rows.device, dtype=torch.int64)
    if size * dim != len(row) or bool((order < 0).any()):
        raise UnsupportedError(
            "the engine's pages of keys and values hold something else than each number once: use "
            "another CPU, dtype or page size, or run without shareprefill"
        )
    return order


def _in_order(half: Tensor, order: Tensor) -> Tensor:
    """`[p, G, page size * D]` as `[p, G, page size, D]`, without a copy where a view will do."""
    view = _view(half, order)
    return half[..., order] if view is None else view


def _view(half: Tensor, order: Tensor) -> Tensor | None:
    """The same, never with a copy: None where no view will do."""
    size, dim = order.shape
    plain = torch.arange(size * dim, device=order.device, dtype=torch.int64)
    if torch.equal(order, plain.view(size, dim)):
        return half.view(*half.shape[:2], size, dim)
    if torch.equal(order, plain.view(dim, size).T):
        return half.view(*half.shape[:2], dim, size).transpose(2, 3)
    return None
