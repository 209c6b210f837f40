"""Times one layer, selection and attention together, against dense attention.

    python benchmarks/bench_layer.py --json layer.json --markdown layer.md
    python benchmarks/bench_layer.py --device cpu --tokens 1024 --plans shared
    python benchmarks/bench_layer.py --tokens 1048576 --plans shared

On inputs with structure (layer_cases.py): as many key blocks attract as the plan `mixed` needs for
the density that is wanted at a length, and every policy has the least gamma that gives the recall,
as calibration chooses it. `mixed` has 2 pivots, 16 sharing heads, 10 vertical-slash ones and 4
row-sampled ones, `shared` 4 pivots and 28 sharing heads; the other plans treat all heads alike.
A layer is timed as sessions run it, after the geometry of the forward pass is made: `eager`, the
host's time included and the device waited for; `stream`, one of eight that follow each other
without waiting; `device`, with all launches queued before the first starts; in a CUDA graph; and
the host alone. `choice` is all but attention: sampling, selection and lists, on the device.
Of `--impl`, `fp8` is attention of all heads in FP8 on patterns chosen in the inputs' precision; it
is compared apart from the others, of which the fastest counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from goals import comparison_table
from kernel_cases import FlashAttention4, dense_baseline, failures, missing_baseline
from layer_cases import (
    BLOCK,
    PLANS,
    LayerCall,
    Structured,
    facts_of,
    gammas_of,
    uniform_plan,
    wanted_density,
)
from layer_tables import FP8, Dense, LayerTime, Row, comparisons, markdown
from provenance import provenance
from timing import Call, device_ms, host_ms, measure

from shareprefill.errors import UnsupportedError
from shareprefill.runtime import core
from shareprefill.runtime.ops.block_sparse_attention import block_sparse_attention

IMPLS = ("auto", "triton", "hopper", FP8)
STREAM = 8
# A longer layer is timed few times.
LONG_MS = 100.0


@contextmanager
def implementation(impl: str) -> Iterator[None]:
    """Lets layers take one implementation of block-sparse attention; FP8 has one alone."""
    if impl == FP8:
        yield
        return
    chosen = partial(block_sparse_attention, impl=impl)
    with patch.object(core, "block_sparse_attention", chosen):
        yield


def layer_time(make: Callable[[], LayerCall], impl: str, device: str, repeats: int) -> LayerTime:
    """Times a layer with one implementation.

    Raises:
        UnsupportedError: it does not take the call.
    """

    def run() -> None:
        make().run()

    def choose() -> None:
        make().choose()

    with implementation(impl):
        run()
        eager = eager_ms(run, device, 1)
        few = repeats if eager < LONG_MS else min(3, repeats)
        eager = eager_ms(run, device, few)
        stream = stream_ms(run, device, STREAM if eager < LONG_MS else 2, few)
        choose()
        if device != "cuda":
            return LayerTime(eager, stream, None, None, eager_ms(choose, device, few), None, None)
        host = host_ms(run, few)
        return LayerTime(
            eager=eager,
            stream=stream,
            device=device_ms(run, host, few),
            graph=graph_time(run, few),
            choice=device_ms(choose, host, few),
            host=host,
            launches=count_launches(run),
        )


def eager_ms(work: Call, device: str, repeats: int) -> float:
    """Median time of a call that is waited for."""
    return stream_ms(work, device, 1, repeats)


def stream_ms(work: Call, device: str, calls: int, repeats: int) -> float:
    """Median time of one of several calls that follow each other without waiting."""
    times = []
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        for _ in range(calls):
            work()
        _wait(device)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times) * 1e3


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def graph_time(work: Call, repeats: int) -> float:
    """Median milliseconds of a captured CUDA graph."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def count_launches(work: Call) -> int | None:
    """Kernels, copies and fills that a call starts; None where the profiler sees no device."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        work()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    return sum(e.count for e in found.key_averages() if e.device_type == on_device) or None


def dense_times(inputs: Structured, device: str) -> Dense:
    """SDPA's fastest backend and FlashAttention-4."""
    query, key, value = inputs.query, inputs.key, inputs.value
    sdpa = dense_baseline(query, key)
    tensors = sdpa.inputs(query, key, value)
    calls: dict[str, Callable[[], Call]] = {
        sdpa.name: lambda: lambda: sdpa(*tensors),
        FlashAttention4.name: lambda: FlashAttention4().dense(query, key, value),
    }
    times, missing = {}, {}
    for name, make in calls.items():
        reason = missing_baseline("fa4", query, key) if name == FlashAttention4.name else None
        if reason is None:
            try:
                found = measure(make(), device)
            except failures() as error:
                reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            else:
                times[name] = (found.median, found.device)
        if reason is not None:
            missing[name] = reason
    return Dense(inputs.tokens, sdpa.name, times, missing)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument(
        "--recall", type=float, default=0.97, help="every policy has the gamma that reaches it"
    )
    parser.add_argument(
        "--density",
        type=float,
        nargs="+",
        help="of the plan `mixed`, one for each length; default .30 at 8K, .11 at 32K, .10 at 128K",
    )
    parser.add_argument("--plans", nargs="+", choices=list(PLANS), default=list(PLANS))
    parser.add_argument("--impl", nargs="+", choices=IMPLS, help="default: all; on a CPU auto")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--commit", help="the commit, where the sources are without git's files")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; use --device cpu")
    options.impl = options.impl or (IMPLS if options.device == "cuda" else ["auto"])
    options.density = options.density or [wanted_density(tokens) for tokens in options.tokens]
    if len(options.density) != len(options.tokens):
        parser.error("--density takes one number for each of --tokens")
    if min(options.tokens) < 4 * BLOCK:
        parser.error(f"--tokens takes {4 * BLOCK} or more")
    return options


def main() -> None:
    options = parse()
    facts = provenance(options.device, options.commit) | {"recall": options.recall}
    print(" ".join(f"{name}={value}" for name, value in facts.items()))
    dense: list[Dense] = []
    rows: list[Row] = []
    for tokens, density in zip(options.tokens, options.density, strict=True):
        inputs = Structured(tokens, options.device)
        tuning = inputs.tune(density, options.recall, PLANS["mixed"])
        print(
            f"{tokens} tokens: {tuning.hot} attracting blocks give `mixed` a density of "
            f"{tuning.density:.3f}, {density:g} was wanted"
        )
        dense.append(dense_times(inputs, options.device))
        print(json.dumps(asdict(dense[-1])), flush=True)
        for name in options.plans:
            gammas = tuning.gammas
            if not gammas_of(PLANS[name]) <= set(gammas):
                gammas = inputs.gammas_for(options.recall, PLANS[name])
            named = {policy.label: gammas[policy] for policy in gammas_of(PLANS[name])}
            known = facts_of(inputs.layer(uniform_plan(PLANS[name], gammas))())
            for impl in options.impl:
                plan = uniform_plan(PLANS[name], gammas, in_fp8=impl == FP8)
                try:
                    # Launches of one implementation are not to be repeated for another.
                    found = layer_time(inputs.layer(plan), impl, options.device, options.repeats)
                except UnsupportedError as error:
                    rows.append(Row(tokens, name, impl, named, known, missing=str(error)))
                else:
                    rows.append(Row(tokens, name, impl, named, known, found))
                print(json.dumps(asdict(rows[-1])), flush=True)
        # After every length: a run that is cut off keeps what it has.
        ratios = comparisons(dense, rows)
        if options.json:
            numbers = {
                "facts": facts,
                "dense": [asdict(known) for known in dense],
                "layers": [asdict(row) for row in rows],
                "ratios": [asdict(ratio) for ratio in ratios],
            }
            options.json.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
        if options.markdown:
            options.markdown.write_text(markdown(facts, dense, rows, ratios), encoding="utf-8")
    print("\n" + "\n".join(comparison_table(ratios)))


if __name__ == "__main__":
    main()
