from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shareprefill import share_prefill
from shareprefill.artifact import Policy
from shareprefill.commands.inspect import describe, summarize
from shareprefill.commands.run import _run_facts
from shareprefill.commands.verdicts import (
    judge_artifact,
    judge_calibration,
    judge_recall,
    planned_and_taken,
    why_dense,
)
from shareprefill.config import RuntimeConfig
from shareprefill.models import ModelGeometry
from shareprefill.runtime.answering import Answer
from tests.audit.synthetic import made_up_artifact, with_gaps
from tests.support.tiny import tiny_artifact, tiny_llama, token_ids

P, S, R = Policy.PIVOT, Policy.SHARE, Policy.SAMPLED
PATH = Path("my clusters.st")


def made(**summary: Any) -> Any:
    known = {
        "cost": 0.42,
        "recall_worst_5_percent": 0.91,
        "held_out_prompts": ["retr_kv", "text"] * 3,
        "held_out_tokens": [20_000, 19_000] * 3,
    }
    calibrate = {"samples": 18, "length": 20_000, "data": ["mixture"]}
    configuration = {"calibrate": calibrate, "cluster": {"target_recall": 0.95}}
    return tiny_artifact(tiny_llama(), configuration=configuration, summary=known | summary)


def test_an_artifact_is_judged_by_gain_worst_heads_and_what_it_rests_on() -> None:
    found = judge_artifact(made(), PATH)
    text = " ".join(found.sentences)
    for part in (
        "42%",
        "95.0%",
        "91.0%",
        "6 prompts held out",
        "19,000 to 20,000",
        "retr_kv, text",
    ):
        assert part in text
    assert "that are not" not in text
    more = judge_artifact(made(further_prompts=["needle", "math_find"]), PATH)
    assert "(retr_kv, text), and 2 prompts that are not (needle, math_find)." in more.sentences[-1]
    one = judge_artifact(made(further_prompts=["needle"]), PATH)
    assert one.sentences[-1].endswith("(retr_kv, text), and 1 prompt that is not (needle).")
    assert found.warnings == ()
    assert found.next.startswith("sp run PROMPT.txt --artifact 'my clusters.st' --compare-dense")


@pytest.mark.parametrize(
    ("summary", "word"),
    [
        ({"held_out_tokens": [20_000] * 3}, "1 of 4 new ones"),
        ({"held_out_tokens": [2_000] * 6}, "run dense by themselves"),
        ({"cost": 0.97}, "little to gain"),
    ],
)
def test_what_an_artifact_rests_on_may_be_thin(summary: dict[str, Any], word: str) -> None:
    (warning,) = judge_artifact(made(**summary), PATH).warnings
    assert word in warning
    # One prompt that is long enough says something.
    some = made(held_out_tokens=[2_000] * 5 + [20_000])
    assert judge_artifact(some, PATH).warnings == ()


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"target_recall": 0.95, "budget": None, "max_kl": None}, "lower sp cluster --target-rec"),
        ({"target_recall": 0.95, "budget": 0.9}, "lower sp cluster --budget,"),
        ({"target_recall": 0.95, "max_kl": 1e-9}, "raise sp cluster --max-kl,"),
        ({}, "lower sp cluster --target-recall,"),
    ],
)
def test_little_gain_is_put_down_to_the_goal_that_was_given(
    options: dict[str, Any], remedy: str
) -> None:
    artifact = replace(made(cost=0.97), configuration={"cluster": options})
    (warning,) = judge_artifact(artifact, PATH).warnings
    assert remedy in warning


def test_an_artifact_without_a_summary_says_so() -> None:
    artifact = tiny_artifact(tiny_llama())
    assert "does not say" in " ".join(judge_artifact(artifact, PATH).sentences)


def test_inspect_tells_data_lengths_and_target(capsys: pytest.CaptureFixture[str]) -> None:
    summarize(made(), PATH)
    out = capsys.readouterr().out
    assert "18 prompts of 20000 tokens at most (mixture)" in out
    assert "a recall of 0.95 in every head" in out
    assert "Verdict: attention is predicted to take 42%" in out


def test_inspect_tells_what_was_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    whole = made_up_artifact(6, 3)
    summarize(whole, PATH)
    assert "not measured" not in capsys.readouterr().out
    artifact = with_gaps(whole, 0, 1, 2, 4)
    summarize(artifact, PATH)
    out = capsys.readouterr().out
    assert "not measured: layers 0-2, 4, without full causal attention" in out
    assert "nan" not in out
    facts = describe(artifact, PATH)
    assert facts["unmeasured_layers"] == [0, 1, 2, 4]
    assert facts["recall"] == pytest.approx(artifact.recall[[3, 5]].mean().item())
    json.dumps(facts, allow_nan=False)
    # No dense head was measured.
    artifact.policy[[3, 5]] = Policy.SAMPLED
    dense = describe(artifact, PATH)["policies"][0]
    assert (dense["policy"], dense["recall"], dense["density"]) == ("dense", None, None)


def calibration(tokens: list[int], data: tuple[str, ...] = ("mixture",)) -> Any:
    prompts = [SimpleNamespace(tokens=n, source="text") for n in tokens]
    return SimpleNamespace(
        prompts=prompts,
        config=SimpleNamespace(length=8192, data=data),
        fingerprint=SimpleNamespace(geometry=ModelGeometry(2, 32, 8, 128)),
    )


def training(held_out: int, *, head_mean: float = 0.2) -> Any:
    return SimpleNamespace(
        split=SimpleNamespace(held_out=tuple(range(held_out))),
        losses=SimpleNamespace(autoencoder=0.1, head_mean=head_mean),
    )


def test_a_calibration_is_enough_or_thin() -> None:
    found = judge_calibration(calibration([8192] * 12), training(4), PATH)
    assert "the data is enough: 12 prompts, 8,192 tokens long" in found.sentences[0]
    assert (found.warnings, found.next) == ((), "sp cluster 'my clusters.st'")
    thin = judge_calibration(
        calibration([8192, 1000, 900], ("retr_kv",)), training(1, head_mean=0.1), PATH
    )
    assert "the data is thin" in thin.sentences[0]
    for word in ("1 of 2 new", "2 of 3 prompts are much shorter", "no prompt from another"):
        assert any(word in warning for warning in thin.warnings)
    assert any("retr_kv" in warning for warning in thin.warnings)


def answered(prefills: int = 0, tokens: int = 100) -> Any:
    return SimpleNamespace(
        report=SimpleNamespace(prefills=prefills),
        generation=SimpleNamespace(prompt_tokens=tokens),
        device="cpu",
        least_tokens=4321,
    )


def test_a_dense_run_says_why() -> None:
    assert why_dense(answered(prefills=1), RuntimeConfig()) is None
    words = why_dense(answered(), RuntimeConfig(min_tokens=300))
    assert words is not None
    assert "100 tokens are fewer than 300" in words
    assert "--min-tokens 0" in words
    words = why_dense(answered(), RuntimeConfig())
    assert words is not None
    assert "fewer than 4,321" in words
    assert "measured on" in words
    assert "--policy dense" in (why_dense(answered(), RuntimeConfig(policy="dense")) or "")
    assert "sp doctor" in (why_dense(answered(tokens=10**6), RuntimeConfig()) or "")


@torch.no_grad()
def test_planned_beside_taken_with_reasons() -> None:
    model = tiny_llama()
    artifact = tiny_artifact(
        model,
        [[P, S, R, R], [R, R, R, R], [R, R, R, R]],
        # No sharing head passes its check.
        slack=torch.full((3, 4), -1.0),
    )
    config = RuntimeConfig(min_tokens=0, max_density=1.0)
    with share_prefill(model, artifact, config) as session:
        model(input_ids=token_ids(1, 96))
    rows = planned_and_taken(session.report(), config, "cpu", 0.3)
    assert [(row["planned"], row["taken"], row["heads"]) for row in rows] == [
        ("sampled", "sampled", 10),
        ("pivot", "pivot", 1),
        ("share", "smoothed", 1),
    ]
    assert "check failed" in rows[2]["why"]
    config = RuntimeConfig(min_tokens=0, max_density=0.05)
    with share_prefill(model, artifact, config) as session:
        model(input_ids=token_ids(1, 96))
    rows = planned_and_taken(session.report(), config, "cpu", 0.3)
    assert all("denser than 0.05" in row["why"] for row in rows if row["taken"] == "dense")
    assert any(row["taken"] == "dense" for row in rows)


def test_recall_beside_its_promise() -> None:
    assert judge_recall(0.951, 0.953) == "recall 0.951, as promised: held-out prompts had 0.953"
    assert "less than promised" in judge_recall(0.9, 0.953)


@torch.no_grad()
def test_recall_of_another_gamma_was_not_promised() -> None:
    model = tiny_llama()
    artifact = tiny_artifact(model)
    with share_prefill(model, artifact, min_tokens=0) as session:
        model(input_ids=token_ids(1, 96))
    said: Any = SimpleNamespace(
        text="", prompt_tokens=96, new_tokens=1, ttft_s=1.0, decode_tokens_per_s=None
    )
    cases: list[tuple[dict[str, Any], float | None]] = [
        ({}, artifact.recall.mean().item()),
        ({"gamma": 0.5}, None),
        ({"policy": "smoothed"}, None),
    ]
    for options, promised in cases:
        result = Answer(said, session.report(), recalls=(0.5,) * 12)
        facts = _run_facts(result, RuntimeConfig(min_tokens=0, **options), artifact)
        assert facts["recall"] == 0.5
        assert facts.get("promised_recall") == (promised and pytest.approx(promised))
    # Nothing was held out for layers that were not captured.
    result = Answer(said, session.report(), recalls=(0.5,) * 12)
    gaps = replace(artifact, recall=torch.full_like(artifact.recall, torch.nan))
    assert "promised_recall" not in _run_facts(result, RuntimeConfig(min_tokens=0), gaps)
