from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from shareprefill.calib.store import FORMAT_VERSION
from shareprefill.commands.known import known_models
from shareprefill.config import CalibrateConfig
from shareprefill.models import Fingerprint, ModelGeometry


def test_known_are_the_models_of_readable_calibrations(tmp_path: Path) -> None:
    fingerprint = asdict(Fingerprint("llama", ModelGeometry(1, 2, 1, 8), "0a" * 32))
    for name, model in (("a", "org/model"), ("b", "../there")):
        (tmp_path / name / "calibration").mkdir(parents=True)
        index = {
            "format_version": FORMAT_VERSION,
            "config": CalibrateConfig(model=model).to_dict(),
            "fingerprint": fingerprint,
            "prompts": [],
        }
        (tmp_path / name / "calibration" / "index.json").write_text(json.dumps(index))
    (tmp_path / "c" / "calibration").mkdir(parents=True)
    (tmp_path / "c" / "calibration" / "index.json").write_text('{"config": {"model": "evil"}}')
    assert known_models(tmp_path) == {"org/model", "../there"}
    assert known_models(tmp_path / "none") == set()
