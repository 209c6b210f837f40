from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shareprefill.artifact import Policy
from shareprefill.audit import map_figures
from shareprefill.audit.heads import Heads, open_calibration
from shareprefill.audit.map_figures import load_thumbnails, pick_heads
from shareprefill.audit.separation import measure_separation
from shareprefill.autoencoder.dataset import resample_maps
from tests.audit.synthetic import clustered, made_up_artifact, made_up_calibration


@pytest.mark.parametrize("most", [0, 1])
def test_the_pivot_with_most_sharers_stands_for_its_cluster(most: int) -> None:
    artifact = made_up_artifact(2, 6, families=1)
    pivots = torch.tensor([[0, 1, 1, 0, 1, 1], [1, 1, 0, 1, 1, 1]], dtype=torch.int32)
    pivots = torch.where(pivots == 1, most, 1 - most).int()
    pivots[0, :2] = torch.tensor([0, 1])
    artifact.policy.fill_(int(Policy.SHARE))
    artifact.policy[0, :2] = int(Policy.PIVOT)
    artifact.pivot.copy_(pivots)
    distances = (torch.arange(12)[:, None] - torch.arange(12)).abs().double()
    (found,) = pick_heads(Heads.of(artifact), distances)
    assert (found.head, found.is_pivot, found.size, found.sharing) == (most, True, 12, 10)
    assert found.members == (1 - most, 4, 8, 11)  # by distance to the pivot, ends included


def test_without_a_pivot_the_middle_head_stands_for_its_cluster() -> None:
    artifact = made_up_artifact(1, 5, families=1)
    artifact.policy.fill_(int(Policy.SAMPLED))
    artifact.pivot.fill_(-1)
    places = torch.tensor([0.0, 1.0, 2.0, 3.0, 100.0])
    (found,) = pick_heads(Heads.of(artifact), (places[:, None] - places).abs())
    assert (found.head, found.is_pivot) == (2, False)
    assert found.members == (1, 3, 0, 4)


def test_sharing_clusters_come_first_and_single_heads_not_at_all() -> None:
    cluster = torch.tensor([[0, 0, 0, 0, 1, 1, 2, -1]], dtype=torch.int32)
    artifact = made_up_artifact(1, 8, cluster=cluster)
    artifact.policy.fill_(int(Policy.SAMPLED))
    artifact.pivot.fill_(-1)
    artifact.policy[0, 4:6] = torch.tensor([int(Policy.PIVOT), int(Policy.SHARE)])
    artifact.pivot[0, 4:6] = 4
    found = pick_heads(Heads.of(artifact), torch.rand(8, 8))
    assert [p.cluster for p in found] == [1, 0]


def test_maps_and_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made_up_calibration(tmp_path)
    artifact = clustered(folder, k=4)
    heads = Heads.of(artifact)
    calibration = open_calibration(folder, artifact, heads)
    distances = measure_separation(artifact, heads, calibration).distances
    whole = load_thumbnails(heads, calibration, distances)
    assert (whole.left_out, whole.heads_left_out) == (0, 0)
    full = [resample_maps(calibration.store.load(n)["full"].flatten(0, 1), 12) for n in range(6)]
    known, held_out = calibration.known, calibration.training.split.held_out
    mean = torch.stack([full[n] for n in known]).mean(0)
    shown = whole.clusters[0]
    picked = shown.picked
    torch.testing.assert_close(shown.head, mean[picked.head])
    for index, member in zip(picked.members, shown.members, strict=True):
        torch.testing.assert_close(member, mean[index])
    torch.testing.assert_close(shown.unseen, full[held_out[0]][picked.head])
    rows = shown.reconstruction.sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows))
    members = (heads.cluster == picked.cluster).nonzero()[:, 0].tolist()
    losses = [
        0.5 * (full[n][h].sqrt() - calibration.network(full[n][h]).sqrt()).square().sum(-1).mean()
        for n in held_out
        for h in members
    ]
    assert shown.loss == pytest.approx(float(torch.stack(losses).detach().mean()), rel=1e-4)

    monkeypatch.setattr(map_figures, "CLUSTERS_SHOWN", 1)
    some = load_thumbnails(heads, calibration, distances)
    sizes = [maps.picked.size for maps in whole.clusters]
    assert len(some.clusters) == 1
    assert (some.left_out, some.heads_left_out) == (len(sizes) - 1, sum(sizes[1:]))
