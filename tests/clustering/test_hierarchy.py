from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from shareprefill.clustering.hierarchy import build_linkage, candidate_counts, cut, silhouette
from shareprefill.errors import ConfigError


def random_distances(seed: int, heads: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    upper = torch.rand(heads, heads, dtype=torch.float64, generator=generator).triu(1)
    return upper + upper.T


def by_first_appearance(labels: list[int]) -> list[int]:
    seen: dict[int, int] = {}
    return [seen.setdefault(label, len(seen)) for label in labels]


LINE = torch.tensor([0.0, 10.0, 1.0, 11.5, 30.0], dtype=torch.float64)
LINE_DISTANCES = (LINE[:, None] - LINE[None, :]).abs()


def test_average_linkage_of_five_points_on_a_line() -> None:
    # {0, 2} at 1, {1, 3} at 1.5, both at (10 + 11.5 + 9 + 10.5) / 4, all at the mean to point 4.
    tree = build_linkage(LINE_DISTANCES, "average")
    expected = torch.tensor(
        [[0, 2, 1, 2], [1, 3, 1.5, 2], [5, 6, 10.25, 4], [4, 7, 24.375, 5]], dtype=torch.float64
    )
    assert torch.equal(tree, expected)


@pytest.mark.parametrize(
    ("k", "expected"),
    [
        (1, [0, 0, 0, 0, 0]),
        (2, [0, 0, 0, 0, 1]),
        (3, [0, 1, 0, 1, 2]),
        (4, [0, 1, 0, 2, 3]),
        (5, [0, 1, 2, 3, 4]),
    ],
)
def test_cuts_of_five_points_on_a_line(k: int, expected: list[int]) -> None:
    labels = cut(build_linkage(LINE_DISTANCES, "average"), k)
    assert labels.dtype == torch.int64
    assert labels.tolist() == expected


@pytest.mark.parametrize(("method", "height"), [("single", 9.0), ("complete", 11.5)])
def test_other_linkages(method: str, height: float) -> None:
    assert build_linkage(LINE_DISTANCES, method)[2, 2] == height  # pyright: ignore[reportArgumentType]


def test_ties_still_give_exactly_k_clusters() -> None:
    heads = 9
    tree = build_linkage(1 - torch.eye(heads, dtype=torch.float64), "average")
    for k in range(1, heads + 1):
        labels = cut(tree, k)
        assert by_first_appearance(labels.tolist()) == labels.tolist()
        assert labels.unique().tolist() == list(range(k))


@pytest.mark.parametrize("method", ["average", "complete", "single"])
@pytest.mark.parametrize("heads", [5, 23, 60])
def test_labels_are_those_of_scikit_learn(method: str, heads: int) -> None:
    from sklearn.cluster import AgglomerativeClustering

    distances = random_distances(heads, heads)
    tree = build_linkage(distances, method)  # pyright: ignore[reportArgumentType]
    for k in (1, 2, heads // 2, heads - 1, heads):
        model = AgglomerativeClustering(n_clusters=k, metric="precomputed", linkage=method)
        theirs = model.fit_predict(distances.numpy()).tolist()
        assert cut(tree, k).tolist() == by_first_appearance(theirs)


def test_the_tree_is_the_same_every_time_and_leaves_its_input_alone() -> None:
    distances = random_distances(1, 40)
    before = distances.clone()
    assert torch.equal(build_linkage(distances, "average"), build_linkage(distances, "average"))
    assert torch.equal(distances, before)


def test_one_head() -> None:
    tree = build_linkage(torch.zeros(1, 1, dtype=torch.float64), "average")
    assert tree.shape == (0, 4)
    assert cut(tree, 1).tolist() == [0]
    with pytest.raises(ConfigError, match=r"k = 2 is larger than the number of heads \(1\)"):
        cut(tree, 2)


def test_impossible_k() -> None:
    tree = build_linkage(LINE_DISTANCES, "average")
    with pytest.raises(ConfigError, match=r"k = 6 is larger than the number of heads \(5\)"):
        cut(tree, 6)
    with pytest.raises(ConfigError, match="k = 0 is not allowed"):
        cut(tree, 0)


def test_silhouette_by_hand() -> None:
    # Points 0, 1 against 10, 11.5: (b - a) / b with a the own and b the other cluster's mean.
    distances = LINE_DISTANCES[:4, :4]
    expected = (9.75 / 10.75 + 8.0 / 9.5 + 8.75 / 9.75 + 9.5 / 11.0) / 4
    assert silhouette(distances, torch.tensor([0, 1, 0, 1])) == pytest.approx(expected)


@pytest.mark.parametrize("labels", [[0, 0, 0, 0, 0], [0, 1, 2, 3, 4]])
def test_silhouette_is_nan_where_it_is_not_defined(labels: list[int]) -> None:
    assert math.isnan(silhouette(LINE_DISTANCES, torch.tensor(labels)))


@pytest.mark.parametrize("heads", [1, 2, 3, 19, 20, 21, 32, 128, 1024, 5120])
def test_candidate_counts(heads: int) -> None:
    counts = candidate_counts(heads)
    assert counts[0] == 1
    assert counts[-1] == heads
    assert counts == sorted(set(counts))
    assert len(counts) == min(heads, 20)
    if heads > 20:
        ratios = [b / a for a, b in pairwise(counts[10:])]
        assert max(ratios) < 1.3 * min(ratios)
