from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shareprefill.audit.heads import Heads, has_calibration, open_calibration
from shareprefill.autoencoder.pipeline import train
from shareprefill.config import TrainConfig
from shareprefill.errors import ArtifactError, DataError
from tests.audit.synthetic import clustered, made_up_artifact, made_up_calibration, with_gaps


def test_layers_that_were_not_captured_are_left_out() -> None:
    artifact = with_gaps(made_up_artifact(4, 3), 0, 2)
    heads = Heads.of(artifact)
    assert heads.layers == (1, 3)
    assert heads.ids.tolist() == [3, 4, 5, 9, 10, 11]
    assert heads.name(4) == "3.1"
    assert torch.equal(heads.recall, artifact.recall[[1, 3]].flatten().double())
    assert heads.grid(heads.cluster).tolist() == artifact.cluster[[1, 3]].tolist()


def test_a_head_without_a_cluster_is_a_captured_head() -> None:
    artifact = made_up_artifact(2, 3)
    artifact.cluster[1] = -1
    assert Heads.of(artifact).layers == (0, 1)


def test_clusters_by_size() -> None:
    cluster = torch.tensor([[3, 3, 7], [1, 7, 3], [-1, 1, 0]], dtype=torch.int32)
    assert Heads.of(made_up_artifact(3, 3, cluster=cluster)).sizes() == {3: 3, 1: 2, 7: 2, 0: 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_up_calibration(tmp_path_factory.mktemp("calibration"))


def test_the_calibration_of_an_artifact(folder: Path) -> None:
    artifact = clustered(folder)
    heads = Heads.of(artifact)
    calibration = open_calibration(folder, artifact, heads)
    assert has_calibration(folder)
    torch.testing.assert_close(calibration.agreed.code.double(), heads.code)
    assert set(calibration.known).isdisjoint(calibration.training.split.held_out)


def test_a_calibration_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    artifact = clustered(folder)
    other = made_up_calibration(tmp_path / "other", weights="cd")
    with pytest.raises(ArtifactError, match=r"of another model: .*weights cdcd.*made-up.*abab"):
        open_calibration(other, artifact, Heads.of(artifact))


def test_a_calibration_of_another_run_is_refused(folder: Path, tmp_path: Path) -> None:
    artifact = clustered(folder)
    other = made_up_calibration(tmp_path / "other", seed=1)
    with pytest.raises(ArtifactError, match=r"of another run than the artifact's \(its seed"):
        open_calibration(other, artifact, Heads.of(artifact))


def test_a_calibration_trained_again_is_refused(tmp_path: Path) -> None:
    folder = made_up_calibration(tmp_path / "calibration")
    artifact = clustered(folder)
    for options in ({"seed": 5}, {"code_size": 4}):
        train(folder, TrainConfig(**{"code_size": 8, "hidden": 16, "epochs": 2, **options}))
        with pytest.raises(ArtifactError, match="it was trained again"):
            open_calibration(folder, artifact, Heads.of(artifact))


def test_a_damaged_calibration_is_refused(tmp_path: Path) -> None:
    folder = made_up_calibration(tmp_path / "calibration")
    artifact = clustered(folder)
    shard = folder / "maps-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(DataError, match="damaged"):
        open_calibration(folder, artifact, Heads.of(artifact))


def test_no_calibration(tmp_path: Path) -> None:
    assert not has_calibration(tmp_path)
    assert not has_calibration(tmp_path / "nowhere")
