"""Times the operators of shareprefill on structured block lists, and others' kernels beside them.

    python benchmarks/bench_kernels.py --baseline --json kernels.json
    python benchmarks/bench_kernels.py --device cpu --tokens 2048 --heads 4 --kv-heads 2

Lists hold sink blocks, a local window, per-pattern vertical columns and random blocks, from a fixed
seed; block counts are exact, so that the density is the one asked for. TFLOP/s counts 4 D flops per
visible token pair of the computed blocks (2 D where no output is made). `floor` is the least time
that the device's measured rates allow: all products, each tensor read or written once, or an
exponential for each pair. Of other kernels the time is without making their lists; of
`impl="fa4"` with. All ratios are of one run, on one device, for the versions that the header names.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from kernel_cases import (
    CUDNN,
    FLASH,
    Call,
    Ceilings,
    FlashAttention4,
    Flex,
    dense_baseline,
    density,
    measure_ceilings,
    median_ms,
    missing_baseline,
    structured_lists,
    visible_pairs,
)

import shareprefill
from shareprefill.errors import UnsupportedError
from shareprefill.runtime.ops.block_sparse_attention import block_sparse_attention
from shareprefill.runtime.ops.blocks import BlockLists, causal_blocks
from shareprefill.runtime.ops.implementations import ATTENTION
from shareprefill.runtime.ops.pooled_attention import pooled_attention, sample_rows

__all__ = ["dense_baseline", "main", "median_ms"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BASELINES = ("flash", "cudnn", "flex", "fa4")
SAMPLED = 8
FA4 = FlashAttention4.name
DENSE, SPARSE, POOLED, ROWS = "dense", "block sparse", "pooled, all rows", f"pooled, {SAMPLED} rows"


@dataclass(frozen=True)
class Row:
    """One measurement, or why it is missing."""

    tokens: int
    task: str
    name: str
    density: float
    wanted: float
    missing: str | None = None
    ms: float | None = None
    tflops: float | None = None
    floor_ms: float | None = None
    bound: str | None = None
    first_call_ms: float | None = None
    difference: float | None = None


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
        for wanted in self.options.density:
            self._sparse(wanted)
        self._sparse(1.0)
        self._pooled()
        return self.rows

    def _dense(self) -> None:
        tensors = (self.query, self.key, self.value)
        pairs = self.options.heads * self.n_tokens * (self.n_tokens + 1) // 2
        best = dense_baseline(self.query, self.key)
        own = best.inputs(*tensors)
        cases: dict[str, Call] = {best.name: lambda: best(*own)}
        self.expected = None
        for key, name in (("cudnn", CUDNN.name), ("flash", FLASH.name), ("fa4", FA4)):
            if key not in self.options.baseline or name in cases:
                continue
            missing = missing_baseline(key, self.query, self.key)
            if missing is not None:
                self._miss(DENSE, name, 1.0, missing)
            elif key == "fa4":
                cases[name] = FlashAttention4().dense(*tensors)
            else:
                dense = CUDNN if key == "cudnn" else FLASH
                cases[name] = lambda dense=dense: dense(*tensors)
        for name, call in cases.items():
            self._measure(DENSE, name, call, pairs, 4, 1.0, 1.0, self._bytes())

    def _sparse(self, wanted: float) -> None:
        options, tensors = self.options, (self.query, self.key, self.value)
        if wanted == 1.0:
            bitmap = causal_blocks(self.n_tokens, 0, options.block_size, device=options.device)
            pattern = torch.zeros(options.heads, device=options.device)
            lists = BlockLists.from_bitmap(bitmap[None], pattern, options.block_size)
        else:
            lists = structured_lists(
                self.n_tokens,
                options.block_size,
                options.heads,
                wanted,
                options.device,
                options.seed,
            )
        pairs, share = visible_pairs(lists, self.n_tokens), density(lists, self.n_tokens)
        n_bytes = self._bytes() + 4 * len(lists.indices)
        self.expected = None
        out = torch.empty_like(self.query)
        for impl in ATTENTION:
            if impl == "reference" or (impl == "blockwise" and options.device == "cuda"):
                continue

            def own(impl: str = impl) -> torch.Tensor:
                return block_sparse_attention(*tensors, lists, out=out, impl=impl)

            self._measure(SPARSE, f"impl={impl}", own, pairs, 4, share, wanted, n_bytes)
        for key, baseline in (("fa4", FlashAttention4), ("flex", Flex)):
            if key not in options.baseline:
                continue
            missing = missing_baseline(key, self.query, self.key)
            if missing is not None:
                self._miss(SPARSE, baseline.name, wanted, missing)
                continue
            call = options.others.setdefault(key, baseline()).sparse(*tensors, lists)
            self._measure(SPARSE, baseline.name, call, pairs, 4, share, wanted, n_bytes)

    def _pooled(self) -> None:
        options = self.options
        size = options.block_size
        pairs = options.heads * self.n_tokens * (self.n_tokens + 1) // 2
        rows = sample_rows(self.n_tokens, size, min(SAMPLED, size), options.device)
        sampled = options.heads * int((rows + 1).sum())
        map_bytes = 4 * options.heads * len(rows) ** 2
        self.expected = None
        self._measure(
            POOLED,
            "output and map",
            lambda: pooled_attention(self.query, self.key, self.value, block_size=size),
            pairs,
            4,
            1.0,
            1.0,
            self._bytes() + map_bytes,
        )
        share = rows.numel() / self.n_tokens
        few_bytes = self._bytes() * options.kv_heads / (2 * (options.heads + options.kv_heads))
        self._measure(
            ROWS,
            "map",
            lambda: pooled_attention(self.query, self.key, rows=rows, block_size=size),
            sampled,
            2,
            share,
            share,
            few_bytes + share * self.query.nbytes + map_bytes,
        )

    def _bytes(self) -> int:
        """Query, keys, values and output, each once."""
        return 2 * self.query.nbytes + self.key.nbytes + self.value.nbytes

    def _miss(self, task: str, name: str, wanted: float, reason: str) -> None:
        self._add(Row(self.n_tokens, task, name, wanted, wanted, missing=reason))

    def _measure(
        self,
        task: str,
        name: str,
        call: Call,
        pairs: int,
        flops_per_pair: int,
        share: float,
        wanted: float,
        n_bytes: float,
    ) -> None:
        try:
            first, median = median_ms(call, self.options.device)
        except UnsupportedError as error:
            self._miss(task, name, wanted, str(error))
            return
        flops = flops_per_pair * self.options.head_dim * pairs
        floor, bound = self.ceilings.floor(flops, n_bytes, pairs)
        self._add(
            Row(
                self.n_tokens,
                task,
                name,
                share,
                wanted,
                ms=median,
                tflops=flops / median / 1e9,
                floor_ms=floor,
                bound=bound,
                first_call_ms=first,
                difference=self._difference(call()),
            )
        )

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
        print(_line(row), flush=True)


LINE = "{:>7}  {:<17} {:<24} {:>7} {:>9} {:>8} {:>9} {:<12} {:>9} {:>9}"
HEAD = LINE.format(
    "tokens",
    "task",
    "kernel",
    "density",
    "ms",
    "TFLOP/s",
    "floor ms",
    "bound by",
    "first ms",
    "off by",
)


def _line(row: Row) -> str:
    if row.missing is not None:
        start = LINE.format(row.tokens, row.task, row.name, f"{row.density:.3f}", *[""] * 6)
        return f"{start.rstrip()}  missing: {row.missing}"
    return LINE.format(
        row.tokens,
        row.task,
        row.name,
        f"{row.density:.3f}",
        f"{row.ms:.3f}",
        f"{row.tflops:.3g}",
        f"{row.floor_ms:.3f}",
        row.bound,
        f"{row.first_call_ms:.0f}",
        "" if row.difference is None else f"{row.difference:.1e}",
    )


def ratios(rows: list[Row], options: argparse.Namespace) -> list[dict[str, object]]:
    """The comparisons that the project is measured by, one for each length and density."""
    found: list[dict[str, object]] = []

    def best(tokens: int, task: str, wanted: float, names: tuple[str, ...]) -> Row | None:
        rows_ms = [
            row
            for row in rows
            if (row.tokens, row.task, row.wanted) == (tokens, task, wanted)
            and row.ms is not None
            and row.name in names
        ]
        return min(rows_ms, key=lambda row: row.ms or 0.0, default=None)

    def compare(tokens: int, what: str, one: Row | None, other: Row | None) -> None:
        known = one is not None and other is not None and one.ms and other.ms
        found.append(
            {
                "tokens": tokens,
                "what": what,
                "kernel": None if one is None else one.name,
                "against": None if other is None else other.name,
                "ratio": one.ms / other.ms if known else None,
            }
        )

    ours = tuple(f"impl={impl}" for impl in ATTENTION if impl != "fa4")
    for tokens in options.tokens:
        dense = {row.name for row in rows if row.task == DENSE and row.name != FA4}
        sdpa = best(tokens, DENSE, 1.0, tuple(dense))
        fa4_dense = best(tokens, DENSE, 1.0, (FA4,))
        for wanted in (*options.density, 1.0):
            own = best(tokens, SPARSE, wanted, ours)
            for other in (FA4, Flex.name):
                what = f"own block sparse, d {wanted:g} / {other}"
                compare(tokens, what, own, best(tokens, SPARSE, wanted, (other,)))
            fastest = best(tokens, SPARSE, wanted, (*ours, "impl=fa4"))
            compare(tokens, f"fastest impl, d {wanted:g} / SDPA", fastest, sdpa)
            compare(tokens, f"fastest impl, d {wanted:g} / FA-4 dense", fastest, fa4_dense)
        compare(tokens, f"{POOLED} / SDPA", best(tokens, POOLED, 1.0, ("output and map",)), sdpa)
        share = next((row.wanted for row in rows if (row.tokens, row.task) == (tokens, ROWS)), 0.0)
        compare(tokens, f"{ROWS} / SDPA", best(tokens, ROWS, share, ("map",)), sdpa)
    return found


def print_ratios(found: list[dict[str, object]], lengths: list[int]) -> None:
    """One line for each comparison, a column for each length; "-": one side is missing."""
    print("\n{:<44}".format("time / time") + "".join(f"{tokens:>26}" for tokens in lengths))
    for what in dict.fromkeys(row["what"] for row in found):
        cells = []
        for tokens in lengths:
            row = next(r for r in found if (r["tokens"], r["what"]) == (tokens, what))
            ratio = row["ratio"]
            cells.append("-" if ratio is None else f"{ratio:.3f} ({row['kernel']})")
        print(f"{what:<44}" + "".join(f"{cell:>26}" for cell in cells))


def header(options: argparse.Namespace, ceilings: Ceilings) -> dict[str, object]:
    """Device, versions and sizes that the numbers belong to."""
    on_gpu = options.device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "threads": torch.get_num_threads(),
        "shareprefill": shareprefill.__version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "flash-attn-4": _version("flash-attn-4"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "dtype": options.dtype,
        "heads": options.heads,
        "kv_heads": options.kv_heads,
        "head_dim": options.head_dim,
        "block_size": options.block_size,
        "seed": options.seed,
        "ceilings": asdict(ceilings),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


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
    facts = header(options, ceilings)
    print(" ".join(f"{name}={value}" for name, value in facts.items() if name != "ceilings"))
    print(
        f"measured: {ceilings.flops / 1e12:.3g} TFLOP/s, {ceilings.bytes / 1e12:.3g} TB/s"
        + ("" if ceilings.exponentials is None else f", {ceilings.exponentials / 1e12:.3g} Texp/s")
    )
    print(HEAD)
    rows: list[Row] = []
    for n_tokens in options.tokens:
        rows += Bench(options, n_tokens, ceilings).run()
    found = ratios(rows, options)
    print_ratios(found, options.tokens)
    if options.json:
        numbers = {"facts": facts, "results": [asdict(row) for row in rows], "ratios": found}
        options.json.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
