"""What calls depend on, and how much of it is kept."""

from __future__ import annotations

import torch

from shareprefill.runtime.ops.inputs import facts
from shareprefill.runtime.ops.pages import PagedTokens
from shareprefill.runtime.ops.prepared import Prepared


def test_facts_tell_apart_what_a_launch_depends_on() -> None:
    tensor = torch.zeros(8, 8)
    others = [tensor[:4], tensor.t(), tensor.double(), tensor.view(-1)[1:33].view(4, 8), None]
    found = [facts(tensor), *map(facts, others)]
    assert len(set(found)) == len(found)
    assert facts(tensor) == facts(torch.ones(8, 8))


def test_few_kinds_of_calls_are_kept() -> None:
    calls = Prepared[int]()
    for kind in range(5000):
        assert calls.keep(kind, kind) == kind
    assert len(calls) < 5000
    assert calls[4999] == 4999


def test_facts_of_pages_are_of_pool_and_table() -> None:
    pool, table = torch.zeros(6, 2, 16, 8), torch.tensor([3, 1, 2])
    tokens = PagedTokens(pool, table, 40)
    assert facts(tokens) == facts(PagedTokens(torch.ones(6, 2, 16, 8), table + 1, 40))
    for other in (
        PagedTokens(pool, table, 41),
        PagedTokens(pool, table.int(), 40),
        PagedTokens(pool.transpose(1, 2).contiguous().transpose(1, 2), table, 40),
    ):
        assert facts(other) != facts(tokens)
