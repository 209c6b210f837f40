"""How far heads of one cluster lie from each other and from the rest, and the tree of merges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from shareprefill.artifact import Artifact
from shareprefill.audit.heads import Calibration, Heads
from shareprefill.autoencoder.dataset import resample_maps
from shareprefill.calib.capture import FULL
from shareprefill.clustering.distances import code_distances, gamma_patterns, jaccard_distances
from shareprefill.clustering.hierarchy import build_linkage, cut, silhouette
from shareprefill.config import LINKAGES, METRICS, Linkage

BINS = 50
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

Measure = Literal["jaccard", "jaccard-raw", "code"]
NAMES: dict[str, str] = {
    "jaccard": "Jaccard distance of consensus patterns",
    "jaccard-raw": "Jaccard distance of mean maps' patterns",
    "code": "Cosine distance of codes",
}


@dataclass(frozen=True, eq=False)
class Spread:
    """The distances of pairs of heads.

    Attributes:
        pairs: How many there are.
        quantiles: At 5, 25, 50, 75 and 95 percent; empty where there is no pair.
        counts: Pairs in each of the histogram's bins.
    """

    pairs: int
    quantiles: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Tree:
    """The merges of all heads, and where they were cut.

    Attributes:
        merges: float64 `[K - 1, 4]`, in SciPy's layout.
        measure: The distance that it was built on.
        linkage: How clusters' distances follow from heads'.
        is_artifacts: Whether cutting it gives the artifact's clusters.
        cut_height: Between the last merge that was made and the first that was not; None where the
            tree is not the artifact's, or nothing was left to cut.
    """

    merges: Tensor
    measure: Measure
    linkage: Linkage
    is_artifacts: bool
    cut_height: float | None


@dataclass(frozen=True, eq=False)
class Separation:
    """Distances within and across clusters.

    Attributes:
        measure: What the distances are.
        edges: Of the histogram's bins.
        within: Pairs of heads of one cluster.
        across: Pairs of heads of different clusters.
        silhouette: Of the artifact's clusters in these distances; None where it is not defined.
        tree: Of all heads.
        distances: float64 `[K, K]`.
    """

    measure: Measure
    edges: tuple[float, ...]
    within: Spread
    across: Spread
    silhouette: float | None
    tree: Tree
    distances: Tensor


def measure_separation(
    artifact: Artifact, heads: Heads, calibration: Calibration | None
) -> Separation:
    """Distances by the artifact's own metric where the calibration is there, of codes otherwise.

    With a calibration the distributions are of Jaccard distances, also where the tree was built on
    the distances of codes.
    """
    configured = artifact.configuration.get("cluster")
    options = configured if isinstance(configured, dict) else {}
    metric = options.get("metric") if options.get("metric") in METRICS else "jaccard"
    linkage = options.get("linkage") if options.get("linkage") in LINKAGES else "average"
    codes = code_distances(heads.code)
    if calibration is None:
        measure: Measure = "code"
        distances = tree_distances = codes
    else:
        measure = "jaccard-raw" if metric == "jaccard-raw" else "jaccard"
        maps = _mean_maps(calibration) if measure == "jaccard-raw" else calibration.agreed.maps
        distances = jaccard_distances(gamma_patterns(maps, artifact.thresholds.gamma))
        tree_distances = codes if metric == "code" else distances
    tree = _tree(
        tree_distances, heads, "code" if metric == "code" else measure, cast(Linkage, linkage)
    )
    edges = torch.linspace(
        0, max(1.0, float(distances.max())), BINS + 1, dtype=torch.float64, device="cpu"
    )
    first, second = torch.triu_indices(heads.count, heads.count, 1, device="cpu")
    between = distances[first, second]
    same = (heads.cluster[first] == heads.cluster[second]) & (heads.cluster[first] >= 0)
    score = silhouette(distances, _labels(heads))
    return Separation(
        measure=measure,
        edges=tuple(edges.tolist()),
        within=_spread(between[same], edges),
        across=_spread(between[~same], edges),
        silhouette=None if score != score else score,
        tree=tree,
        distances=distances,
    )


def _mean_maps(calibration: Calibration) -> Tensor:
    """float32 `[K, R, R]`, the mean maps of the known prompts, one prompt in memory at a time."""
    side = calibration.training.config.resolution
    total: Any = 0
    for number in calibration.known:
        maps = calibration.store.load(number, FULL)[FULL].flatten(0, 1)
        total = total + resample_maps(maps, side)
    return total / len(calibration.known)


def _labels(heads: Heads) -> Tensor:
    """Cluster labels; heads without a cluster get one of their own each."""
    free = heads.cluster.max().clamp_min(-1) + 1 + torch.arange(heads.count, device="cpu")
    return torch.where(heads.cluster >= 0, heads.cluster, free)


def _tree(distances: Tensor, heads: Heads, measure: Measure, linkage: Linkage) -> Tree:
    merges = build_linkage(distances, linkage)
    labels = _labels(heads)
    k = len(labels.unique())
    # Numbered by first appearance, as the cut's labels are.
    order = {label: number for number, label in enumerate(dict.fromkeys(labels.tolist()))}
    renamed = torch.tensor([order[label] for label in labels.tolist()], device="cpu")
    is_artifacts = torch.equal(cut(merges, k), renamed)
    height = None
    if is_artifacts and k > 1:
        above = merges[heads.count - k, 2]
        below = (
            merges[heads.count - k - 1, 2]
            if k < heads.count
            else torch.zeros((), dtype=torch.float32, device="cpu")
        )
        height = float(above + below) / 2
    return Tree(merges, measure, linkage, is_artifacts, height)


def _spread(distances: Tensor, edges: Tensor) -> Spread:
    if not len(distances):
        return Spread(0, (), (0,) * BINS)
    counts = torch.histogram(distances, edges).hist.long().tolist()
    # Sorted once; `quantile` refuses more than 16 million values.
    ordered = distances.sort().values
    places = [round(q * (len(ordered) - 1)) for q in _QUANTILES]
    return Spread(len(ordered), tuple(ordered[places].tolist()), tuple(counts))
