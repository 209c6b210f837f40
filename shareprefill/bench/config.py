"""What `sp bench` times. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from shareprefill.config import PRECISIONS, Precision
from shareprefill.errors import ConfigError, require

DTYPES = ("auto", "float32", "bfloat16", "float16")


def _require_random_weights(config: BenchConfig | TuneConfig, names: tuple[str, ...]) -> None:
    """Refuses what a model that is named makes useless."""
    for name in names:
        if config.model is not None and getattr(config, name) != getattr(type(config), name):
            raise ConfigError(
                f"{name} is for a shape of random weights: a model that is named has its own, so "
                "leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What `sp bench` times.

    Attributes:
        lengths: Tokens of the prompts.
        shape: A shape with random weights, `llama-3.1-8b`, `llama-3.2-1b`, `llama-3.1-70b` or
            `smollm2-135m`; only without a model.
        model: A model to load instead; it needs an artifact.
        layers: Layers of the shape; None: all of them.
        density: Share of the causal blocks that the synthetic patterns are to cover.
        chunk: Tokens of a prefill at a time; 0 for all at once; None: as many as memory allows.
        dense: Time dense attention too.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: `auto` (float32 on a CPU, bfloat16 on a GPU), `float32`, `bfloat16` or `float16`.
        precision: Of sparse attention's operands, `model` or `fp8`, as in `sp run`; with `fp8` all
            heads of a shape are computed in it.
    """

    lengths: tuple[int, ...] = (8192, 32768, 131072)
    shape: str = "llama-3.1-8b"
    model: str | None = None
    layers: int | None = None
    density: float = 0.1
    chunk: int | None = None
    dense: bool = True
    device: str = "auto"
    dtype: str = "auto"
    precision: Precision = "model"

    def __post_init__(self) -> None:
        require(self.precision in PRECISIONS, "precision", self.precision, f"one of {PRECISIONS}")
        if not self.lengths or min(self.lengths) < 1:
            raise ConfigError(f"lengths = {self.lengths} is not allowed: name numbers above 0")
        if not 0 < self.density <= 1:
            raise ConfigError(f"density = {self.density} is not allowed: between 0 and 1")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype = {self.dtype!r} is not allowed: one of {', '.join(DTYPES)}")
        if self.chunk is not None and self.chunk < 0:
            raise ConfigError(f"chunk = {self.chunk} is not allowed: 0 (all at once) or more")
        _require_random_weights(self, ("layers", "shape", "density"))


ENGINES = ("auto", "session", "vllm")


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """What `sp tune` times.

    Attributes:
        lengths: Tokens of the prompts.
        model: The model to be served; it needs its artifact. None: a shape with random weights.
        artifact: Artifact of the model.
        shape: See `sp bench`; None: `llama-3.2-1b` on a CPU, `llama-3.1-8b` on a GPU.
        layers: Layers of the shape; None: a few, as one takes as long as the next.
        density: Share of the causal blocks that a shape's synthetic patterns are to cover.
        repeats: Prefills of each kind at each length; the median counts.
        engine: What runs them: `session` (transformers), `vllm`, or `auto`, which is vLLM where it
            is installed.
        table: File that the result goes into; None: the one in the user's folder of caches.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: `auto` (float32 on a CPU, bfloat16 on a GPU), `float32`, `bfloat16` or `float16`.
    """

    lengths: tuple[int, ...] = (2048, 4096, 8192, 16384)
    model: str | None = None
    artifact: str | None = None
    shape: str | None = None
    layers: int | None = None
    density: float = 0.2
    repeats: int = 3
    engine: str = "auto"
    table: str | None = None
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        require(bool(self.lengths), "lengths", self.lengths, "at least one number above 0")
        require(self.repeats >= 1, "repeats", self.repeats, "at least 1")
        require(self.engine in ENGINES, "engine", self.engine, f"one of {', '.join(ENGINES)}")
        require(0 < self.density <= 1, "density", self.density, "above 0 and at most 1")
        require(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        if (self.model is None) != (self.artifact is None):
            raise ConfigError("a model and its artifact go together: give both, or neither")
        _require_random_weights(self, ("layers", "shape", "density"))


@dataclass(frozen=True, kw_only=True)
class ServeBenchConfig:
    """What `sp bench-serve` asks of a server.

    Attributes:
        model: The served model, a folder or a hub id: its tokenizer makes the prompts.
        served_name: The name that the server knows it by (vLLM's `--served-model-name`); None: the
            same.
        url: Of the server, which runs with the plug-in and its switch.
        lengths: Tokens of the prompts.
        rates: Requests a second.
        prompts: Requests of each kind at each length and rate.
        output_tokens: Tokens that every request generates.
        seed: Of the prompts and of the times at which they come.
    """

    model: str
    served_name: str | None = None
    url: str = "http://127.0.0.1:8000"
    lengths: tuple[int, ...] = (8192, 32768)
    rates: tuple[float, ...] = (0.5, 1.0, 2.0)
    prompts: int = 60
    output_tokens: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        require(bool(self.model), "model", self.model, "a folder or a hub id")
        for name in ("lengths", "rates"):
            values = getattr(self, name)
            allowed = "at least one number above 0"
            require(bool(values) and min(values) > 0, name, values, allowed)
        for name in ("prompts", "output_tokens"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        starts = ("http://", "https://")
        require(self.url.startswith(starts), "url", self.url, "an address like http://host:8000")
