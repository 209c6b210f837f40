"""`sp tune`: from which length on sharing is faster than dense attention, on this machine."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import replace
from pathlib import Path

import torch

from shareprefill.artifact import load_artifact
from shareprefill.bench.config import BenchConfig, TuneConfig
from shareprefill.bench.measure import SHARE, run_bench
from shareprefill.bench.timings import Timing, Tuning, rows_of
from shareprefill.errors import ConfigError, UnsupportedError
from shareprefill.files import printable
from shareprefill.models import resolve_device
from shareprefill.runtime.crossover import (
    SDPA,
    check_table,
    crossover,
    default_table,
    save_crossover,
    saved_tokens,
)

logger = logging.getLogger(__name__)

# Without a model: sizes whose prefills a machine finishes in minutes, and few layers, as one takes
# as long as the next.
_SHAPES = {"cpu": "llama-3.2-1b", "cuda": "llama-3.1-8b"}
_LAYERS = {"cpu": 2, "cuda": 8}


def run_tuning(config: TuneConfig) -> Tuning:
    """Measures a crossover and puts it into the table that sessions and engines read.

    Args:
        config: What is timed.

    Raises:
        ConfigError: options that do not fit together.
        UnsupportedError: vLLM was asked for and is not installed.
        DataError: the table is damaged or cannot be written, which is known before it is measured.
    """
    device = resolve_device(config.device)
    if config.model is None:
        defaults = {"shape": _SHAPES, "layers": _LAYERS}
        missing = {n: of[device.type] for n, of in defaults.items() if getattr(config, n) is None}
        config = replace(config, **missing)
    table = default_table() if config.table is None else Path(config.table)
    check_table(table)
    found = _in_engine(config, device) if _takes_vllm(config) else _in_session(config)
    if found.tokens is None:
        earlier = saved_tokens(table, device, found.backend)
        if earlier is not None:
            logger.warning(
                "%s still says %d tokens, from an earlier run: remove the file, or measure longer "
                "prompts",
                printable(table),
                earlier,
            )
        return found
    save_crossover(
        table,
        device,
        found.backend,
        found.tokens,
        found.source,
        rows_of(found.timings),
        width=None if found.sizes is None else found.sizes.width,
        host_ms=found.host_ms,
    )
    known = crossover(device, found.backend)
    least = found.tokens if found.sizes is None else known.tokens_of(found.sizes)
    return replace(found, table=table, least_tokens=least)


def _takes_vllm(config: TuneConfig) -> bool:
    is_there = importlib.util.find_spec("vllm") is not None
    if config.engine == "vllm" and not is_there:
        raise UnsupportedError("vLLM is not installed: use --engine session, or install it")
    return is_there if config.engine == "auto" else config.engine == "vllm"


def _in_session(config: TuneConfig) -> Tuning:
    """Against the model's own attention in transformers."""
    bench = BenchConfig(
        lengths=config.lengths,
        model=config.model,
        density=BenchConfig.density if config.model is not None else config.density,
        chunk=0,
        device=config.device,
        dtype=config.dtype,
        layers=config.layers,
        shape=config.shape or BenchConfig.shape,
    )
    artifact = None if config.artifact is None else load_artifact(config.artifact)
    result = run_bench(bench, artifact, repeats=config.repeats)
    timings = []
    for dense, share in zip(result.rows[::2], result.rows[1::2], strict=True):
        assert share.attention == SHARE
        timings.append(Timing(share.tokens, dense.seconds, share.seconds, share.density))
    source = f"sp tune: {result.model}, {result.dtype}, torch {torch.__version__}"
    return Tuning(SDPA, source, tuple(timings), result.sizes, result.host_ms)


def _in_engine(config: TuneConfig, device: torch.device) -> Tuning:
    """Against the backend of vLLM that runs dense prefills here."""
    from shareprefill.bench.engine import time_engine

    if config.device not in ("auto", device.type):
        raise ConfigError(
            f"device = {config.device!r} is not allowed: vLLM takes its own; use --engine session"
        )
    return time_engine(config)
