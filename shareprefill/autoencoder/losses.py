"""What reconstructed maps are measured by, and the autoencoder's results in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shareprefill.autoencoder.network import MapAutoencoder
from shareprefill.autoencoder.pca import PrincipalComponents


@dataclass(frozen=True)
class Losses:
    """Mean squared Hellinger distance per row on the held-out prompts, between 0 and 1.

    Attributes:
        autoencoder: The trained network.
        start: The network before its first step: PCA of the training maps and varied copies.
        pca: PCA of the training maps with as many components, clamped and normalised like the
            network's output.
        pca_linear: The same PCA as it is; its rows are no distributions.
        mean: The mean training map (in root space, normalised) for every head.
        head_mean: The mean training map of each head.
    """

    autoencoder: float
    start: float
    pca: float
    pca_linear: float
    mean: float
    head_mean: float

    @property
    def beats_pca(self) -> bool:
        """Whether the autoencoder is better than both forms of PCA."""
        return self.autoencoder < min(self.pca, self.pca_linear)


def hellinger_loss(roots: Tensor, target: Tensor, resolution: int) -> Tensor:
    """Mean squared Hellinger distance per row of `[N, S]` roots: a scalar from 0 to 1."""
    return (roots - target).square().sum(-1).mean() / (2 * resolution)


@torch.no_grad()
def reconstruction_loss(network: MapAutoencoder, roots: Tensor) -> float:
    """`hellinger_loss` of `[N, S]` roots and what the network makes of them."""
    network.eval()
    decoded = network.decode_roots(network.encode_roots(roots))
    return float(hellinger_loss(decoded, roots, network.resolution))


@torch.no_grad()
def reference_losses(
    network: MapAutoencoder,
    baseline: PrincipalComponents,
    held_out: Tensor,
    mean: Tensor,
    head_means: Tensor,
) -> dict[str, float]:
    """The losses of what needs no training, by name in `Losses`.

    Args:
        network: Knows how to normalise roots.
        baseline: PCA of the training maps.
        held_out: `[P, K, S]` roots.
        mean: `[S]`, the mean training roots.
        head_means: `[K, S]`, the mean training roots of each head.
    """
    flat = held_out.flatten(0, 1)
    linear = baseline.reconstruct(flat)

    def loss(roots: Tensor, target: Tensor) -> float:
        return float(hellinger_loss(roots, target, network.resolution))

    return {
        "pca": loss(network.normalise(linear), flat),
        "pca_linear": loss(linear, flat),
        "mean": loss(network.normalise(mean).expand_as(flat), flat),
        "head_mean": loss(network.normalise(head_means).expand_as(held_out).flatten(0, 1), flat),
    }
