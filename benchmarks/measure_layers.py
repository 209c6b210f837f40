"""What a whole layer takes the device and the host, by a model's sizes.

    python benchmarks/measure_layers.py --json layers.json
    python benchmarks/measure_layers.py --device cpu --shapes tiny --tokens 256 384 --end-tokens 256

Three tables, of shapes with random weights, in transformers' eager mode:

1. The device alone, a layer, dense; and what that makes of it by the model's sizes: seconds for a
   token and a parameter, for a token and a channel of the hidden state (norms, rotations and
   activations read and write those), and for a pair of tokens and a channel of all query heads.
   Least squares of relative errors over all shapes and lengths.
2. The host alone, a layer, until a pass returns; and 3. passes from end to end. Both by the
   model's own attention, FlashAttention-4 where it is installed, a session's dense one, and its
   sparse one, in turns; of lengths that were not seen before, and again (the third pass of each).

The result goes into shareprefill/runtime/crossover.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from bench_ttft import register_attention
from kernel_cases import FlashAttention4, missing_baseline
from provenance import provenance
from timing import device_ms, host_ms

from shareprefill.bench.shapes import SHAPES, build_shape, layers_of
from shareprefill.bench.synthetic import synthetic_artifact
from shareprefill.config import RuntimeConfig
from shareprefill.runtime.session import Session

DENSITY = 0.2
OWN, DENSE, SPARSE = "model's own", "session, dense", "session, sparse"
# Of a length, to make one that was not seen before.
_STEP = 17


@dataclass(frozen=True)
class DeviceRow:
    """One shape and length: milliseconds of a layer on the device, dense."""

    shape: str
    tokens: int
    parameters: int
    hidden: int
    width: int
    ms: float

    @property
    def terms(self) -> tuple[float, float, float]:
        """What the three rates are multiplied by."""
        pairs = self.tokens * self.tokens / 2
        return self.tokens * self.parameters, self.tokens * self.hidden, pairs * self.width


class Model:
    """A shape with random weights, and a session whose every prefill is sparse."""

    def __init__(self, shape: str, device: torch.device, most_tokens: int) -> None:
        self.shape, self.device, self.layers = shape, device, layers_of(shape)
        kind = torch.bfloat16 if device.type == "cuda" else torch.float32
        sizes = {"layers": self.layers, "tokens": most_tokens}
        self.model: Any = build_shape(shape, device=device, dtype=kind, **sizes)
        options = RuntimeConfig(min_tokens=0)
        artifact = synthetic_artifact(self.model, DENSITY)
        self.session = Session(self.model, artifact, options)
        self.dense = Session(self.model, artifact, RuntimeConfig(min_tokens=most_tokens + 1))
        # Passes so far, so that each has a length of its own.
        self.taken = 0
        self.ids = torch.randint(3, 500, (1, most_tokens), device=device)

    def run(self, tokens: int) -> None:
        """A forward pass of the decoder's layers."""
        self.model.model(input_ids=self.ids[:, :tokens], use_cache=False)

    def layer_ms(self, time_ms: Callable[[Callable[[], None]], float], tokens: int) -> float:
        """A layer's time: that of eight less that of four, so that nothing else counts."""
        config, times = self.model.config, []
        most = min(8, self.layers)
        for layers in (most // 2, most):
            config.num_hidden_layers = layers
            times.append(time_ms(lambda: self.run(tokens)))
        config.num_hidden_layers = self.layers
        return (times[1] - times[0]) / (most - most // 2)

    def device_row(self, tokens: int) -> DeviceRow:
        """What a dense layer takes on the device alone."""

        def alone(call: Callable[[], None]) -> float:
            call()
            if self.device.type != "cuda":
                return _wall_ms(call, self.device)
            # A host that slows down between the two is not to be seen.
            return device_ms(call, 2 * host_ms(call, 3), repeats=7)

        sizes = SHAPES[self.shape]
        parameters = sum(p.numel() for p in self.model.model.layers[0].parameters() if p.dim() > 1)
        hidden = sizes["hidden_size"]
        ms = self.layer_ms(alone, tokens)
        return DeviceRow(self.shape, tokens, parameters, hidden, hidden, ms)

    def passes(self, tokens: int, repeats: int) -> dict[str, tuple[float, ...]]:
        """Medians of passes of several lengths, by kind of attention.

        Returns:
            Host ms a layer and seconds of a length that is new, then the same of it again.
        """
        kinds: dict[str, Callable[[], AbstractContextManager[object]]] = {
            OWN: nullcontext,
            DENSE: lambda: self.dense,
            SPARSE: lambda: self.session,
        }
        query = torch.empty(1, 1, self.model.config.head_dim, device=self.device)
        if missing_baseline("fa4", query.bfloat16(), query.bfloat16()) is None:
            kinds[FlashAttention4.name] = self._fa4
        found: dict[str, list[list[float]]] = {name: [] for name in kinds}
        for _ in range(repeats):
            for name, context in kinds.items():
                self.taken += 1
                length = tokens - self.taken * _STEP
                with context():
                    times = [self._pass(length) for _ in range(3)]
                found[name].append([*times[0], *times[2]])
        return {
            name: tuple(map(statistics.median, zip(*rows, strict=True)))
            for name, rows in found.items()
        }

    @contextmanager
    def _fa4(self) -> Iterator[None]:
        """The model with FlashAttention-4's dense attention."""
        register_attention()
        self.model.set_attn_implementation("fa4")
        try:
            yield
        finally:
            self.model.set_attn_implementation("sdpa")

    def _pass(self, tokens: int) -> tuple[float, float]:
        """Milliseconds of the host, a layer, and seconds until the device is done."""
        _wait(self.device)
        begun = time.perf_counter()
        self.run(tokens)
        host = time.perf_counter() - begun
        _wait(self.device)
        return host / self.layers * 1e3, time.perf_counter() - begun


def fit(rows: list[DeviceRow]) -> tuple[list[float], list[float]]:
    """The three rates that least squares of relative errors give, in seconds, and those errors."""
    seconds = torch.tensor([row.ms / 1e3 for row in rows], dtype=torch.float64)
    terms = torch.tensor([row.terms for row in rows], dtype=torch.float64) / seconds[:, None]
    scale = terms.norm(dim=0)
    found = torch.linalg.lstsq(terms / scale, torch.ones(len(rows), 1, dtype=torch.float64))
    rates = found.solution[:, 0] / scale
    return rates.tolist(), (terms @ rates - 1).tolist()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _wall_ms(call: Callable[[], None], device: torch.device) -> float:
    _wait(device)
    begun = time.perf_counter()
    call()
    _wait(device)
    return (time.perf_counter() - begun) * 1e3


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--shapes", nargs="+", default=["smollm2-135m", "llama-3.2-1b", "llama-3.1-8b"]
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--host-tokens", type=int, default=2048)
    parser.add_argument(
        "--end-tokens", type=int, nargs="*", default=[6144, 8192, 12288, 16384, 24576, 32768, 40960]
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--commit", help="the commit, where the sources are without git's files")
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    options = parse()
    device = torch.device(options.device)
    facts = provenance(options.device, options.commit)
    print(" ".join(f"{name}={value}" for name, value in facts.items()))
    rows: list[DeviceRow] = []
    others: dict[str, Any] = {}
    most = max([*options.tokens, *options.end_tokens, options.host_tokens])
    for shape in options.shapes:
        model = Model(shape, device, most)
        with model.session:
            model.session.warm_up()
        for tokens in options.tokens:
            rows.append(model.device_row(tokens))
            print(f"{shape} {tokens}: device {rows[-1].ms:.3f} ms a layer, dense", flush=True)
        others[shape] = {}
        for tokens in (options.host_tokens, *options.end_tokens):
            others[shape][tokens] = found = model.passes(tokens, options.repeats)
            text = "; ".join(
                f"{name} {times[0]:.2f} {times[1]:.4f} / {times[2]:.2f} {times[3]:.4f}"
                for name, times in found.items()
            )
            print(f"{shape} {tokens}: host ms a layer, s; new / again: {text}", flush=True)
    rates, errors = fit(rows)
    names = ("token and parameter", "token and channel", "pair and channel")
    print(", ".join(f"{rate:.3g} s a {name}" for rate, name in zip(rates, names, strict=True)))
    print("errors:", ", ".join(f"{error:+.2f}" for error in errors))
    if options.json:
        numbers = {"facts": facts, "rows": [asdict(row) for row in rows], "rates": rates}
        options.json.write_text(json.dumps(numbers | others, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
