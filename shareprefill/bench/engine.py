"""Times prefills inside a vLLM engine: requests with the plug-in and without, in turns.

One engine serves both: a request that carries `shareprefill: off` is dense to the bit of vLLM's own
backend. Nothing is read from a prefix cache.
"""

# vLLM lives in an environment of its own: it is not there where types are checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import itertools
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from shareprefill.artifact import save_artifact
from shareprefill.bench.config import TuneConfig
from shareprefill.bench.shapes import build_shape, layers_of
from shareprefill.bench.synthetic import synthetic_artifact
from shareprefill.bench.timings import Timing, Tuning
from shareprefill.errors import ConfigError
from shareprefill.models import load_tokenizer, resolve_model
from shareprefill.runtime.crossover import LayerSizes

Prompts = Callable[[int], list[int]]
"""Makes token ids of a prompt of about so many tokens."""

# Tokens of an engine's limits beside the prompt.
_ROOM = 64
_SETTINGS = {
    "VLLM_NO_USAGE_STATS": "1",
    # vLLM's own defaults on a CPU: nearly all memory, and cores of its choice.
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


@contextmanager
def engine_settings(processes: int = 1) -> Iterator[None]:
    """vLLM's settings for the block, where the environment has none of its own.

    Args:
        processes: That compute; a single one is this process.
    """
    several = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0" if processes == 1 else "1"}
    wanted = _SETTINGS | several
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def random_checkpoint(folder: Path, shape: str, layers: int, tokens: int, density: float) -> Path:
    """A folder with the configuration of a shape, and `clusters.st` beside it.

    Args:
        folder: Where they go.
        shape: A name in `SHAPES`.
        layers: Layers of the model.
        tokens: The longest prompt.
        density: Share of a whole prompt's causal blocks that the synthetic patterns are to cover.

    Returns:
        The artifact's path.
    """
    meta = torch.device("meta")
    model = build_shape(shape, layers=layers, tokens=tokens, device=meta, dtype=torch.bfloat16)
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder)
    save_artifact(synthetic_artifact(model, density), folder / "clusters.st")
    return folder / "clusters.st"


def start_engine(
    model: str, artifact: str, *, tokens: int, is_random: bool, **arguments: Any
) -> Any:
    """An engine with the plug-in, in which every prefill of at least a block is sparse.

    Args:
        model: A folder or a hub id.
        artifact: Of the model.
        tokens: The longest prompt.
        is_random: Whether there is only the model's configuration: its weights are to be random.
        arguments: Of `vllm.LLM`, over those that are set here.

    Returns:
        The `vllm.LLM`.
    """
    import vllm

    # A CPU passes over CUSTOM, and the plug-in takes its backend's own name.
    named = {"attention_backend": "CUSTOM"} if torch.cuda.is_available() else {}
    options = {"artifact": artifact, "min_tokens": 0}
    if is_random:
        options["checkpoint"] = "unchecked"
    known = {
        "load_format": "dummy" if is_random else "auto",
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": tokens + _ROOM,
        "max_num_batched_tokens": tokens + _ROOM,
        "max_num_seqs": 16,
        "enable_prefix_caching": False,
        "worker_extension_cls": "shareprefill.bench.random_weights.RandomWeights",
        "additional_config": {"shareprefill": options},
    }
    llm = vllm.LLM(model, **known | named | arguments)
    if is_random:
        llm.collective_rpc("shareprefill_randomize")
    return llm


def random_prompts(llm: Any) -> Prompts:
    """Prompts of random tokens: for random weights, to which all are alike."""
    vocabulary = llm.model_config.get_vocab_size()
    return lambda tokens: [random.randrange(vocabulary) for _ in range(tokens)]


def retrieval_prompts(model: str) -> Prompts:
    """Prompts of key-value retrieval, each a little below its length, no two alike.

    Args:
        model: Whose tokenizer it is.
    """
    from shareprefill.calib.tasks import generate

    tokenizer, seeds = load_tokenizer(model), itertools.count()

    def make(tokens: int) -> list[int]:
        text = generate("retr_kv", tokenizer, tokens, next(seeds)).prompt
        return tokenizer(text)["input_ids"]

    return make


def time_prefills(
    llm: Any,
    prompts: Prompts,
    tokens: int,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
    *,
    warm_ups: int = 1,
) -> Timing:
    """Seconds to the first token of prompts of one length.

    Args:
        llm: Of `start_engine`.
        prompts: Makes a prompt.
        tokens: Of every prompt.
        repeats: Prefills of each kind.
        clock: Seconds.
        warm_ups: Prefills of each kind that come before, and are not timed.
    """
    from vllm import SamplingParams

    times: dict[str, list[float]] = {"off": [], "on": []}
    for repeat in range(warm_ups + repeats):
        for kind in times:
            prompt = {"prompt_token_ids": prompts(tokens)}
            extra = {"shareprefill": "off"} if kind == "off" else None
            parameters = SamplingParams(max_tokens=1, temperature=0, extra_args=extra)
            begun = clock()
            llm.generate(prompt, parameters, use_tqdm=False)
            if repeat >= warm_ups:
                times[kind].append(clock() - begun)
    reports = llm.collective_rpc("shareprefill_report", args=(True,))
    # Processes hold as many heads, or layers, each.
    density = statistics.mean(report["recent"]["auto"]["density"] for report in reports)
    return Timing(tokens, tuple(times["off"]), tuple(times["on"]), density)


def time_engine(config: TuneConfig) -> Tuning:
    """Times every length of `sp tune` in an engine of its own.

    Raises:
        ConfigError: a prompt is longer than the model's maximum.
    """
    import vllm

    from shareprefill.vllm import inner_backend

    tokens = max(config.lengths)
    with tempfile.TemporaryDirectory() as folder, engine_settings():
        if config.model is None:
            assert config.shape is not None
            layers = config.layers or layers_of(config.shape)
            model = folder
            what = f"{config.shape}, {layers} layers"
            artifact = str(
                random_checkpoint(
                    Path(folder), config.shape, layers, tokens + _ROOM, config.density
                )
            )
        else:
            assert config.artifact is not None
            model = resolve_model(config.model)
            what, artifact = config.model, os.path.abspath(config.artifact)
            _check_maximum(model, tokens)
        is_plain_cpu = config.dtype == "auto" and not torch.cuda.is_available()
        llm = start_engine(
            model,
            artifact,
            tokens=tokens,
            is_random=config.model is None,
            dtype="float32" if is_plain_cpu else config.dtype,
        )
        prompts = random_prompts(llm) if config.model is None else retrieval_prompts(model)
        timings = tuple(
            time_prefills(llm, prompts, length, config.repeats) for length in config.lengths
        )
        sizes = llm.model_config
        dtype = str(sizes.dtype).removeprefix("torch.")
        heads = sizes.model_arch_config.total_num_attention_heads
        layer = LayerSizes(heads, sizes.get_head_size())
    source = f"sp tune: {what}, {dtype}, vLLM {vllm.__version__}, torch {torch.__version__}"
    return Tuning(inner_backend(), source, timings, layer)


def _check_maximum(model: str, tokens: int) -> None:
    from transformers import AutoConfig

    most = AutoConfig.from_pretrained(model).get_text_config().max_position_embeddings
    if tokens + _ROOM > most:
        raise ConfigError(
            f"lengths = {tokens} is not allowed: with {_ROOM} tokens of room it is above the "
            f"model's maximum of {most}"
        )
