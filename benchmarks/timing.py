"""Times of calls on a device, and the rates that bound any kernel on it."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Call = Callable[[], object]

# Longer calls fill the L2 cache themselves, and hide the host's work for the next one.
_SHORT_MS = 10.0
# Calls that are not repeated.
_LONG_MS = 1000.0
_FLUSH_BYTES = 2**28
# Of the device before a short call, at least.
_PAUSE_MS = 2.0
# A GPU's clock is below this; a pause of so many cycles a millisecond is never too short.
_CYCLES_A_MS = 2_000_000


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a call.

    Attributes:
        first: The first call, compilation included.
        median: As `triton.testing.do_bench` has it; calls of more than 10 ms by events around each.
        device: The device alone: all launches wait in its queue before the first one starts. The
            same as `median` for calls of more than 10 ms; None on a CPU.
        host: The host alone, until the call returns; None on a CPU, or for more than a second.
    """

    first: float
    median: float
    device: float | None = None
    host: float | None = None


def measure(function: Call, device: str) -> Timing:
    """Times a call after a first one."""
    first = _wall_ms(function, device)
    if device != "cuda":
        return Timing(first, statistics.median(_wall_ms(function, device) for _ in range(5)))
    once = _event_ms(function)
    if once > _LONG_MS:
        return Timing(first, once, once)
    if once > _SHORT_MS:
        median = statistics.median(_event_ms(function) for _ in range(3))
        return Timing(first, median, median, host_ms(function, repeats=1))
    from triton.testing import do_bench

    host = host_ms(function)
    median = float(do_bench(function, warmup=10, rep=60, return_mode="median"))
    return Timing(first, median, device_ms(function, host), host)


def median_ms(function: Call, device: str) -> tuple[float, float]:
    """First-call and median time in milliseconds, see `Timing`."""
    found = measure(function, device)
    return found.first, found.median


def host_ms(function: Call, repeats: int = 5) -> float:
    """Median time until a call returns, while the device has nothing else to do."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        times.append((time.perf_counter() - start) * 1e3)
    torch.cuda.synchronize()
    return statistics.median(times)


def device_ms(function: Call, host: float, repeats: int = 20) -> float:
    """Median time of the device alone, from an empty L2 cache.

    The device pauses until the host, which takes `host` ms, has launched everything. A call that
    waits for the device shows the host's time here too. In a pause the device's clock recovers that
    long calls lower. So pauses are alike for all hosts that are fast enough, and before calls of
    more than 10 ms, whose launches are hidden by their kernels, there is none.
    """
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    pause = 0
    if _event_ms(function) < _SHORT_MS:
        pause = int(max(2 * host + 0.2, _PAUSE_MS) * _CYCLES_A_MS)
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        if pause:
            torch.cuda._sleep(pause)
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def _wall_ms(function: Call, device: str) -> float:
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def _event_ms(function: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


@dataclass(frozen=True)
class Ceilings:
    """Measured rates of the device, per second; `fp8_flops` are of products of e4m3."""

    flops: float
    bytes: float
    exponentials: float | None
    fp8_flops: float | None = None

    def floor(
        self, flops: float, n_bytes: float, exponentials: float, *, in_fp8: bool = False
    ) -> tuple[float, str]:
        """Least time in milliseconds, and what bounds it."""
        rate = self.fp8_flops if in_fp8 else self.flops
        assert rate is not None
        times = {"matrix units": flops / rate, "memory": n_bytes / self.bytes}
        if self.exponentials is not None:
            times["exponentials"] = exponentials / self.exponentials
        bound = max(times, key=lambda name: times[name])
        return times[bound] * 1e3, bound


def measure_ceilings(device: str, dtype: torch.dtype) -> Ceilings:
    """Rates of a large matrix product, a large copy and, on a GPU, of exponentials alone."""
    size, words = (8192, 2**29) if device == "cuda" else (1024, 2**24)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    _, product = median_ms(lambda: left @ right, device)
    source = torch.randn(words, device=device)
    target = torch.empty_like(source)
    _, copy = median_ms(lambda: target.copy_(source), device)
    exponentials = None
    if device == "cuda" and importlib.util.find_spec("triton") is not None:
        from exponentials import exponentials_per_second

        exponentials = exponentials_per_second()
    in_fp8 = None
    if device == "cuda" and torch.cuda.get_device_capability() >= (8, 9):
        in_fp8 = 2 * size**3 / _fp8_product_ms(left, right) * 1e3
    return Ceilings(2 * size**3 / product * 1e3, 8 * words / copy * 1e3, exponentials, in_fp8)


def _fp8_product_ms(left: torch.Tensor, right: torch.Tensor) -> float:
    """Median time of a large product of operands in e4m3."""
    one = torch.ones((), device=left.device)
    small = [matrix.to(torch.float8_e4m3fn) for matrix in (left, right)]
    options = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
    return median_ms(
        lambda: torch._scaled_mm(small[0], small[1].T, scale_a=one, scale_b=one, **options), "cuda"
    )[1]
