"""What a calibration will take, told before it runs: time, disk and memory."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Self, cast

import torch

from shareprefill.calib.capture import capture
from shareprefill.calib.effect import measure_effect
from shareprefill.calib.pipeline import load_for_capture, open_for_capture
from shareprefill.calib.prompts import Prompt, check_data
from shareprefill.calib.store import MapStore
from shareprefill.config import CalibrateConfig
from shareprefill.processes import launched

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tokens of the first probe, at most.
_FIRST = 512
# Seconds of a probe, at least: shorter ones tell what a launch takes, not what tokens do.
_ENOUGH = 2.0
# Longer probes foretell better: they are taken for this share of what they foretell, at most.
_SHARE = 0.1


@dataclass(frozen=True)
class Forecast:
    """What is left of a calibration.

    Attributes:
        prompts: Prompts in all.
        done: Those that the folder holds already.
        tokens: Length of every prompt.
        heads: Heads that are captured.
        probes: Lengths of the prompts that times of all lengths follow from.
        seconds: Time of the prompts that are left; without training the autoencoder.
        disk: Bytes of all prompts' maps.
        host_memory: Bytes of this process at its peak, model included where it is on the CPU.
        device_memory: Bytes on the GPU at the peak; None on a CPU.
    """

    prompts: int
    done: int
    tokens: tuple[int, ...]
    heads: int
    probes: tuple[int, int]
    seconds: float
    disk: int
    host_memory: int
    device_memory: int | None


def forecast(
    config: CalibrateConfig, folder: Path, *, resume: bool = True, trust_remote_code: bool = False
) -> Forecast | None:
    """Loads model and prompts, times some short prompts, and writes nothing.

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
        store = open_for_capture(folder, config, model, made_for, prompts, resume=resume)
        found = forecast_prompts(model, prompts, store)
        return replace(found, seconds=found.seconds / processes.size)


def forecast_prompts(
    model: PreTrainedModel, prompts: Sequence[Prompt], store: MapStore
) -> Forecast:
    """The same for a model and prompts that are loaded, of one process.

    Prompts of rising lengths are captured until one takes seconds, and on as long as that is little
    beside the calibration. Time, and memory on a GPU, are taken for a x N + b x N^2 in the tokens
    N, and memory of this process for linear in them.

    Args:
        model: In eval mode.
        prompts: All prompts of the calibration.
        store: The maps of those that are done.
    """
    config, device = store.config, cast(Any, model).get_input_embeddings().weight.device
    lengths = [len(prompt.input_ids) for prompt in prompts]
    longest = max(lengths)
    ids = prompts[lengths.index(longest)].input_ids

    options: dict[str, Any] = {"block_size": config.block_size}
    layers = list[int]()

    def captured(tokens: int) -> None:
        kept: dict[str, Any] = {"rows": config.rows, "map_block": store.map_block(longest)}
        layers[:] = capture(model, ids[:tokens], **options, **kept).layers

    def measured(tokens: int) -> None:
        measure_effect(model, ids[:tokens], layers, **options, tokens=tokens, seed=config.seed)

    left = lengths[len(store.prompts) :]
    captures = _Probes.of(captured, longest, left, device)
    seconds, host, other = sum(map(captures.seconds, left)), *captures.memory(longest)
    if config.effect_tokens:
        most = min(longest, config.effect_tokens)
        cut = [min(n, most) for n in left]
        effects = _Probes.of(measured, most, cut, device)
        seconds += sum(map(effects.seconds, cut))
        host, other = map(max, (host, other), effects.memory(most))
    sizes = [store.prompt_bytes(n, len(layers)) for n in lengths]
    return Forecast(
        prompts=len(prompts),
        done=len(store.prompts),
        tokens=tuple(lengths),
        heads=len(layers) * store.fingerprint.geometry.heads,
        probes=captures.tokens,
        seconds=seconds,
        disk=sum(sizes),
        # Squares of layers, and of all of them together; then their halves, and the file.
        host_memory=host + 6 * max(sizes),
        device_memory=other if device.type == "cuda" else None,
    )


@dataclass(frozen=True)
class _Probes:
    """What two lengths took, the second of them twice the first.

    Attributes:
        tokens: Of both.
        took: Seconds.
        host: Peak bytes of this process until then.
        device: Peak bytes on the GPU beyond what rests there; 0 on a CPU.
        resting: Bytes that rest on the GPU.
    """

    tokens: tuple[int, int]
    took: tuple[float, float]
    host: tuple[int, int]
    device: tuple[int, int]
    resting: int

    @classmethod
    def of(
        cls,
        call: Callable[[int], None],
        longest: int,
        left: Sequence[int],
        device: torch.device,
    ) -> Self:
        """Calls with rising numbers of tokens, at most `longest`.

        Args:
            call: With a number of tokens: what is foretold.
            longest: Tokens of the longest prompt.
            left: Tokens of the prompts that are to be foretold.
            device: Of the model.
        """
        resting = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        tokens, found = min(_FIRST, longest // 2), list[tuple[int, float, int, int]]()

        def probes() -> Self:
            return cls(*zip(*found[-2:], strict=True), resting=resting)

        def pays() -> bool:
            if found[-1][1] < _ENOUGH:
                return True
            of = probes().seconds
            return 2 * of(tokens) <= _SHARE * sum(map(of, left))

        while len(found) < 2 or (tokens <= longest and pays()):
            # The first call of a length may load and compile.
            (first, _), (again, peak) = (_timed(call, tokens, device) for _ in range(2))
            found.append((tokens, min(first, again), _peak_bytes(), peak - resting))
            tokens *= 2
        return probes()

    def seconds(self, tokens: int) -> float:
        """Of any length."""
        return _fit(self.tokens, self.took)(tokens)

    def memory(self, tokens: int) -> tuple[int, int]:
        """Peak bytes of this process and on the GPU, of a length that is not shorter."""
        early, late = self.host
        # What works on a GPU keeps nothing of a token here.
        grown = 0 if self.resting else (late - early) / (self.tokens[1] - self.tokens[0])
        host = late + int(grown * (tokens - self.tokens[1]))
        return host, self.resting + int(_fit(self.tokens, self.device)(tokens))


def _fit(probes: Sequence[int], values: Sequence[float]) -> Callable[[int], float]:
    """A value of any length: a x N + b x N^2 through two points, none of them negative."""
    (n1, n2), (t1, t2) = probes, values
    square = max(0.0, (t2 / n2 - t1 / n1) / (n2 - n1))
    linear = max(0.0, t2 / n2 - square * n2)
    return lambda n: linear * n + square * n * n


def _timed(call: Callable[[int], None], tokens: int, device: torch.device) -> tuple[float, int]:
    """Seconds, and peak bytes on a GPU."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    start = perf_counter()
    call(tokens)
    if on_gpu:
        torch.cuda.synchronize(device)
    seconds = perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated(device) if on_gpu else 0


def _peak_bytes() -> int:
    """Of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
