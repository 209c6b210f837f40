"""benchmarks/bench_pages.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench_pages

    return bench_pages


@pytest.mark.parametrize("first", ["tokens", "heads"])
def test_pages_hold_what_is_timed_on_tensors(bench: Any, first: str) -> None:
    key, value = torch.randn(2, 3, 70, 8)
    keys, values = bench.in_pages(key, value, 16, first)
    assert torch.equal(keys.gathered, key)
    assert torch.equal(values.gathered, value)
    assert keys.pool.isnan().any()
    assert (keys.stride(0) < keys.stride(1)) is (first == "tokens")


def test_one_command_prints_and_keeps_a_table(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table, numbers = tmp_path / "p.md", tmp_path / "p.json"
    options = ["--device", "cpu", "--chunks", "512:128", "--pages", "16", "--commit", "c0ffee"]
    files = ["--json", str(numbers), "--markdown", str(table)]
    monkeypatch.setattr(sys, "argv", ["bench_pages.py", *options, "--plan", "shared", *files])
    bench.main()
    rows = json.loads(numbers.read_text())["rows"]
    assert [row["first"] for row in rows] == ["tokens", "heads"]
    for row, line in zip(rows, table.read_text().splitlines()[-2:], strict=True):
        share = row["gather"] / (row["gather"] + row["tensors"])
        assert f"| {row['tensors']:.3f} | {row['gather']:.3f} | {share:.1%} |" in line
    assert table.read_text() == capsys.readouterr().out
