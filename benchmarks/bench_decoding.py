"""Time of a decode step's attention over listed blocks, against dense decoding in one run.

    python benchmarks/bench_decoding.py --json decoding.json

Every time is of a CUDA graph of as many steps as read more than the L2 cache holds, each on keys
and values of its own, divided by their number: a decode step finds the cache full of other layers.
Dense decoding is the fastest of SDPA's backends and of our own kernel with all blocks listed.
`listed` is attention alone, `choice` the selection of blocks by a sketch, `step` one after the
other, with lists of the density named in place of those chosen from the sketch's random codes. With
`--page-size`, the same of keys and values in an engine's pages, in any order, and `codes`, the
sketch of each sequence's newest key.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from provenance import provenance
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from shareprefill.runtime.ops.block_sparse_decoding import block_sparse_decoding
from shareprefill.runtime.ops.pages import Cached, PagedBatch
from shareprefill.runtime.ops.sketched_selection import Basis, select_blocks, write_codes

Cache = tuple[Tensor, Cached, Cached]
"""Queries, keys and values."""
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# Bytes that the steps of a graph read together, at least: twice what an H200's L2 cache holds.
READ_BYTES = 2**27
REPEATS = 20


def microseconds(steps: Sequence[Callable[[], object]]) -> float:
    """Median time of one of several calls, one after the other in a CUDA graph."""
    for step in steps:
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * REPEATS)]
    graph.replay()
    for start, stop in zip(events[::2], events[1::2], strict=True):
        start.record()
        graph.replay()
        stop.record()
    torch.cuda.synchronize()
    pairs = zip(events[::2], events[1::2], strict=True)
    times = sorted(start.elapsed_time(stop) for start, stop in pairs)
    return times[len(times) // 2] * 1000 / len(steps)


def dense(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """SDPA of one token."""
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(query[:, :, None], key, value, enable_gqa=True)


def random_lists(batch: int, groups: int, n: int, density: float) -> tuple[Tensor, Tensor]:
    """Blocks drawn at random, in their order, as a selection leaves them."""
    count = max(1, round(density * n))
    drawn = torch.rand(batch, groups, n, device="cuda").argsort(-1)[..., :count].sort(-1).values
    blocks = torch.full((batch, groups, n), -1, dtype=torch.int32, device="cuda")
    blocks[..., :count] = drawn
    return blocks, torch.full((batch, groups), count, dtype=torch.int32, device="cuda")


def in_pages(query: Tensor, key: Tensor, value: Tensor, size: int) -> Cache:
    """The same, keys and values in pages, as vLLM lays them out."""
    batch, groups, _, dim = key.shape
    halves = [t.unflatten(2, (-1, size)).permute(0, 2, 3, 1, 4).flatten(0, 1) for t in (key, value)]
    order = torch.randperm(len(halves[0]), device="cuda")
    pool = key.new_empty(len(order), 2, size, groups, dim)
    for number, half in enumerate(halves):
        pool[order, number] = half
    tables = order.int().view(batch, -1)
    keys, values = (
        PagedBatch(half.transpose(1, 2), tables, key.shape[2]) for half in pool.unbind(1)
    )
    return query, keys, values


def writing(key: PagedBatch, options: argparse.Namespace) -> Callable[[], None]:
    """The sketch of each sequence's newest key."""
    axes = torch.randn(options.kv_heads, options.rank, options.head_dim, device="cuda")
    sizes = len(key.pool), options.kv_heads, options.rank // 8, key.page_size
    words = torch.zeros(sizes, dtype=torch.int32, device="cuda")
    slots = key.tables[:, -1].long() * key.page_size + key.page_size - 1
    return partial(write_codes, key.pool, slots, Basis(axes[:, 0].contiguous(), axes, axes), words)


def choosing(
    query: Tensor, key: Cached, options: argparse.Namespace
) -> Callable[[], tuple[Tensor, Tensor]]:
    """The choice of blocks by a sketch, here of random codes."""
    batch, groups, tokens, dim = key.shape
    paged = isinstance(key, PagedBatch)
    axes = torch.randn(1 if paged else batch, groups, options.rank, dim, device="cuda") / dim
    basis = Basis(axes[:, :, 0].contiguous(), axes, axes)
    room = (len(key.pool), key.page_size) if paged else (batch, tokens)
    sizes = room[0], groups, options.rank // 8, room[1]
    words = torch.randint(-(2**31), 2**31 - 1, sizes, dtype=torch.int32, device="cuda")
    share = torch.full((options.heads,), options.kv_heads / options.heads, device="cuda")
    worth = torch.full((batch, options.kv_heads), 0.1, device="cuda")
    return partial(
        select_blocks, *(query, key, words, basis, share, worth), block_size=options.block
    )


def in_turn(*calls: Callable[[], object]) -> None:
    """One call after the other."""
    for call in calls:
        call()


def sparse(caches: Sequence[Cache], options: argparse.Namespace) -> dict[str, float]:
    """Times of our own kernels."""
    batch, groups, tokens, _ = caches[0][1].shape
    n = -(-tokens // options.block)

    def reads(density: float) -> list[Callable[[], object]]:
        lists = [random_lists(batch, groups, n, density) for _ in caches]
        return [
            partial(block_sparse_decoding, *cache, *blocks, block_size=options.block)
            for cache, blocks in zip(caches, lists, strict=True)
        ]

    densities = (1.0, *options.density)
    row = {f"listed {density:g}": microseconds(reads(density)) for density in densities}
    choices = [choosing(query, key, options) for query, key, _ in caches]
    row["choice"] = microseconds(choices)
    for density in options.density:
        pairs = zip(choices, reads(density), strict=True)
        row[f"step {density:g}"] = microseconds([partial(in_turn, *pair) for pair in pairs])
    return row


def case(options: argparse.Namespace, batch: int, tokens: int) -> dict[str, float]:
    """Times of one batch size and length."""
    groups, dim = options.kv_heads, options.head_dim
    cache_bytes = batch * groups * tokens * dim * 2 * 2
    least = min(options.density) * cache_bytes
    copies = max(1, min(-(-READ_BYTES // int(least)), int(40e9 // cache_bytes)))
    make = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    sizes = batch, groups, tokens, dim
    caches = [(make(batch, options.heads, dim), make(*sizes), make(*sizes)) for _ in range(copies)]
    row: dict[str, float] = {"batch": batch, "tokens": tokens, "copies": copies}
    for name, backend in BACKENDS.items():
        try:
            row[name] = microseconds([partial(dense, backend, *cache) for cache in caches])
        except RuntimeError as error:
            print(f"{name}: {str(error).splitlines()[0]}")
    tensors: list[Cache] = [*caches]
    row |= sparse(tensors, options)
    for size in options.page_size:
        paged = [in_pages(query, key, value, size) for query, key, value in caches]
        row |= {f"{name}, pages of {size}": time for name, time in sparse(paged, options).items()}
        writes = [writing(key, options) for _, key, _ in paged if isinstance(key, PagedBatch)]
        row[f"codes, pages of {size}"] = microseconds(writes)
        del paged, writes
    best = min(v for k, v in row.items() if k in BACKENDS or k == "listed 1")
    row["dense"] = best
    row["bytes/s dense"] = cache_bytes / best * 1e6
    for density in options.density:
        row[f"goal {density:g}"] = 1.5 * density * best + 10
    return row


def main() -> None:
    """Parses the command line and prints a row for each case."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--tokens", type=int, nargs="*", default=[32768, 131072])
    parser.add_argument("--density", type=float, nargs="*", default=[0.1, 0.15, 0.2])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--rank", type=int, default=24, help="coordinates of the sketch")
    parser.add_argument("--page-size", type=int, nargs="*", default=[], help="tokens a page")
    parser.add_argument("--block", type=int, default=32, help="tokens a key block")
    parser.add_argument("--commit", help="of the sources, where git's files are not there")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for batch in options.batch:
        for tokens in options.tokens:
            rows.append(case(options, batch, tokens))
            cells = [
                f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()
            ]
            print("  ".join(cells), flush=True)
            torch.cuda.empty_cache()
    if options.json:
        found = {"facts": provenance("cuda", options.commit), "rows": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
