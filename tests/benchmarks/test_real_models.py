"""benchmarks/ablation.py, fidelity.py and real_sizes.py, on small models."""

from __future__ import annotations

import json
import sys
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch

from shareprefill.artifact import Policy, load_artifact
from shareprefill.autoencoder.pipeline import train
from shareprefill.calib.pipeline import capture_maps
from shareprefill.calib.store import MapStore
from shareprefill.config import CalibrateConfig, TrainConfig
from shareprefill.runtime.policies.smoothed import UNFITTED
from tests.support.checkpoint import save_checkpoint, small_calibration

ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a benchmark's `main` with arguments."""

    def run(name: str, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        __import__(name).main()

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return run


def test_an_ablation_leaves_out_one_part_each(benchmark: Any, tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "model")
    capture_maps(CalibrateConfig(**small_calibration(checkpoint, samples=6)), tmp_path / "maps")
    train(tmp_path / "maps", TrainConfig(epochs=1, hidden=16, resolution=16, code_size=8))
    benchmark("ablation", tmp_path / "maps", "--budget", 0.6, "--k", 1, "--out", tmp_path / "out")
    made = {path.stem: load_artifact(path) for path in (tmp_path / "out").iterdir()}
    assert set(made) == {"whole", "half", "pivots-cut", "recall", "one-effect", "unchecked"}
    assert (made["unchecked"].slack == 1).all()
    assert not (made["whole"].slack == 1).all()
    assert set(map(tuple, made["half"].estimator.values())) == {astuple(UNFITTED)}
    assert made["whole"].estimator != made["half"].estimator
    assert made["recall"].summary["kl"] > made["whole"].summary["kl"]
    assert made["one-effect"].summary["kl"] != made["whole"].summary["kl"]
    for name, alike in (("whole", False), ("pivots-cut", True)):
        shares = made[name].policy == int(Policy.SHARE)
        pivots = made[name].pivot[shares].long()
        assert torch.equal(made[name].gamma[shares], made[name].gamma.flatten()[pivots]) == alike


def test_cuts_of_the_same_estimates(
    benchmark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = save_checkpoint(tmp_path / "model")
    capture_maps(CalibrateConfig(**small_calibration(checkpoint, samples=3)), tmp_path / "maps")
    benchmark("cuts", tmp_path / "maps", "--rows", 2, 0, "--budget", 0.8)
    lines = [line for line in capsys.readouterr().out.splitlines() if "harm / oracle" in line]
    cuts = ("head", "row", "row-loss")
    assert [line.split(",")[:2] for line in lines] == [
        [f"{rows} rows", f" {cut}"] for rows in (2, 0) for cut in cuts
    ]
    by_loss = sys.modules["cuts"].blocks_by_loss
    maps = torch.tensor([[[4.0, 0, 0, 0], [1, 3, 0, 0], [0.3, 0.5, 0.2, 0], [1, 10, 6, 3]]])
    # The last row: .5 lacks 1, .3 lacks .5, .15 lacks .2, .05 lacks .05.
    always = torch.zeros(4, 4, dtype=torch.bool)
    assert by_loss(maps, always, 0.05)[0, 3].tolist() == [False, True, True, False]
    always[3, 1] = True
    assert by_loss(maps, always, 0.029)[0, 3].tolist() == [False, True, True, True]
    assert by_loss(maps, always, 0.05)[0, 3].tolist() == [False, True, True, False]


def test_fidelity_measures_each_prompt_and_policy_once(benchmark: Any, tmp_path: Path) -> None:
    artifact, out = ROOT / "artifacts/sp-tiny.st", tmp_path / "rows.jsonl"
    call = ("--model", "sp-tiny", "--artifact", artifact, "--task", "perplexity", "--out", out)
    benchmark("fidelity", *call, "--length", 700, "--policy", "oracle:1.0", "--recall")
    rows = list(map(json.loads, out.read_text().splitlines()))
    assert [row["policy"] for row in rows] == ["auto sp-tiny", "oracle 1.0"]
    planned, every = rows
    assert every["density"] == pytest.approx(1)
    assert every["recall"] == pytest.approx(1)
    assert every["kl"] == pytest.approx(0, abs=1e-6)
    assert every["top1"] == 1
    assert planned["density"] < 1
    assert planned["recall"] < 1
    assert planned["kl"] > 1e-5
    before = out.read_text()
    benchmark("fidelity", *call, "--length", 700, "--policy", "oracle:1.0", "--recall")
    assert out.read_text() == before
    benchmark("fidelity", *call, "--length", 700, "--chunk", 0, "--chunk", 256)
    *known, chunks = map(json.loads, out.read_text().splitlines())
    assert known == rows
    assert chunks["policy"] == "auto sp-tiny in chunks of 256"
    assert chunks["density"] != planned["density"]
    assert 0 < chunks["kl"] != planned["kl"]


def test_a_large_shape_is_captured_and_clustered(
    benchmark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = ("--shape", "tiny", "--length", 1024, "--prompts", 4)
    for step in ("capture", "make-up"):
        out = ("--out", tmp_path / step)
        benchmark("real_sizes", step, *shape, *out)
        assert len(MapStore.open(tmp_path / step).prompts) == 4
        printed = capsys.readouterr().out
        assert ("4 of 4: " in printed) == ("forecast in " in printed) == (step == "capture")
        benchmark("real_sizes", "cluster", "--epochs", 1, *out)
        assert "16 heads, 4 prompts of 1,024 tokens" in capsys.readouterr().out
