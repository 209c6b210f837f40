"""benchmarks/measure_crossover.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def benchmarks_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def row(tokens: int, shared: float, below: float = 1.0, cudnn: float = 1.0) -> Any:
    from measure_crossover import BELOW, OWN, SHARED, Row

    ms = {OWN: 1.0, BELOW: below, SHARED: shared, "SDPA cuDNN": cudnn}
    return Row(tokens, 0.3, 0.97, ms, {})


def test_from_the_crossover_on_sharing_is_never_slower() -> None:
    from measure_crossover import crossover_of

    # A lucky short length does not count, and the fastest dense attention does.
    rows = [row(1024, 0.9), row(2048, 1.1), row(4096, 1.0), row(8192, 0.5, cudnn=0.6)]
    assert crossover_of(rows) == 4096
    assert crossover_of([*rows, row(16384, 0.5, cudnn=0.4)]) is None
    assert crossover_of(rows[::-1]) == 4096


def test_sessions_are_judged_by_what_they_would_run() -> None:
    from measure_crossover import verdicts

    short, long = verdicts([row(1024, 0.9, below=1.1), row(4096, 0.8, below=2.0)], 4096)
    assert "(dense) 0.909, own / session 0.909, goal >= 0.98: missed" in short
    assert "(shared) 1.250, own / session 1.250, goal >= 0.98: met" in long
    assert "(dense)" in verdicts([row(4096, 0.8)], None)[0]


def test_the_density_at_which_both_take_as_long() -> None:
    from measure_crossover import _equal

    assert _equal({0.5: 0.8, 0.75: 1.2, 1.0: 1.5}) == pytest.approx(0.625)
    assert _equal({0.5: 0.8, 1.0: 0.9}) is None
    assert _equal({0.5: 1.8, 1.0: 1.9}) == 0.5


@pytest.mark.slow
def test_one_command_measures_a_session(tmp_path: Path) -> None:
    command = [
        *("benchmarks/measure_crossover.py", "--device", "cpu", "--tokens", "512", "1024"),
        *("--layers", "2", "--repeats", "1", "--density-tokens", "512", "--plan", "shared"),
        *("--json", str(tmp_path / "c.json")),
    ]
    found = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "sharing is never slower from" in found.stdout
    numbers = json.loads((tmp_path / "c.json").read_text())
    short, long = numbers["rows"]
    assert (short["tokens"], long["tokens"]) == (512, 1024)
    for known in (short, long):
        assert set(known["ms"]) == {"model's own", "session, dense", "session, shared"}
        assert set(known["missing"]) == {"SDPA cuDNN", "FlashAttention-4"}
        assert known["recall"] > 0.9
    assert long["density"] < short["density"] <= 1
    (density,) = numbers["densities"]
    assert 1.0 in {float(key) for key in density["ratios"]}
