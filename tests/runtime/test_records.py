from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from shareprefill.config import RuntimeConfig
from shareprefill.runtime.core import SparsePrefill
from shareprefill.runtime.plan import make_plan
from shareprefill.runtime.records import LayerRecord, maker, map_tensors, on_host
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


def tensors_of(record: LayerRecord) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    map_tensors(record, lambda tensor: found.append(tensor) or tensor)
    return found


@pytest.mark.parametrize("config", configs())
def test_records_are_made_of_other_tensors(model: Any, config: RuntimeConfig) -> None:
    for record in records(model, config):
        own = tensors_of(record)
        changed = [tensor for tensor in own if tensor.dtype.is_floating_point]
        numbers = {id(tensor): number for number, tensor in enumerate(changed)}

        def of_tensor(tensor: torch.Tensor, numbers: dict[int, int] = numbers) -> Any:
            number = numbers.get(id(tensor))
            return None if number is None else lambda source: source[number]

        make = maker(record, of_tensor)
        assert make is not None
        assert maker(record, lambda _: None) is None
        others = [tensor + 1 for tensor in changed]
        replaced = dict(zip(numbers, others, strict=True))
        wanted = map_tensors(record, lambda t, replaced=replaced: replaced.get(id(t), t))
        found = make(others)
        assert type(found) is LayerRecord
        assert (found.layer, found.causal) == (record.layer, record.causal)
        pairs = list(zip(tensors_of(found), tensors_of(wanted), strict=True))
        assert all(left is right for left, right in pairs)
        for name in FIELDS:
            torch.testing.assert_close(
                getattr(found, name), getattr(wanted, name), rtol=0, atol=0, equal_nan=True
            )


def test_what_makes_records_holds_no_tensor_that_is_made(model: Any) -> None:
    record = records(model, configs()[0])[0]
    held = [weakref.ref(tensor) for tensor in tensors_of(record)]
    make = maker(record, lambda tensor: lambda _, shape=tensor.shape: torch.zeros(shape))
    del record
    gc.collect()
    assert make is not None
    assert [ref() for ref in held if ref() is not None] == []
