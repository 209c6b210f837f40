"""Engines of vLLM that take turns, each in a process of its own: first tokens, throughput, answers.

    python benchmarks/vllm_turns.py --engines shared --lengths 16384,32768,131072 --chunks 0,8192
    python benchmarks/vllm_turns.py --engines shared,plain --throughput 1024:128:64 --compiled
    python benchmarks/vllm_turns.py --engines shared,shared:2,shared@128 --lengths 131072:2
    python benchmarks/vllm_turns.py --engines shared/.05 --lengths 32768 --chunks 8192
    python benchmarks/vllm_turns.py --engines shared --model MODEL --artifact clusters.st \
        --questions 200 --length 16384

`shared` is an engine with the plug-in, `plain` one without it; `:N` divides its heads over N GPUs,
`:ppN` its layers; `@N` gives its cache pages of N tokens; `/D` its plan another `--density`.
Without `--model` the model has a known shape and random weights, and its patterns are synthetic, at
about `--density` of a whole prompt's blocks: only times mean something then. Prompts are random
tokens, those of a named model key-value retrieval; nothing is read from a prefix cache.

- `--lengths TOKENS[:REPEATS]`: time to first token of each `shared` engine, dense (requests with
  `off`, which are vLLM's own to the bit) and shared in turns, at every number of tokens a step that
  `--chunks` names (0: the whole prompt). The first shared prefill of an engine is told beside them:
  nothing may be compiled in it.
- `--throughput TOKENS:OUTPUT:REQUESTS`: so many requests at once, too short to be sparse.
- `--questions`: of key-value retrieval, answered by each `shared` engine, dense and shared.
"""

# vLLM lives in an environment of its own: it is not there where types are checked.
# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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
from shareprefill.bench.timings import Timing, rows_of
from shareprefill.calib.tasks import Example, generate, score
from shareprefill.models import load_tokenizer
from shareprefill.tokens import encode
from shareprefill.vllm.options import switch_is_on

Json = dict[str, Any]
Question = tuple[Example, list[int]]
# A `multiprocessing.connection.Connection`, whose type differs by system.
Pipe = Any


class Engine(NamedTuple):
    """What one process runs.

    Attributes:
        kind: `shared` or `plain`.
        heads_over: GPUs that its heads are over.
        layers_over: GPUs that its layers are over.
        page: Tokens of a page of its cache; 0 leaves them to vLLM.
        density: Of its synthetic plan; 0 for that of all.
    """

    kind: str
    heads_over: int = 1
    layers_over: int = 1
    page: int = 0
    density: float = 0

    @classmethod
    def read(cls, text: str) -> Engine:
        """`shared`, `plain`, `shared:2`, `shared:pp2`, `shared:2@128`, ..."""
        found = re.fullmatch(r"(shared|plain)(?::(pp)?(\d+))?(?:@(\d+))?(?:/(\d*\.\d+))?", text)
        if found is None:
            raise SystemExit(f"--engines: {text!r} is none of shared, plain, shared:2, shared@128")
        kind, is_pipeline, size, page, density = found.groups()
        over = {"layers_over" if is_pipeline else "heads_over": int(size or 1)}
        return cls(kind, **over, page=int(page or 0), density=float(density or 0))

    @property
    def name(self) -> str:
        """As in the tables."""
        size = f"{'pp' * (self.layers_over > 1)}{self.heads_over * self.layers_over}"
        page = f"@{self.page}" * (self.page > 0)
        return f"{self.kind}:{size}{page}{f'/{self.density}' * (self.density > 0)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--engines", default="shared,plain")
    parser.add_argument("--model", type=Path, help="a model; without one: --shape")
    parser.add_argument("--artifact", type=Path, help="of the model")
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--lengths", default="", help="TOKENS[:REPEATS],...")
    parser.add_argument("--chunks", default="0", help="tokens of a step; 0: the whole prompt")
    parser.add_argument("--throughput", default="", help="TOKENS:OUTPUT:REQUESTS,...")
    parser.add_argument("--questions", type=int, default=0)
    parser.add_argument("--length", type=int, default=16384, help="of a question's prompt")
    parser.add_argument(
        "--min-tokens",
        type=int,
        help="shorter prompts are dense; without: half of the shortest that is timed or asked",
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warm-ups", type=int, default=1, help="prefills that are not timed")
    parser.add_argument("--requests", type=int, default=16, help="of a step, at most")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="seconds of the engine's threads: on a CPU that others use too",
    )
    parser.add_argument("--compiled", action="store_true", help="torch.compile and CUDA graphs")
    parser.add_argument("--graphs", help="which CUDA graphs, as vLLM names them")
    parser.add_argument("--memory", type=float, help="share of a GPU for an engine")
    parser.add_argument("--cache", type=float, help="GiB of keys and values for an engine")
    parser.add_argument("--arguments", type=json.loads, default={}, help="of vllm.LLM, as JSON")
    parser.add_argument("--commit", help="of the sources, where git is not there to tell")
    parser.add_argument("--json", type=Path, help="writes the figures there")
    args = parser.parse_args()
    read_tasks(args)
    engines = [Engine.read(text) for text in args.engines.split(",")]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        if args.is_random:
            layers = args.layers or layers_of(args.shape)
            args.synthetic = {
                density: random_checkpoint(
                    Path(folder, str(density)), args.shape, layers, args.most + 64, density
                )
                for density in {engine.density or args.density for engine in engines}
            }
        elif any(engine.density for engine in engines):
            raise SystemExit("--engines: a density is of a synthetic plan, without --model")
        # All start at once: most of a start is the host's work.
        ends = {engine: stack.enter_context(running(engine, args)) for engine in engines}
        measured(args, ends)


def read_tasks(args: argparse.Namespace) -> None:
    """Replaces what the options say in text, and sets what follows from them."""
    lengths = [list(map(int, text.split(":"))) for text in args.lengths.split(",") if text]
    args.lengths = [(tokens, *(repeats or [args.repeats])) for tokens, *repeats in lengths]
    args.chunks = [int(chunk) for chunk in args.chunks.split(",")]
    args.loads = [[int(n) for n in load.split(":")] for load in args.throughput.split(",") if load]
    args.is_random = args.model is None
    sparse = [tokens for tokens, _ in args.lengths] + [args.length] * bool(args.questions)
    longest_load = max((tokens for tokens, _, _ in args.loads), default=0)
    if args.min_tokens is None:
        args.min_tokens = min(sparse) // 2 if sparse else longest_load + 1
    if longest_load >= args.min_tokens:
        raise SystemExit(
            f"--throughput: prompts of {longest_load} tokens would be sparse, from "
            f"{args.min_tokens} on: name a larger --min-tokens"
        )
    args.most = max([*sparse, *(tokens + output for tokens, output, _ in args.loads)])


@contextmanager
def running(engine: Engine, args: argparse.Namespace) -> Iterator[Pipe]:
    """An engine's process; gives the end of a pipe that takes tasks and returns what they find."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, engine, args))
    process.start()
    # The process holds the other end alone: where it dies, this end says so.
    theirs.close()
    try:
        yield mine
    finally:
        mine.close()
        process.join()


def serve(end: Pipe, engine: Engine, args: argparse.Namespace) -> None:
    """Starts an engine and does its tasks, until there is nobody to give some."""
    if engine.kind == "plain":
        os.environ["VLLM_PLUGINS"] = ""
        # Folders that hold our entry points alone. Where they lie among other packages, the switch
        # of single requests stays, and idles.
        sys.path[:] = [path for path in sys.path if not _is_ours_alone(Path(path))]
    # Scheduled in this process, however many compute: `run_prefills` tells the scheduler the chunk.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    with engine_settings():
        began = time.perf_counter()
        llm = started(engine, args)
        end.send(state_of(llm) | {"start_s": time.perf_counter() - began})
        while True:
            try:
                name, *arguments = end.recv()
            except EOFError:
                return
            end.send(TASKS[name](llm, args, *arguments))


def _is_ours_alone(folder: Path) -> bool:
    return any(folder.glob("shareprefill-*.dist-info")) and not (folder / "vllm").exists()


def started(engine: Engine, args: argparse.Namespace) -> Any:
    """The engine."""
    import torch

    arguments: Json = {
        "dtype": args.dtype,
        "enforce_eager": not args.compiled,
        "tensor_parallel_size": engine.heads_over,
        "pipeline_parallel_size": engine.layers_over,
        "max_num_seqs": args.requests,
    }
    model, artifact = args.model, args.artifact
    options: Json = {}
    if args.is_random:
        artifact = args.synthetic[engine.density or args.density]
        model, options = artifact.parent, {"checkpoint": "unchecked"}
    options |= {"artifact": str(artifact), "min_tokens": args.min_tokens}
    arguments["additional_config"] = {"shareprefill": options}
    if engine.kind == "plain":
        arguments["additional_config"] = {}
        if torch.cuda.is_available():
            arguments["attention_backend"] = "FLASH_ATTN"
    if engine.page:
        arguments["block_size"] = engine.page
    if args.graphs:
        arguments["compilation_config"] = {"cudagraph_mode": args.graphs}
    if args.memory:
        arguments["gpu_memory_utilization"] = args.memory
    if args.cache:
        # Not measured: the other engines take memory meanwhile.
        arguments["kv_cache_memory_bytes"] = int(args.cache * 2**30)
    return start_engine(
        str(model),
        str(artifact),
        tokens=args.most,
        is_random=args.is_random,
        **arguments | args.arguments,
    )


def state_of(llm: Any) -> Json:
    """The modes that an engine says it runs in."""
    import vllm

    config = llm.llm_engine.vllm_config
    graphs = config.compilation_config.cudagraph_mode
    return {
        "vllm": vllm.__version__,
        "cudagraph_mode": getattr(graphs, "name", str(graphs)),
        "compilation": str(config.compilation_config.mode),
        "async_scheduling": config.scheduler_config.async_scheduling,
        "page": config.cache_config.block_size,
    }


def measured(args: argparse.Namespace, ends: dict[Engine, Pipe]) -> None:
    """Does all tasks, and prints tables."""
    import torch

    # While the engines start.
    questions = questions_of(args)
    states = {engine.name: end.recv() for engine, end in ends.items()}
    print(summary(provenance("cuda" if torch.cuda.is_available() else "cpu", args.commit)))
    for name, state in states.items():
        print(f"{name}: {state}")
    found: Json = {"states": states}
    shared = {engine: end for engine, end in ends.items() if engine.kind == "shared"}
    tasks: dict[str, Callable[[], list[Json]] | None] = {
        "throughput": args.loads and partial(throughputs, args, ends),
        "prefills": args.lengths and partial(first_tokens, args, shared),
        "questions": args.questions and partial(answers, args, questions, shared),
    }
    for name, task in tasks.items():
        if task:
            found[name] = task()
        if args.json:
            # After every task: a run that ends too early leaves what it has.
            args.json.write_text(json.dumps(found, indent=1))


def questions_of(args: argparse.Namespace) -> list[Question]:
    """Key-value retrieval, no two alike."""
    if not args.questions:
        return []
    tokenizer = load_tokenizer(str(args.model))
    examples = (generate("retr_kv", tokenizer, args.length, n) for n in range(args.questions))
    return [(example, encode(tokenizer, example.prompt).tolist()) for example in examples]


def ask(end: Pipe, *task: Any) -> Any:
    """One task of an engine."""
    end.send(task)
    return end.recv()


def throughputs(args: argparse.Namespace, ends: dict[Engine, Pipe]) -> list[Json]:
    """Tokens a second under every load, the engines in turns; the first turn warms up."""
    print("| prompt | output | requests | engine | seconds | spread | throughput of the last |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    rows = []
    for load in args.loads:
        times: dict[Engine, list[float]] = {engine: [] for engine in ends}
        for _ in range(args.repeats + 1):
            for engine, end in ends.items():
                times[engine].append(ask(end, "load", *load))
        medians = {engine: statistics.median(taken[1:]) for engine, taken in times.items()}
        last = list(medians.values())[-1]
        for engine, median in medians.items():
            taken = times[engine][1:]
            spread = (max(taken) - min(taken)) / median
            cells = (*load, engine.name, f"{median:.3f}", f"{spread:.1%}", f"{last / median:.3f}")
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
            rows.append({"load": load, "engine": engine.name, "seconds": times[engine]})
    return rows


def first_tokens(args: argparse.Namespace, ends: dict[Engine, Pipe]) -> list[Json]:
    """Time to first token at every length and number of tokens a step."""
    print("| tokens | a step | engine | vLLM | shareprefill | speed-up | spread | density |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    rows = []
    for engine, end in ends.items():
        first = ask(end, "prefills", min(args.lengths)[0], 0, 1, 0)
        print(f"{engine.name}: the first of all took {first.shared_s[0]:.3f} s")
        rows.append({"engine": engine.name, "chunk": "first", **rows_of([first])[0]})
    for length, repeats in args.lengths:
        for chunk in args.chunks:
            for engine, end in ends.items():
                timing: Timing = ask(end, "prefills", length, chunk, repeats, args.warm_ups)
                off, on = statistics.median(timing.dense_s), statistics.median(timing.shared_s)
                print(
                    f"| {length} | {chunk or 'all'} | {engine.name} | {off:.3f} | {on:.3f} "
                    f"| {timing.speedup:.2f} | {timing.spread:.1%} | {timing.density:.3f} |",
                    flush=True,
                )
                rows.append({"engine": engine.name, "chunk": chunk, **rows_of([timing])[0]})
    return rows


def answers(
    args: argparse.Namespace, questions: list[Question], ends: dict[Engine, Pipe]
) -> list[Json]:
    """Right answers of every engine, dense and shared; and how many are the first one's."""
    tokenizer = load_tokenizer(str(args.model))
    examples, prompts = zip(*questions, strict=True)
    longest = max(len(encode(tokenizer, example.answer)) for example in examples) + 2
    columns = (
        *("engine", "requests", "right", "as the first engine's", "density", "seconds"),
        *("sparse rows", "cached tokens", "preemptions", "sparse steps", "their density"),
    )
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    rows, known = [], {}
    # An engine without the switch refuses requests that carry one.
    for switch in ("off", None) if switch_is_on() else (None,):
        for engine, end in ends.items():
            found = ask(end, "answers", prompts, longest, switch)
            tokens = found.pop("tokens")
            texts = [str(tokenizer.decode(answer)) for answer in tokens]
            right = sum(score(e, text) for e, text in zip(examples, texts, strict=True))
            same = sum(map(list.__eq__, tokens, known.setdefault(switch, tokens)))
            cells = (engine.name, switch or "shared", right, same, *found.values())
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
            rows.append(dict(zip(columns, cells, strict=True)))
    return rows


def run_prefills(
    llm: Any, args: argparse.Namespace, tokens: int, chunk: int, repeats: int, warm_ups: int
) -> Timing:
    """Times prefills, `chunk` tokens of each a step."""
    prompts = random_prompts(llm) if args.is_random else retrieval_prompts(str(args.model))
    scheduler = llm.llm_engine.vllm_config.scheduler_config
    scheduler.long_prefill_token_threshold = chunk
    try:
        return time_prefills(llm, prompts, tokens, repeats, clock_of(args), warm_ups=warm_ups)
    finally:
        # Loads and questions come in steps of the engine's own size.
        scheduler.long_prefill_token_threshold = 0


def run_load(llm: Any, args: argparse.Namespace, tokens: int, output: int, requests: int) -> float:
    """Seconds of some requests that come at once."""
    from vllm import SamplingParams

    make = random_prompts(llm)
    prompts = [{"prompt_token_ids": make(tokens)} for _ in range(requests)]
    parameters = SamplingParams(max_tokens=output, temperature=0, ignore_eos=True)
    clock = clock_of(args)
    begun = clock()
    llm.generate(prompts, parameters, use_tqdm=False)
    return clock() - begun


def clock_of(args: argparse.Namespace) -> Callable[[], float]:
    """Seconds of the engine's threads, or of the day."""
    return time.process_time if args.processor_time else time.perf_counter


def run_answers(
    llm: Any,
    args: argparse.Namespace,
    prompts: list[list[int]],
    longest: int,
    switch: str | None,
) -> Json:
    """Greedy answers, and what was done for them; preemptions where the engine counts them."""
    from vllm import SamplingParams

    extra = None if switch is None else {"shareprefill": switch}
    parameters = SamplingParams(max_tokens=longest, temperature=0, extra_args=extra)
    clock = clock_of(args)
    begun = clock()
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    answers = llm.generate(inputs, parameters, use_tqdm=False)
    seconds = clock() - begun
    reports = llm.collective_rpc("shareprefill_report", args=(True,))
    sparse = [recent for report in reports if (recent := report["recent"].get("auto"))]
    steps = reports[0].get("decoding", {})
    metrics = llm.get_metrics() if llm.llm_engine.log_stats else []
    return {
        "tokens": [list(answer.outputs[0].token_ids) for answer in answers],
        "density": statistics.mean(r["density"] for r in sparse) if sparse else None,
        "seconds": round(seconds, 1),
        "sparse": reports[0]["rows"]["sparse"].get("auto", 0),
        "cached": sum(answer.num_cached_tokens or 0 for answer in answers),
        "preemptions": next((m.value for m in metrics if m.name == "vllm:num_preemptions"), None),
        "steps": steps.get("steps"),
        "steps_density": steps.get("density"),
    }


TASKS: dict[str, Callable[..., Any]] = {
    "prefills": run_prefills,
    "load": run_load,
    "answers": run_answers,
}


if __name__ == "__main__":
    main()
