"""Models to time: known shapes with random weights, made on the device."""

from __future__ import annotations

import re
from pathlib import Path
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
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "rope_theta": 100000.0,
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


# Of free memory; the rest is for a prefill's own numbers.
_FOR_WEIGHTS = 0.9


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
        ConfigError: there is no such shape, it has not so many layers, or they do not fit.
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
    with torch.device("meta"):
        _require_room(shape, AutoModelForCausalLM.from_config(config, dtype=dtype), device)
    with torch.device(device), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def _require_room(shape: str, model: Any, device: torch.device) -> None:
    """Refuses a model that the device has no memory for: a host would end the process unasked.

    Args:
        shape: Its name.
        model: On the meta device.
        device: Where it is to be made.

    Raises:
        ConfigError: says how many layers fit.
    """
    free, layers = _free_bytes(device), len(model.model.layers)
    needed, each = (_bytes_of(part) for part in (model, model.model.layers[0]))
    if free is None or needed <= _FOR_WEIGHTS * free:
        return
    fitting = int((_FOR_WEIGHTS * free - needed + layers * each) // each)
    fewer = f"ask for --layers {fitting}, or " if fitting > 0 else ""
    kind = str(model.dtype).removeprefix("torch.")
    raise ConfigError(
        f"{layers} layers of {shape} take {needed / 1e9:.3g} GB in {kind}, and {free / 1e9:.3g} GB "
        f"are free: {fewer}name another --shape"
    )


def _bytes_of(module: torch.nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in module.parameters())


def _free_bytes(device: torch.device) -> int | None:
    """Memory that a device has left; None where it is not known."""
    if device.type == "cuda":
        # What torch keeps for later is free to it.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        facts = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s*(\d+) kB$", facts, re.MULTILINE)
    return None if found is None or device.type != "cpu" else 1024 * int(found[1])
