"""Codes in the plane: the same picture for the same codes, whatever the machine's threads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_FEWEST = 4
_PERPLEXITY = 30.0
_SEED = 0
# A step takes time with the heads; thousands of them have found their places in half as many.
_STEPS, _MANY = 1000, 1500


@dataclass(frozen=True, eq=False)
class Plane:
    """Where each head lies.

    Attributes:
        pca: float64 `[K, 2]`, the codes' two main directions.
        explained: Share of the codes' variance along each of them.
        tsne: float64 `[K, 2]`; None where there are fewer than four different codes.
        perplexity: Of t-SNE.
    """

    pca: Tensor
    explained: tuple[float, float]
    tsne: Tensor | None
    perplexity: float


def embed_in_plane(codes: Tensor) -> Plane:
    """Principal components and t-SNE (van der Maaten and Hinton, 2008) of codes.

    The perplexity is 30, or a third of the heads where there are fewer than 90. t-SNE starts at the
    principal components, so that the places of far-apart groups mean something too.

    Args:
        codes: float64 `[K, Z]`.
    """
    pca, explained = _principal(codes)
    different = len(codes.unique(dim=0))
    perplexity = min(_PERPLEXITY, max(1.0, (different - 1) / 3))
    tsne = _tsne(codes, pca, perplexity) if different >= _FEWEST else None
    return Plane(pca, explained, tsne, perplexity)


def _principal(codes: Tensor) -> tuple[Tensor, tuple[float, float]]:
    centred = codes - codes.mean(0)
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    plane = torch.zeros(len(codes), 2, dtype=codes.dtype, device="cpu")
    shares = [0.0, 0.0]
    total = float(values.square().sum())
    for axis in range(min(2, len(values))):
        if total == 0:
            break
        direction = directions[axis]
        # A direction's sign is arbitrary: its largest part is made positive.
        sign = torch.sign(direction[direction.abs().argmax()])
        plane[:, axis] = centred @ direction * sign
        shares[axis] = float(values[axis].square()) / total
    return plane, (shares[0], shares[1])


def _tsne(codes: Tensor, start: Tensor, perplexity: float) -> Tensor:
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    initial = (start / start[:, 0].std() * 1e-4).float().numpy()
    options: dict[str, Any] = {"init": initial, "learning_rate": "auto", "random_state": _SEED}
    steps = _STEPS if len(codes) <= _MANY else _STEPS // 2
    tsne = TSNE(n_components=2, perplexity=perplexity, max_iter=steps, **options)
    # Sums over threads come out in another order each time, and t-SNE magnifies the last bit.
    scaled = (codes / codes.abs().max()).float().numpy()
    with threadpool_limits(limits=1):
        return torch.from_numpy(tsne.fit_transform(scaled)).double()
