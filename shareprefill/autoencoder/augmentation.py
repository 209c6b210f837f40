"""Maps of the same head in a prompt that it has not seen."""

from __future__ import annotations

import torch
from torch import Tensor

from shareprefill.autoencoder.network import MapAutoencoder


def vary_key_blocks(
    network: MapAutoencoder, roots: Tensor, strength: float, generator: torch.Generator
) -> Tensor:
    """Multiplies each map's columns by random gains and normalises its rows.

    Logits are about a key's term plus a distance's term; the first belongs to the prompt, the
    second to the head. Another prompt therefore looks like other factors on the columns of a map:
    prompts are few, and which of their key blocks draw attention is most of what differs.

    Args:
        network: Knows which entries the roots belong to.
        roots: `[N, S]`.
        strength: Largest standard deviation of a gain's logarithm; each map draws its own,
            uniform from 0.
        generator: Source of the gains.

    Returns:
        `[N, S]`, rows of length 1.
    """
    side = network.resolution
    spread = strength * torch.rand(
        len(roots), 1, generator=generator, dtype=torch.float32, device="cpu"
    )
    logarithms = spread * torch.randn(
        len(roots), side, generator=generator, dtype=torch.float32, device="cpu"
    )  # [N, R]
    gains = (logarithms / 2).exp()  # of roots: half the logarithm
    return network.normalise(roots * gains.index_select(-1, network.entries % side))


class PromptMixer:
    """Weighted means of two maps of one head, from two prompts.

    Heads recur over prompts: what lies between two maps of a head is a map that the head could
    have in a third prompt.

    Args:
        roots: `[N, S]`, the training maps.
        heads: int64 `[N]`, the head of each.
    """

    def __init__(self, roots: Tensor, heads: Tensor) -> None:
        self._roots = roots
        self._heads = heads
        self._by_head = heads.argsort(stable=True)
        self._counts = heads.bincount()
        self._starts = self._counts.cumsum(0) - self._counts

    def mix(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Mixes each map with a random one of its head, itself included, at a uniform weight.

        Args:
            rows: int64 `[M]`, which of the training maps.
            generator: Source of partners and weights.

        Returns:
            Roots `[M, S]`; the means are those of the maps, so rows keep length 1.
        """
        heads = self._heads[rows]
        place = (
            torch.rand(len(rows), generator=generator, dtype=torch.float32, device="cpu")
            * self._counts[heads]
        )
        # A product that rounds up to the count would be the next head's.
        place = torch.minimum(place.long(), self._counts[heads] - 1)
        partners = self._by_head[self._starts[heads] + place]
        weight = torch.rand(len(rows), 1, generator=generator, dtype=torch.float32, device="cpu")
        return torch.lerp(self._roots[rows].square(), self._roots[partners].square(), weight).sqrt()
