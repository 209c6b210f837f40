"""What `sp bench` times. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from shareprefill.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What `sp bench` times.

    Attributes:
        lengths: Tokens of the prompts.
        shape: A shape with random weights, `llama-3.1-8b`, `llama-3.2-1b` or `llama-3.1-70b`; not
            used where a model is named.
        model: A model to load instead; it needs an artifact.
        layers: Layers of the shape; None: all of them.
        density: Share of the causal blocks that the synthetic patterns are to cover.
        chunk: Tokens of a prefill at a time; 0 for all at once; None: as many as memory allows.
        dense: Time dense attention too.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: `auto` (float32 on a CPU, bfloat16 on a GPU), `float32`, `bfloat16` or `float16`.
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

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ConfigError(f"lengths = {self.lengths} is not allowed: name numbers above 0")
        if not 0 < self.density <= 1:
            raise ConfigError(f"density = {self.density} is not allowed: between 0 and 1")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype = {self.dtype!r} is not allowed: one of {', '.join(DTYPES)}")
        if self.chunk is not None and self.chunk < 0:
            raise ConfigError(f"chunk = {self.chunk} is not allowed: 0 (all at once) or more")
        if self.model is not None and self.layers is not None:
            raise ConfigError("layers is for a shape: a model that is named keeps its own")
