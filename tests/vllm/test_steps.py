"""Steps of an engine on plain tensors: pages, rows and states together, without vLLM."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shareprefill.artifact import Policy
from shareprefill.config import RuntimeConfig
from shareprefill.runtime.core import SparsePrefill
from shareprefill.runtime.dense import causal_attention
from shareprefill.runtime.plan import RuntimePlan, make_plan
from shareprefill.vllm.pages import joined_pages
from shareprefill.vllm.rows import Prefill, divide
from tests.support.processes import run_processes
from tests.support.serving import serving_core
from tests.support.tiny import tiny_artifact, tiny_llama

P, S, R, V = Policy.PIVOT, Policy.SHARE, Policy.SAMPLED, Policy.VERTICAL_SLASH
LAYERS, H, G, D, PAGE = 3, 4, 2, 16, 32
SCALE = D**-0.5


class Requests:
    """Requests whose queries, keys and values are known from the start, and their pages."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths, self.done = lengths, [0] * len(lengths)
        self.tensors = [
            [tuple(torch.randn(heads, n, D) for heads in (H, G, G)) for _ in range(LAYERS)]
            for n in lengths
        ]
        needed = [-(-n // PAGE) for n in lengths]
        pages = torch.randperm(sum(needed) + 3)
        self.tables = list(pages[: sum(needed)].split(needed))
        # What nobody wrote may be anything.
        self.caches = torch.full((LAYERS, len(pages), G, PAGE, 2 * D), torch.nan)

    def write(self, request: int, stop: int) -> None:
        """Tokens that a step computes go into the pages of every layer."""
        for token in range(self.done[request], stop):
            page = int(self.tables[request][token // PAGE])
            for layer in range(LAYERS):
                _, key, value = self.tensors[request][layer]
                both = torch.cat([key[:, token], value[:, token]], -1)
                self.caches[layer, page, :, token % PAGE] = both


def plan_of(config: RuntimeConfig) -> RuntimePlan:
    return make_plan(
        tiny_artifact(tiny_llama(), [[P, S, R, V], [S, S, P, R], [V, R, S, S]]), config
    )


@pytest.mark.parametrize(
    ("policy", "gamma"), [("auto", 1.0), ("auto", None), ("shareprefill", None)]
)
def test_rows_of_mixed_steps_are_as_if_they_were_alone(
    policy: str, gamma: float | None, seed: int
) -> None:
    """Chunks of any size at any offset, several in a step, between decodes."""
    config = RuntimeConfig(policy=policy, gamma=gamma, min_tokens=40, max_density=1.0)
    plan, draw = plan_of(config), random.Random(seed)
    core, requests = serving_core(lambda _: plan, config), Requests([150, 9, 260, 77])
    sparse = 0
    while requests.done != requests.lengths:
        rows = [r for r, n in enumerate(requests.lengths) if requests.done[r] < n]
        rows = draw.sample(rows, draw.randint(1, len(rows)))
        sizes = [
            min(draw.choice((1, 7, 33, 64, 101)), requests.lengths[r] - requests.done[r])
            for r in rows
        ]
        stops = [requests.done[r] + size for r, size in zip(rows, sizes, strict=True)]
        for request, stop in zip(rows, stops, strict=True):
            requests.write(request, stop)
        starts = [sum(sizes[:place]) for place in range(len(sizes) + 1)]
        division = divide(starts, stops, lambda _, q, k: core.is_sparse(q, k, None))
        states = {p.row: core.begin(p, None, core.device) for p in division.prefills}
        alone = {p.row: SparsePrefill(plan) for p in division.prefills}
        begun = {
            p.row: alone[p.row].begin(plan.geometry(p.n_query, p.n_key, core.device))
            for p in division.prefills
        }
        for layer in range(LAYERS):
            for prefill in division.prefills:
                request = rows[prefill.row]
                query, key, value = _so_far(requests, request, layer, prefill)
                table = requests.tables[request]
                keys, values = joined_pages(requests.caches[layer], table, prefill.n_key)
                assert torch.equal(keys.gathered, key)
                assert torch.equal(values.gathered, value)
                found = core.attend(
                    layer, states[prefill.row], query, keys, values,
                    scale=SCALE, softcap=None, sinks=None,
                )  # fmt: skip
                expected, _ = alone[prefill.row].attend(
                    layer, begun[prefill.row], query, key, value, scale=SCALE
                )
                torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
                if gamma == 1:
                    dense = causal_attention(query, key, value, scale=SCALE)
                    torch.testing.assert_close(found, dense, atol=1e-5, rtol=1e-4)
        for request, stop in zip(rows, stops, strict=True):
            requests.done[request] = stop
        sparse += len(division.prefills)
    assert sparse


def _so_far(
    requests: Requests, request: int, layer: int, prefill: Prefill
) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous queries of a row, and keys and values up to its last token."""
    query, key, value = requests.tensors[request][layer]
    first = prefill.n_key - prefill.n_query
    return query[:, first : prefill.n_key], key[:, : prefill.n_key], value[:, : prefill.n_key]


def test_a_head_whose_pivot_s_layer_did_not_run_here_does_without() -> None:
    """A layer may run dense in an engine (a window, another rank) and be sparse in the artifact."""
    config = RuntimeConfig(min_tokens=0, max_density=1.0, gamma=1.0)
    plan = plan_of(config)
    core, requests = serving_core(lambda _: plan, config), Requests([200])
    whole = Prefill(0, slice(0, 200), 200)
    state = core.begin(whole, None, core.device)
    for layer in (1, 2):
        query, key, value = _so_far(requests, 0, layer, whole)
        out = core.attend(layer, state, query, key, value, scale=SCALE, softcap=None, sinks=None)
        dense = causal_attention(query, key, value, scale=SCALE)
        torch.testing.assert_close(out, dense, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("policy", ["auto", "shareprefill"])
def test_processes_warm_up_by_themselves_and_then_meet_once(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one process compiles or loads a kernel, no other one waits for it in a collective."""
    config = RuntimeConfig(policy=policy, min_tokens=0)
    plan, events, attend = plan_of(config), [], SparsePrefill.attend

    class Noted:
        def sum(self, tensor: Tensor) -> None:
            events.append("meets")

    def noted(self: SparsePrefill, layer: int, *args: Any, **options: Any) -> Any:
        events.append(layer)
        return attend(self, layer, *args, **options)

    monkeypatch.setattr(SparsePrefill, "attend", noted)
    monkeypatch.setattr("shareprefill.vllm.core.logger.info", events.append)
    # The pivots of layers 0 and 1 are in the other process.
    core = serving_core(lambda _: plan, config, heads=range(2, 4), exchange=Noted())
    assert not core.is_alone
    # Before anything runs on a device.
    assert events.pop() == "meets"
    core.warm(torch.empty(5, 2, D), 1, PAGE, scale=SCALE, softcap=None, sinks=None)
    told = "shareprefill: has compiled, and waits for the other processes"
    assert events == [0, 1, 2, 0, 1, 2, told, "meets"]
    assert core.report()["latest"] == []
    state = core.begin(Prefill(0, slice(0, 200), 200), None, core.device)
    query, keys = torch.randn(2, 200, D), torch.randn(1, 200, D)
    core.attend(0, state, query, keys, keys, scale=SCALE, softcap=None, sinks=None)
    assert "meets" in events[8:]


UNLIKE = """
import sys
import torch
from shareprefill.config import RuntimeConfig
from shareprefill.errors import ConfigError
from shareprefill.runtime.plan import plan_without_artifact
from shareprefill.runtime.tensor_parallel import HeadShard
from tests.support.processes import run_processes
from tests.support.serving import serving_core

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
shard = HeadShard(rank, 2, torch.distributed.group.WORLD)
for least in (128, 128 + rank):
    config = RuntimeConfig(policy="pooled", min_tokens=least)
    plan = plan_without_artifact(2, 4, config)
    try:
        serving_core(lambda _: plan, config, heads=shard.heads(4), exchange=shard)
    except ConfigError as error:
        print(error, file=open(f"{sys.argv[1]}/{rank}-{least}", "w"))
"""


@pytest.mark.slow
def test_processes_that_were_started_unlike_say_so_instead_of_standing_still(
    tmp_path: Path,
) -> None:
    """Where rows are sparse in one process alone, it waits for the other in a sum for ever."""
    run_processes(2, "-c", UNLIKE, str(tmp_path))
    texts = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert texts.keys() == {"0-128", "1-129"}
    assert all("2 processes were started with unlike options" in text for text in texts.values())
