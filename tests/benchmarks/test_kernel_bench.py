"""benchmarks/bench_kernels.py, and what it stands on."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def benchmarks_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def bench() -> Any:
    from bench_kernels import Bench
    from timing import Ceilings

    options = argparse.Namespace(
        device="cpu", dtype="fp32", heads=2, kv_heads=1, head_dim=16, block_size=32, seed=0,
        baseline=("flex",), density=[0.5], others={},
    )  # fmt: skip
    return Bench(options, 100, Ceilings(1e12, 1e11, None))


@pytest.mark.slow
def test_one_command_prints_times_ratios_and_tables(tmp_path: Path) -> None:
    command = [
        *("benchmarks/bench_kernels.py", "--device", "cpu", "--tokens", "256", "512", "--heads"),
        *("4", "--kv-heads", "2", "--head-dim", "16", "--block-size", "32", "--baseline"),
        *("--commit", "c0ffee", "--density", ".5"),
        *("--json", str(tmp_path / "k.json"), "--markdown", str(tmp_path / "k.md")),
    ]
    found = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "FlexAttention              0." in found.stdout
    numbers = json.loads((tmp_path / "k.json").read_text())
    assert numbers["facts"]["commit"] == "c0ffee"
    rows = numbers["results"]
    assert {row["tokens"] for row in rows} == {256, 512}
    for row in rows:
        assert (row["ms"] is None) == (row["missing"] is not None)
        if row["missing"] is None and row["difference"] is not None:
            assert row["difference"] < 1e-5
    by_what = {(r["tokens"], r["what"]): r for r in numbers["ratios"]}
    known = by_what[512, "pooled, all rows / SDPA"]
    one, other = (
        next(r["ms"] for r in rows if (r["tokens"], r["name"]) == (512, name))
        for name in ("output and map", "SDPA default")
    )
    assert known["ratio"] == one / other
    assert by_what[256, "own block sparse, d 0.5 / FlashAttention-4"]["ratio"] is None
    text = (tmp_path / "k.md").read_text()
    assert "commit `c0ffee`" in text
    assert "python benchmarks/bench_kernels.py --device cpu" in text
    assert "- FlashAttention-4: needs a CUDA GPU" in text


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, ImportError, AssertionError, ValueError])
def test_a_failing_kernel_of_others_is_a_line(error: type[Exception]) -> None:
    from bench_kernels import Work

    def fail() -> Any:
        raise error("no such luck\nand more")

    made = bench()
    made._measure_other("dense", "theirs", lambda: fail, Work(1, 4, 1.0))
    made._measure_other("dense", "theirs too", fail, Work(1, 4, 1.0))
    assert [row.missing for row in made.rows] == [f"{error.__name__}: no such luck"] * 2


def test_a_mistake_of_our_own_ends_the_run() -> None:
    from bench_kernels import Work

    def fail() -> Any:
        raise KeyError("a typing error")

    with pytest.raises(KeyError, match="a typing error"):
        bench()._measure_other("dense", "theirs", fail, Work(1, 4, 1.0))
    with pytest.raises(RuntimeError, match="ours"):
        bench()._measure("dense", "ours", _raise_ours, Work(1, 4, 1.0))


def _raise_ours() -> Any:
    raise RuntimeError("ours")


def test_products_of_e4m3_have_a_rate_of_their_own() -> None:
    from timing import Ceilings

    ceilings = Ceilings(flops=1e12, bytes=1e15, exponentials=1e12, fp8_flops=2e12)
    assert ceilings.floor(4e9, 1, 1e9) == (4.0, "matrix units")
    assert ceilings.floor(4e9, 1, 1e9, in_fp8=True) == (2.0, "matrix units")
    assert ceilings.floor(4e9, 1, 3e9, in_fp8=True) == (3.0, "exponentials")


def test_lists_of_others_are_the_same_blocks() -> None:
    """Counts and blocks as FlexAttention and FlashAttention-4 take them, listed ones first."""
    from kernel_cases import _padded, density, structured_lists, visible_pairs

    lists = structured_lists(500, 32, 3, 0.4, "cpu", seed=int(torch.seed() % 1000))
    bitmap = lists.to_bitmap()[lists.head_to_list.long()]
    counts, tiles = _padded(lists)
    assert (counts.dtype, tiles.dtype) == (torch.int32, torch.int32)
    for head in range(3):
        for row in range(lists.n_q):
            listed = tiles[0, head, row, : int(counts[0, head, row])]
            assert listed.tolist() == bitmap[head, row].nonzero()[:, 0].tolist()
            assert int(listed[-1]) == row
    assert 0.4 < density(lists, 500) < 0.6
    mask = bitmap.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, :500, :500]
    assert visible_pairs(lists, 500) == int(mask.tril().sum())


def test_goals() -> None:
    from goals import LAYER, NEVER_SLOWER, OWN_TO_FA4, compare, comparison_table

    assert OWN_TO_FA4.verdict(8192, 0.95) == "met"
    assert OWN_TO_FA4.verdict(131072, 0.96) == "missed"
    assert OWN_TO_FA4.verdict(4096, 1.0) is None
    assert LAYER.verdict(32768, 0.60) == "met"
    assert LAYER.verdict(32768, 0.59) == "missed"
    assert NEVER_SLOWER.at(1024) == ">= 0.98"
    fine, late = ("ours", 1.0, 0.5), ("theirs", 1.0, 0.4)
    found = compare(8192, "one / other", fine, late, OWN_TO_FA4)
    assert (found.ratio, found.device_ratio) == (1.0, 1.25)
    # The host hides what the device takes longer.
    assert found.verdict == "missed"
    missing = compare(32768, "one / other", fine, None, OWN_TO_FA4)
    assert (missing.cell(), missing.verdict) == ("missing", None)
    assert comparison_table([found, missing])[-1] == (
        "| one / other | <= 0.95 | 1.000 (device 1.250) missed | missing |"
    )


def test_the_commit_says_where_files_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import provenance

    def git(*arguments: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True)

    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.current_commit() == "unknown"
    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "one")
    commit = provenance.current_commit()
    assert len(commit) >= 7
    assert " " not in commit
    (tmp_path / "file").write_text("2")
    assert provenance.current_commit() == f"{commit} + work tree"
