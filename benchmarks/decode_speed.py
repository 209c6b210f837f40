"""Tokens a second of a model whose cache is full: sparse and dense decode steps.

    python benchmarks/decode_speed.py --layers 8 --batch 1 8 --tokens 131072

The model has the shape of a published one, fewer layers, and random weights; its cache is filled
with random keys and values. How many blocks steps read is what was asked for, so that times are
those of a real model; answers are nothing. Keys of a block are alike, so that some blocks are worth
more than others. Dense steps are FlashAttention over the keys that there are, KV heads not
repeated, without a mask: transformers' own repeats them, and reads a static cache to its end, and
cuDNN, which SDPA takes first, plans anew for every length.

With a `dynamic` cache, which copies all keys at every step, and a `static` one, sparse steps are a
session with `decode="sparse"`, and the host starts all kernels one by one. `graph`: a CUDA graph of
one step, as servers have it, by the session's core, without what comes once in 32 steps.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from provenance import provenance
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache

from shareprefill.bench.shapes import build_shape
from shareprefill.config import RuntimeConfig
from shareprefill.runtime.decoding import DecodeRecord, SparseDecoding
from shareprefill.runtime.generation import cache_of
from shareprefill.runtime.session import share_prefill

# Tokens that go through the model behind the filled keys, for a session to see queries of.
_PROMPT = 256
# Of keys that are alike; and how much what they have in common is, over what they have not.
_ALIKE, _IN_COMMON = 32, 2.0
_STEPS = "over the keys that there are"


class Steps:
    """Attention of a model, over the keys that there are.

    Attributes:
        tokens: So many.
    """

    def __init__(self) -> None:
        self.tokens = 0
        AttentionInterface.register(_STEPS, self)
        AttentionMaskInterface.register(_STEPS, lambda *_args, **_options: None)

    def __call__(
        self, _module: Any, query: Tensor, key: Tensor, value: Tensor, *_args: Any, **options: Any
    ) -> tuple[Tensor, None]:
        keys = slice(0, self.tokens)
        backend = SDPBackend.FLASH_ATTENTION if query.is_cuda else SDPBackend.MATH
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(
                query, key[:, :, keys], value[:, :, keys], scale=options["scaling"], enable_gqa=True
            )
        return out.transpose(1, 2).contiguous(), None


class SparseSteps(Steps):
    """The same, but single tokens read few blocks.

    Attributes:
        records: What they read, in order.
    """

    def __init__(self, density: float, batch: int) -> None:
        super().__init__()
        self.decoding = SparseDecoding(density=density)
        self.state = self.decoding.begin([0] * batch)
        self.records: list[DecodeRecord] = []

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any
    ) -> tuple[Tensor, None]:
        if query.shape[2] > 1:
            self.decoding.read_prompt(module.layer_idx, self.state, query)
            return super().__call__(module, query, key, value, *args, **options)
        there = (t[:, :, : self.tokens] for t in (key, value))
        out, record = self.decoding.attend(
            *(module.layer_idx, self.state, query[:, :, 0], *there), scale=options["scaling"]
        )
        self.records.append(record)
        return out[:, None], None

    def density(self, layers: int) -> float:
        """What the last step read."""
        last = self.records[-layers:]
        return sum(int(r.counts.sum()) for r in last) / sum(r.blocks for r in last)


def filled_cache(model: Any, kind: str, batch: int, tokens: int, room: int) -> Any:
    """A cache with random keys and values of so many tokens."""
    config = model.config
    cache = DynamicCache() if kind == "dynamic" else StaticCache(config, max_cache_len=room)
    sizes = batch, config.num_key_value_heads, tokens, config.head_dim
    for layer in range(config.num_hidden_layers):
        key, value = (torch.randn(sizes, dtype=model.dtype, device=model.device) for _ in range(2))
        common = torch.randn_like(key[:, :, ::_ALIKE]) * _IN_COMMON
        key += common.repeat_interleave(_ALIKE, 2)[:, :, :tokens]
        cache.update(key, value, layer)
    return cache


@torch.no_grad()
def case(
    model: Any, kind: str, batch: int, tokens: int, density: float | None, options: Any
) -> dict[str, Any]:
    """Milliseconds of a step; sparse ones where there is a density."""
    steps = options.warm_up + options.steps
    cache = filled_cache(model, kind, batch, tokens - _PROMPT, tokens + steps)
    session, dense = None, Steps()
    if density is None:
        model.set_attn_implementation(_STEPS)
    else:
        model.set_attn_implementation("sdpa")
        config = RuntimeConfig(
            policy="streaming",
            min_tokens=0,
            max_density=1e-9,
            decode="sparse",
            decode_density=density,
        )
        session = share_prefill(model, config=config)
    start = 0.0
    ids = torch.randint(3, 500, (batch, _PROMPT), device=model.device)
    with session or nullcontext():
        dense.tokens = tokens
        step = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        for number in range(steps):
            if number == options.warm_up:
                if session is not None:
                    session.reset()
                _wait(model)
                start = time.perf_counter()
            dense.tokens += 1
            token = step.logits[:, -1:].argmax(-1)
            step = model(input_ids=token, **cache_of(step), use_cache=True)
        _wait(model)
        seconds = (time.perf_counter() - start) / options.steps
    row = {"batch": batch, "tokens": tokens, "cache": kind, "density": 1.0, "asked": density}
    row |= {"ms": seconds * 1e3, "tokens/s": batch / seconds}
    if session is not None:
        found = session.report().decoding
        assert found is not None
        assert not found.dense_steps, found
        row["density"] = found.density
    return row


@torch.no_grad()
def fixed_step(
    model: Any, batch: int, tokens: int, density: float | None, warm_up: int, repeats: int
) -> tuple[Callable[[], Tensor], Steps]:
    """A step whose launches are always the same, and its attention, after steps that warm it up.

    Args:
        model: Of a shape.
        batch: Sequences.
        tokens: Before the first step.
        density: Of sparse steps; None: dense ones.
        warm_up: Steps before.
        repeats: How often it will be called at most.
    """
    steps = Steps() if density is None else SparseSteps(density, batch)
    model.set_attn_implementation(_STEPS)
    cache = filled_cache(model, "static", batch, tokens - _PROMPT, tokens + warm_up + repeats)
    steps.tokens = tokens
    ids = torch.randint(3, 500, (batch, _PROMPT), device=model.device)
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = ids[:, :1].clone()

    def step() -> Tensor:
        return model(input_ids=token, past_key_values=cache, use_cache=True).logits

    for _ in range(warm_up):
        steps.tokens += 1
        step()
    return step, steps


@torch.no_grad()
def graph_case(
    model: Any, batch: int, tokens: int, density: float | None, options: Any
) -> dict[str, Any]:
    """Milliseconds of a step in a CUDA graph."""
    # Two more before the graph is made, and one replay before times are taken.
    step, attention = fixed_step(model, batch, tokens, density, options.warm_up, options.steps + 4)
    row: dict[str, Any] = {"batch": batch, "tokens": tokens, "cache": "graph"}
    row |= {"density": 1.0, "asked": density}
    if isinstance(attention, SparseSteps):
        row["density"] = attention.density(model.config.num_hidden_layers)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    _wait(model)
    start = time.perf_counter()
    for _ in range(options.steps):
        graph.replay()
    _wait(model)
    seconds = (time.perf_counter() - start) / options.steps
    return row | {"ms": seconds * 1e3, "tokens/s": batch / seconds}


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Parses the command line and prints a row for each case."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--tokens", type=int, nargs="*", default=[131072])
    parser.add_argument(
        "--cache", nargs="*", default=["static", "graph"], choices=["dynamic", "static", "graph"]
    )
    parser.add_argument("--density", type=float, nargs="*", default=[0.1, 0.2])
    parser.add_argument("--warm-up", type=int, default=24, help="steps, until the price is found")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", help="of the sources, where git's files are not there")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    most = max(options.tokens) + options.warm_up + options.steps
    model = build_shape(
        options.shape, layers=options.layers, tokens=most, device=device, dtype=dtype
    )
    rows = []
    for batch in options.batch:
        for tokens in options.tokens:
            for kind in options.cache:
                for density in (None, *options.density):
                    if kind == "graph":
                        rows.append(graph_case(model, batch, tokens, density, options))
                    else:
                        rows.append(case(model, kind, batch, tokens, density, options))
                    row = rows[-1]
                    print(
                        f"batch {batch}, {tokens} tokens, {kind} cache, "
                        f"density {row['density']:.3f}: {row['ms']:.2f} ms a step, "
                        f"{row['tokens/s']:.1f} tokens/s",
                        flush=True,
                    )
                    if options.device == "cuda":
                        torch.cuda.empty_cache()
    if options.json:
        found = {"facts": provenance(options.device, options.commit), "rows": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
