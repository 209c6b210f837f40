"""Tokens a second of decode steps inside a vLLM engine: dense steps and sparse ones, in turns.

    python benchmarks/vllm_decode.py --tokens 32768 --requests 8 --layers 8
    python benchmarks/vllm_decode.py --tokens 32768 --requests 8 --layers 8 --compiled
    python benchmarks/vllm_decode.py --tokens 32768 --requests 8 --layers 8 --compiled --plain

Prompts are read once, and lie in the prefix cache then; steps are timed from the moment at which
all requests have their first token, but for the first `--warm-ups`. Requests with `off` are dense,
in CUDA graphs of whole steps (`--compiled`) by the kernels of sparse ones; `--plain` times vLLM
without the plug-in. A model of a known shape has random weights: only times mean something then,
and its steps read more blocks than was asked for where no key stands out.
"""

# vLLM lives in an environment of its own: it is not there where types are checked.
# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from provenance import provenance, summary

from shareprefill.bench.engine import (
    engine_settings,
    random_checkpoint,
    random_prompts,
    start_engine,
)
from shareprefill.bench.shapes import layers_of

Json = dict[str, Any]
# Blocks of a cache, and tokens for other things than prompts.
_PAGE, _ROOM = 128, 64
# Of requests: an engine knows them by different ones.
_NUMBERS = itertools.count()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--tokens", type=int, default=32768, help="of every prompt")
    parser.add_argument("--requests", type=int, default=8, help="that are decoded together")
    parser.add_argument("--steps", type=int, default=64, help="that are timed")
    parser.add_argument("--warm-ups", type=int, default=32, help="steps before, not timed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--density", type=float, default=0.2, help="of sparse decode steps")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--compiled", action="store_true", help="torch.compile and CUDA graphs")
    parser.add_argument("--plain", action="store_true", help="an engine without the plug-in")
    parser.add_argument("--arguments", type=json.loads, default={}, help="of vllm.LLM, as JSON")
    parser.add_argument("--commit", help="of the sources, where git is not there to tell")
    parser.add_argument("--json", type=Path, help="writes the figures there")
    args = parser.parse_args()
    args.most = args.tokens + args.warm_ups + args.steps + _ROOM
    if args.plain:
        os.environ["VLLM_PLUGINS"] = ""
    with tempfile.TemporaryDirectory() as folder, engine_settings():
        measured(started(Path(folder), args), args)


def started(folder: Path, args: argparse.Namespace) -> Any:
    """The engine."""
    layers = args.layers or layers_of(args.shape)
    artifact = random_checkpoint(folder, args.shape, layers, args.most + _ROOM, 0.1)
    options = {
        "artifact": str(artifact),
        "checkpoint": "unchecked",
        "min_tokens": args.tokens // 2,
        "decode": "sparse",
        "decode_density": args.density,
    }
    arguments: Json = {
        "dtype": args.dtype,
        "enforce_eager": not args.compiled,
        "enable_prefix_caching": True,
        "max_num_seqs": args.requests,
        "block_size": _PAGE,
        "additional_config": {} if args.plain else {"shareprefill": options},
    }
    if args.plain:
        arguments["attention_backend"] = None
    return start_engine(
        str(folder), str(artifact), tokens=args.most, is_random=True, **arguments | args.arguments
    )


def measured(llm: Any, args: argparse.Namespace) -> None:
    """Times both kinds of steps in turns, and prints a table."""
    import torch

    config = llm.llm_engine.vllm_config
    graphs = config.compilation_config.cudagraph_mode
    print(summary(provenance("cuda" if torch.cuda.is_available() else "cpu", args.commit)))
    print(f"CUDA graphs: {getattr(graphs, 'name', graphs)}", flush=True)
    make = random_prompts(llm)
    prompts = [make(args.tokens) for _ in range(args.requests)]
    kinds: dict[str, str | None] = {"dense": "off"}
    kinds = {"plain": None} if args.plain else kinds | {"sparse": None}
    # Reads the prompts, each by itself.
    for prompt in prompts:
        run(llm, [prompt], 0, 1, None)
    found: dict[str, list[Json]] = {kind: [] for kind in kinds}
    for _ in range(args.repeats):
        for kind, switch in kinds.items():
            seconds = run(llm, prompts, args.warm_ups, args.steps, switch)
            report = {}
            if not args.plain:
                (report,) = llm.collective_rpc("shareprefill_report", args=(True,))
            found[kind].append({"seconds": seconds} | report.get("decoding", {}))
    print("| steps | ms a step | tokens a second | spread | density | sparse steps | dense ones |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for kind, runs in found.items():
        times = [taken["seconds"] / args.steps for taken in runs]
        median, last = statistics.median(times), runs[-1]
        density = last.get("density")
        cells = (
            *(kind, f"{1000 * median:.2f}", f"{args.requests / median:.0f}"),
            f"{(max(times) - min(times)) / median:.1%}",
            *("" if density is None else f"{density:.3f}", last.get("steps", "")),
            sum(last.get("dense_steps", {}).values()) if "dense_steps" in last else "",
        )
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


def run(llm: Any, prompts: list[list[int]], warm_ups: int, steps: int, switch: str | None) -> float:
    """Seconds of so many steps of all prompts together, behind their first tokens."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    extra = None if switch is None else {"shareprefill": switch}
    parameters = SamplingParams(
        max_tokens=1 + warm_ups + steps, temperature=0, ignore_eos=True, extra_args=extra
    )
    for prompt in prompts:
        engine.add_request(str(next(_NUMBERS)), {"prompt_token_ids": prompt}, parameters)
    tokens: dict[str, int] = {}
    begun = None
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens[output.request_id] = len(output.outputs[0].token_ids)
        has_all = len(tokens) == len(prompts) and min(tokens.values()) > warm_ups
        if begun is None and has_all:
            begun = time.perf_counter()
    assert begun is not None
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
