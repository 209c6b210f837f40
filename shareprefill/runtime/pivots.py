"""The patterns that pivots give to other heads, of maps of any resolution, in torch.

Calibration predicts with them; prefills take the same from the operators (`planned`, `state`).
"""

from __future__ import annotations

from torch import Tensor

from shareprefill.runtime.policies.coverage import head_pattern
from shareprefill.runtime.policies.smoothed import smooth


def pivot_estimate(maps: Tensor, causal: Tensor, rows: int) -> Tensor:
    """What a pivot's patterns are chosen from, at any gamma.

    Args:
        maps: Maps of the pivots `[S, n_q, n_k]`.
        causal: Causal blocks, bool `[n_q, n_k]`.
        rows: Query rows a block that the maps are of, which are then smoothed as for the policy
            `smoothed`; 0: all of them, an exact map, which is taken as it is.

    Returns:
        float32 `[S, n_q, n_k]`.
    """
    return smooth(maps, causal, rows) if rows else maps.float()


def pivot_patterns(estimate: Tensor, gamma: Tensor, always: Tensor, causal: Tensor) -> Tensor:
    """The blocks that cover `gamma` of a pivot's whole mass, and those that are always read.

    Args:
        estimate: `[S, n_q, n_k]`, of `pivot_estimate`.
        gamma: Share of the mass to cover `[S]`, in (0, 1].
        always: Blocks that every pattern reads, bool `[n_q, n_k]`.
        causal: Causal blocks, bool `[n_q, n_k]`.

    Returns:
        bool `[S, n_q, n_k]`, causal.
    """
    return (head_pattern(estimate, gamma) | always) & causal
