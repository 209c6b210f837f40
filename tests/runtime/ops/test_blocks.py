from __future__ import annotations

import pytest
import torch

from shareprefill.errors import ConfigError
from shareprefill.runtime.ops.blocks import (
    BlockLists,
    block_diagonals,
    causal_blocks,
    causal_lists,
    count_blocks,
    count_causal_blocks,
)


def random_bitmap(n_patterns: int, n_q: int, n_k: int) -> torch.Tensor:
    return torch.rand(n_patterns, n_q, n_k) < 0.4


@pytest.mark.parametrize(("n", "size", "expected"), [(1, 16, 1), (16, 16, 1), (17, 16, 2)])
def test_count_blocks(n: int, size: int, expected: int) -> None:
    assert count_blocks(n, size) == expected


@pytest.mark.parametrize(
    ("n_q", "offset", "size"), [(1, 0, 16), (63, 0, 16), (50, 13, 16), (48, 32, 16), (7, 100, 32)]
)
def test_causal_blocks_equal_the_pooled_token_mask(n_q: int, offset: int, size: int) -> None:
    positions = torch.arange(n_q) + offset
    tokens = torch.arange(n_q + offset)[None, :] <= positions[:, None]
    expected = torch.stack(
        [
            torch.stack([part.any() for part in rows.split(size, dim=1)])
            for rows in tokens.split(size)
        ]
    )
    assert torch.equal(causal_blocks(n_q, offset, size), expected)


@pytest.mark.parametrize("offset", [0, 1, 15, 16, 37])
def test_causal_blocks_are_counted_and_bounded_by_the_diagonals(offset: int) -> None:
    for n_q in range(1, 70):
        causal = causal_blocks(n_q, offset, 16)
        assert count_causal_blocks(n_q, offset, 16) == int(causal.sum())
        first, last = block_diagonals(n_q, offset, 16)
        assert torch.equal(last, causal.sum(1) - 1)
        assert torch.equal(first, (torch.arange(0, n_q, 16) + offset) // 16)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("n_q", "offset", "size"), [(1, 0, 16), (63, 0, 16), (50, 13, 16), (48, 32, 16), (7, 100, 32)]
)
def test_causal_lists_hold_every_causal_block(
    n_q: int, offset: int, size: int, device: str
) -> None:
    lists = causal_lists(n_q, offset, size, 3, torch.device(device))
    lists.validate()
    causal = causal_blocks(n_q, offset, size, device=device)
    assert torch.equal(lists.to_bitmap(), causal[None])
    assert (lists.n_q, lists.n_k) == causal.shape
    assert lists.offsets[-1] == len(lists.indices)
    assert lists.head_to_list.tolist() == [0, 0, 0]


def test_layers_share_their_causal_lists() -> None:
    cpu = torch.device("cpu")
    lists = causal_lists(50, 13, 16, 3, cpu)
    assert causal_lists(50, 13, 16, 3, cpu) is lists
    assert causal_lists(50, 14, 16, 3, cpu) is not lists


@pytest.mark.gpu
def test_causal_lists_of_streams_and_graphs_are_their_own() -> None:
    cuda = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        lists = causal_lists(500, 133, 16, 3, cuda)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.cuda.stream(torch.cuda.Stream()):
        assert causal_lists(500, 133, 16, 3, cuda) is not lists
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = causal_lists(500, 133, 16, 3, cuda)
    assert causal_lists(500, 133, 16, 3, cuda).offsets is not captured.offsets
    graph.replay()
    assert torch.equal(captured.indices, lists.indices)


def test_lists_round_trip_through_a_bitmap() -> None:
    bitmap = random_bitmap(3, 5, 9)
    bitmap[1, 2] = False
    lists = BlockLists.from_bitmap(bitmap, torch.tensor([2, -1, 0, 0]), 16)
    lists.validate()
    assert torch.equal(lists.to_bitmap(), bitmap)
    assert (lists.n_patterns, lists.n_q, lists.n_k) == (3, 5, 9)
    assert lists.head_to_list.tolist() == [2, -1, 0, 0]
    assert {lists.offsets.dtype, lists.indices.dtype, lists.head_to_list.dtype} == {torch.int32}


def test_capacity_gives_the_same_lists() -> None:
    bitmap = random_bitmap(2, 6, 7)
    pattern = torch.tensor([0, 1])
    exact = BlockLists.from_bitmap(bitmap, pattern, 16)
    roomy = BlockLists.from_bitmap(bitmap, pattern, 16, capacity=bitmap.numel())
    roomy.validate()
    assert len(roomy.indices) == bitmap.numel()
    assert torch.equal(roomy.offsets, exact.offsets)
    assert torch.equal(roomy.indices[: len(exact.indices)], exact.indices)
    assert torch.equal(roomy.to_bitmap(), bitmap)


def test_a_capacity_that_is_too_small_keeps_the_first_blocks() -> None:
    bitmap = torch.ones(1, 2, 3, dtype=torch.bool)
    lists = BlockLists.from_bitmap(bitmap, torch.tensor([0]), 16, capacity=4)
    lists.validate()
    assert lists.to_bitmap()[0].tolist() == [[True, True, True], [True, False, False]]


def lists_of(offsets: list[int], indices: list[int], pattern: list[int]) -> BlockLists:
    tensors = [torch.tensor(data, dtype=torch.int32) for data in (offsets, indices, pattern)]
    return BlockLists(*tensors, n_q=2, n_k=3, block_size=16)


@pytest.mark.parametrize(
    ("offsets", "indices", "pattern", "message"),
    [
        ([0, 2, 1], [0, 1], [0], "never fall"),
        ([1, 2, 2], [0, 1], [0], "start at 0"),
        ([0, 2, 3], [0, 1], [0], "list 3 blocks, indices hold 2"),
        ([0, 1, 2], [0, 3], [0], "0..2"),
        ([0, 2, 2], [1, 0], [0], "ascending"),
        ([0, 2, 2], [1, 1], [0], "unique"),
        ([0, 1, 2], [0, 1], [1], "-1..0"),
    ],
)
def test_validate_names_what_is_wrong(
    offsets: list[int], indices: list[int], pattern: list[int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        lists_of(offsets, indices, pattern).validate()


def test_rows_may_start_below_the_end_of_the_row_before() -> None:
    lists_of([0, 2, 4], [1, 2, 0, 1], [0, -1]).validate()


def test_construction_checks_types_and_shapes() -> None:
    with pytest.raises(ConfigError, match="offsets must be a one-dimensional int32"):
        BlockLists(torch.zeros(3), *[torch.zeros(1, dtype=torch.int32)] * 2, 2, 3, 16)
    with pytest.raises(ConfigError, match=r"P \* n_q \+ 1"):
        lists_of([0, 1], [0], [0])
    with pytest.raises(ConfigError, match="bitmap must be bool"):
        BlockLists.from_bitmap(torch.zeros(2, 3, dtype=torch.bool), torch.zeros(1), 16)
