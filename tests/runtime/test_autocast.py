"""Sessions under torch.autocast, as accelerate and transformers' Trainer set it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shareprefill import share_prefill
from shareprefill.artifact import Policy
from shareprefill.config import RuntimeConfig
from shareprefill.policy_names import POLICIES, reads
from shareprefill.runtime.generation import cache_of
from tests.support.families import FAMILIES, build
from tests.support.tiny import tiny_artifact, tiny_llama, token_ids

P, S, R, V = Policy.PIVOT, Policy.SHARE, Policy.SAMPLED, Policy.VERTICAL_SLASH
PLANNED = [[P, S, R, V], [S, S, P, R], [V, R, S, S]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_every_policy_computes_what_it_does_in_the_type_of_autocast(
    policy: str, dtype: torch.dtype
) -> None:
    model, ids = tiny_llama(), token_ids(1, 120)
    artifact = tiny_artifact(model, PLANNED)
    everything = dict.fromkeys(("gamma", "slack", "max_density"), 1.0)
    options = {name: value for name, value in everything.items() if reads(policy, name)}
    config = RuntimeConfig.from_dict({"policy": policy, "min_tokens": 0, **options})
    own = model(input_ids=ids).logits
    with torch.autocast("cpu", dtype=dtype):
        expected = model(input_ids=ids).logits
        with share_prefill(model, artifact, config, measure_recall=True) as session:
            found = model(input_ids=ids).logits
            step = model(input_ids=ids, use_cache=True)
            model(input_ids=ids[:, :1], **cache_of(step))
            report = session.report()
    assert found.dtype == expected.dtype
    assert report.prefills == 2
    rounding = (expected.float() - own).norm() / own.norm()
    error = (found.float() - own).norm() / own.norm()
    if policy in ("auto", "dense", "share", "sampled", "smoothed"):
        # All mass is read.
        assert error < 2 * rounding
    assert error.isfinite()


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "mistral (sliding window)"])
@torch.no_grad()
def test_own_attention_runs_under_autocast_as_without_a_session(name: str) -> None:
    model = build(next(family for family in FAMILIES if family.name == name))
    model.set_attn_implementation("eager")
    ids, artifact = token_ids(2, 60), tiny_artifact(model)
    mask = torch.ones(2, 60, dtype=torch.int64)
    mask[0, :20], mask[0, 30:34] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    own = model(**inputs).logits[mask.bool()]
    for options in (RuntimeConfig(min_tokens=10**9), RuntimeConfig(min_tokens=0, max_density=1.0)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = model(**inputs).logits[mask.bool()]
            with share_prefill(model, artifact, options):
                found = model(**inputs).logits[mask.bool()]
        assert found.dtype == expected.dtype
        rounding = (expected.float() - own).norm() / own.norm()
        assert (found.float() - own).norm() / own.norm() < 2 * rounding + 1e-3


@torch.no_grad()
def test_float64_is_left_alone_by_autocast() -> None:
    model, ids = tiny_llama().double(), token_ids(1, 120)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected: Any = model(input_ids=ids).logits
        with share_prefill(model, tiny_artifact(model), RuntimeConfig(min_tokens=10**9)):
            found = model(input_ids=ids).logits
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_a_model_prepared_by_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    model, ids = tiny_llama(), token_ids(1, 120)
    artifact = tiny_artifact(model, PLANNED)
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    expected = prepared(input_ids=ids).logits
    config = RuntimeConfig(min_tokens=0, max_density=1.0, gamma=1.0, slack=1.0)
    with share_prefill(prepared, artifact, config) as session:
        found = prepared(input_ids=ids).logits
    assert session.report().prefills == 1
    assert (found - expected).norm() < 0.05 * expected.norm()
