"""benchmarks/decode_speed.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest


def test_rows_tell_what_steps_took_and_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import decode_speed

    path = tmp_path / "speed.json"
    arguments = ["--shape", "tiny", "--layers", "1", "--batch", "2", "--tokens", "400"]
    options = ["--density", ".3", "--warm-up", "8", "--steps", "2", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["", *arguments, *options, "--json", str(path)])
    decode_speed.main()
    rows = json.loads(path.read_text())["rows"]
    assert [(row["cache"], row["asked"]) for row in rows] == [
        (kind, asked) for kind in ("dynamic", "static") for asked in (None, 0.3)
    ]
    assert all(row["ms"] > 0 for row in rows)
    assert rows[0]["density"] == 1
    assert 0.2 < rows[1]["density"] < 1
    assert "batch 2, 400 tokens, static cache" in capsys.readouterr().out
