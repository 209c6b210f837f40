"""Times the operators of shareprefill on structured block lists, and others' kernels beside them.

    python benchmarks/bench_kernels.py --baseline --json kernels.json --markdown kernels.md
    python benchmarks/bench_kernels.py --device cpu --tokens 2048 --heads 4 --kv-heads 2

Lists hold sink blocks, a local window, per-pattern vertical columns and random blocks, from a fixed
seed; block counts are exact, so that the density is the one asked for. TFLOP/s counts 4 D flops per
visible token pair of the computed blocks (2 D where no output is made). `floor` is the least time
that the device's measured rates allow: all products, each tensor read or written once, or an
exponential for each pair. FP8 rounds its operands within its time; its products are of e4m3. Of
other kernels the time is without making their lists.
`ms` are medians of `do_bench`, `device ms` are without the host (timing.py). All
ratios are of one run, on one device, for the versions that the header names. A kernel of others
that fails is a line "missing"; a failing kernel of our own ends the run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from goals import comparison_table
from kernel_cases import (
    CUDNN,
    FLASH,
    FlashAttention4,
    Flex,
    dense_baseline,
    density,
    failures,
    missing_baseline,
    structured_lists,
    visible_pairs,
)
from kernel_tables import (
    DENSE,
    FA4,
    FP8,
    HEAD,
    MAP,
    OUTPUT_AND_MAP,
    POOLED,
    ROWS,
    SAMPLED,
    SPARSE,
    Row,
    line,
    markdown,
    ratios,
)
from provenance import provenance
from timing import Call, Ceilings, measure, measure_ceilings

from shareprefill.errors import UnsupportedError
from shareprefill.runtime.ops.block_sparse_attention import block_sparse_attention
from shareprefill.runtime.ops.blocks import BlockLists, causal_blocks
from shareprefill.runtime.ops.dispatch import ATTENTION
from shareprefill.runtime.ops.fp8_attention import fp8_attention
from shareprefill.runtime.ops.pooled_attention import pooled_attention, sample_rows

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BASELINES = ("flash", "cudnn", "flex", "fa4")


@dataclass(frozen=True)
class Work:
    """What a kernel has to do, at the least.

    Attributes:
        pairs: Token pairs, summed over heads.
        flops_per_dim: Operations of a pair, by head dimension.
        n_bytes: Bytes that are read or written once.
        density: Achieved, in computed blocks over causal blocks (of sampled rows: their share).
        wanted: The density that was asked for.
        in_fp8: Whether products have operands of e4m3.
    """

    pairs: int
    flops_per_dim: int
    n_bytes: float
    density: float = 1.0
    wanted: float = 1.0
    in_fp8: bool = False


class Bench:
    """Measures one length."""

    def __init__(self, options: argparse.Namespace, n_tokens: int, ceilings: Ceilings) -> None:
        self.options, self.n_tokens, self.ceilings = options, n_tokens, ceilings
        device = options.device
        generator = torch.Generator(device).manual_seed(options.seed)
        self.query, self.key, self.value = (
            torch.randn(
                (heads, n_tokens, options.head_dim),
                dtype=DTYPES[options.dtype],
                device=device,
                generator=generator,
            )
            for heads in (options.heads, options.kv_heads, options.kv_heads)
        )
        self.rows: list[Row] = []
        self.expected: torch.Tensor | None = None

    def run(self) -> list[Row]:
        """All rows, printed as they come."""
        self._dense()
        for wanted in (*self.options.density, 1.0):
            self._sparse(wanted)
        self._pooled()
        return self.rows

    def _dense(self) -> None:
        tensors = (self.query, self.key, self.value)
        work = Work(self._causal_pairs(), 4, self._bytes())
        best = dense_baseline(self.query, self.key)
        own = best.inputs(*tensors)
        self.expected = None
        self._measure_other(DENSE, best.name, lambda: lambda: best(*own), work)
        for key, baseline in (("cudnn", CUDNN), ("flash", FLASH)):
            if key in self.options.baseline and baseline.name != best.name:
                self._measure_baseline(
                    key, DENSE, baseline.name, lambda b=baseline: lambda: b(*tensors), work
                )
        if "fa4" in self.options.baseline:
            self._measure_baseline(
                "fa4", DENSE, FA4, lambda: FlashAttention4().dense(*tensors), work
            )

    def _sparse(self, wanted: float) -> None:
        options, tensors = self.options, (self.query, self.key, self.value)
        lists = self._lists(wanted)
        work = Work(
            visible_pairs(lists, self.n_tokens),
            4,
            self._bytes() + 4 * len(lists.indices),
            density(lists, self.n_tokens),
            wanted,
        )
        self.expected = None
        out = torch.empty_like(self.query)
        for impl in ATTENTION:
            if impl == "reference" or (impl == "blockwise" and options.device == "cuda"):
                continue

            def own(impl: str = impl) -> torch.Tensor:
                return block_sparse_attention(*tensors, lists, out=out, impl=impl)

            self._measure(SPARSE, f"impl={impl}", own, work)
        if options.device == "cuda":
            small = replace(work, in_fp8=True)
            self._measure(SPARSE, FP8, lambda: fp8_attention(*tensors, lists, out=out), small)
        for key, baseline in (("fa4", FlashAttention4), ("flex", Flex)):
            if key in options.baseline:
                self._measure_baseline(
                    key,
                    SPARSE,
                    baseline.name,
                    lambda key=key, kind=baseline: options.others.setdefault(key, kind()).sparse(
                        *tensors, lists
                    ),
                    work,
                )

    def _lists(self, wanted: float) -> BlockLists:
        options = self.options
        if wanted < 1.0:
            return structured_lists(
                self.n_tokens,
                options.block_size,
                options.heads,
                wanted,
                options.device,
                options.seed,
            )
        bitmap = causal_blocks(self.n_tokens, 0, options.block_size, device=options.device)
        pattern = torch.zeros(options.heads, dtype=torch.int32, device=options.device)
        return BlockLists.from_bitmap(bitmap[None], pattern, options.block_size)

    def _pooled(self) -> None:
        options = self.options
        size = options.block_size
        rows = sample_rows(self.n_tokens, size, min(SAMPLED, size), options.device)
        map_bytes = 4 * options.heads * len(rows) ** 2
        self.expected = None
        self._measure(
            POOLED,
            OUTPUT_AND_MAP,
            lambda: pooled_attention(self.query, self.key, self.value, block_size=size),
            Work(self._causal_pairs(), 4, self._bytes() + map_bytes),
        )
        share = rows.numel() / self.n_tokens
        few_bytes = self.key.nbytes + share * self.query.nbytes + map_bytes
        self._measure(
            ROWS,
            MAP,
            lambda: pooled_attention(self.query, self.key, rows=rows, block_size=size),
            Work(options.heads * int((rows + 1).sum()), 2, few_bytes, share, share),
        )

    def _causal_pairs(self) -> int:
        return self.options.heads * self.n_tokens * (self.n_tokens + 1) // 2

    def _bytes(self) -> int:
        """Query, keys, values and output, each once."""
        return 2 * self.query.nbytes + self.key.nbytes + self.value.nbytes

    def _measure_baseline(
        self, key: str, task: str, name: str, make: Callable[[], Call], work: Work
    ) -> None:
        missing = missing_baseline(key, self.query, self.key)
        if missing is None:
            self._measure_other(task, name, make, work)
        else:
            self._miss(task, name, work, missing)

    def _measure_other(self, task: str, name: str, make: Callable[[], Call], work: Work) -> None:
        """A kernel of others: what it raises is a line, unless the device is lost with it."""
        try:
            self._measure(task, name, make(), work)
            return
        # The tuple is made when an error is caught: by then a kernel's compiler is imported.
        except failures() as error:
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        if self.options.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        self._miss(task, name, work, reason[:200])

    def _measure(self, task: str, name: str, call: Call, work: Work) -> None:
        try:
            found = measure(call, self.options.device)
        except UnsupportedError as error:
            self._miss(task, name, work, str(error))
            return
        flops = work.flops_per_dim * self.options.head_dim * work.pairs
        floor, bound = self.ceilings.floor(flops, work.n_bytes, work.pairs, in_fp8=work.in_fp8)
        self._add(
            Row(
                self.n_tokens,
                task,
                name,
                work.density,
                work.wanted,
                ms=found.median,
                device_ms=found.device,
                host_ms=found.host,
                tflops=flops / found.median / 1e9,
                floor_ms=floor,
                bound=bound,
                first_call_ms=found.first,
                difference=self._difference(call()),
            )
        )

    def _miss(self, task: str, name: str, work: Work, reason: str) -> None:
        self._add(Row(self.n_tokens, task, name, work.density, work.wanted, missing=reason))

    def _difference(self, result: object) -> float | None:
        """Relative distance to the first result of the same task; a wrong kernel shows here."""
        if isinstance(result, tuple):
            result = result[0]
        if not isinstance(result, torch.Tensor):
            return None
        some = result.view(self.query.shape)[:, ::61].float()
        if self.expected is None:
            self.expected = some
        return float((some - self.expected).norm() / self.expected.norm())

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        print(line(row), flush=True)


def parse() -> argparse.Namespace:
    """Command line; the CPU has smaller defaults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tokens", type=int, nargs="+", help="default 8192 32768 131072")
    parser.add_argument("--density", type=float, nargs="*", default=[0.25, 0.10, 0.05])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--dtype", choices=list(DTYPES), help="default bf16, on a CPU fp32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--baseline",
        nargs="*",
        choices=BASELINES,
        default=(),
        help="others' kernels too, all or those named; one that cannot run is printed as missing",
    )
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--markdown", type=Path, help="also write tables of Markdown to this file")
    parser.add_argument("--commit", help="the commit, where the sources are without git's files")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("no CUDA device; use --device cpu")
    options.tokens = options.tokens or ([8192, 32768, 131072] if on_gpu else [2048])
    options.dtype = options.dtype or ("bf16" if on_gpu else "fp32")
    options.baseline = BASELINES if options.baseline == [] else tuple(options.baseline)
    options.others = {}
    return options


def main() -> None:
    options = parse()
    ceilings = measure_ceilings(options.device, DTYPES[options.dtype])
    sizes = ("dtype", "heads", "kv_heads", "head_dim", "block_size", "seed")
    facts = provenance(options.device, options.commit)
    facts |= {name: getattr(options, name) for name in sizes}
    print(" ".join(f"{name}={value}" for name, value in facts.items()))
    facts["ceilings"] = asdict(ceilings)
    print(
        f"measured: {ceilings.flops / 1e12:.3g} TFLOP/s, {ceilings.bytes / 1e12:.3g} TB/s"
        + ("" if ceilings.fp8_flops is None else f", {ceilings.fp8_flops / 1e12:.4g} in e4m3")
        + ("" if ceilings.exponentials is None else f", {ceilings.exponentials / 1e12:.3g} Texp/s")
    )
    print(HEAD)
    rows: list[Row] = []
    for n_tokens in options.tokens:
        rows += Bench(options, n_tokens, ceilings).run()
        # After every length: a run that is cut off keeps what it has.
        found = ratios(rows, options.density)
        if options.json:
            numbers = {
                "facts": facts,
                "results": [asdict(row) for row in rows],
                "ratios": [asdict(row) for row in found],
            }
            options.json.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
        if options.markdown:
            options.markdown.write_text(markdown(facts, rows, found), encoding="utf-8")
    print("\n" + "\n".join(comparison_table(found)))


if __name__ == "__main__":
    main()
