"""benchmarks/bench_layer.py and its inputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from shareprefill.artifact import Policy

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def benchmarks_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def inputs() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        from layer_cases import Structured

        return Structured(2000, "cpu")


def test_heads_that_look_alike_share_and_others_do_not(inputs: Any) -> None:
    from layer_cases import PLANS, UNLIKE, chosen_density, uniform_plan

    inputs.place(5)
    layer = inputs.layer(uniform_plan(PLANS["shared"], 0.95))()
    chosen_density(layer)
    shared = (layer.policies == int(Policy.SHARE)).nonzero()[:, 0].tolist()
    assert shared == [head for head in range(4, 32) if head % UNLIKE != UNLIKE - 1]


@pytest.mark.slow
def test_blocks_are_placed_for_a_density(inputs: Any) -> None:
    from layer_cases import PLANS, chosen_density, uniform_plan

    policies = PLANS["shared"]
    hot = inputs.place_for(0.5, 0.97, policies)
    placed = inputs.key.clone()
    near = {}
    for count in (hot - 1, hot, hot + 1):
        inputs.place(count)
        plan = uniform_plan(policies, inputs.gamma_for(0.97, policies))
        near[count] = abs(chosen_density(inputs.layer(plan)()) - 0.5)
    assert min(near, key=lambda count: near[count]) == hot
    # Placing is not adding up.
    inputs.place(12)
    inputs.place(hot)
    assert torch.equal(inputs.key, placed)


def test_gamma_is_the_least_that_reaches_a_recall(inputs: Any) -> None:
    from layer_cases import PLANS, facts_of, uniform_plan

    inputs.place(5)
    policies = PLANS["sampled"]
    gamma = inputs.gamma_for(0.9, policies)
    facts = facts_of(inputs.layer(uniform_plan(policies, gamma))())
    assert facts.recall >= 0.9
    assert facts.worst_recall <= facts.recall
    assert facts_of(inputs.layer(uniform_plan(policies, gamma - 0.002))()).recall < 0.9


def test_layers_take_the_implementation_that_is_asked_for(inputs: Any) -> None:
    from bench_layer import implementation
    from layer_cases import PLANS, uniform_plan

    from shareprefill.errors import UnsupportedError

    make = inputs.layer(uniform_plan(PLANS["shared"], 0.9))
    with implementation("fa4"), pytest.raises(UnsupportedError, match="impl='fa4'"):
        make().run()
    make().run()


@pytest.mark.slow
def test_one_command_prints_gains_and_tables(tmp_path: Path) -> None:
    command = [
        *("benchmarks/bench_layer.py", "--device", "cpu", "--tokens", "1024", "--plans", "mixed"),
        *("shared", "--repeats", "1", "--commit", "c0ffee"),
        *("--json", str(tmp_path / "l.json"), "--markdown", str(tmp_path / "l.md")),
    ]
    subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    numbers = json.loads((tmp_path / "l.json").read_text())
    (dense,) = numbers["dense"]
    assert set(dense["missing"]) == {"FlashAttention-4"}
    mixed, shared = numbers["layers"]
    assert (mixed["plan"], shared["plan"]) == ("mixed", "shared")
    assert mixed["facts"]["recall"] == pytest.approx(shared["facts"]["recall"], abs=0.02)
    gains = {row["what"]: row["ratio"] for row in numbers["ratios"]}
    expected = dense["times"]["SDPA default"][0] * shared["facts"]["density"]
    found = gains["shared: speed-up over SDPA dense x density, eager, layer after layer"]
    assert found == pytest.approx(expected / shared["time"]["stream"])
    what = "shared: speed-up over FlashAttention-4 dense x density, the device alone"
    assert gains[what] is None
    text = (tmp_path / "l.md").read_text()
    assert "FlashAttention-4 missing: needs a CUDA GPU" in text
    assert "commit `c0ffee`" in text
