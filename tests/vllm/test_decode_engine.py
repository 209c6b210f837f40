"""Sparse decode steps inside a real vLLM on a CPU: `make test-vllm` installs it and runs these."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from shareprefill.config import RuntimeConfig
from tests.support.serving import IN_VLLM, run
from tests.support.vllm_engine import MODEL, prompt_tokens

pytestmark = IN_VLLM

ARTIFACT = str(Path(__file__).parents[2] / "artifacts" / "sp-tiny.st")
# Every block of every head in prefills, so that decode steps alone differ.
DECODED = {
    "artifact": ARTIFACT,
    "min_tokens": 0,
    "gamma": 1.0,
    "max_density": 1.0,
    "decode": "sparse",
}
# Each needs one more page for its answer.
REQUESTS = [
    {"n": 2040, "tokens": 12, "ignore_eos": True},
    {"seed": 1, "n": 890, "tokens": 12, "ignore_eos": True},
    {"seed": 2, "n": 378, "tokens": 12, "ignore_eos": True},
]
STEPS = 3 * 11
CHUNKED = {"max_num_batched_tokens": 700}


def difference(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> float:
    """Largest difference of the likely tokens' log-probabilities, over all requests and steps."""
    largest = 0.0
    for one, two in zip(found, wanted, strict=True):
        assert one["tokens"] == two["tokens"]
        for step, other in zip(one["steps"], two["steps"], strict=True):
            common = step.keys() & other.keys()
            assert len(common) >= 18
            largest = max(largest, *(abs(step[token] - other[token]) for token in common))
    return largest


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What vLLM finds for the requests without any plug-in."""
    folder = tmp_path_factory.mktemp("dense")
    (found,) = run(folder, {"batches": [REQUESTS]}, VLLM_PLUGINS="")
    return found["batches"][0]


def test_steps_that_read_every_block_are_as_dense_ones(
    tmp_path: Path, dense: list[dict[str, Any]]
) -> None:
    """Beside chunks of prefills, behind cached prefixes, preempted, with others given up."""
    everything = DECODED | {"decode_density": 1.0}
    given_up = [{"seed": 7, "n": 1100, "abort": 2}, {"seed": 8, "n": 600, "abort": 9}]
    off = [REQUESTS[0], REQUESTS[1] | {"switch": "off"}, REQUESTS[2]]
    # The prompts fill all pages but the one that vLLM keeps.
    crowded = {
        "num_gpu_blocks_override": 27,
        "max_model_len": 2600,
        "disable_log_stats": False,
        "enable_prefix_caching": False,
    }
    cached, without = run(
        tmp_path,
        {"options": everything, "batches": [REQUESTS, REQUESTS, off], "arguments": CHUNKED},
        {
            "options": everything,
            "batches": [[*given_up, *REQUESTS]],
            "arguments": CHUNKED | crowded,
        },
    )
    for batch in (*cached["batches"], *without["batches"]):
        assert difference(batch, dense) < 1e-4
    assert cached["batches"][1][0]["cached"] > 1800
    decoding = cached["reports"][0]["decoding"]
    assert decoding["steps"] == 3 * STEPS - 11
    assert decoding["dense_steps"] == {"request": 11}
    assert decoding["density"] == pytest.approx(1, abs=1e-3)
    assert without["metrics"]["vllm:num_preemptions"] > 0
    assert without["reports"][0]["decoding"]["steps"] >= STEPS
    assert without["left"] == 0


def test_a_request_alone_is_decoded_as_in_a_session(tmp_path: Path) -> None:
    from shareprefill import share_prefill
    from shareprefill.models import load_model

    request = {"n": 2000, "tokens": 24, "ignore_eos": True}
    options = DECODED | {"decode_density": 0.2}
    (found,) = run(tmp_path, {"options": options, "batches": [[request]]})
    (answer,) = found["batches"][0]
    model = load_model(str(MODEL), device="cpu", dtype="float32")
    config = RuntimeConfig.from_dict({n: value for n, value in options.items() if n != "artifact"})
    ids = torch.tensor([prompt_tokens(0, request["n"])])
    densities = []
    with torch.no_grad(), share_prefill(model, ARTIFACT, config) as session:
        out = model(ids, use_cache=True)
        for token, step in zip(answer["tokens"][0], answer["steps"], strict=True):
            expected = out.logits[0, -1].log_softmax(-1)
            for likely, value in step.items():
                assert abs(float(expected[int(likely)]) - value) < 1e-4
            decoding = session.report().decoding
            assert decoding is not None
            densities.append(decoding.density)
            out = model(torch.tensor([[token]]), past_key_values=out.past_key_values)
    decoding = found["reports"][0]["decoding"]
    assert decoding["steps"] == 23
    # The newest step is not in it.
    assert decoding["density"] == pytest.approx(densities[22], abs=1e-6)
    assert decoding["density"] < 0.5


def test_two_processes_decode_as_one_does(tmp_path: Path) -> None:
    from prometheus_client import CollectorRegistry
    from prometheus_client.multiprocess import MultiProcessCollector

    (metrics := tmp_path / "metrics").mkdir()
    engine = {
        "options": DECODED | {"decode_density": 0.3},
        # One after the other: when requests arrive that come at once is not the same in both.
        "batches": [[REQUESTS[0]], [REQUESTS[1]], [REQUESTS[2] | {"switch": "off"}]],
    }
    (one,) = run(tmp_path, engine)
    divided = engine | {"arguments": {"tensor_parallel_size": 2}}
    several = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "PROMETHEUS_MULTIPROC_DIR": str(metrics),
    }
    (two,) = run(tmp_path, divided, **several)
    for batch, other in zip(two["batches"], one["batches"], strict=True):
        assert difference(batch, other) < 1e-4
    (alone,), both = one["reports"], two["reports"]
    assert [report["decoding"]["steps"] for report in both] == [alone["decoding"]["steps"]] * 2
    for report in both:
        density = report["decoding"]["density"]
        assert density == pytest.approx(alone["decoding"]["density"], rel=1e-3)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(metrics))
    samples = [sample for family in registry.collect() for sample in family.samples]
    counted = {
        (s.labels["kind"], s.labels["name"]): s.value
        for s in samples
        if s.name == "shareprefill_decode_steps_total"
    }
    assert counted == {("sparse", "decode"): 22, ("dense", "request"): 11}


def test_engines_whose_steps_cannot_be_sparse_fail_at_the_start(tmp_path: Path) -> None:
    connector = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"prefix_match_unit": 32}, "a prefix cache of parts of pages"),
        ({"kv_transfer_config": connector}, "a KV connector"),
    ]
    engines = [{"fails": True, "options": DECODED, "arguments": a} for a, _ in cases]
    for answer, (_, message) in zip(run(tmp_path, *engines), cases, strict=True):
        assert re.search(message, answer["error"] or "started")
