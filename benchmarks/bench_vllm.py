"""Time to first token inside vLLM: requests with the plug-in against requests without, alternating.

    python benchmarks/bench_vllm.py --lengths 16384,32768,131072 --density .1
    python benchmarks/bench_vllm.py --model MODEL --artifact clusters.st --lengths 8192

One engine serves both: a request that carries `shareprefill: off` is dense to the bit of vLLM's own
backend. Without `--model` the model has a known shape and random weights, and its patterns are
synthetic, at about `--density` of the blocks: only times mean something then. Prompts are random
tokens, and nothing is read from a prefix cache.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from provenance import provenance, summary

from shareprefill.artifact import save_artifact
from shareprefill.bench.shapes import build_shape, layers_of
from shareprefill.bench.synthetic import synthetic_artifact


def made_model(folder: Path, shape: str, layers: int, tokens: int, density: float) -> Path:
    """A folder with the configuration of a shape, and `clusters.st` beside it."""
    meta = torch.device("meta")
    model = build_shape(shape, layers=layers, tokens=tokens, device=meta, dtype=torch.bfloat16)
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder)
    save_artifact(synthetic_artifact(model, density), folder / "clusters.st")
    return folder


def measure(llm: Any, length: int, vocabulary: int, repeats: int) -> dict[str, list[float]]:
    """Seconds to the first token, `off` and `on`, one after the other."""
    from vllm import SamplingParams

    times: dict[str, list[float]] = {"off": [], "on": []}
    for repeat in range(repeats + 1):
        for kind in times:
            prompt = {"prompt_token_ids": [random.randrange(vocabulary) for _ in range(length)]}
            extra = {"shareprefill": "off"} if kind == "off" else None
            parameters = SamplingParams(max_tokens=1, temperature=0, extra_args=extra)
            begun = time.perf_counter()
            llm.generate(prompt, parameters, use_tqdm=False)
            if repeat:
                times[kind].append(time.perf_counter() - begun)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a model; without one: --shape")
    parser.add_argument("--artifact", type=Path, help="of the model")
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--lengths", default="16384,32768,131072", help="tokens of the prompts")
    parser.add_argument("--chunk", type=int, help="tokens of a step; without: the whole prompt")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compiled", action="store_true", help="torch.compile and CUDA graphs")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--commit", help="of the sources, where git is not there to tell")
    parser.add_argument("--json", type=Path, help="writes the figures there")
    args = parser.parse_args()
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if args.tensor_parallel == 1:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    lengths = [int(length) for length in args.lengths.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        model, artifact = args.model, args.artifact
        if model is None:
            layers = args.layers or layers_of(args.shape)
            model = made_model(Path(folder), args.shape, layers, max(lengths) + 64, args.density)
            artifact = model / "clusters.st"
        rows = run(args, lengths, model, artifact)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


def run(
    args: argparse.Namespace, lengths: list[int], model: Path, artifact: Path
) -> list[dict[str, Any]]:
    """Starts an engine, measures every length, and prints a table."""
    import vllm

    llm = vllm.LLM(
        str(model),
        load_format="auto" if args.model else "dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        enforce_eager=not args.compiled,
        max_model_len=max(lengths) + 64,
        max_num_batched_tokens=args.chunk or max(lengths) + 64,
        max_num_seqs=16,
        enable_prefix_caching=False,
        tensor_parallel_size=args.tensor_parallel,
        worker_extension_cls="shareprefill.vllm.report.ReportExtension",
        additional_config={"shareprefill": {"artifact": str(artifact), "min_tokens": 0}},
        **({} if os.environ.get("SHAREPREFILL_NO_CUSTOM") else {"attention_backend": "CUSTOM"}),
    )
    vocabulary = llm.model_config.get_vocab_size()
    facts = provenance("cuda" if torch.cuda.is_available() else "cpu", args.commit)
    print(f"vLLM {vllm.__version__}, {summary(facts)}")
    print(f"chunks of {args.chunk or 'the whole prompt'}; medians of {args.repeats}, seconds")
    print("| tokens | vLLM | shareprefill | speed-up | spread | density |")
    print("| --- | --- | --- | --- | --- | --- |")
    rows = []
    for length in lengths:
        times = measure(llm, length, vocabulary, args.repeats)
        off, on = (statistics.median(times[kind]) for kind in ("off", "on"))
        spread = max((max(t) - min(t)) / statistics.median(t) for t in times.values())
        (report, *_) = llm.collective_rpc("shareprefill_report", args=(True,))
        density = report["recent"]["auto"]["density"]
        print(
            f"| {length} | {off:.3f} | {on:.3f} | {off / on:.2f} | {spread:.1%} | {density:.3f} |",
            flush=True,
        )
        rows.append({"tokens": length, "times": times, "density": density})
    return rows


if __name__ == "__main__":
    main()
