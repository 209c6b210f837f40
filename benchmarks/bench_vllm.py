"""Time to first token inside vLLM: requests with the plug-in against requests without, alternating.

    python benchmarks/bench_vllm.py --lengths 16384,32768,131072 --density .1
    python benchmarks/bench_vllm.py --model MODEL --artifact clusters.st --lengths 8192

One engine serves both: a request that carries `shareprefill: off` is dense to the bit of vLLM's own
backend. Without `--model` the model has a known shape and random weights, and its patterns are
synthetic, at about `--density` of the blocks: only times mean something then. Prompts are random
tokens, those of a named model key-value retrieval; nothing is read from a prefix cache.
"""

# vLLM lives in an environment of its own: it is not there where types are checked.
# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from provenance import provenance, summary

from shareprefill.bench.engine import (
    engine_settings,
    random_checkpoint,
    random_prompts,
    retrieval_prompts,
    start_engine,
    time_prefills,
)
from shareprefill.bench.shapes import layers_of
from shareprefill.bench.timings import rows_of


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a model; without one: --shape")
    parser.add_argument("--artifact", type=Path, help="of the model")
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--lengths", default="16384,32768,131072", help="tokens of the prompts")
    parser.add_argument("--chunk", type=int, help="tokens of a step; without: the whole prompt")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="seconds of this process's threads: on a CPU that others use too",
    )
    parser.add_argument("--compiled", action="store_true", help="torch.compile and CUDA graphs")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--commit", help="of the sources, where git is not there to tell")
    parser.add_argument("--json", type=Path, help="writes the figures there")
    args = parser.parse_args()
    lengths = [int(length) for length in args.lengths.split(",")]
    with tempfile.TemporaryDirectory() as folder, engine_settings(args.tensor_parallel):
        model, artifact = args.model or Path(folder), args.artifact
        if args.model is None:
            layers = args.layers or layers_of(args.shape)
            artifact = random_checkpoint(model, args.shape, layers, max(lengths) + 64, args.density)
        rows = run(args, lengths, model, artifact)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


def run(
    args: argparse.Namespace, lengths: list[int], model: Path, artifact: Path
) -> list[dict[str, Any]]:
    """Starts an engine, measures every length, and prints a table."""
    import vllm

    llm = start_engine(
        str(model),
        str(artifact),
        tokens=max(lengths),
        is_random=args.model is None,
        dtype=args.dtype,
        enforce_eager=not args.compiled,
        tensor_parallel_size=args.tensor_parallel,
        **({"max_num_batched_tokens": args.chunk} if args.chunk else {}),
    )
    facts = provenance("cuda" if torch.cuda.is_available() else "cpu", args.commit)
    print(f"vLLM {vllm.__version__}, {summary(facts)}")
    print(f"chunks of {args.chunk or 'the whole prompt'}; medians of {args.repeats}, seconds")
    print("| tokens | vLLM | shareprefill | speed-up | spread | density |")
    print("| --- | --- | --- | --- | --- | --- |")
    clock, timings = time.process_time if args.processor_time else time.perf_counter, []
    prompts = retrieval_prompts(str(model)) if args.model else random_prompts(llm)
    for length in lengths:
        timing = time_prefills(llm, prompts, length, args.repeats, clock)
        off, on = statistics.median(timing.dense_s), statistics.median(timing.shared_s)
        print(
            f"| {length} | {off:.3f} | {on:.3f} | {timing.speedup:.2f} | {timing.spread:.1%} "
            f"| {timing.density:.3f} |",
            flush=True,
        )
        timings.append(timing)
    return rows_of(timings)


if __name__ == "__main__":
    main()
