"""Patterns, distances and recall of cases that are worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from shareprefill.runtime.ops.block_selection import (
    covered_mass,
    js_distances,
    select_blocks,
    vertical_slash_blocks,
)
from shareprefill.runtime.ops.blocks import always_blocks


def smallest_cover(maps: torch.Tensor, gamma: float | torch.Tensor) -> torch.Tensor:
    """`select_blocks` of rows `[N, n]` that see every block."""
    gammas = gamma if isinstance(gamma, torch.Tensor) else torch.full((len(maps),), gamma)
    sizes = {"n_query": 1, "n_key": maps.shape[1], "block_size": 1}
    return select_blocks(maps[:, None], gammas, **sizes)[:, 0]


def js(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """`js_distances` of rows `[N, n]`."""
    return js_distances(p[:, None], q[:, None], torch.arange(len(p)))


def test_a_cover_is_the_smallest_set_that_reaches_gamma() -> None:
    maps = torch.tensor([[0.1, 0.6, 0.3], [0.25, 0.25, 0.5]])
    assert smallest_cover(maps, 0.6).tolist() == [[False, True, False], [True, False, True]]
    assert smallest_cover(maps, 0.61).tolist() == [[False, True, True], [True, False, True]]
    assert smallest_cover(maps, 1.0).all()


def test_a_cover_takes_no_empty_block_and_a_gamma_by_map() -> None:
    maps = torch.tensor([[0.5, 0.0, 0.4], [0.5, 0.1, 0.4]])
    found = smallest_cover(maps, torch.tensor([1.0, 0.4]))
    assert found.tolist() == [[True, False, True], [True, False, False]]


@pytest.mark.parametrize("gamma", [0.3, 0.9, 0.99])
def test_a_cover_reaches_gamma_and_holds_nothing_needless(gamma: float) -> None:
    maps = torch.rand(200, 40).softmax(-1)
    pattern = smallest_cover(maps, gamma)
    covered = (maps * pattern).sum(-1)
    least = torch.where(pattern, maps, torch.inf).min(-1).values
    assert (covered >= gamma - 1e-5).all()
    assert (covered - least < gamma).all()


@pytest.mark.parametrize(("n_query", "n_key"), [(64, 64), (50, 50), (40, 100), (1, 33), (33, 64)])
def test_always_blocks_are_sink_and_local_ones(n_query: int, n_key: int) -> None:
    block, sink, local = 16, 1, 2
    found = always_blocks(n_query, n_key - n_query, block, sink_blocks=sink, local_blocks=local)
    for row in range(found.shape[0]):
        first = row * block + n_key - n_query
        last = min((row + 1) * block, n_query) - 1 + n_key - n_query
        for column in range(found.shape[1]):
            near = first // block - local < column <= last // block
            assert found[row, column] == (near or (column < sink and column <= last // block))


def test_vertical_slash_blocks_of_a_hand_computed_case() -> None:
    vertical = torch.tensor([[0.0, 0.9, 0.1, 0.0]])
    slash = torch.tensor([[0.2, 0.0, 0.8, 0.0, 0.0]])
    sizes = {"n_query": 8, "n_key": 8, "block_size": 2}
    found = vertical_slash_blocks(vertical, slash, torch.tensor([0.8]), **sizes)
    assert found[0].int().tolist() == [[0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0]]


def test_vertical_slash_blocks_of_a_chunk_off_the_block_grid() -> None:
    # Query rows 3 and 4 of a block of 2 lie in key blocks 1 and 2: both diagonals are read.
    vertical, slash = torch.zeros(1, 3), torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    sizes = {"n_query": 2, "n_key": 5, "block_size": 2}
    found = vertical_slash_blocks(vertical, slash, torch.tensor([0.9]), **sizes)
    assert found[0].int().tolist() == [[0, 1, 1]]


def test_js_distances_against_scipy_and_at_zeros() -> None:
    from scipy.spatial.distance import jensenshannon

    p, q = torch.rand(7, 30).softmax(-1), torch.rand(7, 30).softmax(-1)
    p[:, :9] = 0
    p = p / p.sum(-1, keepdim=True)
    expected = [jensenshannon(a, b) for a, b in zip(p.numpy(), q.numpy(), strict=True)]
    torch.testing.assert_close(js(p, q), torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_js_distances_are_never_nan() -> None:
    p = torch.rand(2000, 64).softmax(-1)
    near = js(p, p * (1 + 1e-7 * torch.randn_like(p)))
    assert torch.isfinite(near).all()
    assert near.max() < 1e-2
    assert js(p, p).max() < 1e-3
    apart = js(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    assert apart.item() == pytest.approx(math.sqrt(math.log(2)))


def test_recall_is_the_mass_inside() -> None:
    maps = torch.tensor([[[1.0, 0.0], [0.25, 0.75]]])
    pattern = torch.tensor([[[True, False], [True, False]]])
    assert covered_mass(maps, pattern, torch.tensor([0])).item() == 0.625
