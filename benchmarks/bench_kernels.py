"""Times the operators of shareprefill against dense SDPA on structured block lists.

    python benchmarks/bench_kernels.py --json kernels.json
    python benchmarks/bench_kernels.py --device cpu --tokens 2048 --heads 4 --kv-heads 2

Lists hold sink blocks, a local window, per-pattern vertical columns and random blocks, from a fixed
seed; block counts are exact, so that the density is the one asked for. TFLOP/s counts 4 D flops per
visible token pair of the computed blocks (2 D where no output is made). For one commit, device and
set of versions, which the header names.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import shareprefill
from shareprefill.runtime.ops.block_sparse_attention import block_sparse_attention
from shareprefill.runtime.ops.blocks import BlockLists, causal_blocks
from shareprefill.runtime.ops.pooled_attention import pooled_attention, sample_rows

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SAMPLED = 8
SINK_BLOCKS, LOCAL_BLOCKS = 1, 2


def structured_lists(
    n_tokens: int, block_size: int, n_heads: int, density: float, device: str, seed: int
) -> BlockLists:
    """A pattern per head with `density` of the causal blocks, sink and window always listed."""
    generator = torch.Generator().manual_seed(seed)
    causal = causal_blocks(n_tokens, 0, block_size)
    n_blocks = len(causal)
    places = torch.arange(n_blocks)
    score = torch.rand(n_heads, n_blocks, n_blocks, generator=generator)
    # Half of the freely chosen blocks lie in columns that all rows of the head prefer.
    columns = torch.rand(n_heads, 1, n_blocks, generator=generator)
    score = torch.maximum(score, columns)
    score[:, :, :SINK_BLOCKS] = 2.0
    distance = places[:, None] - places[None, :]
    score[:, distance.abs() < LOCAL_BLOCKS] = 3.0
    score[:, ~causal] = -1.0
    # Row i of n keeps about density * (i + 1), at least its sink and window.
    wanted = (density * (places + 1)).round().clamp(min=SINK_BLOCKS + LOCAL_BLOCKS)
    kept = torch.minimum(wanted, places + 1).long()
    rank = score.argsort(-1, descending=True).argsort(-1)
    bitmap = (rank < kept[None, :, None]) & causal
    return BlockLists.from_bitmap(
        bitmap.to(device), torch.arange(n_heads, device=device), block_size
    )


def visible_pairs(lists: BlockLists, n_tokens: int) -> int:
    """Token pairs of the listed causal blocks, summed over heads."""
    bitmap = lists.to_bitmap()[lists.pattern.long()].cpu()
    size = lists.block_size
    positions = torch.arange(n_tokens)
    starts = torch.arange(lists.n_k) * size
    seen = (positions[:, None] + 1 - starts[None, :]).clamp(0, size)
    by_block = torch.zeros(lists.n_q, lists.n_k, dtype=torch.int64)
    by_block.index_add_(0, positions // size, seen)
    return int((bitmap.sum(0) * by_block).sum())


def density(lists: BlockLists, n_tokens: int) -> float:
    """Listed blocks divided by causal blocks."""
    bitmap = lists.to_bitmap()[lists.pattern.long()].cpu()
    causal = causal_blocks(n_tokens, 0, lists.block_size)
    return float((bitmap & causal).sum() / (causal.sum() * len(bitmap)))


def median_ms(function: Callable[[], object], device: str) -> tuple[float, float]:
    """First-call and median time in milliseconds."""
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    first = (time.perf_counter() - start) * 1e3
    if device == "cuda":
        from triton.testing import do_bench

        return first, float(do_bench(function, warmup=50, rep=300, return_mode="median"))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        function()
        times.append((time.perf_counter() - start) * 1e3)
    return first, statistics.median(times)


@dataclass(frozen=True)
class Dense:
    """Causal SDPA of one sequence with a fixed backend."""

    name: str
    backend: SDPBackend | None
    expand: bool

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        context = nullcontext() if self.backend is None else sdpa_kernel(self.backend)
        with context:
            return torch.nn.functional.scaled_dot_product_attention(
                query[None], key[None], value[None], is_causal=True, enable_gqa=not self.expand
            )

    def inputs(self, query: torch.Tensor, *keys: torch.Tensor) -> list[torch.Tensor]:
        """Inputs for the call; a backend without GQA gets keys and values of all heads."""
        if not self.expand:
            return [query, *keys]
        return [query, *(key.repeat_interleave(len(query) // len(key), 0) for key in keys)]


def dense_baseline(query: torch.Tensor, key: torch.Tensor) -> Dense:
    """The fastest SDPA backend that takes these tensors: cuDNN, or flash, named."""
    if query.device.type != "cuda":
        return Dense("SDPA default", None, False)
    cudnn, flash = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
    choices = [
        Dense("SDPA cuDNN", cudnn, False),
        Dense("SDPA cuDNN, KV expanded", cudnn, True),
        Dense("SDPA flash", flash, False),
    ]
    for choice in choices:
        try:
            choice(*choice.inputs(query[:, :256], key[:, :256], key[:, :256]))
        except RuntimeError:
            continue
        return choice
    raise SystemExit("neither SDPA's cuDNN nor its flash backend takes these tensors")


def bench_length(options: argparse.Namespace, n_tokens: int) -> list[dict[str, object]]:
    """All rows of one sequence length."""
    device, dtype, size = options.device, DTYPES[options.dtype], options.block_size
    generator = torch.Generator(device).manual_seed(options.seed)
    shapes = [(heads, n_tokens, options.head_dim) for heads in (options.heads, options.kv_heads)]
    query, key, value = (
        torch.randn(shape, dtype=dtype, device=device, generator=generator)
        for shape in (shapes[0], shapes[1], shapes[1])
    )
    pairs = options.heads * n_tokens * (n_tokens + 1) // 2
    rows = sample_rows(n_tokens, size, min(SAMPLED, size), device)
    sampled_pairs = options.heads * int((rows + 1).sum())
    dense = dense_baseline(query, key)
    tensors = dense.inputs(query, key, value)
    results = [measure(dense.name, lambda: dense(*tensors), pairs, 4, 1.0, options)]
    for wanted in options.density:
        lists = structured_lists(n_tokens, size, options.heads, wanted, device, options.seed)
        results.append(
            measure(
                "block sparse",
                lambda lists=lists: block_sparse_attention(query, key, value, lists),
                visible_pairs(lists, n_tokens),
                4,
                density(lists, n_tokens),
                options,
            )
        )
    dense_lists = BlockLists.from_bitmap(
        causal_blocks(n_tokens, 0, size, device=device)[None],
        torch.zeros(options.heads, device=device),
        size,
    )
    results += [
        measure(
            "block sparse, all blocks",
            lambda: block_sparse_attention(query, key, value, dense_lists),
            pairs,
            4,
            1.0,
            options,
        ),
        measure(
            "pooled, all rows, out + map",
            lambda: pooled_attention(query, key, value, block_size=size),
            pairs,
            4,
            1.0,
            options,
        ),
        measure(
            f"pooled, {rows.shape[1]} rows, map",
            lambda: pooled_attention(query, key, rows=rows, block_size=size),
            sampled_pairs,
            2,
            sampled_pairs / pairs,
            options,
        ),
    ]
    for result in results:
        result |= {"tokens": n_tokens, "ratio": result["ms"] / results[0]["ms"]}
    return results


def measure(
    name: str,
    function: Callable[[], object],
    pairs: int,
    flops_per_pair: int,
    share: float,
    options: argparse.Namespace,
) -> dict[str, object]:
    """One result row; `share` is the computed share of the causal pairs."""
    first, median = median_ms(function, options.device)
    flops = flops_per_pair * options.head_dim * pairs
    return {
        "name": name,
        "density": share,
        "ms": median,
        "tflops": flops / median / 1e9,
        "first_call_ms": first,
    }


def header(options: argparse.Namespace) -> dict[str, object]:
    """Device, versions and sizes that the numbers belong to."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    on_gpu = options.device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "threads": torch.get_num_threads(),
        "shareprefill": shareprefill.__version__,
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda,
        "dtype": options.dtype,
        "heads": options.heads,
        "kv_heads": options.kv_heads,
        "head_dim": options.head_dim,
        "block_size": options.block_size,
        "seed": options.seed,
    }


def parse() -> argparse.Namespace:
    """Command line; the CPU has smaller defaults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tokens", type=int, nargs="+", help="default 8192 32768 131072")
    parser.add_argument("--density", type=float, nargs="+", default=[0.25, 0.10, 0.05])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--dtype", choices=list(DTYPES), help="default bf16, on a CPU fp32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("no CUDA device; use --device cpu")
    options.tokens = options.tokens or ([8192, 32768, 131072] if on_gpu else [2048])
    options.dtype = options.dtype or ("bf16" if on_gpu else "fp32")
    return options


def main() -> None:
    options = parse()
    facts = header(options)
    print(" ".join(f"{name}={value}" for name, value in facts.items()))
    line = "{:>7}  {:<28} {:>8} {:>10} {:>9} {:>10} {:>11}"
    print(line.format("tokens", "operator", "density", "ms", "TFLOP/s", "x SDPA", "first ms"))
    results = []
    for n_tokens in options.tokens:
        for row in bench_length(options, n_tokens):
            results.append(row)
            print(
                line.format(
                    row["tokens"],
                    row["name"],
                    f"{row['density']:.3f}",
                    f"{row['ms']:.3f}",
                    f"{row['tflops']:.3g}",
                    f"{row['ratio']:.3f}",
                    f"{row['first_call_ms']:.1f}",
                ),
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps({"facts": facts, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
