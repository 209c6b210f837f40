from __future__ import annotations

import math

import pytest
import torch

from shareprefill.runtime.ops.blocks import causal_blocks
from shareprefill.runtime.patterns import (
    always_blocks,
    cumulative_pattern,
    distance_to_uniform,
    js_distance,
    recall,
    vertical_slash_pattern,
)

CPU = torch.device("cpu")


def test_cumulative_pattern_is_the_smallest_set_that_reaches_gamma() -> None:
    maps = torch.tensor([[0.1, 0.6, 0.3], [0.25, 0.25, 0.5]])
    assert cumulative_pattern(maps, 0.6).tolist() == [[False, True, False], [True, False, True]]
    assert cumulative_pattern(maps, 0.61).tolist() == [[False, True, True], [True, False, True]]
    assert cumulative_pattern(maps, 1.0).all()


def test_cumulative_pattern_takes_no_empty_block_and_a_gamma_by_row() -> None:
    maps = torch.tensor([[0.5, 0.0, 0.4], [0.5, 0.1, 0.4]])
    found = cumulative_pattern(maps, torch.tensor([1.0, 0.4]))
    assert found.tolist() == [[True, False, True], [True, False, False]]


@pytest.mark.parametrize("gamma", [0.3, 0.9, 0.99])
def test_cumulative_pattern_covers_gamma_and_nothing_needless(gamma: float) -> None:
    maps = torch.rand(5, 40, 40).softmax(-1)
    pattern = cumulative_pattern(maps, gamma)
    covered = (maps * pattern).sum(-1)
    least = torch.where(pattern, maps, torch.inf).min(-1).values
    assert (covered >= gamma - 1e-5).all()
    assert (covered - least < gamma).all()


@pytest.mark.parametrize(("n_query", "n_key"), [(64, 64), (50, 50), (40, 100), (1, 33), (33, 64)])
def test_always_blocks_are_sink_and_local_ones(n_query: int, n_key: int) -> None:
    block, sink, local = 16, 1, 2
    found = always_blocks(n_query, n_key, block, sink=sink, local=local, device=CPU)
    for row in range(found.shape[0]):
        first = row * block + n_key - n_query
        last = min((row + 1) * block, n_query) - 1 + n_key - n_query
        for column in range(found.shape[1]):
            near = first // block - local < column <= last // block
            assert found[row, column] == (near or (column < sink and column <= last // block))


def test_vertical_slash_pattern_of_a_hand_computed_case() -> None:
    vertical = torch.tensor([[0.0, 0.9, 0.1, 0.0]])
    slash = torch.tensor([[0.2, 0.0, 0.8, 0.0, 0.0]])
    found = vertical_slash_pattern(vertical, slash, torch.tensor([0.8]), 8, 8, 2)
    assert found[0].int().tolist() == [[0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0]]


def test_vertical_slash_pattern_of_a_chunk_off_the_block_grid() -> None:
    # Query rows 3 and 4 of a block of 2 lie in key blocks 1 and 2: both diagonals are read.
    vertical, slash = torch.zeros(1, 3), torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    found = vertical_slash_pattern(vertical, slash, torch.tensor([0.9]), 2, 5, 2)
    assert found[0].int().tolist() == [[0, 1, 1]]


def test_js_distance_against_scipy_and_at_zeros() -> None:
    from scipy.spatial.distance import jensenshannon

    p, q = torch.rand(7, 30).softmax(-1), torch.rand(7, 30).softmax(-1)
    p[:, :9] = 0
    p = p / p.sum(-1, keepdim=True)
    expected = [jensenshannon(a, b) for a, b in zip(p.numpy(), q.numpy(), strict=True)]
    torch.testing.assert_close(js_distance(p, q), torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_js_distance_is_never_nan() -> None:
    p = torch.rand(2000, 64).softmax(-1)
    near = js_distance(p, p * (1 + 1e-7 * torch.randn_like(p)))
    assert torch.isfinite(near).all()
    assert near.max() < 1e-2
    assert js_distance(p, p).max() < 1e-3
    apart = js_distance(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    assert apart.item() == pytest.approx(math.sqrt(math.log(2)))


def test_distance_to_uniform() -> None:
    causal = causal_blocks(64, 0, 16)
    uniform = causal / causal.sum(-1, keepdim=True)
    assert distance_to_uniform(uniform, causal).item() < 1e-3
    assert distance_to_uniform(torch.eye(4), causal).item() > 0.3


def test_recall_is_the_mass_inside() -> None:
    maps = torch.tensor([[1.0, 0.0], [0.25, 0.75]])
    assert recall(maps, torch.tensor([[True, False], [True, False]])).item() == 0.625
