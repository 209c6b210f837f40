from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shareprefill.artifact import load_artifact, save_artifact
from shareprefill.autoencoder.pipeline import train
from shareprefill.calib.pipeline import capture_maps
from shareprefill.clustering.pipeline import cluster
from shareprefill.config import CalibrateConfig, ClusterConfig, TrainConfig
from shareprefill.errors import ConfigError
from shareprefill.evaluation.config import SweepConfig
from shareprefill.evaluation.sweep import Sweep, sweep
from tests.support.checkpoint import save_checkpoint, small_calibration
from tests.support.tiny import tiny_artifact, tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, its calibration and its artifact."""
    folder = tmp_path_factory.mktemp("sweep")
    model = save_checkpoint(folder / "model")
    calibration = CalibrateConfig(**small_calibration(model, data=("text",)))
    capture_maps(calibration, folder / "calibration")
    train(folder / "calibration", TrainConfig(epochs=2, code_size=8))
    artifact, _ = cluster(folder / "calibration", ClusterConfig(k=3, target_recall=0.8))
    save_artifact(artifact, folder / "clusters.st")
    return folder


def config(folder: Path, **changes: Any) -> SweepConfig:
    options = {
        "artifact": str(folder / "clusters.st"),
        "tasks": ("perplexity",),
        "length": 320,
        "samples": 1,
        "max_density": 1.0,
    }
    return SweepConfig(**{**options, **changes})


@pytest.fixture(scope="module")
def found(folder: Path) -> Sweep:
    return sweep(
        config(
            folder,
            gammas=(0.95, 0.5, 0.8),
            ks=(2, 12),
            block_sizes=(32,),
            calibrations=(str(folder / "calibration"),),
        ),
        out=folder / "out",
    )


def test_one_parameter_changes_at_a_time(folder: Path, found: Sweep) -> None:
    curves = {curve.parameter: curve for curve in found.curves}
    assert list(curves) == ["gamma", "block_size", "k"]
    assert curves["gamma"].values == (0.5, 0.8, 0.95)
    assert curves["k"].values == (2, 12)
    densities = [point.density for point in curves["gamma"].points]
    recalls = [point.recall for point in curves["gamma"].points]
    assert densities == sorted(densities)
    assert recalls == sorted(recalls)  # pyright: ignore[reportArgumentType]
    assert found.dense.density == 1
    assert load_artifact(folder / "out" / "k-2.st").cluster.max() == 1
    # Everything else is as the artifact has it.
    made = load_artifact(folder / "out" / "k-12.st").configuration["cluster"]
    assert made == {**load_artifact(folder / "clusters.st").configuration["cluster"], "k": 12}


def test_a_parameter_that_no_head_reads_is_told_before_the_model_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "clusters.st"
    save_artifact(tiny_artifact(tiny_llama()), path)
    asked = SweepConfig(artifact=str(path), model="not-there", slacks=(0.0, 0.1))
    with pytest.raises(ConfigError, match=r"slack = 0\.0 .* none of whose heads is share"):
        sweep(asked)


def test_the_knee_lies_within_the_values(found: Sweep) -> None:
    gamma = found.curves[0]
    assert set(gamma.knees) == {
        f"{gain} against {cost}"
        for gain in ("recall", "perplexity_change", "kl")
        for cost in ("effective_density", "ttft_s")
    }
    assert all(value is None or value in gamma.values for value in gamma.knees.values())
    assert all(value is None for value in found.curves[2].knees.values())  # two points


def test_a_sweep_is_json(found: Sweep) -> None:
    values = json.loads(found.to_json())
    assert values["schema"] == 1
    assert [curve["parameter"] for curve in values["curves"]] == ["gamma", "block_size", "k"]
    assert len(values["cells"]) == 1 + 3 + 1 + 2
    assert SweepConfig.from_dict(values["config"]) == found.config


def test_slack_is_swept_for_planned_sharing_and_tau_for_the_papers_rule(folder: Path) -> None:
    planned = sweep(config(folder, slacks=(0.9, -1.0))).curves
    assert [curve.parameter for curve in planned] == ["slack"]
    assert planned[0].values == (-1.0, 0.9)
    # Heads whose check fails have their own patterns, for more work.
    strict, lenient = planned[0].points
    assert strict.selection_work > lenient.selection_work
    online = sweep(config(folder, policy="shareprefill", taus=(0.0, 0.8))).curves
    assert [(curve.parameter, curve.values) for curve in online] == [("tau", (0.0, 0.8))]


def test_a_block_size_without_calibration(folder: Path) -> None:
    calibrations = (str(folder / "calibration"),)
    with pytest.raises(ConfigError, match=r"block size 64 needs .* have 32: .*--block-size 64"):
        sweep(config(folder, block_sizes=(64,), calibrations=calibrations))
