"""Every layout is checked against a cache that is written token by token."""

import pytest
import torch

from shareprefill.errors import UnsupportedError
from shareprefill.vllm.pages import (
    all_pages,
    gather_ordered,
    joined_pages,
    ordered_pages,
    page_order,
    request_table,
    split_pages,
)

G, D = 3, 8


def _tokens(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(G, n, D), torch.randn(G, n, D)


def _table(n: int, size: int) -> torch.Tensor:
    """Pages in a random order, with places behind the last one that are of nobody."""
    needed = -(-n // size)
    return torch.randperm(needed + 4)[: needed + 2].to(torch.int32)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 64, 100])
@pytest.mark.parametrize("head_major", [False, True])
def test_split_pages(n: int, head_major: bool):
    keys, values = _tokens(n)
    table = _table(n, 16)
    cache = torch.full((len(table) + 4, 2, 16, G, D), torch.nan)
    if head_major:
        cache = torch.full((len(table) + 4, 2, G, 16, D), torch.nan).transpose(2, 3)
    for token in range(n):
        page = int(table[token // 16])
        cache[page, 0, token % 16], cache[page, 1, token % 16] = keys[:, token], values[:, token]
    found = split_pages(cache, table, n)
    assert torch.equal(found[0].gathered, keys)
    assert torch.equal(found[1].gathered, values)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 64, 100])
def test_joined_pages(n: int):
    keys, values = _tokens(n)
    table = _table(n, 16)
    cache = torch.full((len(table) + 4, G, 16, 2 * D), torch.nan)
    for token in range(n):
        both = torch.cat([keys[:, token], values[:, token]], -1)
        cache[int(table[token // 16]), :, token % 16] = both
    found = joined_pages(cache, table, n)
    assert torch.equal(found[0].gathered, keys)
    assert torch.equal(found[1].gathered, values)


@pytest.mark.parametrize("width", [1, 129, 266])
def test_a_request_s_table_starts_where_kernels_are_compiled_for(width: int):
    tables = torch.arange(4 * width, dtype=torch.int32).view(4, width)
    assert any(row.data_ptr() % 16 for row in tables)
    found = [request_table(tables, row) for row in range(4)]
    assert not any(table.data_ptr() % 16 for table in found)
    assert torch.equal(torch.stack(found), tables)
    # The only request of a step needs no copy.
    assert found[0].data_ptr() == tables.data_ptr()


@pytest.mark.parametrize("is_split", [False, True])
def test_all_pages_are_seen_where_they_are(is_split: bool):
    keys, values = torch.randn(2, 5, G, 16, D)
    cache = torch.cat([keys, values], -1)
    if is_split:
        cache = torch.stack([keys, values], 1).transpose(2, 3)
    for found, wanted in zip(all_pages(cache), (keys, values), strict=True):
        assert torch.equal(found, wanted)
        assert found.untyped_storage().data_ptr() == cache.untyped_storage().data_ptr()


def _order(kind: str, size: int) -> torch.Tensor:
    """Where token t's number c lies in a page's half."""
    plain = torch.arange(size * D).view(size, D)
    if kind == "transposed":
        return torch.arange(size * D).view(D, size).T
    return plain if kind == "plain" else torch.randperm(size * D).view(size, D)


@pytest.mark.parametrize("n", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("kinds", [("plain", "plain"), ("transposed", "plain"), ("any", "any")])
def test_pages_laid_out_for_an_instruction_set(n: int, kinds: tuple[str, str]):
    size = 32
    keys, values = _tokens(n)
    table = _table(n, size)
    orders = tuple(_order(kind, size) for kind in kinds)
    cache = torch.full((len(table) + 4, G, size, 2 * D), torch.nan)
    halves = cache.view(-1, G, 2, size * D)
    for token in range(n):
        page = int(table[token // size])
        for half, (order, rows) in enumerate(zip(orders, (keys, values), strict=True)):
            halves[page, :, half, order[token % size]] = rows[:, token]
    found = gather_ordered(cache, table, n, orders)
    assert torch.equal(found[0], keys)
    assert torch.equal(found[1], values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_order_of_a_page_is_read_from_what_was_written(dtype: torch.dtype):
    size = 128
    order = _order("any", size)
    rows = torch.empty(size * D, dtype=dtype)
    columns = torch.empty_like(rows)
    rows[order] = torch.arange(size, dtype=dtype)[:, None].expand(size, D)
    columns[order] = torch.arange(D, dtype=dtype).expand(size, D)
    assert torch.equal(page_order(rows, columns), order)


def test_a_page_with_padding_inside_is_refused():
    rows, columns = torch.zeros(12), torch.arange(12) % 4
    with pytest.raises(UnsupportedError, match="each number once"):
        page_order(rows, columns)


@pytest.mark.parametrize("kinds", [("plain", "plain"), ("transposed", "plain")])
def test_pages_of_an_instruction_set_are_seen_where_they_are(kinds: tuple[str, str]):
    orders = tuple(_order(kind, 32) for kind in kinds)
    halves = torch.randn(2, 5, G, 32, D)
    cache = torch.empty(5, G, 2, 32 * D)
    for half, order in enumerate(orders):
        cache[:, :, half, order] = halves[half]
    cache = cache.view(5, G, 32, 2 * D)
    for found, wanted in zip(ordered_pages(cache, (orders[0], orders[1])), halves, strict=True):
        assert torch.equal(found, wanted)
        assert found.untyped_storage().data_ptr() == cache.untyped_storage().data_ptr()


def test_pages_that_no_strides_describe_are_refused():
    orders = _order("transposed", 32), _order("any", 32)
    with pytest.raises(UnsupportedError, match='leave out "decode"'):
        ordered_pages(torch.zeros(5, G, 32, 2 * D), orders)
