from __future__ import annotations

from pathlib import Path

import pytest

from shareprefill.calib.forecast import Forecast, _fit, forecast
from shareprefill.calib.pipeline import capture_maps
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
    assert (found.prompts, found.done, len(found.tokens)) == (3, 0, 3)
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
    found = Forecast(12, 3, (8012, 8190), (512, 1024), 1500.0, 900_000_000, 3 * 10**9, 20 * 10**9)
    show_forecast(found, tmp_path)
    assert capsys.readouterr().out.splitlines() == [
        "prompts: 12 of 8,012 to 8,190 tokens; 3 are done",
        "time: about 25 min, as 512 and 1024 tokens took here; then the autoencoder is trained",
        f"disk: 900 MB in {tmp_path}, 75 MB a prompt",
        "memory: about 3.0 GB at the peak, and 20.0 GB on the GPU",
    ]


@pytest.mark.parametrize("seconds", [(1.0, 2.0), (1.0, 3.0), (1.0, 1.5)])
def test_times_are_fitted_to_both_probes(seconds: tuple[float, float]) -> None:
    of = _fit((100, 200), seconds)
    assert of(200) == pytest.approx(seconds[1])
    # In proportion at least, and with the square at most.
    assert 5 * seconds[1] <= of(1000) <= 25 * seconds[1]
