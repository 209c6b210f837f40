"""Times prefills of several lengths, dense and shared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shareprefill.artifact import Artifact, check_fingerprint
from shareprefill.bench.config import BenchConfig
from shareprefill.bench.shapes import build_shape, layers_of
from shareprefill.bench.synthetic import synthetic_artifact
from shareprefill.config import RuntimeConfig
from shareprefill.errors import ConfigError
from shareprefill.models import fingerprint, geometry, load_model, load_tokenizer, resolve_device
from shareprefill.runtime.crossover import LayerSizes, crossover
from shareprefill.runtime.generation import chunk_tokens, encode_prompt, prefill
from shareprefill.runtime.layers import layer_sizes
from shareprefill.runtime.ops.fp8_attention import refuse as refuse_fp8
from shareprefill.runtime.ops.hopper.launch import unavailable
from shareprefill.runtime.session import Session

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DENSE, SHARE = "dense", "share"
# Tokens of the prefill that warms longer ones up; prefills of each kind by default.
_SHORT, _REPEATS = 32768, 3
# Prefills that take longer hide what the host prepares for a length.
_HIDDEN_S = 1.0
# Prefills in which the host is timed: the longest, and by how much each of the others is shorter.
_HOST_TOKENS, _HOST_STEP, _HOST_REPEATS = 2048, 17, 7


@dataclass(frozen=True)
class BenchRow:
    """One length under one kind of attention.

    Attributes:
        tokens: Of the prompt.
        attention: `dense` or `share`.
        chunk: Tokens at a time; 0 for all at once.
        ttft_s: Seconds to the first token: prefill and the last token's logits; the median, of a
            length that came before.
        peak_gib: Most device memory held, weights and cache included; None on a CPU.
        density: Computed share of the causal blocks.
        selection_work: Work of choosing the patterns, as a share of dense attention's operations.
        seconds: Of each prefill, in their order.
        first_s: Of the first prefill of this length, for which the host prepares launches, and
            cuDNN a plan where SDPA takes its kernel.
    """

    tokens: int
    attention: str
    chunk: int
    ttft_s: float
    peak_gib: float | None
    density: float
    selection_work: float
    seconds: tuple[float, ...] = ()
    first_s: float | None = None


@dataclass(frozen=True)
class BenchResult:
    """All rows, and what they were measured on.

    Attributes:
        model: Shape or model, with its layers.
        device: Its name.
        dtype: Of the weights.
        sizes: Of a layer.
        host_ms: Milliseconds that the host takes for a layer with patterns, of a length that it has
            not seen; None on a CPU, which computes itself, and where prompts are short.
        notes: What has to be known to read the rows.
        rows: By length, dense before share.
    """

    model: str
    device: str
    dtype: str
    sizes: LayerSizes
    host_ms: float | None
    notes: tuple[str, ...]
    rows: tuple[BenchRow, ...]

    def speedup(self, tokens: int) -> float | None:
        """Dense time to first token over ours; None where one of them is missing."""
        found = {row.attention: row.ttft_s for row in self.rows if row.tokens == tokens}
        return found[DENSE] / found[SHARE] if len(found) == 2 else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        values = asdict(self)
        for row, found in zip(values["rows"], self.rows, strict=True):
            row["speedup"] = self.speedup(found.tokens) if found.attention == SHARE else None
        return values


def run_bench(
    config: BenchConfig,
    artifact: Artifact | None = None,
    *,
    trust_remote_code: bool = False,
    repeats: int = _REPEATS,
    progress: Callable[[BenchRow], None] | None = None,
) -> BenchResult:
    """Times every length, dense and shared.

    Args:
        config: What is timed.
        artifact: Of the model that the configuration names; shapes get a synthetic one.
        trust_remote_code: Run the model repository's own code.
        repeats: Prefills of each kind, whose median counts.
        progress: Called with every row as it is there.

    Raises:
        ConfigError: a model without an artifact or the other way round, an unknown shape, one that
            does not fit into memory, or lengths that do not fit.
        UnsupportedError: FP8 attention does not run here.
        ModelError: the model cannot be loaded.
        ArtifactError: the artifact is of another model.
    """
    device = resolve_device(config.device)
    if config.precision == "fp8":
        refuse_fp8(unavailable(device))
    if config.model is None and artifact is not None:
        raise ConfigError(
            "an artifact is timed with its model: name that, too (--model), or leave --artifact out"
        )
    torch.manual_seed(0)
    if config.model is None:
        model, notes = _random_model(config, device)
        artifact = synthetic_artifact(model, config.density)
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        prompts = [
            torch.randint(3, vocabulary, (tokens,), device="cpu") for tokens in config.lengths
        ]
    else:
        if artifact is None:
            raise ConfigError("a model that is named needs its artifact (--artifact clusters.st)")
        model = load_model(
            config.model,
            device=config.device,
            dtype=config.dtype,
            trust_remote_code=trust_remote_code,
        )
        check_fingerprint(artifact, fingerprint(model))
        prompts, notes = _retrieval(config, model, trust_remote_code)
    bench = _Bench(config, model, artifact, device, repeats)
    longest = max(prompts, key=len)
    bench.warm_up(longest)
    host_ms = bench.host_ms(longest)
    rows = []
    for prompt in prompts:
        for row in bench.measure(prompt):
            rows.append(row)
            if progress is not None:
                progress(row)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return BenchResult(
        f"{config.model or config.shape}, {geometry(model).layers} layers",
        name,
        str(model.dtype).removeprefix("torch."),
        layer_sizes(model),
        host_ms,
        (*notes, *bench.notes(rows, host_ms)),
        tuple(rows),
    )


class _Bench:
    """A model and a session to time it in."""

    def __init__(
        self,
        config: BenchConfig,
        model: PreTrainedModel,
        artifact: Artifact,
        device: torch.device,
        repeats: int,
    ) -> None:
        self.config, self.model, self.device, self.repeats = config, model, device, repeats
        options = RuntimeConfig(min_tokens=0, precision=config.precision)
        self.session = Session(model, artifact, options)
        self.kinds = (DENSE, SHARE) if config.dense else (SHARE,)

    def warm_up(self, prompt: Tensor) -> None:
        """Compiles the kernels, fills the allocator, and imports what chunks need."""
        short = prompt[:_SHORT]
        for attention in self.kinds:
            self._prefill(short, attention, 0)
            if 0 < self._chunk(prompt) < len(prompt):
                self._prefill(short, attention, -(-len(short) // 2))

    def host_ms(self, prompt: Tensor) -> float | None:
        """The host's time of a layer, see `BenchResult`: the median of several lengths."""
        if self.device.type != "cuda" or len(prompt) < _HOST_TOKENS:
            return None
        times, layers = [], geometry(self.model).layers
        for number in range(_HOST_REPEATS):
            # Short, so that the device does not hold the host up.
            tokens = _HOST_TOKENS - number * _HOST_STEP
            torch.cuda.synchronize(self.device)
            start = time.perf_counter()
            with self.session:
                prefill(self.model, prompt[:tokens], 0)
                times.append((time.perf_counter() - start) / layers * 1e3)
        return statistics.median(times)

    def measure(self, prompt: Tensor) -> list[BenchRow]:
        """Times one prompt, its kinds of attention in turns: a clock that drifts slows both."""
        chunk = self._chunk(prompt)
        peaks: dict[str, float | None] = dict.fromkeys(self.kinds)
        self.session.reset()
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.empty_cache()

        def timed(attention: str) -> float:
            if cuda:
                torch.cuda.reset_peak_memory_stats(self.device)
            found = self._prefill(prompt, attention, chunk)
            if cuda:
                peaks[attention] = torch.cuda.max_memory_allocated(self.device) / 2**30
            return found

        firsts = {attention: timed(attention) for attention in self.kinds}
        seconds: dict[str, list[float]] = {attention: [] for attention in self.kinds}
        for attention, first in firsts.items():
            if cuda and first < _HIDDEN_S:
                # A session notes its launches in the second prefill of a length.
                self._prefill(prompt, attention, chunk)
            else:
                seconds[attention].append(first)
        for _ in range(self.repeats):
            for attention in self.kinds:
                if len(seconds[attention]) < self.repeats:
                    seconds[attention].append(timed(attention))
        report = self.session.report()
        return [
            BenchRow(
                tokens=len(prompt),
                attention=attention,
                chunk=chunk if chunk < len(prompt) else 0,
                ttft_s=statistics.median(seconds[attention]),
                peak_gib=peaks[attention],
                density=report.density if attention == SHARE else 1.0,
                selection_work=report.selection_work if attention == SHARE else 0.0,
                seconds=tuple(seconds[attention]),
                first_s=firsts[attention],
            )
            for attention in self.kinds
        ]

    def _chunk(self, prompt: Tensor) -> int:
        """Tokens of a prompt at a time; 0 for all at once."""
        if self.config.chunk is not None:
            return self.config.chunk
        return chunk_tokens(self.model, len(prompt))

    def notes(self, rows: list[BenchRow], host_ms: float | None) -> tuple[str, ...]:
        """What the rows do not say of themselves."""
        least = crossover(self.device).tokens_of(layer_sizes(self.model))
        found = [
            f"times: medians of {self.repeats} prefills, dense and shared in turns",
            "dense: the model's own attention (torch SDPA)",
        ]
        if any(row.tokens < least for row in rows):
            found.append(
                f"share is forced at every length: a session runs prompts below {least} tokens "
                "dense by itself"
            )
        if host_ms is not None:
            found.append(
                f"a layer with patterns takes the host {host_ms:.2f} ms, at a length that it has "
                "not seen: where dense layers take the device less, nothing is gained"
            )
        if any(row.chunk for row in rows):
            found.append(
                "in chunks, dense attention reads all keys so far: on Hopper with the kernel of "
                "block lists, elsewhere with SDPA's flash kernel where there is one"
            )
        return tuple(found)

    def _prefill(self, prompt: Tensor, attention: str, chunk: int) -> float:
        start = time.perf_counter()
        if attention == SHARE:
            with self.session:
                step = prefill(self.model, prompt, chunk)
        else:
            step = prefill(self.model, prompt, chunk)
        # Reading the token waits for the device.
        int(step.logits[0, -1].argmax())
        return time.perf_counter() - start


def _random_model(
    config: BenchConfig, device: torch.device
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    full = layers_of(config.shape)
    layers = full if config.layers is None else config.layers
    kind = "float32" if device.type == "cpu" else "bfloat16"
    model = build_shape(
        config.shape,
        layers=layers,
        tokens=max(config.lengths),
        device=device,
        dtype=getattr(torch, kind if config.dtype == "auto" else config.dtype),
    )
    notes = [
        "random weights and tokens: attention has no structure, so the patterns are synthetic, of "
        f"about the density {config.density:g}; every layer has pivots, sharing heads, "
        "vertical-slash and row-sampled ones, and their selection is timed too"
    ]
    if layers < full:
        notes.append(f"{layers} of {full} layers: times and memory are of these alone")
    return model, tuple(notes)


def _retrieval(
    config: BenchConfig, model: PreTrainedModel, trust_remote_code: bool
) -> tuple[list[Tensor], tuple[str, ...]]:
    """Retrieval prompts of the model's own tokens, each a little below its length."""
    from shareprefill.calib.tasks import generate

    assert config.model is not None
    tokenizer = load_tokenizer(config.model, trust_remote_code=trust_remote_code)
    prompts = [
        encode_prompt(model, tokenizer, generate("retr_kv", tokenizer, tokens, 0).prompt)
        for tokens in config.lengths
    ]
    return prompts, ("prompts: key-value retrieval (retr_kv)",)
