from __future__ import annotations

import pytest
import torch

from shareprefill.clustering.distances import code_distances, gamma_patterns, jaccard_distances


def random_patterns(seed: int, heads: int, n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(heads, n, n, generator=generator) < 0.3


def test_gamma_pattern_takes_the_fewest_blocks_and_lower_columns_first() -> None:
    maps = torch.tensor([[[1.0, 0.0, 0.0], [0.3, 0.7, 0.0], [0.4, 0.2, 0.4]]])
    expected = torch.tensor([[[1, 0, 0], [0, 1, 0], [1, 0, 1]]], dtype=torch.bool)
    assert torch.equal(gamma_patterns(maps, 0.7), expected)
    tied = torch.full((1, 4, 4), 0.25)
    assert gamma_patterns(tied, 0.5)[0, 3].tolist() == [True, True, False, False]


def test_gamma_one_takes_every_block_with_mass_and_no_other() -> None:
    maps = torch.tensor([[[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.1, 0.0, 0.9]]])
    assert torch.equal(gamma_patterns(maps, 1.0), maps > 0)


def test_jaccard_of_hand_made_patterns() -> None:
    a = torch.tensor([[1, 0], [1, 1]], dtype=torch.bool)
    b = torch.tensor([[1, 0], [0, 1]], dtype=torch.bool)
    c = torch.tensor([[0, 1], [0, 0]], dtype=torch.bool)
    empty = torch.zeros(2, 2, dtype=torch.bool)
    distances = jaccard_distances(torch.stack([a, b, c, empty, empty]))
    expected = torch.tensor(
        [
            [0, 1 / 3, 1, 1, 1],
            [1 / 3, 0, 1, 1, 1],
            [1, 1, 0, 1, 1],
            [1, 1, 1, 0, 0],
            [1, 1, 1, 0, 0],
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(distances, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("heads", "n"), [(1, 3), (7, 5), (33, 17)])
def test_jaccard_equals_the_definition_on_sets(heads: int, n: int) -> None:
    patterns = random_patterns(heads, heads, n)
    distances = jaccard_distances(patterns)
    sets = [set(p.flatten().nonzero()[:, 0].tolist()) for p in patterns]
    for i, left in enumerate(sets):
        for j, right in enumerate(sets):
            expected = 1 - len(left & right) / len(left | right)
            assert distances[i, j].item() == pytest.approx(expected, abs=1e-12)
    assert distances.dtype == torch.float64
    assert torch.equal(distances, distances.T)
    assert torch.equal(distances.diagonal(), torch.zeros(heads, dtype=torch.float64))


def test_jaccard_does_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    patterns = random_patterns(3, 11, 13)
    whole = jaccard_distances(patterns)
    monkeypatch.setattr("shareprefill.clustering.distances._CHUNK_ENTRIES", 70)
    assert torch.equal(jaccard_distances(patterns), whole)


def test_cosine_distance_of_hand_made_codes() -> None:
    codes = torch.tensor([[2.0, 0.0], [0.0, 0.5], [-1.0, 0.0], [3.0, 3.0], [0.0, 0.0], [0.0, 0.0]])
    distances = code_distances(codes)
    half = 1 - 2**-0.5
    torch.testing.assert_close(
        distances[0], torch.tensor([0, 1, 2, half, 1, 1], dtype=torch.float64), rtol=0, atol=1e-12
    )
    assert distances[4, 5] == 0


def test_cosine_distance_is_a_clean_matrix() -> None:
    codes = torch.randn(41, 7, generator=torch.Generator().manual_seed(5))
    distances = code_distances(torch.cat([codes, 3 * codes]))
    assert distances.dtype == torch.float64
    assert torch.equal(distances, distances.T)
    assert torch.equal(distances.diagonal(), torch.zeros(82, dtype=torch.float64))
    assert distances.min() >= 0
    assert distances.max() <= 2
    assert distances[:41, 41:].diagonal().max() < 1e-6
