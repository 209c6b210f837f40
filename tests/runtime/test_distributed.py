from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from shareprefill.artifact import Policy, save_artifact
from shareprefill.config import RuntimeConfig
from shareprefill.errors import ConfigError
from shareprefill.runtime.core import SparsePrefill
from shareprefill.runtime.plan import make_plan
from shareprefill.runtime.tensor_parallel import HeadShard
from tests.support import tensor_parallel
from tests.support.processes import run_processes
from tests.support.tensor_parallel import sessions
from tests.support.tiny import tiny_artifact, tiny_llama, token_ids

P, S, R, V = Policy.PIVOT, Policy.SHARE, Policy.SAMPLED, Policy.VERTICAL_SLASH
D = Policy.DENSE
# Heads share with pivots of either process, of their own layer and of earlier ones.
POLICIES = [[P, S, S, S], [S, R, P, V], [S, S, S, S]]
SESSIONS: list[dict[str, Any]] = [
    {"gamma": 0.6, "slack": -0.1, "min_tokens": 0, "max_density": 1.0},
    {"gamma": 0.6, "slack": 1.0, "pivot_rows": 0, "min_tokens": 0, "max_density": 1.0},
    {"policy": "shareprefill", "tau": 0.42, "delta": 0.9, "min_tokens": 0, "max_density": 1.0},
]


def prepare(folder: Path, **options: Any) -> Any:
    model = tiny_llama(**options)
    model.save_pretrained(folder)
    heads = model.config.num_attention_heads
    policies = [(row * 2)[:heads] for row in POLICIES]
    save_artifact(tiny_artifact(model, policies), folder / "clusters.st")
    torch.save({"input_ids": token_ids(1, 200), "sessions": SESSIONS}, folder / "inputs.pt")
    return model


def run(size: int, folder: Path) -> list[Any]:
    """What every process of a tensor-parallel group has found."""
    run_processes(size, tensor_parallel.__file__, str(folder))
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(size)]


def joined(layers: list[list[dict[str, Any]]], name: str) -> list[Any]:
    """A field of every layer's report, over the heads of all processes in order."""
    return [value for parts in zip(*layers, strict=True) for p in parts for value in p[name]]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_every_process_does_as_one_alone(size: int, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers' tensor parallelism needs accelerate")
    model = prepare(tmp_path, num_attention_heads=4, num_key_value_heads=4 if size == 4 else 2)
    expected = sessions(model, tmp_path)
    ranks = run(size, tmp_path)
    for number, alone in enumerate(expected):
        together = [rank[number] for rank in ranks]
        for part in together:
            torch.testing.assert_close(part["logits"], alone["logits"], rtol=1e-3, atol=1e-3)
        layers = [part["layers"] for part in together]
        assert [p["first_head"] for p in (x[0] for x in layers)] == [
            rank * 4 // size for rank in range(size)
        ]
        assert joined(layers, "policies") == joined([alone["layers"]], "policies")
        density = joined([alone["layers"]], "density")
        # A block whose mass is at the threshold may fall to either side.
        assert joined(layers, "density") == pytest.approx(density, abs=0.02)
        compared = "distance" if "policy" in SESSIONS[number] else "covered"
        known = joined([alone["layers"]], compared)
        assert any(not math.isnan(value) for value in known)
        assert joined(layers, compared) == pytest.approx(known, abs=5e-3, nan_ok=True)
        # What is compared is sparse, and shared.
        assert min(joined(layers, "density")) < 0.9
        assert "share" in joined(layers, "policies")


class ThreadExchange:
    """Sums the tensors of two threads, each of which stands for a process."""

    def __init__(self) -> None:
        self.met, self.given = threading.Barrier(2, timeout=20), {}

    def sum(self, tensor: torch.Tensor) -> None:
        self.given[threading.get_ident()] = tensor.clone()
        self.met.wait()
        total = sum(self.given.values())
        self.met.wait()
        tensor.copy_(total)


@pytest.mark.parametrize("pivot_rows", [0, 4])
def test_a_process_of_dense_heads_gets_the_pivots_of_the_others(pivot_rows: int) -> None:
    """Its heads of a later layer share them; and the others wait for it in the exchange."""
    layers = [[P, S, D, D], [D, D, S, S], [D, D, D, D]]
    artifact = tiny_artifact(tiny_llama(), layers)
    config = RuntimeConfig(gamma=0.6, slack=1.0, max_density=1.0, pivot_rows=pivot_rows)
    plan = make_plan(artifact, config)
    query, key, value = torch.randn(4, 150, 16), torch.randn(2, 150, 16), torch.randn(2, 150, 16)

    def attend(prefill: SparsePrefill, q: slice, kv: slice) -> list[tuple[torch.Tensor, Any]]:
        state = prefill.begin(plan.geometry(150, 150, torch.device("cpu")))
        tensors = query[q], key[kv], value[kv]
        return [prefill.attend(n, state, *tensors, scale=0.25) for n in range(len(layers))]

    exchange = ThreadExchange()

    def part(rank: int) -> list[tuple[torch.Tensor, Any]]:
        prefill = SparsePrefill(plan, range(2 * rank, 2 * rank + 2), exchange)
        return attend(prefill, slice(2 * rank, 2 * rank + 2), slice(rank, rank + 1))

    alone = attend(SparsePrefill(plan), slice(4), slice(2))
    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(part, range(2)))
    for number, (output, record) in enumerate(alone):
        assert record.policies.tolist() == layers[number]
        joined_output = torch.cat([part[number][0] for part in parts])
        torch.testing.assert_close(joined_output, output)
        assert [p for part in parts for p in part[number][1].policies.tolist()] == layers[number]


def test_heads_that_do_not_divide_are_refused() -> None:
    group: Any = None
    shard = HeadShard(1, 4, group)
    assert list(shard.heads(32)) == list(range(8, 16))
    shard.check(32, 8)
    with pytest.raises(ConfigError, match="4 processes cannot share 32 query heads and 2 KV heads"):
        shard.check(32, 2)


@pytest.mark.slow
def test_fewer_kv_heads_than_processes_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers' tensor parallelism needs accelerate")
    prepare(tmp_path, num_key_value_heads=1)
    assert ["2 processes cannot share" in text for text in run(2, tmp_path)] == [True] * 2
