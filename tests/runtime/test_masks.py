from __future__ import annotations

import random
from typing import Any

import pytest
import torch

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
