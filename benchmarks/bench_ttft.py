"""Time to first token of an 8B model: SDPA, FlashAttention-4, sessions with patterns, FP8 too.

    python benchmarks/bench_ttft.py --json ttft.json
    python benchmarks/bench_ttft.py --tokens 262144 1048576 --layers 2 1

Times whole transformers models with random weights, all kinds of attention in turns. Random weights
leave attention without structure, so the session gets tensors that have some (layer_cases.py) in
place of each layer's own, of the same sizes and strides: density and recall are known, and the time
is what it would be. Dense attention takes as long on either. Density falls from .30 at 8K to .11 at
32K, and to .10 above, as the goals of bench_layer.py have it. Where few layers are run, the time of
all is what the model takes without layers, and as many times what one layer takes.

The session in FP8 has all heads in it, on the patterns of the other: density and recall are alike.

The least that a session could take is the time of the model whose attention gives back its queries,
and of its attention on the device alone: what is above that is its host's, and waits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from kernel_cases import FlashAttention4, failures, missing_baseline
from layer_cases import DIM, PLANS, Structured, chosen_density, facts_of, uniform_plan
from measure_crossover import density_for
from provenance import provenance, summary
from timing import measure
from torch import Tensor

from shareprefill.bench.shapes import build_shape
from shareprefill.bench.synthetic import synthetic_artifact
from shareprefill.config import RuntimeConfig
from shareprefill.errors import UnsupportedError
from shareprefill.runtime.core import SparsePrefill
from shareprefill.runtime.generation import prefill
from shareprefill.runtime.records import LayerRecord
from shareprefill.runtime.session import Session

SHAPE = "llama-3.1-8b"
SDPA, SHARED, FP8, NONE = "SDPA", "session", "session in FP8", "no attention"
LENGTHS = tuple(1024 << power for power in range(2, 11))
LEAST_DENSITY = 0.10
LAYERS = (32, 32, 32, 32, 16, 16, 2, 1, 1)
# Longer ones take an exact map, as much work as dense attention, for a number alone.
LONGEST_RECALL = 524288


@dataclass(frozen=True)
class Row:
    """One length.

    Attributes:
        tokens: Of the prompt.
        layers: That were run.
        seconds: To the first token of a model with all layers, of each turn, by kind of attention.
        without: Seconds without layers.
        attention: Seconds that the session's attention takes the device, of all layers.
        density: Computed blocks over causal blocks of the session.
        recall: Attention mass inside its patterns; None where it was not measured.
        missing: Why other kinds could not be timed.
    """

    tokens: int
    layers: int
    seconds: dict[str, list[float]]
    without: float
    attention: float
    density: float
    recall: float | None
    missing: dict[str, str]

    def median(self, kind: str) -> float | None:
        """Median of a kind's turns; None if it could not be timed."""
        found = self.seconds.get(kind)
        return statistics.median(found) if found else None

    @property
    def overhead(self) -> float:
        """The session's time over that of a model without attention and of its attention."""
        bare, ours = self.median(NONE), self.median(SHARED)
        assert bare is not None
        assert ours is not None
        return ours / (bare + self.attention)


class Given(SparsePrefill):
    """Sparse prefill of the same queries, keys and values in every layer, whatever it is given."""

    tensors: tuple[Tensor, Tensor, Tensor]

    def attend(
        self, layer: int, state: Any, query: Tensor, key: Any, value: Any, **options: Any
    ) -> tuple[Tensor, LayerRecord]:
        assert query.shape == self.tensors[0].shape
        return super().attend(layer, state, *self.tensors, **options)


class Lengths:
    """A model of which ever fewer layers are run, and its kinds of attention."""

    def __init__(self, model: Any, options: argparse.Namespace) -> None:
        self.model, self.options = model, options
        self.device: torch.device = model.device
        self.all_layers = len(model.model.layers)
        self.artifact = synthetic_artifact(model, 0.1)
        register_attention()

    def measure(self, tokens: int, layers: int) -> Row:
        """Times one length; those to come cannot have more layers."""
        self.model.model.layers = self.model.model.layers[:layers]
        torch.cuda.empty_cache()
        given, in_fp8, density, recall = self._given(tokens, layers)
        session, session_fp8 = self._session(given), self._session(in_fp8)
        prompt = torch.randint(3, self.model.config.vocab_size, (tokens,), device="cpu")
        kinds: dict[str, Callable[[], float]] = {
            SDPA: lambda: self._dense("sdpa", prompt),
            FlashAttention4.name: lambda: self._dense("fa4", prompt),
            SHARED: lambda: self._shared(session, prompt),
            FP8: lambda: self._shared(session_fp8, prompt),
            NONE: lambda: self._dense("none", prompt),
        }
        missing: dict[str, str] = {}
        reason = missing_baseline("fa4", given.tensors[0], given.tensors[1])
        if reason is not None:
            missing[FlashAttention4.name] = reason
            del kinds[FlashAttention4.name]
        without = self._without_layers(prompt)
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        first = self._turn(kinds, seconds, missing)
        # What is compiled or allocated for the first time is not counted, where a turn is short.
        turns = min(self.options.repeats, int(self.options.seconds / first))
        if turns > 0:
            seconds = {kind: [] for kind in kinds}
        for _ in range(turns):
            self._turn(kinds, seconds, missing)
        scaled = {
            kind: [without + (one - without) * self.all_layers / layers for one in found]
            for kind, found in seconds.items()
        }
        attention = self._attention_seconds(given, tokens) * self.all_layers
        return Row(tokens, layers, scaled, without, attention, density, recall, missing)

    def _turn(
        self,
        kinds: dict[str, Callable[[], float]],
        seconds: dict[str, list[float]],
        missing: dict[str, str],
    ) -> float:
        start = time.perf_counter()
        for kind in list(kinds):
            try:
                seconds[kind].append(kinds[kind]())
            except (UnsupportedError, *failures()) as error:
                if kind == SHARED:
                    raise
                missing[kind] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
                del kinds[kind], seconds[kind]
        return time.perf_counter() - start

    def _session(self, prefill: SparsePrefill) -> Session:
        session = Session(self.model, self.artifact, RuntimeConfig(min_tokens=0, max_density=1.0))
        session.prefill = prefill
        return session

    def _given(self, tokens: int, layers: int) -> tuple[Given, Given, float, float | None]:
        """Sparse prefills of structured tensors, the second in FP8; their density and recall."""
        policies = PLANS[self.options.plan]
        inputs = Structured(tokens, self.device.type)
        density = max(LEAST_DENSITY, density_for(tokens))
        tuning = inputs.tune(density, self.options.recall, policies)
        begin = inputs.layer(uniform_plan(policies, tuning.gammas))
        if tokens <= LONGEST_RECALL:
            facts = facts_of(begin())
            reached, recall = facts.density, facts.recall
        else:
            reached, recall = chosen_density(begin()), None
        made = [
            Given(uniform_plan(policies, tuning.gammas, layers, in_fp8=in_fp8))
            for in_fp8 in (False, True)
        ]
        # As projections leave them: tokens before heads.
        query, key, value = (
            tensor.transpose(0, 1).contiguous().transpose(0, 1)
            for tensor in (inputs.query, inputs.key, inputs.value)
        )
        for given in made:
            given.tensors = (query, key, value)
        return made[0], made[1], reached, recall

    def _attention_seconds(self, given: Given, tokens: int) -> float:
        """What one layer's attention takes the device; on a CPU all of it."""
        geometry = given.plan.geometry(tokens, tokens, self.device)

        def layer() -> object:
            return given.attend(0, given.begin(geometry), *given.tensors, scale=DIM**-0.5)

        found = measure(layer, self.device.type)
        return (found.median if found.device is None else found.device) / 1e3

    def _shared(self, session: Session, prompt: Tensor) -> float:
        with session:
            found = self._seconds(prompt)
        session.reset()
        return found

    def _dense(self, implementation: str, prompt: Tensor) -> float:
        self.model.set_attn_implementation(implementation)
        try:
            return self._seconds(prompt)
        finally:
            self.model.set_attn_implementation("sdpa")

    def _without_layers(self, prompt: Tensor) -> float:
        with _layers(self.model, 0):
            self._seconds(prompt)
            return self._seconds(prompt)

    def _seconds(self, prompt: Tensor) -> float:
        self._wait()
        start = time.perf_counter()
        # Reading the token waits for the device.
        int(prefill(self.model, prompt, 0).logits[0, -1].argmax())
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


@contextmanager
def _layers(model: Any, count: int) -> Iterator[None]:
    """The model with its first layers alone."""
    every = model.model.layers
    model.model.layers = every[:count]
    try:
        yield
    finally:
        model.model.layers = every


def register_attention() -> None:
    """FlashAttention-4's dense call, and none at all, as attention of transformers' models."""
    from transformers import AttentionInterface, AttentionMaskInterface

    def attend(
        _module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: None, **options: Any
    ) -> tuple[Tensor, None]:
        from flash_attn.cute import flash_attn_func

        tensors = (tensor.transpose(1, 2) for tensor in (query, key, value))
        out = flash_attn_func(*tensors, softmax_scale=options["scaling"], causal=True)
        return out[0], None

    def give_back(_module: Any, query: Tensor, *_args: Any, **_options: Any) -> tuple[Tensor, None]:
        return query.transpose(1, 2), None

    for name, function in (("fa4", attend), ("none", give_back)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, lambda *_args, **_options: None)


def table(rows: list[Row]) -> list[str]:
    """Lines of Markdown."""
    kinds = (SDPA, FlashAttention4.name, SHARED, FP8)
    ratios = ((SDPA, SHARED), (FlashAttention4.name, SHARED), (SDPA, FP8))
    heads = ["tokens", "layers run", *(f"{kind}, s" for kind in kinds)]
    heads += [f"{kind} ÷ {ours}" for kind, ours in ratios]
    heads += [f"{NONE}, s", "attention on the device, s", "session ÷ both", "density", "recall"]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for row in rows:
        medians = {kind: row.median(kind) for kind in kinds}
        cells = ["missing" if found is None else f"{found:.3f}" for found in medians.values()]
        for kind, other in ratios:
            found, ours = medians[kind], medians[other]
            cells.append("–" if found is None or ours is None else f"{found / ours:.2f}")
        cells += [f"{row.median(NONE):.3f}", f"{row.attention:.3f}", f"{row.overhead:.3f}"]
        cells += [f"{row.density:.3f}", "–" if row.recall is None else f"{row.recall:.3f}"]
        lines.append(f"| {row.tokens} | {row.layers} | {' | '.join(cells)} |")
    return lines


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--layers", nargs="+", type=int, default=list(LAYERS), help="by length")
    parser.add_argument("--plan", default="shared", choices=PLANS)
    parser.add_argument("--recall", type=float, default=0.95, help="that plans are tuned to")
    parser.add_argument("--repeats", type=int, default=3, help="most turns of a length")
    parser.add_argument("--seconds", type=float, default=8.0, help="most for further turns")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--commit", help="the commit, where the sources are without git's files")
    options = parser.parse_args(arguments)
    if len(options.layers) != len(options.tokens):
        parser.error("--layers takes a number for each of --tokens")
    if sorted(options.layers, reverse=True) != options.layers:
        parser.error("--layers must not rise")
    return options


def run(
    model: Any, options: argparse.Namespace, keep: Callable[[list[Row]], None] = lambda rows: None
) -> list[Row]:
    """Times all lengths; prints each, and keeps all so far, as it is there."""
    lengths, rows = Lengths(model, options), []
    for tokens, layers in zip(options.tokens, options.layers, strict=True):
        rows.append(lengths.measure(tokens, layers))
        print(table(rows)[-1], *rows[-1].missing.items(), flush=True)
        keep(rows)
    return rows


@torch.inference_mode()
def main() -> None:
    options = parse()
    facts = provenance("cuda", options.commit)
    print(summary(facts), flush=True)
    model = build_shape(
        SHAPE,
        layers=max(options.layers),
        tokens=max(options.tokens),
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
    )

    def keep(rows: list[Row]) -> None:
        if options.json:
            numbers = {"facts": facts, "rows": [asdict(row) for row in rows]}
            options.json.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")

    print("\n".join(table(run(model, options, keep))))


if __name__ == "__main__":
    main()
