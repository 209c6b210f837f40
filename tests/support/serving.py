"""What tests of the vLLM plug-in share: marks and engines of those that run vLLM, and a core."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shareprefill.config import RuntimeConfig
from shareprefill.runtime.plan import RuntimePlan
from shareprefill.runtime.rules.base import Exchange
from shareprefill.vllm.core import ServingCore

IN_VLLM = [
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"
    ),
    pytest.mark.slow,
    pytest.mark.timeout(900),
]


def serving_core(
    plan_of: Callable[[str | None], RuntimePlan],
    config: RuntimeConfig,
    *,
    heads: range | None = None,
    exchange: Exchange | None = None,
    head_dim: int = 32,
) -> ServingCore:
    """The core of an engine on a CPU, in one process or in one of several."""
    return ServingCore(
        plan_of,
        config,
        heads=heads,
        exchange=exchange,
        head_dim=head_dim,
        device=torch.device("cpu"),
        backend="CPU_ATTN",
        max_rows=1024,
        max_keys=4096,
    )


def run(tmp_path: Path, *engines: dict[str, Any], **environment: str) -> list[dict[str, Any]]:
    """Runs engines one after the other in one fresh process."""
    out = tmp_path / "found.json"
    request = json.dumps({"engines": engines, "out": str(out)})
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, str(Path(__file__).parent / "vllm_engine.py"), request],
        env=os.environ | variables | environment,
        check=True,
        timeout=800,
    )
    return json.loads(out.read_text())


def difference(found: dict[str, Any], wanted: dict[str, Any]) -> float:
    """Largest difference of the likely tokens' log-probabilities, over all requests."""
    largest = 0.0
    for batch, other in zip(found["batches"], wanted["batches"], strict=True):
        for one, two in zip(batch, other, strict=True):
            assert one["tokens"] == two["tokens"]
            common = one["logprobs"].keys() & two["logprobs"].keys()
            assert len(common) >= 18
            largest = max(
                largest, *(abs(one["logprobs"][token] - two["logprobs"][token]) for token in common)
            )
    return largest
