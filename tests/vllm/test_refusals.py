"""Modes of an engine that cannot be served, with vLLM's own types: `make test-vllm`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

from vllm import SamplingParams  # pyright: ignore

from shareprefill.errors import UnsupportedError
from shareprefill.vllm.engine import check_decoding, check_engine
from shareprefill.vllm.options import ServingOptions
from shareprefill.vllm.requests import RequestSwitch


def config(part: str = "", **changes: Any) -> Any:
    """An engine's configuration as far as it is looked at, one part changed."""
    parts: dict[str, dict[str, Any]] = {
        "parallel_config": {
            "decode_context_parallel_size": 1,
            "pipeline_parallel_size": 1,
            "use_ubatching": False,
        },
        "model_config": {
            "runner_type": "generate",
            "use_mla": False,
            "is_attention_free": False,
            "is_hybrid": False,
            "enable_sleep_mode": False,
        },
        "cache_config": {"enable_prefix_caching": True},
        "compilation_config": {"cudagraph_mode": None, "splitting_ops": None},
        "speculative_config": {},
    }
    values = {name: SimpleNamespace(**of | changes) for name, of in parts.items() if name == part}
    plain = {name: SimpleNamespace(**of) for name, of in parts.items()}
    plain |= {"speculative_config": None, "lora_config": None, "kv_transfer_config": None}
    return SimpleNamespace(**plain | values, use_v2_model_runner=False)


def options(**entry: Any) -> ServingOptions:
    found = ServingOptions.find({"shareprefill": {"artifact": "a.st"} | entry}, {})
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("parallel_config", {"decode_context_parallel_size": 2}, "context parallelism"),
        ("parallel_config", {"use_ubatching": True}, "cut in two"),
        ("model_config", {"use_mla": True}, "latent attention"),
        ("model_config", {"is_attention_free": True}, "a model without attention"),
    ],
)
def test_an_engine_in_which_rows_would_be_wrong_or_none_is_refused(
    part: str, changes: dict[str, Any], message: str
):
    check_engine(options(), config())
    with pytest.raises(UnsupportedError, match=message):
        check_engine(options(), config(part, **changes))


def test_an_engine_that_promises_the_same_in_any_batch_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(UnsupportedError, match="VLLM_BATCH_INVARIANT"):
        check_engine(options(), config())


def test_drafts_whose_number_the_device_decides_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SHAREPREFILL_REQUEST_SWITCH", "off")
    check_engine(options(), config("speculative_config", enable_adaptive_verification=False))
    with pytest.raises(UnsupportedError, match="enable_adaptive_verification"):
        check_engine(options(), config("speculative_config", enable_adaptive_verification=True))


def test_a_pooling_model_is_served_without_the_switch(monkeypatch: pytest.MonkeyPatch):
    pooling = config("model_config", runner_type="pooling")
    with pytest.raises(UnsupportedError, match="tells nobody .a pooling model"):
        check_engine(options(), pooling)
    monkeypatch.setenv("SHAREPREFILL_REQUEST_SWITCH", "off")
    check_engine(options(), pooling)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_model_whose_layers_never_call_us_is_refused(monkeypatch: pytest.MonkeyPatch, ranks: int):
    core = SimpleNamespace(switches={}, is_called=False)
    monkeypatch.setattr("shareprefill.vllm.engine.core_of", lambda _: core)
    engine = config("parallel_config", pipeline_parallel_size=ranks)
    if ranks == 1:
        with pytest.raises(UnsupportedError, match="no layer of the model takes the backend"):
            RequestSwitch(engine).update_state(None)
        core.is_called = True
    switch = RequestSwitch(engine)
    for _ in range(2):
        switch.update_state(None)
        assert not switch.add_request(0, SamplingParams(extra_args={"shareprefill": "off"}))
    assert core.switches == {0: "off"}


def test_sparse_steps_refuse_an_engine_that_throws_its_cache_away():
    check_decoding(config())
    with pytest.raises(UnsupportedError, match="sleep mode"):
        check_decoding(config("model_config", enable_sleep_mode=True))


def test_a_request_whose_switch_is_misspelt_is_refused():
    RequestSwitch.validate_params(SamplingParams(extra_args={"kv_transfer_params": {}}))
    for key in ("share_prefill", "sharePrefill", "shareprefil"):
        with pytest.raises(ValueError, match=f"'{key}' is unknown .did you mean 'shareprefill'"):
            RequestSwitch.validate_params(SamplingParams(extra_args={key: "off"}))
