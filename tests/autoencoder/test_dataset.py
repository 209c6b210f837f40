from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from shareprefill.autoencoder.dataset import MapDataset, Split, resample_maps, split_prompts
from shareprefill.errors import DataError


def random_maps(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(*shape, shape[-1], generator=generator)
    causal = torch.ones(shape[-1], shape[-1], dtype=torch.bool).tril()
    return scores.masked_fill(~causal, -torch.inf).softmax(-1)


def resample_by_definition(source: torch.Tensor, resolution: int) -> torch.Tensor:
    """Overlap of every pair of cells, in exact fractions of the unit square."""
    n = source.shape[-1]

    def overlap(fine: int, coarse: int) -> float:
        low = max(Fraction(fine, resolution), Fraction(coarse, n))
        high = min(Fraction(fine + 1, resolution), Fraction(coarse + 1, n))
        return float(max(Fraction(0), high - low))

    result = torch.zeros(resolution, resolution, dtype=torch.float64)
    for row in range(resolution):
        for column in range(resolution):
            for i in range(n):
                for j in range(n):
                    weight = overlap(row, i) * resolution * overlap(column, j) * n
                    result[row, column] += weight * source[i, j].double()
    return result


@pytest.mark.parametrize(("n", "resolution"), [(3, 8), (9, 8), (7, 5), (2, 9), (1, 4), (5, 1)])
def test_resampling_is_weighted_by_overlap(n: int, resolution: int) -> None:
    source = random_maps(n, n)
    expected = resample_by_definition(source, resolution).float()
    torch.testing.assert_close(resample_maps(source, resolution), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("n", [1, 5, 16, 17, 31, 100])
def test_resampled_rows_sum_to_one(n: int) -> None:
    resampled = resample_maps(random_maps(n, 2, 3, n).double(), 16)
    assert resampled.shape == (2, 3, 16, 16)
    assert resampled.dtype == torch.float32
    torch.testing.assert_close(resampled.sum(-1), torch.ones(2, 3, 16), rtol=0, atol=2e-6)


def test_resampling_to_the_same_side_changes_nothing() -> None:
    source = random_maps(0, 4, 13)
    assert torch.equal(resample_maps(source, 13), source)


def test_whole_factors_pool_and_repeat() -> None:
    source = random_maps(0, 6)
    pooled = source.view(3, 2, 3, 2).sum(3).mean(1)
    torch.testing.assert_close(resample_maps(source, 3), pooled, rtol=0, atol=1e-6)
    repeated = source.repeat_interleave(2, 0).repeat_interleave(2, 1) / 2
    torch.testing.assert_close(resample_maps(source, 12), repeated, rtol=0, atol=1e-6)


@pytest.mark.parametrize("prompts", [3, 4, 5, 6, 7, 12, 24, 50])
def test_split_uses_every_prompt_once(prompts: int) -> None:
    split = split_prompts(prompts)
    assert sorted(split.train + split.validation + split.held_out) == list(range(prompts))
    assert split.held_out == tuple(range(2, prompts, 3))
    rest = prompts - len(split.held_out)
    assert len(split.validation) >= (1 if rest >= 3 else 0)
    assert abs(len(split.validation) - rest / 5) < 1
    assert len(split.train) > len(split.validation)


def test_split_of_the_default_number_of_prompts() -> None:
    assert split_prompts(12) == Split((0, 1, 4, 6, 7, 9), (3, 10), (2, 5, 8, 11))
    assert split_prompts(3) == Split((0, 1), (), (2,))


@pytest.mark.parametrize("kinds", [1, 2, 3, 4])
def test_every_source_is_trained_on_and_held_out(kinds: int) -> None:
    sources = [f"data-{i % kinds}" for i in range(12)]
    split = split_prompts(12, sources)
    for part in (split.train, split.held_out):
        assert {sources[prompt] for prompt in part} == set(sources)


@pytest.mark.parametrize("prompts", [0, 1, 2])
def test_too_few_prompts(prompts: int) -> None:
    with pytest.raises(DataError, match=rf"{prompts} prompt\(s\) cannot be split.*at least 3"):
        split_prompts(prompts)


def test_prompts_of_different_lengths_make_one_data_set() -> None:
    dataset = MapDataset.from_prompts([random_maps(n, 5, n) for n in (7, 8, 30)], 8)
    assert dataset.maps.shape == (3, 5, 8, 8)
    assert torch.equal(dataset.maps[1], random_maps(8, 5, 8))
    assert dataset.split() == split_prompts(3)


def test_unusable_maps() -> None:
    with pytest.raises(DataError, match="there are no maps"):
        MapDataset.from_prompts([], 8)
    with pytest.raises(DataError, match=r"prompts have \[2, 3\] heads"):
        MapDataset.from_prompts([random_maps(0, 2, 8), random_maps(0, 3, 8)], 8)
    broken = random_maps(0, 2, 8)
    broken[1, 2, 2] = torch.nan
    with pytest.raises(DataError, match="NaN or infinity"):
        MapDataset.from_prompts([broken], 8)
