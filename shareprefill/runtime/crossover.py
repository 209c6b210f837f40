"""Where dense attention is faster, as measured: a small table by kind of device.

`benchmarks/measure_crossover.py` measures a row; docs/performance.md has the figures.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Crossover:
    """From where on sharing is never slower than dense attention.

    Attributes:
        tokens: Keys below which a prefill runs dense by itself.
        density: Computed blocks over causal blocks above which a head is computed densely: its
            pattern takes more time, or so little less that it is not worth what it loses.
        source: What it was measured on.
        is_measured: Whether that is this kind of device.
    """

    tokens: int
    density: float
    source: str
    is_measured: bool = True


# End to end sp-ref gains from 4K tokens on and sp-tiny between 4K and 8K; a block takes 1.5 times
# as long as in dense attention.
_CPU = Crossover(5120, 0.6, "2 CPU cores, sp-ref and sp-tiny, end to end")
# Choosing patterns takes 2.3 to 2.8 ms of host time a layer, dense attention 2.0 ms at 12K tokens
# and 3.4 at 16K. Between the linear layers of a model of 8B, which hide that time, sharing gains
# from 6K on; other models have smaller ones. A block takes about as long as in dense attention,
# but with 0.95 for 0.7 sp-ref's artifact of most sharing heads loses 6.7 points of retr_kv for .010
# of density (docs/findings-record.md).
_HOPPER = Crossover(
    16384, 0.7, "one H100: a layer of 32 heads, D=128 (30d13c9), and sp-ref's answers (5e089ea)"
)
# By the first number of the compute capability.
_GPUS = {9: _HOPPER}


@lru_cache(maxsize=64)
def crossover(device: torch.device) -> Crossover:
    """The crossover of a device; kinds that were not measured take that of Hopper GPUs.

    Args:
        device: Where attention is computed.
    """
    if device.type == "cpu":
        return _CPU
    if device.type == "cuda":
        found = _GPUS.get(torch.cuda.get_device_capability(device)[0])
        if found is not None:
            return found
    return replace(_HOPPER, is_measured=False)
