"""The prompt length below which dense attention is faster, as measured."""

from __future__ import annotations

_CROSSOVER = {"cpu": 2048, "cuda": 4096}


def crossover_tokens(device_type: str) -> int:
    """Keys below which a prefill runs dense by itself.

    Args:
        device_type: `cpu`, `cuda`, ...; unknown ones take the GPU's value.

    Returns:
        Tokens.
    """
    return _CROSSOVER.get(device_type, _CROSSOVER["cuda"])
