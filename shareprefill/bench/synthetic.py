"""An artifact for a model that was never calibrated: only to time it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from shareprefill.artifact import Artifact, Policy, Rows, Thresholds
from shareprefill.models import Fingerprint, geometry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Of 16 heads of every layer: pivots, heads that share with them, vertical-slash and row-sampled.
MIX = (
    *(Policy.PIVOT,) * 1,
    *(Policy.SHARE,) * 10,
    *(Policy.VERTICAL_SLASH,) * 3,
    *(Policy.SAMPLED,) * 2,
)
BLOCK_SIZE = 128
# A pivot's pattern covers the mass m of even attention in about m^1.6 of the blocks, as the first
# rows hold more in each of theirs (32 to 1,024 blocks a side, m from .05 to .5).
_PIVOT_EXPONENT = 1.6


def synthetic_artifact(model: PreTrainedModel, density: float) -> Artifact:
    """An artifact whose heads do a fixed mix of everything, at about a given density.

    Random weights give attention without structure: every block of a row holds about the same mass,
    so a pattern that covers the mass `density` of every row computes about that share of the
    blocks. Every check before sharing passes (slack = 1). What is timed is therefore the work of a
    prefill at this density, selection included; what recall it has cannot be seen on such a model.

    The density is that of whole prompts. A pivot's map is cut at one threshold for all rows, and in
    a whole prompt the first rows hold the most in each of their blocks. In a chunk behind other
    tokens all rows hold about the same, so that the mass m takes about m of the blocks there.

    Args:
        model: A transformers decoder.
        density: Share of a whole prompt's causal blocks that patterns are to cover.
    """
    sizes = geometry(model)
    shape = (sizes.layers, sizes.heads)
    row = torch.tensor(
        [int(MIX[head * len(MIX) // sizes.heads]) for head in range(sizes.heads)], device="cpu"
    )
    policy = row.to(torch.int8).repeat(sizes.layers, 1)
    heads = torch.arange(sizes.layers * sizes.heads, device="cpu").view(shape)
    first = int((row == Policy.PIVOT).nonzero()[0])
    pivot = torch.where(policy == Policy.PIVOT, heads, -1)
    pivot = torch.where(policy == Policy.SHARE, heads[:, first : first + 1], pivot)
    floats: Any = {"dtype": torch.float32, "device": "cpu"}
    mass = torch.full(shape, density, **floats)
    mass[pivot >= 0] = density ** (1 / _PIVOT_EXPONENT)
    cluster = torch.where(pivot >= 0, torch.arange(sizes.layers, device="cpu")[:, None], -1)
    return Artifact(
        model="synthetic",
        fingerprint=Fingerprint(model.config.model_type, sizes, "0" * 64),
        cluster=cluster.int(),
        policy=policy,
        pivot=pivot.int(),
        fallback=torch.where(policy == Policy.SHARE, int(Policy.SMOOTHED), policy).to(torch.int8),
        gamma=mass,
        fallback_gamma=torch.full(shape, density, **floats),
        slack=torch.ones(shape, **floats),
        recall=torch.full(shape, density, **floats),
        density=torch.full(shape, density, **floats),
        instability=torch.zeros(shape, **floats),
        code=torch.zeros(*shape, 1, **floats),
        # In FP8, all heads are computed in it.
        fp8_error=torch.zeros(shape, **floats),
        block_size=BLOCK_SIZE,
        thresholds=Thresholds(gamma=density, tau=1.0, delta=0.0),
        rows=Rows(pivot=2, sample=8, check=1),
        configuration={},
        summary={},
    )
