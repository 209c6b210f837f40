from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from shareprefill.calib import pipeline
from shareprefill.calib.forecast import forecast
from shareprefill.calib.pipeline import capture_maps, load_for_capture
from shareprefill.calib.store import MapStore
from shareprefill.config import CalibrateConfig
from shareprefill.errors import ConfigError, DataError
from shareprefill.files import locked_folder
from shareprefill.processes import Processes
from tests.support.checkpoint import (
    change_outside_of_attention,
    save_checkpoint,
    small_calibration,
)

KILLS = 3
WORKER = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from shareprefill.calib.pipeline import capture_maps
from shareprefill.config import CalibrateConfig
capture_maps(CalibrateConfig(**eval(sys.argv[2])), Path(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model"))


def config(checkpoint: Path, **changes: Any) -> CalibrateConfig:
    return CalibrateConfig(**small_calibration(checkpoint, **changes))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


def test_a_calibration_repeats_to_the_byte(checkpoint: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    for name in ("a", "b"):
        capture_maps(
            config(checkpoint), tmp_path / name, progress=lambda *state: told.append(state)
        )
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert told[:5] == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    assert MapStore.open(tmp_path / "a").complete


@pytest.mark.slow
def test_a_killed_calibration_goes_on_to_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    options = small_calibration(checkpoint, samples=12)
    capture_maps(CalibrateConfig(**options), tmp_path / "whole")
    folder, chance = tmp_path / "killed", random.Random(7)
    command = [sys.executable, "-c", WORKER, str(folder), repr(options)]
    for _ in range(KILLS):
        before = _shards(folder)
        process = subprocess.Popen(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
        # Not other than before: a shard that the index does not name yet is removed at first.
        while process.poll() is None and _shards(folder) <= before:
            time.sleep(0.01)
        time.sleep(chance.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert _shards(folder) >= KILLS
    capture_maps(CalibrateConfig(**options), folder)
    assert contents(folder) == contents(tmp_path / "whole")


def _shards(folder: Path) -> int:
    return len(list(folder.glob("maps-*.safetensors")))


def test_another_process_in_the_folder_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with locked_folder(tmp_path), pytest.raises(DataError, match=tmp_path.name):
        capture_maps(config(checkpoint), tmp_path)


def test_a_length_beyond_the_model_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="maximum of 4096"):
        capture_maps(config(checkpoint, length=5000), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("part", ["mlp", "rope"])
def test_a_model_that_changed_outside_of_attention_is_refused(part: str, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model")
    options = config(folder, samples=3)
    capture_maps(options, tmp_path / "out")
    change_outside_of_attention(folder, part)
    what = {"mlp": "other ones elsewhere", "rope": "other positions .*10000.0 there, 80000.0 now"}
    with pytest.raises(ConfigError, match=f"the same attention weights, but {what[part]}"):
        forecast(options, tmp_path / "out")
    with pytest.raises(ConfigError, match=f"the same attention weights, but {what[part]}"):
        capture_maps(options, tmp_path / "out")
    capture_maps(options, tmp_path / "out", resume=False)


def test_a_length_of_the_models_maximum_is_not(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = config(checkpoint)
    monkeypatch.setattr(pipeline, "max_length", lambda _: given.length)
    _, prompts, _ = load_for_capture(given, Processes(), False)
    assert len(prompts) == given.samples


def test_changed_data_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_text("One line of the file, and the next. " * 400)
    options = config(checkpoint, data=(str(path),), samples=3)
    capture_maps(options, tmp_path / "out")
    path.write_text("Another line of the file, and one more. " * 400)
    with pytest.raises(DataError, match="the data changed"):
        capture_maps(options, tmp_path / "out")
    capture_maps(options, tmp_path / "out", resume=False)
