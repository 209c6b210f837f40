"""Models to time: known shapes with random weights, made on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from shareprefill.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Shapes of published checkpoints, in Llama's terms.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
    },
    "llama-3.1-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
    },
    # For tests, and for a look at the table on a CPU.
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "rope_theta": 10000.0,
    },
}


def layers_of(shape: str) -> int:
    """Layers of a shape.

    Raises:
        ConfigError: there is no such shape.
    """
    if shape not in SHAPES:
        raise ConfigError(f"there is no shape {shape!r}: it must be one of {', '.join(SHAPES)}")
    return SHAPES[shape]["num_hidden_layers"]


def build_shape(
    shape: str, *, layers: int, tokens: int, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    """A Llama of a shape, with random weights that are made on the device.

    Args:
        shape: A name in `SHAPES`.
        layers: Layers; fewer than the shape has make a long prompt fit.
        tokens: The longest prompt.
        device: Where it is made.
        dtype: Of its weights.

    Raises:
        ConfigError: there is no such shape, or it has not so many layers.
    """
    if not 1 <= layers <= layers_of(shape):
        raise ConfigError(
            f"layers = {layers} is not allowed: {shape} has 1 to {layers_of(shape)} layers"
        )
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = dict(SHAPES[shape])
    theta = sizes.pop("rope_theta")
    config = LlamaConfig(
        **{**sizes, "num_hidden_layers": layers},
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        max_position_embeddings=tokens,
        tie_word_embeddings=False,
    )
    with torch.device(device), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
