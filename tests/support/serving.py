"""What tests of the vLLM plug-in share: the marks of those that run vLLM, and a core without it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

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
) -> ServingCore:
    """The core of an engine on a CPU, in one process or in one of several."""
    return ServingCore(
        plan_of,
        config,
        heads=heads,
        exchange=exchange,
        device=torch.device("cpu"),
        backend="CPU_ATTN",
        max_rows=1024,
        max_keys=4096,
    )
