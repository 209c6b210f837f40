from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from shareprefill.runtime.masks import FactMask, MaskFacts, Sequence, bool_mask, mask_facts

CPU = torch.device("cpu")


def allowed(facts: MaskFacts, batch: int, n_query: int, n_key: int) -> torch.Tensor:
    """What may be read, pair by pair."""
    mask = torch.zeros(batch, n_query, n_key, dtype=torch.bool)
    for b in range(batch):
        for q in range(n_query):
            for k in range(n_key):
                at, key = q + facts.q_offset, k + facts.kv_offset
                seen = key <= at
                if facts.window is not None:
                    seen &= key > at - facts.window
                if facts.padding is not None:
                    seen &= key < facts.padding.shape[1] and bool(facts.padding[b, key])
                if facts.packed is not None:
                    seen &= bool(facts.packed[b, q] == facts.packed[b, k])
                mask[b, q, k] = seen
    return mask


def some_facts() -> tuple[MaskFacts, int, int, int]:
    """Facts of a random prefill, its batch, its query rows and its keys."""
    batch, n_query, past = random.randint(1, 3), random.randint(2, 9), random.randint(0, 6)
    window = random.choice([None, None, random.randint(1, 8)])
    kind = random.choice(["plain", "left", "right", "holes", "packed"])
    tail = random.choice([0, 0, 3])
    if kind == "packed":
        packed = (torch.rand(batch, n_query) < 0.3).int().cumsum(-1)
        return MaskFacts(0, 0, None, window, packed), batch, n_query, n_query
    padding = None
    if kind != "plain":
        padding = torch.ones(batch, past + n_query, dtype=torch.bool)
        for row in padding:
            cut = random.randint(0, past + n_query - 1)
            if kind == "left":
                row[:cut] = False
            elif kind == "right":
                row[len(row) - cut :] = False
            else:
                row[torch.rand(len(row)) < 0.3] = False
    kv_offset = random.randint(0, past) if window is not None else 0
    facts = MaskFacts(past, kv_offset, padding, window)
    return facts, batch, n_query, past + n_query - kv_offset + tail


@pytest.mark.parametrize("number", range(60))
def test_masks_and_sequences_say_what_pairs_say(number: int) -> None:
    random.seed(number)
    facts, batch, n_query, n_key = some_facts()
    expected = allowed(facts, batch, n_query, n_key)
    mask = bool_mask(facts, batch, slice(0, n_query), slice(0, n_key), CPU)[:, 0]
    some = expected.any(-1)
    assert torch.equal(mask[some], expected[some])
    # A row that may read nothing is padding, and reads what there is instead of being NaN.
    assert mask[~some].all()
    sequences = facts.sequences(batch, n_query)
    if sequences is None:
        assert facts.padding is not None
        return
    covered = torch.zeros_like(expected)
    for s in sequences:
        rows, keys = s.query.stop - s.query.start, s.key.stop - s.key.start
        causal = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
        if facts.window is not None:
            causal &= causal.triu(keys - rows - facts.window + 1)
        assert not covered[s.row, s.query].any()
        covered[s.row, s.query, s.key] = causal
    real = torch.ones(batch, n_query, dtype=torch.bool)
    if facts.padding is not None:
        real = facts.padding[:, facts.q_offset : facts.q_offset + n_query]
    assert torch.equal(covered[real], expected[real])
    assert len({s.place for s in sequences}) == len(sequences)


def test_sequences_are_read_once_for_all_layers() -> None:
    padding = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])
    facts = MaskFacts(0, 0, padding, None)
    found = facts.sequences(2, 4)
    assert found == [Sequence(0, slice(1, 4), slice(1, 4)), Sequence(1, slice(0, 2), slice(0, 2))]
    assert facts.sequences(2, 4) is found
    bounds = torch.tensor([0, 3, 4])
    plain = MaskFacts(0, 0, None, None)
    assert plain.divided(bounds, bounds, 4) is plain.divided(bounds, None, 4)


def test_a_static_caches_offset_is_read() -> None:
    options: dict[str, Any] = {"batch_size": 1, "q_length": 4, "kv_length": 20}
    mask = mask_facts(**options, q_offset=torch.tensor(7))
    assert isinstance(mask, FactMask)
    assert (mask.facts.q_offset, mask.shape) == (7, (1, 1, 4, 20))
    one = {**options, "q_length": 1, "allow_is_causal_skip": False}
    decode = mask_facts(**one, q_offset=torch.tensor(7))
    assert decode is not None
    assert not isinstance(decode, FactMask)
    assert decode[0, 0, 0].tolist() == [True] * 8 + [False] * 12


def window_masks() -> tuple[MaskFacts, torch.Tensor, torch.Tensor]:
    """A window over cached keys in a batch with padding: facts, and transformers' two masks."""
    from transformers.masking_utils import (
        eager_mask,
        sdpa_mask,
        sliding_window_causal_mask_function,
    )

    padding = torch.ones(2, 8, dtype=torch.bool)
    padding[1, :3] = False
    arguments: dict[str, Any] = {
        "batch_size": 2,
        "q_length": 5,
        "kv_length": 8,
        "q_offset": 3,
        "mask_function": sliding_window_causal_mask_function(4),
        "attention_mask": padding,
        "local_size": 4,
        "allow_is_causal_skip": False,
    }
    own = sdpa_mask(**arguments)
    assert own is not None
    return MaskFacts(3, 0, padding, 4), own, eager_mask(**arguments)


def unaware(mask: torch.Tensor) -> torch.Tensor:
    """What goes past Python's part of torch."""
    with torch._C.DisableTorchFunctionSubclass():
        return torch.clone(mask)


OPERATIONS: dict[str, Callable[[torch.Tensor], Any]] = {
    "repeat": lambda m: m.repeat(1, 4, 1, 1),
    "expand": lambda m: m.expand(2, 3, 5, 8),
    "repeat_interleave": lambda m: m.repeat_interleave(2, 1),
    "cat": lambda m: torch.cat([m, torch.ones_like(m)], -1),
    "cat later": lambda m: torch.cat([torch.zeros(2, 1, 5, 1, dtype=m.dtype), m], -1),
    "stack": lambda m: torch.stack([m, m]),
    "pad": lambda m: F.pad(m, (0, 2), value=0),
    "and": lambda m: m.bool() & torch.ones(5, 8).tril().bool(),
    "or": lambda m: m.bool() | m.bool(),
    "not": lambda m: ~m.bool(),
    "logical_not": torch.logical_not,
    "add": lambda m: 1.0 + m,
    "multiply": lambda m: m * 2.0,
    "inverted": lambda m: (1.0 - m.float()) * -1e4,
    "where": lambda m: torch.where(m.bool(), 1.0, -1.0),
    "masked_fill": lambda m: m.masked_fill(torch.ones(5, 8).triu().bool(), 0),
    "masked_fill of scores": lambda m: torch.zeros(2, 1, 5, 8).masked_fill(m.bool(), 3.0),
    "index of scores": lambda m: torch.zeros(2, 1, 5, 8)[m.bool()],
    "equal": lambda m: m == 0,
    "list": lambda m: m.tolist(),
    "array": lambda m: m.numpy(),
    "asarray": np.asarray,
    "item": lambda m: m[1, 0, 0, 7].item(),
    "truth": lambda m: bool(m[1, 0, 0, 7]),
    "iteration": list,
    "text": str,
    "contains": lambda m: 0 in m,
    "integer index": lambda m: m[0],
    "added dimension": lambda m: m[:, None],
    "ellipsis": lambda m: m[..., -1],
    "steps": lambda m: m[:, :, ::2],
    "index of rows": lambda m: m[torch.tensor([1, 0])],
    "batch": lambda m: m[1:],
    "last rows": lambda m: m[:, :, -2:] + 0,
    "columns from 1": lambda m: m[:, :, :, 1:] + 0,
    "columns from 4": lambda m: m[..., 4:] + 0,
    "columns to 6": lambda m: m[..., :6] + 0,
    "half": lambda m: m.to(torch.float16),
    "type": lambda m: m.type(torch.int32),
    "reshape": lambda m: m.reshape(2, -1),
    "transpose": lambda m: m.transpose(2, 3),
    "permute": lambda m: m.permute(0, 2, 3, 1),
    "squeeze": lambda m: m.squeeze(1),
    "unfold": lambda m: m.unfold(-1, 2, 1),
    "split": lambda m: m.split(3, -1),
    "sum": lambda m: m.sum(-1),
    "einsum": lambda m: torch.einsum("bhqk->bhkq", m.float()),
    "clone": lambda m: m.clone() + 0,
    "detach": lambda m: m.detach(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),  # noqa: S301
    "dlpack": lambda m: torch.from_dlpack(m.float()),
    "vmap": lambda m: torch.vmap(lambda row: row.float() + 1)(m),
    "out": lambda m: torch.logical_not(m, out=torch.empty(2, 1, 5, 8)),
    "past torch_function": unaware,
    "sdpa": lambda m: F.scaled_dot_product_attention(
        torch.ones(2, 1, 5, 4), torch.ones(2, 1, 8, 4), torch.eye(8).expand(2, 1, 8, 8), attn_mask=m
    ),
}


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_get_the_mask_that_transformers_would_have_given(
    name: str, inference: bool, dtype: torch.dtype
) -> None:
    facts, own, added = window_masks()
    with torch.inference_mode(inference):
        mask = FactMask.make((2, 1, 5, 8), CPU, facts, dtype)
        expected = OPERATIONS[name]((own if dtype == torch.bool else added).clone())
        found = OPERATIONS[name](mask)
    assert not isinstance(found, FactMask)
    if isinstance(expected, list | tuple) and isinstance(expected[0], torch.Tensor):
        assert all(map(torch.equal, found, expected))
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, equal_nan=True)
    else:
        assert np.array_equal(found, expected)


CHANGES: dict[str, Callable[[torch.Tensor], Any]] = {
    "masked_fill_": lambda m: m.masked_fill_(torch.ones(5, 8).triu().bool(), -1.0),
    "item": lambda m: m.__setitem__((0, 0, 0, 0), -1.0),
    "augmented": lambda m: m.__iadd__(-1.0),
    "through a view": lambda m: m[0].zero_(),
    "through a view of a view": lambda m: m.unsqueeze(0).flatten().zero_(),
    "through data": lambda m: m.data.zero_(),
    "through numpy": lambda m: m.numpy().fill(0),
    "out": lambda m: torch.add(torch.ones(2, 1, 5, 8), 1, out=m),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_what_is_written_into_a_mask_counts_from_then_on(name: str, inference: bool) -> None:
    facts, _, expected = window_masks()
    with torch.inference_mode(inference):
        mask = FactMask.make((2, 1, 5, 8), CPU, facts, torch.float32)
        CHANGES[name](mask)
        CHANGES[name](expected)
        assert mask.is_changed
        found = mask.of_call(2, 5, 8)
    assert isinstance(found, torch.Tensor)
    assert not isinstance(found, FactMask)
    assert torch.equal(found, expected)


def test_a_mask_that_is_handed_on_keeps_its_facts() -> None:
    facts, own, _ = window_masks()
    mask = FactMask.make((2, 1, 5, 8), CPU, facts)
    for same in (mask[:, :, :, :8], mask[...], mask.contiguous(), mask.to("cpu"), mask.bool()):
        assert same is mask
    for copied in (mask.clone(), mask.to("meta"), mask[:, :, :, :], mask.to(torch.bool)):
        assert isinstance(copied, FactMask)
        assert copied.facts is facts
    last = mask[:, :, 2:, 1:]
    assert isinstance(last, FactMask)
    assert (last.shape, last.facts.q_offset, last.facts.kv_offset) == ((2, 1, 3, 7), 5, 1)
    assert torch.equal(last.materialised(), own[:, :, 2:, 1:])
    # Cut so far that plainly causal attention would be another.
    assert not isinstance(mask[..., :7], FactMask)
    assert not isinstance(mask[..., 4:], FactMask)
