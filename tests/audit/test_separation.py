from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shareprefill.artifact import Artifact
from shareprefill.audit.heads import Calibration, Heads, open_calibration
from shareprefill.audit.separation import BINS, measure_separation
from tests.audit.synthetic import clustered, made_up_artifact, made_up_calibration

Case = tuple[Artifact, Heads, Calibration]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_up_calibration(tmp_path_factory.mktemp("calibration"))


def opened(folder: Path, **options: str) -> Case:
    artifact = clustered(folder, **options)
    heads = Heads.of(artifact)
    return artifact, heads, open_calibration(folder, artifact, heads)


def test_pairs_within_and_across_clusters(folder: Path) -> None:
    artifact, heads, calibration = opened(folder)
    found = measure_separation(artifact, heads, calibration)
    assert found.measure == "jaccard"
    labels, within, across = heads.cluster.tolist(), [], []
    for i in range(heads.count):
        for j in range(i):
            (within if labels[i] == labels[j] else across).append(float(found.distances[i, j]))
    for spread, pairs in ((found.within, within), (found.across, across)):
        assert spread.pairs == len(pairs) == sum(spread.counts)
        assert spread.quantiles[2] in (sorted(pairs)[len(pairs) // 2 - 1 : len(pairs) // 2 + 1])
        bins = [0] * BINS
        for distance in pairs:
            bins[min(BINS - 1, int(distance * BINS + 1e-9))] += 1
        # A distance on an edge may be rounded to either side of it.
        assert sum(abs(a - b) for a, b in zip(bins, spread.counts, strict=True)) <= len(pairs) // 4
    assert found.within.quantiles[2] < found.across.quantiles[2]


@pytest.mark.parametrize("metric", ["jaccard", "jaccard-raw", "code"])
@pytest.mark.parametrize("linkage", ["average", "single"])
def test_the_tree_is_the_one_that_was_cut(folder: Path, metric: str, linkage: str) -> None:
    artifact, heads, calibration = opened(folder, metric=metric, linkage=linkage)
    tree = measure_separation(artifact, heads, calibration).tree
    assert (tree.measure, tree.linkage, tree.is_artifacts) == (metric, linkage, True)
    assert tree.cut_height is not None
    clusters = int(heads.cluster.max()) + 1
    assert int((tree.merges[:, 2] > tree.cut_height).sum()) == clusters - 1
    assert int((tree.merges[:, 2] < tree.cut_height).sum()) == len(tree.merges) - clusters + 1


def test_without_a_calibration_distances_are_those_of_codes(folder: Path) -> None:
    artifact, heads, _ = opened(folder, metric="code")
    found = measure_separation(artifact, heads, None)
    assert found.measure == found.tree.measure == "code"
    assert found.tree.is_artifacts
    unit = heads.code / heads.code.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found.distances, 1 - unit @ unit.T, rtol=0, atol=1e-9)


def test_clusters_that_are_no_cut_have_no_cut_height() -> None:
    artifact = made_up_artifact(3, 4)
    artifact.cluster.copy_(torch.arange(12).view(3, 4) // 6)
    tree = measure_separation(artifact, Heads.of(artifact), None).tree
    assert not tree.is_artifacts
    assert tree.cut_height is None


def test_heads_without_a_cluster_are_clusters_of_their_own() -> None:
    artifact = made_up_artifact(3, 4)
    artifact.cluster[artifact.cluster == 2] = -1
    found = measure_separation(artifact, Heads.of(artifact), None)
    assert found.within.pairs == 2 * 6  # two clusters of four heads
    assert found.across.pairs == 66 - 12


def test_one_cluster_has_no_silhouette_and_no_pairs_across() -> None:
    found = measure_separation(
        made_up_artifact(2, 3, families=1), Heads.of(made_up_artifact(2, 3, families=1)), None
    )
    assert found.silhouette is None
    assert found.across.pairs == 0
    assert found.across.quantiles == ()
    assert found.tree.cut_height is None
