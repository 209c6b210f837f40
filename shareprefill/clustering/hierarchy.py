"""Agglomerative clustering on a precomputed distance matrix: merge tree, cuts, silhouette."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shareprefill.errors import ConfigError

if TYPE_CHECKING:
    from shareprefill.config import Linkage

_CANDIDATES = 20


def build_linkage(distances: Tensor, method: Linkage) -> Tensor:
    """The merge tree of all heads, in SciPy's layout.

    Args:
        distances: float64 `[K, K]`, symmetric with a zero diagonal.
        method: How the distance of two clusters follows from those of their heads.

    Returns:
        float64 `[K - 1, 4]`: the two merged clusters (heads are 0 .. K - 1, row i makes cluster
        K + i), their distance, and the number of heads in the new cluster. Distances never fall.
    """
    heads = distances.shape[0]
    assert distances.shape == (heads, heads)
    assert heads >= 1
    assert bool(distances.isfinite().all())
    if heads == 1:
        return torch.zeros(0, 4, dtype=torch.float64, device="cpu")
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import squareform

    condensed = squareform(distances.double().numpy(), checks=False)
    return torch.from_numpy(linkage(condensed, method=method))


def cut(linkage: Tensor, k: int) -> Tensor:
    """The clusters that are left when the tree's first merges have brought their number to k.

    SciPy's `maxclust` cuts at a height and gives fewer clusters where heights tie; this gives k.

    Args:
        linkage: float64 `[K - 1, 4]` of `build_linkage`.
        k: Number of clusters.

    Returns:
        int64 `[K]`: labels 0 .. k - 1, numbered by first appearance, so head 0 has label 0.

    Raises:
        ConfigError: k is below 1 or larger than the number of heads.

    >>> tied = build_linkage(1.0 - torch.eye(3, dtype=torch.float64), "average")
    >>> cut(tied, 2).unique().tolist()
    [0, 1]
    """
    heads = linkage.shape[0] + 1
    if k > heads:
        raise ConfigError(
            f"k = {k} is larger than the number of heads ({heads}): choose k from 1 to {heads}"
        )
    if k < 1:
        raise ConfigError(
            f"k = {k} is not allowed: choose k from 1 to the number of heads ({heads})"
        )
    members: dict[int, list[int]] = {head: [head] for head in range(heads)}
    pairs: list[list[int]] = linkage[: heads - k, :2].long().tolist()
    for step, (left, right) in enumerate(pairs):
        members[heads + step] = members.pop(left) + members.pop(right)
    labels = torch.empty(heads, dtype=torch.int64, device="cpu")
    for label, group in enumerate(sorted(members.values(), key=min)):
        labels[group] = label
    return labels


def silhouette(distances: Tensor, labels: Tensor) -> float:
    """Mean silhouette of a clustering: 1 for tight, distant clusters, below 0 for wrong ones.

    Args:
        distances: float64 `[K, K]`, symmetric with a zero diagonal.
        labels: int64 `[K]`.

    Returns:
        The mean over heads, a cluster of one head counting 0 (Rousseeuw, 1987); NaN for one
        cluster and for K clusters, where it is not defined.
    """
    if not 2 <= int(labels.unique().numel()) < labels.numel():
        return float("nan")
    from sklearn.metrics import silhouette_score

    return float(silhouette_score(distances.numpy(), labels.numpy(), metric="precomputed"))


def candidate_counts(heads: int) -> list[int]:
    """The numbers of clusters that the automatic choice tries: about geometric from 1 to `heads`.

    All of 1 .. heads for up to 20 heads, otherwise 20 of them.

    >>> candidate_counts(128)[:8], candidate_counts(128)[-3:]
    ([1, 2, 3, 4, 5, 6, 7, 9], [81, 102, 128])
    """
    assert heads >= 1
    counts = [1]
    while counts[-1] < heads:
        left = max(1, _CANDIDATES - len(counts))
        ratio = (heads / counts[-1]) ** (1.0 / left)
        counts.append(max(counts[-1] + 1, round(counts[-1] * ratio)))
    return counts
