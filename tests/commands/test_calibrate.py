"""`sp calibrate`: which options reach which stage."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from shareprefill.autoencoder import pipeline as training
from shareprefill.calib import forecast as forecasts
from shareprefill.calib import pipeline
from shareprefill.calib.forecast import Forecast
from shareprefill.commands import calibrate

COMMAND = ("calibrate", "--model", "m", "--samples", 4, "--seed", 7)


def test_seed_and_fresh_reach_every_stage(monkeypatch: pytest.MonkeyPatch, sp: Any) -> None:
    given: dict[str, Any] = {}

    def capture(config: Any, _folder: Any, **options: Any) -> object:
        given.update(captured=config.seed, resume=options["resume"])
        return object()

    def train(_folder: Any, config: Any) -> Any:
        given["trained"] = config.seed
        return SimpleNamespace(losses=None, epochs=1)

    verdict = SimpleNamespace(show=lambda: None)
    monkeypatch.setattr(pipeline, "capture_maps", capture)
    monkeypatch.setattr(training, "train", train)
    monkeypatch.setattr(calibrate, "judge_calibration", lambda *_: verdict)
    monkeypatch.setattr(calibrate, "show_training", lambda *_: None)
    for more, resume in (((), True), (("--fresh",), False)):
        assert sp(*COMMAND, *more) == (0, "", "")
        assert given == {"captured": 7, "trained": 7, "resume": resume}


def test_a_forecast_is_of_what_would_be_done(monkeypatch: pytest.MonkeyPatch, sp: Any) -> None:
    resumes = []

    def forecast(_config: Any, _folder: Any, **options: Any) -> Forecast:
        resumes.append(options["resume"])
        return Forecast(2, 0, (512, 512), 8, (128, 256), 1.0, 10, 10, None)

    monkeypatch.setattr(forecasts, "forecast", forecast)
    monkeypatch.setattr(training, "forecast_training", lambda *_: 1.0)
    for more in ((), ("--fresh",)):
        assert sp(*COMMAND, "--dry-run", *more)[0] == 0
    assert resumes == [True, False]
