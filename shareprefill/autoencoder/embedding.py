"""Codes of heads: one per prompt, and their consensus over prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shareprefill.autoencoder.network import MapAutoencoder


@dataclass(frozen=True)
class Consensus:
    """What each head looks like over prompts.

    Attributes:
        code: float32 `[K, Z]`, mean over prompts.
        instability: float32 `[K]`, root of the mean squared distance of a head's codes to its
            mean code; 0 for a head that looks alike in every prompt.
        maps: float32 `[K, R, R]`, the decoded mean codes, rows sum to 1.
    """

    code: Tensor
    instability: Tensor
    maps: Tensor


@torch.no_grad()
def embed(network: MapAutoencoder, maps: Tensor) -> Tensor:
    """Encodes maps `[P, K, R, R]`, rows summing to 1, prompt by prompt.

    Returns:
        The code of each head in each prompt, float32 `[P, K, Z]`.
    """
    network.eval()
    return torch.stack([network.encode(prompt) for prompt in maps])


@torch.no_grad()
def consensus(
    network: MapAutoencoder, codes: Tensor, prompts: Sequence[int] | None = None
) -> Consensus:
    """The mean code of each head, its spread, and the map it decodes to.

    Args:
        network: The network that made the codes.
        codes: `[P, K, Z]`.
        prompts: The prompts to take; None for all.
    """
    chosen = codes if prompts is None else codes[list(prompts)]
    assert chosen.shape[0] >= 1
    network.eval()
    mean = chosen.mean(0)
    spread = (chosen - mean).square().sum(-1).mean(0).sqrt()
    return Consensus(code=mean, instability=spread, maps=network.decode(mean))
