"""What a calibration will take, told before it runs: time, disk and memory."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import torch

from shareprefill.calib.capture import capture
from shareprefill.calib.effect import measure_effect
from shareprefill.calib.pipeline import load_for_capture, open_for_capture
from shareprefill.calib.prompts import check_data
from shareprefill.config import CalibrateConfig
from shareprefill.processes import launched

# Tokens of the longer of two probes, at most: the shorter one has half of them.
_PROBE = 1024


@dataclass(frozen=True)
class Forecast:
    """What is left of a calibration.

    Attributes:
        prompts: Prompts in all.
        done: Those that the folder holds already.
        tokens: Length of every prompt.
        probes: Lengths of the prompts that were timed.
        seconds: Time of the prompts that are left; without training the autoencoder.
        disk: Bytes of all prompts' maps.
        host_memory: Bytes of this process at its peak, model included where it is on the CPU.
        device_memory: Bytes on the GPU at the peak; None on a CPU.
    """

    prompts: int
    done: int
    tokens: tuple[int, ...]
    probes: tuple[int, int]
    seconds: float
    disk: int
    host_memory: int
    device_memory: int | None


def forecast(
    config: CalibrateConfig, folder: Path, *, resume: bool = True, trust_remote_code: bool = False
) -> Forecast | None:
    """Loads model and prompts, times two short prompts, and writes nothing.

    Time is taken for a x N + b x N^2 in the tokens N, and memory for linear in them.

    Args:
        config: What would be captured.
        folder: Where the store would be.
        resume: Whether the prompts that are there would be kept.
        trust_remote_code: Run the model repository's own code.

    Returns:
        The forecast; None in all but the first process of a torchrun.

    Raises:
        As `pipeline.capture_maps`.
    """
    check_data(config)
    with launched() as processes:
        if processes.rank > 0:
            return None
        model, prompts, made_for = load_for_capture(config, processes, trust_remote_code)
        store = open_for_capture(folder, config, made_for, prompts, resume=resume)
        lengths = [len(prompt.input_ids) for prompt in prompts]
        long = min(_PROBE, *lengths)
        probes = long // 2, long
        ids = prompts[0].input_ids
        device = cast(Any, model).get_input_embeddings().weight.device

        def captured(tokens: int) -> tuple[int, ...]:
            maps = capture(model, ids[:tokens], block_size=config.block_size, rows=config.rows)
            return maps.layers

        layers = captured(probes[0])  # what is loaded and compiled at the first call, too
        before = _memory(device)
        seconds_of = _fit(probes, [_timed(captured, tokens, device) for tokens in probes])
        seconds = sum(seconds_of(n) for n in lengths[len(store.prompts) :])
        widest = max(lengths)
        if config.effect_tokens:

            def measured(tokens: int) -> None:
                sizes: dict[str, Any] = {"block_size": config.block_size, "tokens": tokens}
                measure_effect(model, ids[:tokens], layers, **sizes, seed=config.seed)

            effect_of = _fit(probes, [_timed(measured, tokens, device) for tokens in probes])
            parts = [min(n, config.effect_tokens) for n in lengths[len(store.prompts) :]]
            seconds += sum(map(effect_of, parts))
        grown = [now - then for now, then in zip(_memory(device), before, strict=True)]
        # Captures keep nothing of N x N, and effects are of so many positions alone.
        widest = max(widest // 4, min(widest, config.effect_tokens))
        host, other = (
            then + int(more * max(1.0, widest / long))
            for then, more in zip(before, grown, strict=True)
        )
        sizes = [store.prompt_bytes(n, len(layers)) for n in lengths]
        return Forecast(
            prompts=len(prompts),
            done=len(store.prompts),
            tokens=tuple(lengths),
            probes=probes,
            seconds=seconds / processes.size,
            disk=sum(sizes),
            # Squares of layers, and of all of them together; then their halves, and the file.
            host_memory=host + 6 * max(sizes),
            device_memory=other if device.type == "cuda" else None,
        )


def _fit(probes: Sequence[int], seconds: Sequence[float]) -> Callable[[int], float]:
    """Seconds of any length: a x N + b x N^2 through two points, none of them negative."""
    (n1, n2), (t1, t2) = probes, seconds
    square = max(0.0, (t2 / n2 - t1 / n1) / (n2 - n1))
    linear = max(0.0, t2 / n2 - square * n2)
    return lambda n: linear * n + square * n * n


def _timed(call: Callable[[int], object], tokens: int, device: torch.device) -> float:
    start = perf_counter()
    call(tokens)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter() - start


def _memory(device: torch.device) -> tuple[int, int]:
    """Peak bytes so far, of this process and on a GPU."""
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return host, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
