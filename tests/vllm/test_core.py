from pathlib import Path

import pytest
import torch

from shareprefill.config import RuntimeConfig
from shareprefill.runtime.core import SparsePrefill
from shareprefill.runtime.crossover import Crossover, crossover, save_crossover
from shareprefill.runtime.ops.pages import PagedTokens
from shareprefill.runtime.plan import RuntimePlan, plan_without_artifact
from shareprefill.vllm.core import ServingCore
from shareprefill.vllm.rows import Prefill
from tests.support.serving import serving_core

EMPTY = {"rows": {"sparse": {}, "dense": {}}, "recent": {}, "latest": []}


def core_with(*, heads: range | None = None, **options: object) -> ServingCore:
    config = RuntimeConfig.from_dict({"policy": "pooled", "min_tokens": 0} | options)

    def plan_of(policy: str | None) -> RuntimePlan:
        assert policy is None
        return plan_without_artifact(2, 4, config)

    return serving_core(plan_of, config, heads=heads)


def test_a_step_is_new_once_however_many_groups_ask():
    core = core_with()
    first = torch.arange(3)
    assert [core.is_new_step(first) for _ in range(3)] == [True, False, False]
    # Builders that come later (an engine makes its own twice) book the next step all the same.
    second = first.clone()
    assert [core.is_new_step(second), core.is_new_step(second)] == [True, False]
    del first, second
    assert core.is_new_step(torch.arange(3))


def test_warming_runs_every_layer_and_counts_nothing(monkeypatch: pytest.MonkeyPatch):
    core, seen, paged = core_with(), [], []
    attend = SparsePrefill.attend

    def noted(self: SparsePrefill, layer: int, *args: torch.Tensor, **options: object) -> object:
        found = attend(self, layer, *args, **options)  # pyright: ignore[reportArgumentType]
        seen.append((layer, args[1].shape[1], args[2].shape[1]))
        paged.append(isinstance(args[2], PagedTokens) and isinstance(args[3], PagedTokens))
        assert found[0].isfinite().all()
        return found

    monkeypatch.setattr(SparsePrefill, "attend", noted)
    core.warm(torch.empty(5, 4, 32), 2, 48, scale=0.2, softcap=None, sinks=None)
    n_key = 16 * core.least_rows
    assert seen == [(layer, rows, n_key) for rows in (n_key, n_key // 2) for layer in (0, 1)]
    assert paged == [False, False, True, True]
    assert core.report() == EMPTY


def test_a_reports_records_are_bounded_and_forgotten():
    core = core_with(min_tokens=300)
    for n_key, switch in ((400, None), (400, "off"), (200, None)):
        core.book(128, n_key, switch)
    core.book(127, 400, None)
    assert core.report()["rows"] == {
        "sparse": {"pooled": 1},
        "dense": {"request": 1, "length": 1},
    }
    query, keys = torch.randn(4, 128, 8), torch.randn(2, 128, 8)
    for _ in range(70):
        state = core.begin(Prefill(0, slice(0, 128), 128), None, query.device)
        for layer in (0, 1):
            core.attend(layer, state, query, keys, keys, scale=1, softcap=None, sinks=None)
    assert core.report()["recent"]["pooled"]["prefills"] == 64
    assert len(core.report()["latest"]) == 64
    core.reset()
    assert core.report() == EMPTY


def test_a_report_tells_of_each_row_by_itself():
    core, rows = core_with(gamma=0.5, max_density=1.0), []
    for n_query, n_key in ((1024, 1024), (256, 1280)):
        query, keys = torch.randn(4, n_query, 8), torch.randn(2, n_key, 8)
        states = [core.begin(Prefill(0, slice(0, n_query), n_key), None, query.device)]
        # The other row of the step, layer by layer beside it.
        states.append(core.begin(Prefill(1, slice(0, n_query), n_key), None, query.device))
        for layer in (0, 1):
            for state in states:
                core.attend(layer, state, query, keys, keys, scale=1, softcap=None, sinks=None)
        rows += [("pooled", n_query, n_key)] * 2
    report = core.report()
    assert [(row["policy"], row["rows"], row["keys"]) for row in report["latest"]] == rows
    assert {row["prefills"] for row in report["latest"]} == {1}
    first, _, second, _ = (row["density"] for row in report["latest"])
    assert 0 < second < first < 1
    # Causal blocks of 8 x 8, and of 2 rows behind 8 blocks.
    assert report["recent"]["pooled"]["density"] == pytest.approx((36 * first + 19 * second) / 55)


def test_a_request_that_names_the_engine_s_own_policy_gets_its_options():
    core = core_with(gamma=0.5, max_density=1.0)
    query, keys = torch.randn(4, 1024, 8), torch.randn(2, 1024, 8)
    for switch in (None, "pooled"):
        # `core_with` makes no other plan than the engine's own.
        state = core.begin(Prefill(0, slice(0, 1024), 1024), switch, query.device)
        for layer in (0, 1):
            core.attend(layer, state, query, keys, keys, scale=1, softcap=None, sinks=None)
    report = core.report()
    assert report["recent"]["pooled"]["prefills"] == 2
    first, second = (row["density"] for row in report["latest"])
    assert first == second < 1


def test_a_tuned_crossover_of_its_backend_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cpu, table = torch.device("cpu"), tmp_path / "table.json"
    save_crossover(table, cpu, "CPU_ATTN", 700, "by hand", [])
    save_crossover(table, cpu, "SDPA", 300, "by hand", [])
    monkeypatch.setenv("SHAREPREFILL_CROSSOVERS", str(table))
    try:
        core = core_with(min_tokens=None)
        assert (core.min_tokens, core.crossover.source) == (700, "by hand")
        assert [core.is_sparse(128, keys, None) for keys in (699, 700)] == [False, True]
        assert core_with(min_tokens=200).min_tokens == 200
    finally:
        crossover.cache_clear()


def test_a_device_s_crossover_counts_the_work_of_a_row(monkeypatch: pytest.MonkeyPatch):
    # Of a layer of 4 heads of 32 dims.
    measured = Crossover(400, 0.7, "here", width=4 * 32)
    monkeypatch.setattr("shareprefill.vllm.core.crossover", lambda *_: measured)
    core = core_with(min_tokens=None)
    assert core.min_tokens == 400
    assert [core.is_sparse(keys, keys, None) for keys in (399, 400)] == [False, True]
    # The last rows of a prompt that an engine cut into chunks: 128 * (2 * 688 - 128) < 400 ** 2.
    assert [core.is_sparse(128, keys, None) for keys in (688, 690)] == [False, True]
    # 690 would do but for the last key, which is half of a pair.
    assert [core.keys_of_chunk(rows) for rows in (127, 128, 400, 4096)] == [None, 689, 400, 400]
    core.book(128, 688, None)
    assert core.report()["rows"]["dense"] == {"length": 1}
    # A process that holds half of the heads has half of the work.
    assert core_with(min_tokens=None, heads=range(2)).min_tokens == 565
    # What is asked for counts keys.
    assert core_with(min_tokens=500).is_sparse(128, 500, None)
    assert core_with(min_tokens=500).keys_of_chunk(128) == 500
    assert core_with(min_tokens=0).keys_of_chunk(4096) == 128
