from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shareprefill.calib import forecast as forecasts
from shareprefill.calib.capture import PromptMaps, capture
from shareprefill.calib.forecast import Forecast, _fit, _Probes, forecast
from shareprefill.calib.pipeline import capture_maps
from shareprefill.calib.store import MapStore
from shareprefill.commands.calibrate import show_forecast
from shareprefill.config import CalibrateConfig
from shareprefill.errors import ConfigError
from tests.support.checkpoint import save_checkpoint, small_calibration


def test_a_forecast_writes_nothing_and_knows_what_the_maps_take(tmp_path: Path) -> None:
    config = CalibrateConfig(**small_calibration(save_checkpoint(tmp_path / "model"), samples=3))
    folder = tmp_path / "calibration"
    found = forecast(config, folder)
    assert found is not None
    assert not folder.exists()
    assert (found.prompts, found.done, len(found.tokens), found.heads) == (3, 0, 3, 12)
    assert found.seconds > 0
    assert found.host_memory > 50e6
    assert found.device_memory is None
    store = capture_maps(config, folder)
    assert store is not None
    assert [record.tokens for record in store.prompts] == list(found.tokens)
    written = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert 0 < written - found.disk < 3 * 2048
    done = forecast(config, folder)
    assert done is not None
    assert (done.done, done.seconds) == (3, 0)
    with pytest.raises(ConfigError, match="another configuration"):
        forecast(CalibrateConfig(**{**config.to_dict(), "seed": 1}), folder)


def test_a_forecast_is_told_in_four_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Forecast(
        12, 3, (8012, 8190), 48, (512, 1024), 1500.0, 900_000_000, 3 * 10**9, 20 * 10**9
    )
    show_forecast(found, 40.0, tmp_path)
    assert capsys.readouterr().out.splitlines() == [
        "prompts: 12 of 8,012 to 8,190 tokens; 3 are done",
        "time: about 25 min, as 512 and 1024 tokens took here; then about 40 s to train the "
        "autoencoder",
        f"disk: 900 MB in {tmp_path}, 75 MB a prompt",
        "memory: about 3.0 GB at the peak, and 20.0 GB on the GPU",
    ]


@pytest.mark.parametrize("seconds", [(1.0, 2.0), (1.0, 3.0), (1.0, 1.5)])
def test_times_are_fitted_to_both_probes(seconds: tuple[float, float]) -> None:
    of = _fit((100, 200), seconds)
    assert of(200) == pytest.approx(seconds[1])
    # In proportion at least, and with the square at most.
    assert 5 * seconds[1] <= of(1000) <= 25 * seconds[1]


def test_probes_grow_until_one_takes_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model on a GPU is as quick with 1,024 tokens as with 512: that says nothing of 128K."""
    asked = list[int]()

    def timed(call: Callable[[int], None], tokens: int, _device: object) -> tuple[float, int]:
        compiling = 9.0 * (tokens not in asked)
        call(tokens)
        # Of an 8B shape: about 50 ms at least, 18 s and 13 GB at 128K.
        seconds = max(0.05, 7e-5 * tokens + 5e-10 * tokens**2)
        return compiling + seconds, 10**6 + 100_000 * tokens

    monkeypatch.setattr(forecasts, "_timed", timed)
    cpu = torch.device("cpu")
    probes = _Probes.of(asked.append, 131072, [131072], cpu)
    assert sorted(asked) == asked
    assert sorted({*asked}) == [512, 1024, 2048, 4096, 8192, 16384, 32768]
    assert probes.tokens == (16384, 32768)
    assert probes.seconds(131072) == pytest.approx(7e-5 * 131072 + 5e-10 * 131072**2)
    assert probes.memory(131072)[1] == pytest.approx(100_000 * 131072, rel=0.01)
    # For twelve prompts a probe of 64K is a twentieth more, one of 128K would be a sixth.
    assert _Probes.of(asked.append, 131072, [131072] * 12, cpu).tokens == (32768, 65536)
    assert _Probes.of(asked.append, 131072, [131072] * 24, cpu).tokens == (65536, 131072)
    asked.clear()
    assert _Probes.of(asked.append, 1500, [1500], cpu).tokens == (512, 1024)
    assert asked == [512, 512, 1024, 1024]
    assert _Probes.of(asked.append, 255, [255], cpu).tokens == (127, 254)


def test_memory_of_this_process_grows_with_the_tokens_on_a_cpu_alone() -> None:
    """On a GPU what it grows by is code that was loaded."""
    probes = _Probes((1000, 2000), (1.0, 2.0), (700, 900), (0, 0), resting=0)
    assert probes.memory(2000) == (900, 0)
    assert probes.memory(5000) == (900 + 3 * 200, 0)
    on_gpu = _Probes((1000, 2000), (1.0, 2.0), (700, 900), (10, 20), resting=50)
    assert on_gpu.memory(5000) == (900, 50 + 50)


def test_probes_join_blocks_as_the_longest_prompt_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Maps of a probe's own blocks would be larger than those of the whole prompt."""
    checkpoint = save_checkpoint(tmp_path / "model")
    small = small_calibration(checkpoint, samples=3, length=18 * 32, map_blocks=9)
    sizes = set[object]()

    def noted(*args: Any, **options: Any) -> PromptMaps:
        sizes.add(options["map_block"])
        return capture(*args, **options)

    monkeypatch.setattr(forecasts, "capture", noted)
    monkeypatch.setattr(MapStore, "prompt_bytes", lambda *_: 10**12)
    found = forecast(CalibrateConfig(**small), tmp_path / "calibration")
    assert sizes == {64}
    assert found is not None
    # A prompt's maps are held beside the model while they are joined and written.
    assert (found.disk, found.host_memory // 10**12) == (3 * 10**12, 6)
