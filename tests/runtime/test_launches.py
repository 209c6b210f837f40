"""How many device operations a planned layer takes: bookkeeping on the device shows here."""

from __future__ import annotations

import pytest
import torch

from shareprefill.artifact import Policy
from shareprefill.runtime.core import SequenceState, SparsePrefill
from shareprefill.runtime.plan import HeadPlan, RuntimePlan
from tests.support.launches import counted_launches
from tests.support.plans import D, M, P, R, S, V, layer_plan

BLOCK = 16


def plan_of(
    policies: tuple[Policy, ...], *, fallback: Policy, guarded: bool, block_size: int = BLOCK
) -> RuntimePlan:
    heads = tuple(
        HeadPlan(
            head=head,
            policy=policy,
            pivot=policies.index(P) if policy in (P, S) else -1,
            fallback=fallback if policy is S else policy,
            gamma=0.7,
            fallback_gamma=0.7,
            coverage_slack=0.05,
            cluster=0,
        )
        for head, policy in enumerate(policies)
    )
    return layer_plan(heads, block_size, slash_needs_sparsity=guarded)


@pytest.mark.parametrize(
    ("policies", "fallback", "guarded", "most"),
    [
        ((P, S, S, S, S, M, M, D), M, True, 10),
        ((P, S, S, S, V, V, R, M), M, False, 13),
        ((P, S, S, S, V, V, R, M), V, True, 13),
        ((M,) * 8, M, True, 6),
        ((R,) * 8, R, True, 6),
        ((V,) * 8, V, False, 5),
    ],
)
def test_a_planned_layer_takes_few_launches(
    policies: tuple[Policy, ...],
    fallback: Policy,
    guarded: bool,
    most: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = plan_of(policies, fallback=fallback, guarded=guarded)
    prefill = SparsePrefill(plan)
    # As in a long prompt, the check looks at some of the query blocks.
    monkeypatch.setattr("shareprefill.runtime.geometry.CHECKED_BLOCKS", 3)
    geometry = plan.geometry(80, 80, torch.device("cpu"))
    query, key, value = torch.randn(8, 80, 16), torch.randn(2, 80, 16), torch.randn(2, 80, 16)

    def run(state: SequenceState) -> None:
        # Capped, as a CPU lets SDPA compute dense heads of plain logits.
        prefill.attend(0, state, query, key, value, scale=0.25, softcap=30.0)

    # Tables are made in the first pass, though only kernels look at them.
    monkeypatch.setattr("shareprefill.runtime.policies.sampled.table_height", lambda _query: 64)
    # The second pass of a length finds what the first one has made.
    run(prefill.begin(geometry))
    state = prefill.begin(geometry)
    with counted_launches() as found:
        run(state)
    assert found["count_kernel"] == found["block_sparse_kernel"] == 1
    assert found.total() <= most, found.most_common()
