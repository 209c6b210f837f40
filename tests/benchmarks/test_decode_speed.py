"""benchmarks/decode_speed.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch


def test_rows_tell_what_steps_took_and_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import decode_speed

    path = tmp_path / "speed.json"
    arguments = ["--shape", "tiny", "--layers", "1", "--batch", "2", "--tokens", "400"]
    options = ["--density", ".3", "--warm-up", "8", "--steps", "2", "--device", "cpu"]
    options += ["--cache", "dynamic", "static"]
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


def test_steps_of_a_graph_read_few_blocks_or_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import decode_speed

    from shareprefill.bench.shapes import build_shape

    device = torch.device("cpu")
    model = build_shape("tiny", layers=1, tokens=512, device=device, dtype=torch.float32)
    logits = {}
    for density in (None, 1.0, 0.3):
        torch.manual_seed(0)
        step, attention = decode_speed.fixed_step(model, 1, 400, density, 8, 2)
        if isinstance(attention, decode_speed.SparseSteps):
            read = attention.density(1)
            assert (read == 1) == (density == 1)
        logits[density] = step()
    dense = logits[None]
    torch.testing.assert_close(logits[1.0], dense, rtol=0, atol=1e-5)
    assert 0 < (logits[0.3] - dense).norm() / dense.norm() < 0.5
