from __future__ import annotations

from typing import Any

import pytest
import torch

from shareprefill.config import RuntimeConfig
from shareprefill.runtime.core import SparsePrefill
from shareprefill.runtime.plan import make_plan
from shareprefill.runtime.records import LayerRecord, map_tensors, on_host
from tests.support.plans import D, M, P, R, S, V
from tests.support.tiny import tiny_artifact, tiny_llama

FIELDS = ("policies", "blocks", "covered", "distances", "work")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama()


def records(model: Any, config: RuntimeConfig) -> list[LayerRecord]:
    """Records of three layers, of two prefills of different lengths."""
    plan = make_plan(tiny_artifact(model, [[P, S, S, V], [R, S, M, D], [D] * 4]), config)
    prefill = SparsePrefill(plan)
    found = []
    for tokens in (120, 200):
        state = prefill.begin(plan.geometry(tokens, tokens, torch.device("cpu")))
        for layer in range(3):
            query, key = torch.randn(4, tokens, 16), torch.randn(2, tokens, 16)
            _, record = prefill.attend(
                layer, state, query, key, key, scale=0.25, measure_recall=True
            )
            found.append(record)
    return found


def configs() -> list[RuntimeConfig]:
    """Checks that pass, that fail, and the online rule."""
    return [
        RuntimeConfig(slack=1.0, gamma=0.6, max_density=1.0),
        RuntimeConfig(slack=-1.0, gamma=0.6, max_density=0.8),
        RuntimeConfig(policy="shareprefill", delta=0.9, max_density=1.0),
    ]


@pytest.mark.parametrize("config", configs())
def test_records_say_the_same_on_the_host(model: Any, config: RuntimeConfig) -> None:
    found = records(model, config)
    moved = on_host(found)
    assert [(r.layer, r.causal) for r in moved] == [(r.layer, r.causal) for r in found]
    for record, known in zip(moved, found, strict=True):
        for name in FIELDS:
            torch.testing.assert_close(
                getattr(record, name), getattr(known, name), rtol=0, atol=0, equal_nan=True
            )
        assert record.recall is not None
        assert known.recall is not None
        assert torch.equal(record.recall, known.recall)
    assert len({tuple(r.policies.tolist()) for r in moved}) > 1


@pytest.mark.parametrize("config", configs())
def test_records_keep_only_small_tensors(model: Any, config: RuntimeConfig) -> None:
    """A long session has many: nothing of a map's or a list's size stays with one."""
    found = records(model, config)
    sizes = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return tensor

    for record in found:
        map_tensors(record, keep)
    # Less than two numbers for each head that may choose, and for each candidate.
    assert max(sizes) <= 4 + 2 * 4
