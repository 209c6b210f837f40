"""A calibration that torchrun spreads over processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shareprefill.calib.pipeline import capture_maps
from shareprefill.calib.store import INDEX
from shareprefill.config import CalibrateConfig
from shareprefill.files import sealed
from tests.support.checkpoint import save_checkpoint, small_calibration
from tests.support.processes import run_processes

WORKER = """
import os, sys
from pathlib import Path
from shareprefill.calib.pipeline import capture_maps
from shareprefill.config import CalibrateConfig
told = []
folder = Path(sys.argv[1])
store = capture_maps(
    CalibrateConfig(**eval(sys.argv[2])), folder, progress=lambda *state: told.append(state)
)
first = os.environ["RANK"] == "0"
assert (store is not None) == first
assert (told[-1:] == [(5, 5)]) == first
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


@pytest.mark.slow
def test_two_processes_make_the_store_of_one(tmp_path: Path) -> None:
    options = small_calibration(save_checkpoint(tmp_path / "model"), samples=5)
    capture_maps(CalibrateConfig(**options), tmp_path / "one")
    run_processes(2, "-c", WORKER, str(tmp_path / "two"), repr(options))
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    # Killed after the second prompt: the others are captured again.
    index = json.loads((tmp_path / "two" / INDEX).read_text())
    del index["checksum"]
    index["prompts"] = index["prompts"][:2]
    (tmp_path / "two" / INDEX).write_text(json.dumps(sealed(index)))
    run_processes(2, "-c", WORKER, str(tmp_path / "two"), repr(options))
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
