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
EVERY = dict.fromkeys(Policy, 0.95)


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
    from layer_cases import PLANS, UNLIKE, uniform_plan

    inputs.place(5)
    layer = inputs.layer(uniform_plan(PLANS["shared"], EVERY))()
    shared = (layer.choose().record.policies == int(Policy.SHARE)).nonzero()[:, 0].tolist()
    assert shared == [head for head in range(4, 32) if head % UNLIKE != UNLIKE - 1]


@pytest.mark.slow
def test_blocks_are_placed_for_a_density(inputs: Any) -> None:
    from layer_cases import PLANS, chosen_density, uniform_plan

    policies = PLANS["shared"]
    tuning = inputs.tune(0.5, 0.97, policies)
    placed = inputs.key.clone()
    assert tuning.density == pytest.approx(0.5, abs=0.1)
    again = chosen_density(inputs.layer(uniform_plan(policies, tuning.gammas))())
    assert again == tuning.density
    inputs.place(1)
    fewer = inputs.layer(uniform_plan(policies, inputs.gammas_for(0.97, policies)))()
    assert chosen_density(fewer) < tuning.density
    # Placing is not adding up.
    inputs.place(12)
    inputs.place(tuning.hot)
    assert torch.equal(inputs.key, placed)


def test_gamma_is_the_least_that_reaches_a_recall(inputs: Any) -> None:
    from layer_cases import PLANS, facts_of, uniform_plan

    inputs.place(5)
    policies = PLANS["sampled"]
    gammas = inputs.gammas_for(0.9, policies)
    facts = facts_of(inputs.layer(uniform_plan(policies, gammas))())
    assert facts.recall >= 0.9
    assert facts.worst_recall <= facts.recall
    ((policy, gamma),) = gammas.items()
    less = uniform_plan(policies, {policy: gamma - 0.004})
    assert facts_of(inputs.layer(less)()).recall < 0.9


def test_long_inputs_are_tuned_at_fewer_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    import layer_cases

    policies = layer_cases.PLANS["shared"]
    short = layer_cases.Structured(1024, "cpu").tune(0.7, 0.9, policies)
    monkeypatch.setattr(layer_cases, "LONGEST_TUNED", 1024)
    inputs = layer_cases.Structured(4096, "cpu")
    found = inputs.tune(0.7, 0.9, policies)
    assert (found.hot, found.gammas) == (4 * short.hot, short.gammas)
    placed = inputs.key.clone()
    inputs.place(found.hot)
    assert torch.equal(inputs.key, placed)


def test_sharing_heads_have_the_gamma_of_their_pivot(inputs: Any) -> None:
    from layer_cases import FALLBACK, PLANS, P, gammas_of, uniform_plan

    assert gammas_of(PLANS["shared"]) == {P, FALLBACK}
    plan = uniform_plan(PLANS["shared"], {P: 0.5, FALLBACK: 0.6}, layers=2)
    assert [layer[9].gamma for layer in plan.layers] == [0.5, 0.5]
    assert plan.layers[1][9].fallback_gamma == 0.6
    assert [layer[9].pivot for layer in plan.layers] == [1, 33]


def test_layers_take_the_implementation_that_is_asked_for(inputs: Any) -> None:
    from bench_layer import implementation
    from layer_cases import PLANS, uniform_plan

    from shareprefill.errors import UnsupportedError

    make = inputs.layer(uniform_plan(PLANS["shared"], EVERY))
    with implementation("hopper"), pytest.raises(UnsupportedError, match="impl='hopper'"):
        make().run()
    make().run()
    in_fp8 = inputs.layer(uniform_plan(PLANS["shared"], EVERY, in_fp8=True))
    with implementation("fp8"), pytest.raises(UnsupportedError, match="FP8 attention needs"):
        in_fp8().run()


def test_fp8_is_compared_apart_from_the_fastest_of_the_others() -> None:
    from layer_cases import Facts
    from layer_tables import Dense, LayerTime, Row, comparisons

    def row(impl: str, ms: float) -> Row:
        time = LayerTime(ms, ms, ms, None, 0.1, None, None)
        return Row(1024, "mixed", impl, {}, Facts(0.5, 1.0, 1.0, 1.0), time)

    dense = [Dense(1024, "SDPA", {"SDPA": (8.0, 8.0)}, {})]
    rows = [row("triton", 4.0), row("hopper", 2.0), row("fp8", 1.0)]
    found = {one.what: one.ratio for one in comparisons(dense, rows)}
    what = "speed-up over SDPA dense x density, the device alone"
    assert (found[f"mixed: {what}"], found[f"mixed in FP8: {what}"]) == (2.0, 4.0)


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
    # Weights that no model was asked for estimate these made-up maps a little less well.
    assert mixed["facts"]["recall"] == pytest.approx(shared["facts"]["recall"], abs=0.03)
    gains = {row["what"]: row["ratio"] for row in numbers["ratios"]}
    expected = dense["times"]["SDPA default"][0] * shared["facts"]["density"]
    found = gains["shared: speed-up over SDPA dense x density, eager, layer after layer"]
    assert found == pytest.approx(expected / shared["time"]["stream"])
    what = "shared: speed-up over FlashAttention-4 dense x density, the device alone"
    assert gains[what] is None
    text = (tmp_path / "l.md").read_text()
    assert "FlashAttention-4 missing: needs a CUDA GPU" in text
    assert "commit `c0ffee`" in text
