"""Where dense attention is faster, as measured."""

from __future__ import annotations

# CPU: end to end on 2 cores, sp-ref gains from 4K on and sp-tiny between 4K and 8K. CUDA: choosing
# patterns takes some 5 ms of host time a layer, and dense attention 3.4 ms at 16K tokens, 14 ms at
# 32K (one H100, 32 heads, D=128). docs/performance.md has the commands.
_TOKENS = {"cpu": 5120, "cuda": 24576}
# A block takes 1.5 times as long as in dense attention on a CPU, 1.25 to 1.4 times on an H100.
_DENSITY = {"cpu": 0.6, "cuda": 0.7}


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
