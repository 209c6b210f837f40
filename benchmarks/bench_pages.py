"""Times a layer on keys and values in an engine's pages: gathered first, and read where they are.

    python benchmarks/bench_pages.py --json pages.json --markdown pages.md
    python benchmarks/bench_pages.py --device cpu --chunks 2048:512 --pages 16 --plan shared

A layer is a plan of bench_layer.py on its inputs with structure (32 query heads, 8 KV heads, a
head_dim of 128), for `tokens:rows`, a chunk of rows at the end of a prompt. Pages lie in a random
order among as many that hold NaN, as in vLLM 0.24: keys and values are halves of a page, and in a
half tokens come first (its layout NHD), or heads (HND). Times are of the device alone (timing.py):
the median of 9 calls from an empty L2 cache; on a CPU they are of one call.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import torch
from layer_cases import BLOCK, DIM, PLANS, Structured, gammas_of, uniform_plan
from provenance import provenance, summary
from timing import device_ms, host_ms

from shareprefill.runtime.core import SparsePrefill
from shareprefill.runtime.ops.pages import PagedTokens, Tokens
from shareprefill.runtime.records import LayerRecord
from shareprefill.vllm.pages import split_pages

# A share of the key blocks attracts, and all heads cover so much of their mass.
HOT_SHARE, GAMMA = 1 / 16, 0.95
CHUNKS = ["131072:2048", "131072:8192", "131072:16384", "32768:32768", "131072:131072"]
HEADER = (
    "| prompt | rows | density | page | first in it | tensors, ms | gather, ms | its share "
    "| pages, ms | against tensors |"
)


@dataclass(frozen=True)
class Row:
    """Milliseconds of one layer.

    Attributes:
        tokens: Of the prompt so far.
        rows: Of the chunk.
        density: Computed blocks over causal blocks.
        page: Tokens of a page.
        first: What comes first in a page.
        tensors: On tensors, heads first.
        gather: To make tensors of pages.
        pages: On pages; where the kernels do not read them, the gather is in it.
    """

    tokens: int
    rows: int
    density: float
    page: int
    first: str
    tensors: float
    gather: float
    pages: float

    def line(self) -> str:
        """For a table."""
        share, more = self.gather / (self.gather + self.tensors), self.pages / self.tensors - 1
        return (
            f"| {self.tokens // 1024}K | {self.rows // 1024}K | {self.density:.3f} | {self.page} | "
            f"{self.first} | {self.tensors:.3f} | {self.gather:.3f} | {share:.1%} | "
            f"{self.pages:.3f} | {more:+.1%} |"
        )


def in_pages(
    key: torch.Tensor, value: torch.Tensor, page: int, first: str
) -> tuple[PagedTokens, PagedTokens]:
    """Keys and values `[G, N, D]` in half of the pages of a cache, in a random order."""
    groups, tokens, dim = key.shape
    needed = -(-tokens // page)
    generator = torch.Generator(key.device).manual_seed(page)
    table = torch.randperm(2 * needed, generator=generator, device=key.device)[:needed].int()
    inside = (page, groups) if first == "tokens" else (groups, page)
    cache = key.new_full((2 * needed, 2, *inside, dim), torch.nan)
    cache = cache if first == "tokens" else cache.transpose(2, 3)
    place = torch.arange(tokens, device=key.device)
    for half, source in enumerate((key, value)):
        cache[table[place // page].long(), half, place % page] = source.transpose(0, 1)
    return split_pages(cache, table, tokens)


class Chunk:
    """One layer of a chunk of rows at the end of a prompt."""

    def __init__(self, tokens: int, rows: int, plan: str, device: str) -> None:
        self.tokens, self.rows, self.device = tokens, rows, device
        self.inputs = Structured(tokens, device)
        self.inputs.place(max(1, int(tokens // BLOCK * HOT_SHARE)))
        policies = PLANS[plan]
        made = uniform_plan(policies, dict.fromkeys(gammas_of(policies), GAMMA))
        self.prefill = SparsePrefill(made)
        self.geometry = made.geometry(rows, tokens, self.inputs.query.device)

    def attend(self, key: Tokens, value: Tokens) -> LayerRecord:
        """Runs it."""
        query = self.inputs.query[:, self.tokens - self.rows :]
        state = self.prefill.begin(self.geometry)
        return self.prefill.attend(0, state, query, key, value, scale=DIM**-0.5)[1]

    def measure(self, pages: list[int]) -> Iterator[Row]:
        """Rows of the table."""
        key, value = self.inputs.key, self.inputs.value
        record = self.attend(key, value)
        density = record.blocks.double().mean().item() / record.causal
        for page, first in product(pages, ("tokens", "heads")):
            made = in_pages(key, value, page, first)

            def fresh(made: tuple[PagedTokens, PagedTokens] = made) -> list[PagedTokens]:
                # What is gathered stays with the pages that it is of.
                return [replace(tokens) for tokens in made]

            yield Row(
                tokens=self.tokens,
                rows=self.rows,
                density=density,
                page=page,
                first=first,
                tensors=self._time(lambda: self.attend(key, value)),
                gather=self._time(lambda: [tokens.gathered for tokens in fresh()]),
                pages=self._time(lambda: self.attend(*fresh())),
            )

    def _time(self, work: Callable[[], object]) -> float:
        work()
        if self.device == "cuda":
            return device_ms(work, host_ms(work, 3), 9)
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) * 1e3


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--chunks", nargs="+", default=CHUNKS, metavar="TOKENS:ROWS")
    parser.add_argument("--pages", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--plan", choices=list(PLANS), default="mixed")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--commit", help="the commit, where the sources are without git's files")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; use --device cpu")
    return options


def main() -> None:
    options = parse()
    facts = provenance(options.device, options.commit)
    lines = [summary(facts), "", HEADER, "| --- " * HEADER.count(" | ") + "| --- |"]
    print("\n".join(lines))
    found: list[Row] = []
    for chunk in options.chunks:
        tokens, rows = map(int, chunk.split(":"))
        for row in Chunk(tokens, rows, options.plan, options.device).measure(options.pages):
            found.append(row)
            lines.append(row.line())
            print(lines[-1], flush=True)
        # After every chunk: a run that is cut off keeps what it has.
        if options.json:
            numbers = {"facts": facts, "rows": [asdict(row) for row in found]}
            options.json.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
        if options.markdown:
            options.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
