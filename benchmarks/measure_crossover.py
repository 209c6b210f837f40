"""From how many tokens on a session is never slower with patterns than dense.

    python benchmarks/measure_crossover.py --linear --json crossover.json
    python benchmarks/measure_crossover.py --device cpu --tokens 512 1024 --layers 2 --repeats 1

Times one layer's attention as models call it, through the seam to transformers and the session, in
a stream of layers that nothing waits for, so that host and device overlap; `--linear` puts the
products of an 8B model's linear layers before each. Beside it, in turns: the model's own attention
without a session, the session below its crossover, cuDNN's and FlashAttention-4's. Inputs have
structure (layer_cases.py); their density falls with length as the goals of bench_layer.py have it.
A real model's layers have more small kernels, whose host time adds to every line alike.

Then, for two lengths, the density at which block-sparse attention takes as long as dense attention.
The result goes into shareprefill/runtime/crossover.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from bench_layer import stream_ms
from goals import NEVER_SLOWER
from kernel_cases import (
    CUDNN,
    FlashAttention4,
    density,
    failures,
    missing_baseline,
    structured_lists,
)
from layer_cases import BLOCK, DIM, HEADS, PLANS, Structured, facts_of, uniform_plan
from provenance import provenance
from timing import Call, measure

from shareprefill.bench.shapes import build_shape
from shareprefill.bench.synthetic import synthetic_artifact
from shareprefill.config import RuntimeConfig
from shareprefill.runtime import interface
from shareprefill.runtime.core import SparsePrefill
from shareprefill.runtime.dense import causal_attention
from shareprefill.runtime.masks import FactMask, MaskFacts
from shareprefill.runtime.ops.block_sparse_attention import block_sparse_attention
from shareprefill.runtime.session import Session

LENGTHS = (1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768)
OWN, BELOW, SHARED = "model's own", "session, dense", "session, shared"
# Sizes of an 8B model's linear layers.
HIDDEN, INNER, PROJECTED = 4096, 14336, 6144
Attention = Callable[[int], object]


@dataclass(frozen=True)
class Row:
    """One length.

    Attributes:
        tokens: Length.
        density: Computed blocks over causal blocks of the shared session.
        recall: Attention mass inside its patterns.
        ms: Milliseconds a layer, by what computed its attention.
        missing: Why others could not be timed.
    """

    tokens: int
    density: float
    recall: float
    ms: dict[str, float]
    missing: dict[str, str]

    @property
    def best_dense(self) -> float:
        """The fastest dense attention, sessions left out."""
        return min(ms for name, ms in self.ms.items() if name not in (BELOW, SHARED))

    @property
    def gain(self) -> float:
        """Time of the fastest dense attention over that of the shared session."""
        return self.best_dense / self.ms[SHARED]


def density_for(tokens: int) -> float:
    """A power of the length through .30 at 8K and .11 at 32K."""
    return min(0.95, 0.30 * (8192 / tokens) ** 0.72)


class Layers:
    """Layers of a model without weights, and their attention in several ways."""

    def __init__(self, options: argparse.Namespace, tokens: int) -> None:
        self.options, device = options, options.device
        meta = torch.device("meta")
        self.model: Any = build_shape(
            "llama-3.1-8b",
            layers=options.layers,
            tokens=tokens,
            device=meta,
            dtype=torch.bfloat16,
        )
        self.modules = [layer.self_attn for layer in self.model.model.layers]
        inputs = Structured(tokens, device)
        policies = PLANS[options.plan]
        tuning = inputs.tune(density_for(tokens), options.recall, policies)
        self.facts = facts_of(inputs.layer(uniform_plan(policies, tuning.gammas))())
        plan = uniform_plan(policies, tuning.gammas, options.layers)
        # As projections leave them: tokens before heads.
        self.tensors = [
            tensor.transpose(0, 1).contiguous().transpose(0, 1)[None]
            for tensor in (inputs.query, inputs.key, inputs.value)
        ]
        self.mask = FactMask.make((1, 1, tokens, tokens), device, MaskFacts(0, 0, None, None))
        artifact = synthetic_artifact(self.model, 0.1)
        self.shared = Session(self.model, artifact, RuntimeConfig(min_tokens=0, max_density=1.0))
        self.shared.prefill = SparsePrefill(plan)
        self.below = Session(self.model, artifact, RuntimeConfig(min_tokens=tokens + 1))
        self.linear = _linear(tokens, device) if options.linear else None

    def measure(self) -> Row:
        """Times every kind of attention, in turns."""
        query, key, _ = self.tensors
        kinds: dict[str, Attention] = {OWN: self._own(), BELOW: self._seam, SHARED: self._seam}
        sessions = {BELOW: self.below, SHARED: self.shared}
        missing: dict[str, str] = {}
        others: dict[str, tuple[str, Callable[[], Attention]]] = {
            CUDNN.name: ("cudnn", self._cudnn),
            FlashAttention4.name: ("fa4", self._fa4),
        }
        for name, (kind, make) in others.items():
            reason = missing_baseline(kind, query[0], key[0])
            if reason is None:
                try:
                    attention = make()
                    attention(0)
                except failures() as error:
                    reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                else:
                    kinds[name] = attention
            if reason is not None:
                missing[name] = reason
        times: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(self.options.repeats):
            for name, attention in kinds.items():
                with sessions.get(name, nullcontext()):
                    times[name].append(self._time(attention))
        for session in sessions.values():
            session.reset()
        ms = {name: statistics.median(found) for name, found in times.items()}
        return Row(query.shape[2], self.facts.density, self.facts.recall, ms, missing)

    def _time(self, attention: Attention) -> float:
        layers = self.options.layers

        def layers_after_each_other() -> None:
            for layer in range(layers):
                if self.linear is not None:
                    self.linear()
                attention(layer)

        # Another kind ran before: what it left in caches is not to count.
        layers_after_each_other()
        return stream_ms(layers_after_each_other, self.options.device, 1, 1) / layers

    def _seam(self, layer: int) -> object:
        """As transformers calls a session."""
        return interface._attention(
            self.modules[layer], *self.tensors, self.mask, scaling=DIM**-0.5
        )

    def _own(self) -> Attention:
        """As transformers calls SDPA without a session."""
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return lambda layer: sdpa_attention_forward(
            self.modules[layer], *self.tensors, None, scaling=DIM**-0.5
        )

    def _cudnn(self) -> Attention:
        query, key, value = (tensor[0] for tensor in self.tensors)
        return lambda _: CUDNN(query, key, value).transpose(1, 2).contiguous()

    def _fa4(self) -> Attention:
        call = FlashAttention4().dense(*(tensor[0] for tensor in self.tensors))
        return lambda _: call()


def _linear(tokens: int, device: str) -> Call:
    """The products of one layer's linear layers, with random weights."""
    kind: dict[str, Any] = {"device": device}
    kind["dtype"] = torch.bfloat16 if device == "cuda" else torch.float32
    hidden = torch.ones(tokens, HIDDEN, **kind)
    shapes = ((PROJECTED, HIDDEN), (HIDDEN, HIDDEN), (2 * INNER, HIDDEN), (HIDDEN, INNER))
    projected, out, up, down = (torch.randn(shape, **kind) for shape in shapes)
    linear = torch.nn.functional.linear

    def run() -> None:
        linear(hidden, projected)
        linear(hidden, out)
        gate, inner = linear(hidden, up).chunk(2, dim=-1)
        linear(gate * inner, down)

    return run


def crossover_of(rows: list[Row]) -> int | None:
    """The least of the lengths from which on sharing is never slower than the best dense."""
    found = None
    for row in sorted(rows, key=lambda row: -row.tokens):
        if row.gain < 1:
            break
        found = row.tokens
    return found


def density_crossover(tokens: int, device: str) -> dict[str, Any]:
    """Times of block-sparse attention at several densities over dense attention's.

    `equal` is the density at which both take as long, between the measured ones; None where sparse
    attention is faster at all of them.
    """
    kind = torch.bfloat16 if device == "cuda" else torch.float32
    query, key, value = (
        torch.randn(heads, tokens, DIM, device=device, dtype=kind) for heads in (HEADS, 8, 8)
    )
    scale = DIM**-0.5
    dense = measure(lambda: causal_attention(query, key, value, scale=scale), device).median
    out = torch.empty_like(query)
    ratios: dict[float, float] = {}
    for wanted in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        lists = structured_lists(tokens, BLOCK, HEADS, wanted, device, 0)
        call = measure(
            lambda lists=lists: block_sparse_attention(query, key, value, lists, out=out), device
        )
        ratios[density(lists, tokens)] = call.median / dense
    return {"tokens": tokens, "dense_ms": dense, "ratios": ratios, "equal": _equal(ratios)}


def _equal(ratios: dict[float, float]) -> float | None:
    """Where the ratio passes 1, on the line between its neighbours."""
    known = sorted(ratios.items())
    if known[0][1] >= 1:
        return known[0][0]
    for (low, below), (high, above) in pairwise(known):
        if below < 1 <= above:
            return low + (high - low) * (1 - below) / (above - below)
    return None


def verdicts(rows: list[Row], least: int | None) -> list[str]:
    """What a session does at each length with that crossover, over the best dense attention."""
    lines = []
    for row in rows:
        shares = least is not None and row.tokens >= least
        ratio = row.best_dense / row.ms[SHARED if shares else BELOW]
        text = f"{row.tokens:>7}: best dense / session ({'shared' if shares else 'dense'})"
        goal = NEVER_SLOWER.at(row.tokens)
        end = "" if goal is None else f", goal {goal}: {NEVER_SLOWER.verdict(row.tokens, ratio)}"
        lines.append(f"{text} {ratio:.3f}, own / session {_own_ratio(row, shares):.3f}{end}")
    return lines


def _own_ratio(row: Row, shares: bool) -> float:
    return row.ms[OWN] / row.ms[SHARED if shares else BELOW]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--plan", choices=list(PLANS), default="mixed")
    parser.add_argument("--recall", type=float, default=0.97)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--linear", action="store_true", help="with an 8B model's linear layers")
    parser.add_argument(
        "--density-tokens", type=int, nargs="*", default=[8192, 32768], help="for the density"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--commit", help="the commit, where the sources are without git's files")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; use --device cpu")
    return options


@torch.no_grad()
def main() -> None:
    options = parse()
    facts = provenance(options.device, options.commit)
    facts |= {"linear": options.linear, "layers": options.layers, "plan": options.plan}
    print(" ".join(f"{name}={value}" for name, value in facts.items()))
    rows = []
    for tokens in options.tokens:
        row = Layers(options, tokens).measure()
        rows.append(row)
        times = ", ".join(f"{name} {ms:.3f}" for name, ms in row.ms.items())
        times += "".join(f", {name} missing: {why}" for name, why in row.missing.items())
        print(
            f"{tokens:>7}: d {row.density:.3f}, recall {row.recall:.3f}; ms a layer: {times}; "
            f"best dense / shared {row.gain:.3f}",
            flush=True,
        )
    least = crossover_of(rows)
    print("sharing is never slower from", "none of these lengths" if least is None else least)
    print("\n".join(verdicts(rows, least)))
    densities = [density_crossover(tokens, options.device) for tokens in options.density_tokens]
    for found in densities:
        ratios = ", ".join(f"d {d:.2f}: {ratio:.3f}" for d, ratio in found["ratios"].items())
        equal = "none" if found["equal"] is None else f"{found['equal']:.2f}"
        print(f"{found['tokens']:>7}: block sparse / dense: {ratios}; as long at d {equal}")
    if options.json:
        numbers = {
            "facts": facts,
            "rows": [asdict(row) for row in rows],
            "crossover": least,
            "densities": densities,
        }
        options.json.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
