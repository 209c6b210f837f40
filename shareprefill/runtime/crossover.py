"""Where dense attention is faster, as measured."""

from __future__ import annotations

_TOKENS = {"cpu": 5120, "cuda": 4096}
_DENSITY = {"cpu": 0.6, "cuda": 0.75}


def crossover_tokens(device_type: str) -> int:
    """Keys below which a prefill runs dense by itself.

    Args:
        device_type: `cpu`, `cuda`, ...; unknown ones take the GPU's value.

    Returns:
        Tokens.
    """
    return _TOKENS.get(device_type, _TOKENS["cuda"])


def crossover_density(device_type: str) -> float:
    """Density above which a head's dense attention takes less time than its pattern.

    Args:
        device_type: `cpu`, `cuda`, ...; unknown ones take the GPU's value.

    Returns:
        Computed blocks over causal blocks, in (0, 1).
    """
    return _DENSITY.get(device_type, _DENSITY["cuda"])
