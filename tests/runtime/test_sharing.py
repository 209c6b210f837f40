from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from shareprefill.artifact import Policy, Thresholds
from shareprefill.config import RuntimeConfig
from shareprefill.errors import DataError
from shareprefill.policy_names import reads
from shareprefill.runtime import core
from shareprefill.runtime.core import LayerChoice, SequenceState, SparsePrefill
from shareprefill.runtime.ops.block_selection import select_blocks
from shareprefill.runtime.ops.block_sparse_attention import block_sparse_attention
from shareprefill.runtime.ops.blocks import BlockLists, always_blocks, causal_blocks
from shareprefill.runtime.ops.pooled_attention import pooled_attention, sample_rows
from shareprefill.runtime.plan import RuntimePlan, make_plan, what_is_read
from shareprefill.runtime.policies.base import LayerInputs
from shareprefill.runtime.policies.smoothed import Smoothed
from shareprefill.runtime.records import LayerRecord
from shareprefill.testing import LargestTensor
from tests.support.maps import recall, smooth
from tests.support.plans import D, M, P, R, S, V
from tests.support.tiny import BLOCK, tiny_artifact, tiny_llama


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama()


def tensors(n_query: int, n_key: int) -> dict[str, torch.Tensor]:
    """Attention inputs with structure: keys of a few blocks attract every query."""
    query, key, value = (
        torch.randn(4, n_query, 16),
        torch.randn(2, n_key, 16),
        torch.randn(2, n_key, 16),
    )
    query[..., 0] += 4
    key[:, BLOCK : BLOCK + 4, 0] += 4
    return {"query": query, "key": key, "value": value}


def run(
    model: Any,
    policies: list[list[Policy]],
    inputs: dict[str, torch.Tensor],
    config: RuntimeConfig | None = None,
    state: SequenceState | None = None,
    layer: int = 0,
    **changes: Any,
):
    config, artifact = config or RuntimeConfig(), tiny_artifact(model, policies, **changes)
    if config.max_density is None and reads(config.policy, "max_density"):
        config = replace(config, max_density=1.0)
    plan = make_plan(artifact, what_is_read(artifact, config))
    if state is None:
        state = state_of(plan, inputs)
    return layer_of(plan, layer, state, inputs)


def layer_of(
    plan: RuntimePlan, layer: int, state: SequenceState, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, LayerRecord, LayerChoice]:
    """One layer's output, record and choice."""
    choices = []

    class Observed(SparsePrefill):
        def choose(self, *args: Any) -> LayerChoice:
            choices.append(super().choose(*args))
            return choices[-1]

    out, record = Observed(plan).attend(layer, state, **inputs, scale=0.25, measure_recall=True)
    return out, record, choices[0]


def state_of(plan: RuntimePlan, inputs: dict[str, torch.Tensor]) -> SequenceState:
    sizes = (inputs["query"].shape[1], inputs["key"].shape[1])
    return SparsePrefill(plan).begin(plan.geometry(*sizes, torch.device("cpu")))


def kept(choice: LayerChoice, head: int) -> torch.Tensor:
    """The pattern that a head has read."""
    assert choice.head_to_pattern[head] >= 0
    return choice.selection.patterns[choice.head_to_pattern[head]]


def dense(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    query, key, value = inputs["query"], inputs["key"], inputs["value"]
    mask = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool).tril(
        key.shape[1] - query.shape[1]
    )
    return F.scaled_dot_product_attention(
        query[None], key[None], value[None], attn_mask=mask, scale=0.25, enable_gqa=True
    )[0]


@pytest.mark.parametrize(("n_query", "n_key"), [(130, 130), (64, 64), (50, 133), (16, 200)])
@pytest.mark.parametrize("row", [[D] * 4, [P, S, S, S], [R] * 4, [V] * 4, [P, S, M, V]])
def test_everything_selected_is_dense_attention(
    model: Any, row: list[Policy], n_query: int, n_key: int
) -> None:
    inputs = tensors(n_query, n_key)
    config = RuntimeConfig(gamma=1.0, slack=1.0, delta=0.0, max_density=1.0)
    out, record, _ = run(model, [row, [D] * 4, [D] * 4], inputs, config)
    torch.testing.assert_close(out, dense(inputs), rtol=1e-4, atol=1e-5)
    assert record.policies.tolist() == row
    assert record.recall is not None
    assert record.recall.min() > 0.999


def test_a_sharing_head_computes_with_its_pivots_pattern(model: Any) -> None:
    inputs = tensors(200, 200)
    config = RuntimeConfig(slack=1.0, gamma=0.8)
    out, record, choice = run(model, [[S, P, S, D], [D] * 4, [D] * 4], inputs, config)
    # The pivot comes second, and the head before it in its layer shares too.
    assert record.policies.tolist() == [S, P, S, D]
    assert torch.equal(kept(choice, 0), kept(choice, 2))
    _, exact = pooled_attention(
        inputs["query"], inputs["key"], block_size=BLOCK, scale=0.25, impl="reference"
    )
    pattern = kept(choice, 0)
    lists = BlockLists.from_bitmap(pattern[None], torch.zeros(4).int(), BLOCK)
    expected = block_sparse_attention(**inputs, lists=lists, scale=0.25, impl="reference")
    torch.testing.assert_close(out[:3], expected[:3], rtol=1e-4, atol=1e-5)
    assert record.recall is not None
    inside = (exact * pattern).sum(-1).mean(-1)
    torch.testing.assert_close(record.recall[[0, 2]], inside[[0, 2]], rtol=1e-4, atol=1e-4)
    assert record.blocks.tolist() == [int(pattern.sum())] * 3 + [record.causal]


def head_pattern_of(maps: torch.Tensor, gamma: float) -> torch.Tensor:
    """The fewest blocks of a whole map `[n_q, n_k]` that hold gamma of its mass, by sorting."""
    values, order = maps.double().flatten().sort(descending=True)
    count = int((values.cumsum(0) < gamma * values.sum()).sum()) + 1
    pattern = torch.zeros(maps.numel(), dtype=torch.bool)
    pattern[order[:count]] = True
    n_q, n_k = maps.shape
    size = (n_q * BLOCK, n_k * BLOCK)
    always = always_blocks(size[0], size[1] - size[0], BLOCK, sink_blocks=1, local_blocks=2)
    return (pattern.view_as(maps) | always) & causal_blocks(n_q * BLOCK, (n_k - n_q) * BLOCK, BLOCK)


def test_a_pivot_of_all_rows_gives_its_exact_pattern_and_dense_output(model: Any) -> None:
    inputs = tensors(150, 150)
    config = RuntimeConfig(pivot_rows=0, slack=1.0, gamma=0.8)
    out, record, choice = run(model, [[P, S, D, D], [D] * 4, [D] * 4], inputs, config)
    torch.testing.assert_close(out[0], dense(inputs)[0], rtol=1e-4, atol=1e-5)
    assert record.blocks[0] == record.causal
    _, exact = pooled_attention(
        inputs["query"], inputs["key"], block_size=BLOCK, scale=0.25, impl="reference"
    )
    assert torch.equal(kept(choice, 1), head_pattern_of(exact[0], 0.8))


@pytest.mark.parametrize("rows", [2, 4])
def test_a_sampled_pivot_gives_the_smoothed_pattern(model: Any, rows: int) -> None:
    inputs = tensors(208, 208)
    config = RuntimeConfig(slack=1.0, gamma=0.7, pivot_rows=rows)
    _, record, choice = run(model, [[P, S, M, D], [D] * 4, [D] * 4], inputs, config)
    _, maps = pooled_attention(
        inputs["query"],
        inputs["key"],
        rows=sample_rows(208, BLOCK, rows),
        block_size=BLOCK,
        scale=0.25,
        impl="reference",
    )
    expected = head_pattern_of(smooth(maps)[0], 0.7)
    assert torch.equal(kept(choice, 0), expected)
    assert torch.equal(kept(choice, 1), expected)
    work = torch.tensor([rows, 1, 2, 0]) / BLOCK / 2
    torch.testing.assert_close(record.work, work)


def test_a_pivot_of_two_rows_does_as_a_smoothed_head(model: Any) -> None:
    inputs = tensors(150, 150)
    inputs["query"][1] = inputs["query"][0]
    config = RuntimeConfig(gamma=0.7, pivot_rows=2)
    out, record, choice = run(model, [[P, M, S, D], [D] * 4, [D] * 4], inputs, config)
    assert torch.equal(kept(choice, 0), kept(choice, 1))
    torch.testing.assert_close(out[0], out[1])
    assert record.work[0] == record.work[1] > 0


@pytest.mark.parametrize("margin", [1e-4, -1e-4])
def test_a_head_shares_what_covers_enough_of_its_sampled_rows(model: Any, margin: float) -> None:
    inputs = tensors(150, 150)
    policies = [[P, S, D, D], [D] * 4, [D] * 4]
    gamma = torch.full((3, 4), 0.8)
    _, before, choice = run(model, policies, inputs, gamma=gamma, slack=torch.full((3, 4), 1.0))
    _, maps = pooled_attention(
        inputs["query"],
        inputs["key"],
        rows=sample_rows(150, BLOCK, 1),
        block_size=BLOCK,
        scale=0.25,
        impl="reference",
    )
    covered = recall(maps[1], kept(choice, 1)).item()
    assert before.covered[1].item() == pytest.approx(covered, abs=1e-5)
    # The head's own slack decides, to either side of what is covered.
    slack = torch.full((3, 4), 0.8 - covered + margin)
    _, record, _ = run(model, policies, inputs, gamma=gamma, slack=slack)
    assert record.policies[1] == (S if margin > 0 else M)


def test_a_head_that_covers_just_what_it_must_shares(model: Any) -> None:
    inputs, policies = tensors(150, 150), [[P, S, D, D], [D] * 4, [D] * 4]
    _, before, _ = run(model, policies, inputs, RuntimeConfig(gamma=0.8, slack=1.0))
    slack = 0.8 - before.covered[1].item()
    _, record, _ = run(model, policies, inputs, RuntimeConfig(gamma=0.8, slack=slack))
    assert record.policies[1] == S


def test_nothing_is_computed_for_a_fallback_that_is_not_taken(model: Any) -> None:
    """A head that passes is -1 to its fallback's policy, and its work is not booked."""
    inputs = tensors(150, 150)
    policies = [[P, S, S, M], [D] * 4, [D] * 4]
    slack = torch.tensor([[0.0, 1.0, -1.0, 0.0]] * 3)
    plan = make_plan(tiny_artifact(model, policies, slack=slack), RuntimeConfig(max_density=1.0))
    asked = []

    class Recorded(Smoothed):
        def write(self, inputs: LayerInputs, heads: torch.Tensor, *places: Any) -> torch.Tensor:
            asked.append(heads.tolist())
            return super().write(inputs, heads, *places)

    plan = replace(plan, selectors={int(M): Recorded()})
    _, record, _ = layer_of(plan, 0, state_of(plan, inputs), inputs)
    assert asked == [[-1, 2, 3]]
    assert record.policies.tolist() == [P, S, M, M]
    rows = torch.tensor([4 * 10, 10, 10 + 20, 20]) / 150 / 2
    torch.testing.assert_close(record.work, rows, rtol=0.02, atol=0)


def test_pivots_of_an_earlier_layer_are_shared(model: Any) -> None:
    inputs = tensors(150, 150)
    policies = [[P, D, D, D], [S, S, D, D], [D] * 4]
    config = RuntimeConfig(slack=1.0)
    state = state_of(make_plan(tiny_artifact(model, policies), config), inputs)
    _, _, first = run(model, policies, inputs, config, state, layer=0)
    _, record, second = run(model, policies, inputs, config, state, layer=1)
    assert record.policies.tolist() == [S, S, D, D]
    assert torch.equal(kept(second, 0), kept(first, 0))


def test_a_check_of_few_query_blocks_finds_planted_unlike_heads(model: Any) -> None:
    """Heads that attend elsewhere than their pivot, throughout or in the prompt's second half."""
    policies = [[P, S, S, S], [D] * 4, [D] * 4]
    length = 40 * BLOCK  # 40 query blocks, of which 16 are looked at

    def prompt(*, planted: bool) -> dict[str, torch.Tensor]:
        inputs = tensors(length, length)
        inputs["key"][..., :2] = 0
        for dim, block in ((0, 1), (1, 10)):
            inputs["key"][:, block * BLOCK : block * BLOCK + 4, dim] = 4
        inputs["query"][..., :2] = torch.tensor([12.0, 0.0])
        if planted:
            for head, start in ((2, 0), (3, length // 2)):
                inputs["query"][head, start:, :2] = torch.tensor([0.0, 12.0])
        return inputs

    def covered(inputs: dict[str, torch.Tensor], slack: torch.Tensor) -> LayerRecord:
        return run(model, policies, inputs, gamma=torch.full((3, 4), 0.9), slack=slack)[1]

    alike = [covered(prompt(planted=False), torch.ones(3, 4)).covered for _ in range(4)]
    slack = torch.ones(3, 4)
    slack[0, 1:] = 0.9 - torch.stack(alike)[:, 1:].min(0).values + 0.04
    for _ in range(4):
        record = covered(prompt(planted=True), slack)
        assert record.policies.tolist() == [P, S, M, M], (record.covered, slack)
        record = covered(prompt(planted=False), slack)
        assert record.policies.tolist() == [P, S, S, S], (record.covered, slack)
    # None of them has a fallback to pay for.
    torch.testing.assert_close(record.work[1:], torch.full((3,), 16 / length / 2))


def test_a_head_unlike_its_pivot_falls_back(model: Any) -> None:
    inputs = tensors(150, 150)
    policies = [[P, S, S, S], [D] * 4, [D] * 4]
    fallback = torch.tensor([[1, 3, 4, 5], [0] * 4, [0] * 4], dtype=torch.int8)
    _, record, choice = run(
        model, policies, inputs, RuntimeConfig(slack=-1.0, delta=0.0), fallback=fallback
    )
    assert record.policies.tolist() == [P, R, V, M]
    assert all(0 < c <= 1 for c in record.covered[1:])
    assert math.isnan(record.covered[0])
    assert record.distances.isnan().all()
    assert record.work[1] > record.work[2] > record.work[3] > 0
    config = RuntimeConfig(delta=0.0, gamma=0.9)
    _, _, own = run(model, [[D, R, V, M], [D] * 4, [D] * 4], inputs, config)
    assert all(torch.equal(kept(choice, head), kept(own, head)) for head in (1, 2, 3))


def test_a_head_unlike_its_pivot_may_fall_back_to_dense_attention(model: Any) -> None:
    inputs = tensors(150, 150)
    policies = [[P, S, S, D], [D] * 4, [D] * 4]
    fallback = torch.tensor([[1, 0, 3, 0], [0] * 4, [0] * 4], dtype=torch.int8)
    config = RuntimeConfig(slack=-1.0, gamma=0.8)
    plan = make_plan(
        tiny_artifact(model, policies, fallback=fallback), replace(config, max_density=1.0)
    )
    out, record, _ = layer_of(plan, 0, state_of(plan, inputs), inputs)
    assert record.policies.tolist() == [P, D, R, D]
    assert record.blocks[1] == record.causal
    torch.testing.assert_close(out[1], dense(inputs)[1], rtol=1e-4, atol=1e-5)
    assert out.isfinite().all()


def test_fallback_patterns_cover_their_own_mass(model: Any) -> None:
    inputs = tensors(150, 150)
    policies = [[P, S, S, D], [D] * 4, [D] * 4]
    low, high = torch.full((3, 4), 0.5), torch.full((3, 4), 0.99)
    config = RuntimeConfig(slack=-1.0)
    _, modest, _ = run(model, policies, inputs, config, gamma=low, fallback_gamma=low)
    _, generous, _ = run(model, policies, inputs, config, gamma=low, fallback_gamma=high)
    assert all(g > m for g, m in zip(generous.blocks[1:3], modest.blocks[1:3], strict=True))


def test_vertical_slash_is_for_highly_sparse_heads(model: Any) -> None:
    inputs = tensors(150, 150)
    policies = [[V] * 4, [D] * 4, [D] * 4]
    _, spread, _ = run(model, policies, inputs, RuntimeConfig(delta=1.0))
    _, sparse, _ = run(model, policies, inputs, RuntimeConfig(delta=0.0))
    assert spread.policies.tolist() == [R] * 4
    assert sparse.policies.tolist() == [V] * 4


@pytest.mark.parametrize(("name", "policy"), [("sampled", R), ("vertical-slash", V), ("dense", D)])
def test_one_policy_for_every_head(model: Any, name: str, policy: Policy) -> None:
    inputs = tensors(150, 150)
    # That heads are not highly sparse keeps none from one policy for all.
    thresholds = Thresholds(gamma=0.9, tau=0.2, delta=1.0)
    rows = [[P, S, V, R], [D] * 4, [D] * 4]
    _, record, _ = run(model, rows, inputs, RuntimeConfig(policy=name), thresholds=thresholds)
    assert record.policies.tolist() == [policy] * 4


def test_the_papers_rule(model: Any) -> None:
    """First head of a cluster: dense pivot; alike: share; unlike or sparse: vertical-slash."""
    inputs = tensors(150, 150)
    inputs["query"][1] = inputs["query"][0]
    inputs["query"][2] = inputs["query"][0]
    cluster = torch.tensor([[0, 0, 1, -1], [0] * 4, [0] * 4], dtype=torch.int32)
    policies = [[D] * 4] * 3
    config = RuntimeConfig(policy="shareprefill", tau=0.2, delta=0.8)
    out, record, choice = run(model, policies, inputs, config, cluster=cluster)
    assert record.policies.tolist() == [P, S, P, V]
    assert record.distances[1] < 0.2
    torch.testing.assert_close(out[0], dense(inputs)[0], rtol=1e-4, atol=1e-5)
    always = always_blocks(150, 0, BLOCK, sink_blocks=1, local_blocks=2)
    _, exact = pooled_attention(
        inputs["query"], inputs["key"], block_size=BLOCK, scale=0.25, impl="reference"
    )
    causal = causal_blocks(150, 0, BLOCK)
    expected = (
        select_blocks(exact[:1], torch.tensor([0.9]), n_query=150, n_key=150, block_size=BLOCK)[0]
        | always
    ) & causal
    assert torch.equal(kept(choice, 1), expected)
    _, unlike, _ = run(model, policies, inputs, replace(config, tau=0.0), cluster=cluster)
    assert unlike.policies.tolist() == [P, V, P, V]
    _, sparse, _ = run(model, policies, inputs, replace(config, delta=0.0), cluster=cluster)
    assert sparse.policies.tolist() == [V] * 4


def test_heads_denser_than_the_crossover_are_computed_densely(model: Any) -> None:
    inputs = tensors(320, 320)
    row = [P, S, R, V]
    config = RuntimeConfig(gamma=1.0, slack=1.0, delta=0.0, max_density=0.5)
    out, record, choice = run(model, [row, [D] * 4, [D] * 4], inputs, config)
    torch.testing.assert_close(out, dense(inputs), rtol=1e-4, atol=1e-5)
    assert record.policies.tolist() == [P, D, D, D]
    assert record.blocks.tolist() == [record.causal] * 4
    assert choice.head_to_pattern.tolist() == [-1] * 4
    _, sparse, _ = run(model, [row, [D] * 4, [D] * 4], inputs, replace(config, gamma=0.1))
    assert sparse.policies.tolist() == row
    assert sparse.blocks.max() < record.causal


@pytest.mark.parametrize("row", [[P, D, S, D], [P, D, V, S]])
@pytest.mark.parametrize("pivot_rows", [0, 2])
def test_dense_heads_may_read_every_block_in_the_others_launch(
    model: Any, row: list[Policy], pivot_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = tensors(100, 170)
    config = RuntimeConfig(pivot_rows=pivot_rows)
    usual, wanted, _ = run(model, [row] * 2, inputs, config)
    monkeypatch.setattr(core, "has_fast_kernel", lambda *_: True)
    monkeypatch.setattr(core, "_dense", None)
    found, record, _ = run(model, [row] * 2, inputs, config)
    torch.testing.assert_close(found, usual, rtol=1e-4, atol=1e-4)
    assert torch.equal(record.blocks, wanted.blocks)
    assert torch.equal(record.policies, wanted.policies)
    assert record.recall is not None
    assert wanted.recall is not None
    torch.testing.assert_close(record.recall, wanted.recall)


def test_a_layer_of_dense_heads_is_one_call_of_sdpa(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = tensors(130, 130)
    monkeypatch.setattr(core, "has_fast_kernel", lambda *_: True)
    monkeypatch.setattr(core, "block_sparse_attention", None)
    found, _, _ = run(model, [[D] * 4] * 2, inputs)
    torch.testing.assert_close(found, dense(inputs), rtol=1e-4, atol=1e-4)


def test_a_layer_of_dense_heads_may_be_one_launch_of_lists(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = tensors(130, 130)
    monkeypatch.setattr(core, "block_sparse_attention", None)
    monkeypatch.setattr("shareprefill.runtime.dense._is_faster_in_blocks", lambda *_: True)
    monkeypatch.setattr("shareprefill.runtime.dense.sdpa", None)
    found, _, _ = run(model, [[D] * 4] * 2, inputs)
    torch.testing.assert_close(found, dense(inputs), rtol=1e-4, atol=1e-4)
    assert found.transpose(0, 1).is_contiguous()


@pytest.mark.parametrize("row", [[P, S, R, V], [D] * 4])
def test_no_n_by_n_tensor_is_made(model: Any, row: list[Policy]) -> None:
    tokens = 3000
    inputs = tensors(tokens, tokens)
    artifact = tiny_artifact(model, [row, [D] * 4, [D] * 4], slack=torch.ones(3, 4))
    plan = make_plan(artifact, RuntimeConfig())
    with LargestTensor() as largest:
        SparsePrefill(plan).attend(0, state_of(plan, inputs), **inputs, scale=0.25)
    assert largest.elements < tokens**2 / 4


def test_options_go_before_the_artifact(model: Any) -> None:
    policies, thresholds = [[P, S, S, S]] * 3, Thresholds(gamma=0.7, tau=0.1, delta=0.4)
    artifact = tiny_artifact(model, policies, thresholds=thresholds)
    plan = make_plan(artifact, RuntimeConfig())
    assert (plan.delta, plan.pivot_rows) == (0.4, 4)
    assert plan.layers[0][0].gamma == pytest.approx(0.9)
    assert plan.layers[0][0].coverage_slack == pytest.approx(0.04)
    assert plan.layers[0][0].min_coverage == pytest.approx(0.86)
    plan = make_plan(artifact, RuntimeConfig(slack=0.5, gamma=0.6, pivot_rows=0))
    assert (plan.delta, plan.pivot_rows) == (0.4, 0)
    assert {(head.gamma, head.coverage_slack) for layer in plan.layers for head in layer} == {
        (0.6, 0.5)
    }
    plan = make_plan(artifact, RuntimeConfig(policy="sampled", gamma=0.6))
    assert {head.gamma for layer in plan.layers for head in layer} == {0.6}
    plan = make_plan(artifact, RuntimeConfig(policy="shareprefill"))
    assert plan.pivot_rows == 0
    assert (plan.layers[0][0].gamma, plan.tau) == (0.7, 0.1)
    assert make_plan(artifact, RuntimeConfig(policy="shareprefill", tau=0.5)).tau == 0.5


@pytest.mark.parametrize("name", ["query", "key"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("policy", ["auto", "shareprefill"])
def test_numbers_that_are_none_stay_with_their_head(
    model: Any, policy: str, bad: float, name: str
) -> None:
    """Head 0 is the pivot; what it cannot give, the heads that would share it choose themselves."""
    clean, inputs = tensors(150, 150), {}
    clean["query"][1:] = clean["query"][:1]
    inputs = {key: tensor.clone() for key, tensor in clean.items()}
    # The last row of a block is always sampled; KV head 0 serves the heads 0 and 1.
    row = 3 * BLOCK - 1
    inputs[name][0, row, 3] = bad
    policies = [[P, S, S, S], [D] * 4, [D] * 4]
    # Either check passes whatever it finds, so that only what is broken keeps a head from sharing.
    passing = {"tau": 0.9} if policy == "shareprefill" else {"slack": 1.0}
    config = RuntimeConfig.from_dict({"policy": policy, "delta": 0.9, "gamma": 0.8, **passing})
    out, record, choice = run(model, policies, inputs, config)
    _, before, _ = run(model, policies, clean, config)
    assert before.policies.tolist() == [P, S, S, S]
    if policy == "auto":
        assert S not in record.policies.tolist()
        assert record.covered.isnan().all()
        assert record.blocks[0] == record.causal
    assert out[2:].isfinite().all()
    recalls = record.recall
    assert recalls is not None
    assert recalls[2:].min() > 0.7
    if name == "query":
        expected = dense(clean)[0]
        rest = torch.arange(150) != row
        torch.testing.assert_close(out[0, rest], expected[rest], rtol=1e-4, atol=1e-5)
    assert choice.head_to_pattern.dtype == torch.int64


@pytest.mark.parametrize("pivot_rows", [0, 4])
def test_a_sharing_head_of_numbers_that_are_none_reads_everything(
    model: Any, pivot_rows: int
) -> None:
    inputs = tensors(150, 150)
    inputs["query"][1, 3 * BLOCK - 1, 3] = math.nan
    config = RuntimeConfig(slack=1.0, gamma=0.8, pivot_rows=pivot_rows)
    _, record, _ = run(model, [[P, S, S, S], [D] * 4, [D] * 4], inputs, config)
    assert record.policies.tolist() == [P, D, S, S]
    assert record.covered.isnan().tolist() == [True, True, False, False]
    assert record.blocks[1] == record.causal


@pytest.mark.parametrize("fallback", [R, V, M, "sampled", "vertical-slash", "smoothed", "flex"])
def test_heads_whose_own_choice_fails_for_want_of_numbers_read_everything(
    model: Any, fallback: Any
) -> None:
    """KV head 0 serves the heads 0 and 1; the others stay sparse."""
    inputs = tensors(320, 320)
    inputs["key"][0, 5, 3] = math.nan
    fallbacks = torch.zeros(3, 4, dtype=torch.int8)
    if isinstance(fallback, str):
        config = RuntimeConfig.from_dict({"policy": fallback, "gamma": 0.3})
    else:
        config = RuntimeConfig(slack=-1.0, delta=0.0, gamma=0.3)
        fallbacks[0] = torch.tensor([int(P), *[int(fallback)] * 3])
    policies = [[P, S, S, S], [D] * 4, [D] * 4]
    out, record, _ = run(model, policies, inputs, config, fallback=fallbacks)
    assert record.blocks[:2].tolist() == [record.causal] * 2
    assert record.blocks[2:].max() < record.causal
    # Of a forced policy all heads are alike; otherwise the first one is a pivot.
    assert record.policies[1] == D
    assert record.policies[0] == (D if isinstance(fallback, str) else P)
    assert out[2:].isfinite().all()


@pytest.mark.parametrize("with_sinks", [True, False])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_soft_capped_logits_and_sinks(model: Any, softcap: float | None, with_sinks: bool) -> None:
    inputs, sinks = tensors(150, 150), torch.randn(4) * 3 if with_sinks else None
    config = RuntimeConfig(gamma=1.0, slack=1.0, delta=0.0, max_density=1.0)
    plan = make_plan(tiny_artifact(model, [[P, S, V, D], [D] * 4, [D] * 4]), config)
    state = state_of(plan, inputs)
    options = {"scale": 0.25, "softcap": softcap, "sinks": sinks}
    out, _ = SparsePrefill(plan).attend(0, state, **inputs, **options)
    keys, values = (inputs[name].repeat_interleave(2, 0) for name in ("key", "value"))
    logits = inputs["query"] @ keys.mT * 0.25
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    logits = logits.masked_fill(~torch.ones(150, 150, dtype=torch.bool).tril(), -torch.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks[:, None, None].expand(-1, 150, 1)], -1)
    expected = logits.softmax(-1)[..., :150] @ values
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_numbers_that_are_none_can_be_an_error(model: Any) -> None:
    inputs = tensors(150, 150)
    inputs["value"][1, 7, 0] = math.inf
    policies = [[P, S, R, V], [D] * 4, [D] * 4]
    with pytest.raises(DataError, match=r"layer 0 .* value of heads \[1\]"):
        run(model, policies, inputs, RuntimeConfig(nonfinite="error"))
    run(model, policies, inputs, RuntimeConfig(nonfinite="dense"))


def test_what_pivots_gave_moves_along_to_another_device(model: Any) -> None:
    inputs = tensors(150, 150)
    online = RuntimeConfig(policy="shareprefill", delta=0.9)
    kept_by_rule = ((RuntimeConfig(), ["patterns", "is_finite"]), (online, ["maps", "elected"]))
    for config, names in kept_by_rule:
        plan = make_plan(tiny_artifact(model, [[P, S, S, S], [D] * 4, [D] * 4]), config)
        state = state_of(plan, inputs)
        layer_of(plan, 0, state, inputs)
        given = state.pivots
        copied = given.to(torch.device("cpu"))
        for name in names:
            assert getattr(given, name).any()
            assert torch.equal(getattr(copied, name), getattr(given, name))
        state.move_to(torch.device("meta"))
        assert state.geometry.device == torch.device("meta")
        assert state.geometry.reads == plan.geometry(150, 150, torch.device("cpu")).reads
        assert all(getattr(state.pivots, name).is_meta for name in names)


def test_the_output_lies_as_the_model_reads_it(model: Any) -> None:
    """Tokens before heads: the seam's transposition copies nothing."""
    out, _, _ = run(model, [[P, S, R, D]] * 3, tensors(300, 300))
    assert out.transpose(0, 1).is_contiguous()
