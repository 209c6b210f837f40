from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import pytest
import torch
from torch import Tensor

from shareprefill.autoencoder import training
from shareprefill.autoencoder.dataset import MapDataset, resample_maps
from shareprefill.autoencoder.fitting import Batches
from shareprefill.autoencoder.network import MapAutoencoder
from shareprefill.autoencoder.pipeline import (
    CODES,
    HISTORY,
    WEIGHTS,
    forecast_training,
    load_maps,
    load_training,
    train,
)
from shareprefill.autoencoder.training import load_autoencoder
from shareprefill.calib.capture import PromptMaps
from shareprefill.calib.store import MapStore
from shareprefill.config import CalibrateConfig, TrainConfig
from shareprefill.errors import DataError
from shareprefill.models import Fingerprint, ModelGeometry

MODEL = Fingerprint("llama", ModelGeometry(2, 4, 2, 16), "0" * 64)
CONFIG = TrainConfig(epochs=2, hidden=8, resolution=16, code_size=4)


def calibration(folder: Path, tokens: int, prompts: int = 6) -> Path:
    config = CalibrateConfig(model="m", samples=6, length=512, block_size=32)
    store = MapStore.begin(folder, config, MODEL, resume=True)
    n = -(-tokens // 32)
    for number in range(prompts):
        maps = torch.rand(2, 4, n, n).tril() + 1e-3 * torch.eye(n)
        maps = maps / maps.sum(-1, keepdim=True)
        layers = PromptMaps((0, 1), {"full": maps.half()})
        store.add(f"source{number % 2}", torch.arange(tokens), f"{number}", layers)
    return folder


def test_a_training_is_read_back(tmp_path: Path) -> None:
    seen: list[dict] = []
    folder = calibration(tmp_path, 512)
    done = train(folder, CONFIG, on_epoch=seen.append)
    loaded, codes = load_training(folder)
    assert loaded == done
    assert codes.shape == (6, 8, 4)
    assert seen
    assert load_autoencoder(folder / WEIGHTS).code_size == 4
    history = json.loads((folder / HISTORY).read_text())
    assert history["losses"]["autoencoder"] == done.losses.autoencoder


@pytest.mark.parametrize(("tokens", "resolution"), [(512, 16), (321, 11), (130, 8)])
def test_the_resolution_is_at_most_the_maps_own(
    tmp_path: Path, tokens: int, resolution: int
) -> None:
    folder = calibration(tmp_path, tokens)
    assert train(folder, CONFIG).config.resolution == resolution
    assert load_autoencoder(folder / WEIGHTS).resolution == resolution


def test_an_unfinished_calibration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="5 of 6 prompts; run sp calibrate again"):
        train(calibration(tmp_path, 512, prompts=5), CONFIG)


@pytest.mark.parametrize("name", [HISTORY, CODES])
def test_damaged_files_are_refused(tmp_path: Path, name: str) -> None:
    folder = calibration(tmp_path, 512)
    with pytest.raises(DataError, match="no trained autoencoder"):
        load_training(folder)
    train(folder, CONFIG)
    (folder / name).write_text("[" * 100_000)
    with pytest.raises(DataError, match="damaged training"):
        load_training(folder)
    (folder / name).unlink()
    with pytest.raises(DataError, match="no trained autoencoder"):
        load_training(folder)


def test_a_history_that_was_changed_is_refused(tmp_path: Path) -> None:
    folder = calibration(tmp_path, 512)
    train(folder, CONFIG)
    history = json.loads((folder / HISTORY).read_text())
    history["split"]["held_out"] = []
    (folder / HISTORY).write_text(json.dumps(history))
    with pytest.raises(DataError, match="damaged training .its checksum is another.*run sp train"):
        load_training(folder)


def test_a_training_of_two_runs_is_refused(tmp_path: Path) -> None:
    """What a kill between two of a training's files leaves."""
    folder = calibration(tmp_path, 512)
    train(folder, CONFIG)
    earlier = {name: (folder / name).read_bytes() for name in (WEIGHTS, CODES, HISTORY)}
    train(folder, replace(CONFIG, seed=1))
    for name in (HISTORY, CODES):
        (folder / name).write_bytes(earlier[name])
        with pytest.raises(DataError, match="not the one that history.json names.*run sp train"):
            load_training(folder)
    (folder / WEIGHTS).write_bytes(earlier[WEIGHTS])
    load_training(folder)


def test_a_training_on_other_maps_is_refused(tmp_path: Path) -> None:
    folder = calibration(tmp_path / "one", 512)
    train(folder, CONFIG)
    other = calibration(tmp_path / "two", 512)
    for name in (WEIGHTS, CODES, HISTORY):
        (other / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(DataError, match="trained on other maps than it holds; run sp train"):
        load_training(other)


def test_maps_are_resampled_prompt_by_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of all prompts at their own size would take several times the memory."""
    store = MapStore.open(calibration(tmp_path, 512))
    at_once = []
    from_prompts = MapDataset.from_prompts

    def noted(prompts: Sequence[Tensor], resolution: int) -> MapDataset:
        at_once.extend(maps.shape[-1] for maps in prompts)
        return from_prompts(prompts, resolution)

    monkeypatch.setattr(MapDataset, "from_prompts", noted)
    found = load_maps(store, 5).maps
    assert at_once == [5] * 6
    for maps, number in zip(found, range(6), strict=True):
        full = store.load(number, "full")["full"].flatten(0, 1)
        torch.testing.assert_close(maps, resample_maps(full, 5))


def test_a_training_is_foretold_from_a_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def timed(network: MapAutoencoder, batches: Batches, _config: TrainConfig) -> float:
        asked.append((network.resolution, len(batches.plain)))
        return 0.01

    monkeypatch.setattr(training, "step_seconds", timed)
    config = TrainConfig(epochs=50, batch_size=128)
    # 12 prompts train on six of them: 48 steps an epoch, and 100 epochs with two strengths.
    found = forecast_training([131072] * 12, 1024, 128, config)
    assert found == pytest.approx(0.01 * 48 * 50 * 2)
    assert asked == [(64, 8 * 128)]
    forecast_training([1024] * 3, 4, 128, config)
    assert asked[1] == (8, 2 * 4)


def test_steps_are_timed() -> None:
    config = replace(CONFIG, batch_size=4)
    begun = perf_counter()
    took = forecast_training([512] * 6, 8, 32, config)
    # Two passes of three prompts' 24 maps were run, of the two epochs with two strengths.
    assert 0 < took <= 2 * (perf_counter() - begun)
