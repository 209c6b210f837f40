from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.check_trust import TURNS, pairs, prefix, turns
from shareprefill import share_prefill
from shareprefill.artifact import Policy
from shareprefill.config import RuntimeConfig
from shareprefill.runtime.session import Session
from tests.support.tiny import tiny_artifact, tiny_llama, token_ids

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


def test_the_pair_that_is_asked_for_stands_at_its_depth() -> None:
    class Words:
        def __call__(self, text: str) -> Any:
            return type("", (), {"input_ids": torch.arange(len(text) // 3)})

    for depth in (0.0, 0.5, 1.0):
        prompt, value = pairs(3000, Words(), depth=depth)
        place = (prompt.index(value) - 90) / (len(prompt) - len(value) - 250)
        assert place == pytest.approx(depth, abs=0.05)
