from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.check_trust import (
    PASSAGE,
    TURNS,
    follows,
    forced,
    long_value,
    pairs,
    prefix,
    quotation,
    switch,
    tool_prompt,
    turns,
)
from shareprefill import share_prefill
from shareprefill.artifact import Policy
from shareprefill.config import RuntimeConfig
from shareprefill.models import load_model, load_tokenizer
from shareprefill.runtime.generation import encode_prompt, generate
from shareprefill.runtime.session import Session
from tests.support.tiny import tiny_artifact, tiny_llama, token_ids

ARTIFACT = Path(__file__).parents[2] / "artifacts" / "sp-tiny.st"
PLANNED = [[Policy.PIVOT, Policy.SHARE, Policy.SAMPLED, Policy.VERTICAL_SLASH]] * 3


def session(**options: Any) -> Session:
    model = tiny_llama()
    config = RuntimeConfig(min_tokens=0, max_density=1.0, **options)
    return share_prefill(model, tiny_artifact(model, PLANNED), config)


def test_ten_turns_over_a_growing_cache_are_the_conversation_at_once() -> None:
    found = turns(session(gamma=1.0, slack=1.0), token_ids(400))
    assert [len(errors) for errors in found.values()] == [TURNS] * 3
    assert max(found["dense"] + found["grown"] + found["once"]) < 1e-4


def test_turns_with_sparse_patterns_differ_from_dense_ones() -> None:
    found = turns(session(gamma=0.5), token_ids(400))
    assert max(found["dense"]) < 1e-4
    assert min(max(found["grown"]), max(found["once"])) > 1e-3


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_requests_that_share_a_prefix_are_what_each_is_alone(gamma: float) -> None:
    assert all(prefix(session(gamma=gamma), token_ids(400)).values())


def test_a_cache_that_one_request_changed_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = session(gamma=1.0)
    shared = SimpleNamespace(deepcopy=lambda cache: cache)
    monkeypatch.setattr("benchmarks.check_trust.copy", shared)
    assert not all(prefix(ours, token_ids(400)).values())


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_a_dense_call_is_the_models_own(gamma: float) -> None:
    found = switch(session(gamma=gamma, slack=1.0), token_ids(400))
    assert found.pop("sparse differs") or gamma == 1.0
    assert all(found.values())


class Words:
    """A tokenizer that takes every three characters for a token."""

    chat_template = None

    def __call__(self, text: str, **_: Any) -> Any:
        return SimpleNamespace(input_ids=[text[i : i + 3] for i in range(0, len(text), 3)])

    def decode(self, ids: list[str]) -> str:
        return "".join(ids)


@pytest.mark.parametrize("make", [quotation, long_value])
def test_passages_stand_at_their_depth(make: Any) -> None:
    for depth in (0.0, 0.5, 1.0):
        prompt, passage = make(1500, Words(), depth=depth)
        assert len(prompt) == pytest.approx(4500, rel=0.1)
        assert PASSAGE - 1 < len(passage) / 3 < PASSAGE + 20
        assert prompt.count(passage) == 1
        before = prompt.index(passage) / (len(prompt) - len(passage))
        assert before == pytest.approx(depth, abs=0.1)


def test_a_call_follows_the_schema_that_stands_first() -> None:
    prompt, schema = tool_prompt(1500, Words())
    assert prompt.index(schema["name"]) < 300
    assert prompt.count(schema["name"]) == 1
    call = {"name": schema["name"], "arguments": dict.fromkeys(schema["arguments"], "x")}
    assert follows(json.dumps(call) + " and more", schema)
    for wrong in ({**call, "name": "other"}, {**call, "arguments": {}}, {"name": 3}, [call], 7):
        assert not follows(json.dumps(wrong), schema)
    assert not follows(json.dumps(call)[:-1], schema)


def test_sp_tiny_quotes_as_its_dense_self_does() -> None:
    """A part of what docs/trust.md says; the whole takes a minute."""
    model, tokenizer = load_model("sp-tiny", device="cpu"), load_tokenizer("sp-tiny")
    ours = share_prefill(model, ARTIFACT, RuntimeConfig(min_tokens=0))
    prompt, value = pairs(1024, tokenizer, depth=0.5, tokens=40)
    expected, (dense, sparse) = forced(ours, tokenizer, prompt, value)
    assert dense == sparse == expected
    assert ours.report().density < 0.8
    ids = encode_prompt(model, tokenizer, prompt)
    answer = generate(model, tokenizer, ids, max_new_tokens=len(expected)).text
    assert answer == value
