"""Everything that an audit found, and the same as JSON-ready values."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from shareprefill.artifact import Artifact, Policy
from shareprefill.audit.codes import (
    TOO_MUCH,
    Noise,
    Plane,
    SourceSpread,
    embed_in_plane,
    find_noise,
    spread_by_source,
)
from shareprefill.audit.heads import Calibration, Heads, has_calibration, open_calibration
from shareprefill.audit.map_figures import Thumbnails, load_thumbnails
from shareprefill.audit.separation import Separation, Spread, measure_separation
from shareprefill.files import printable

FORMAT_VERSION = 1


@dataclass(frozen=True)
class PolicyFacts:
    """The heads of one policy; figures are None where it has no head.

    Attributes:
        policy: Its label.
        heads: How many.
        recall: Mean attention mass inside the patterns on held-out prompts.
        recall_p5: Its 5th percentile over heads.
        recall_least: The worst head's.
        density: Mean share of causal blocks computed.
        density_most: The densest head's.
    """

    policy: str
    heads: int
    recall: float | None
    recall_p5: float | None
    recall_least: float | None
    density: float | None
    density_most: float | None


@dataclass(frozen=True, eq=False)
class Findings:
    """What an audit found.

    Attributes:
        artifact: The artifact.
        heads: Its captured heads.
        calibration: What it was made from; None where that is not at hand.
        missing: Why there is no calibration; empty where there is one.
        plane: The codes in the plane.
        separation: Distances within and across clusters, and the tree.
        noise: Heads without company, and unstable ones.
        sources: Spread of the codes by data set; needs the calibration.
        thumbnails: Maps of the clusters; needs the calibration.
        policies: One entry a policy.
    """

    artifact: Artifact
    heads: Heads
    calibration: Calibration | None
    missing: str
    plane: Plane
    separation: Separation
    noise: Noise
    sources: list[SourceSpread] | None
    thumbnails: Thumbnails | None
    policies: list[PolicyFacts]

    @property
    def warnings(self) -> list[str]:
        """What the reader must not miss."""
        noise, count = self.noise, self.heads.count
        if not noise.is_high:
            return []
        return [
            f"{noise.share:.0%} of the heads ({int(noise.heads.sum())} of {count}) are in no "
            f"cluster or unstable, more than {TOO_MUCH:.0%}: calibrate on more prompts or on data "
            "closer to what is served, or choose another number of clusters, before relying on "
            "shared patterns."
        ]


def examine(artifact: Artifact, folder: Path | None = None) -> Findings:
    """Measures everything that the page shows.

    Args:
        artifact: The artifact.
        folder: The calibration that it was made from. None, or a folder without a calibration:
            what needs the maps is left out, and `missing` says so.

    Raises:
        ArtifactError: the folder's calibration is of another model, or of another run.
        DataError: the calibration is incomplete, damaged, or being written.
    """
    heads = Heads.of(artifact)
    calibration, missing = None, "no calibration folder was given"
    if folder is not None and has_calibration(folder):
        calibration, missing = open_calibration(folder, artifact, heads), ""
    elif folder is not None:
        missing = f"{printable(folder)} holds no calibration"
    separation = measure_separation(artifact, heads, calibration)
    distances = separation.distances
    return Findings(
        artifact=artifact,
        heads=heads,
        calibration=calibration,
        missing=missing,
        plane=embed_in_plane(heads.code),
        separation=separation,
        noise=find_noise(heads),
        sources=None if calibration is None else spread_by_source(calibration),
        thumbnails=None if calibration is None else load_thumbnails(heads, calibration, distances),
        policies=[_policy(heads, policy) for policy in Policy],
    )


def _policy(heads: Heads, policy: Policy) -> PolicyFacts:
    chosen = heads.policy == int(policy)
    recall, density = heads.recall[chosen], heads.density[chosen]
    if not len(recall):
        return PolicyFacts(policy.label, 0, None, None, None, None, None)
    return PolicyFacts(
        policy=policy.label,
        heads=len(recall),
        recall=float(recall.mean()),
        recall_p5=float(recall.quantile(0.05)),
        recall_least=float(recall.min()),
        density=float(density.mean()),
        density_most=float(density.max()),
    )


def to_dict(findings: Findings) -> dict[str, Any]:
    """The figures' numbers as JSON-ready values: finite numbers, text, lists, objects and null."""
    artifact, heads, noise = findings.artifact, findings.heads, findings.noise
    return {
        "format_version": FORMAT_VERSION,
        "model": printable(artifact.model, 512),
        "fingerprint": {
            **asdict(artifact.fingerprint),
            "model_type": printable(artifact.fingerprint.model_type),
        },
        "block_size": artifact.block_size,
        "thresholds": asdict(artifact.thresholds),
        "rows": asdict(artifact.rows),
        "captured_layers": list(heads.layers),
        "captured_heads": heads.count,
        "expected": {
            "density": artifact.expected("density"),
            "recall": artifact.expected("recall"),
            "cost": _figure(artifact.summary, "cost"),
            "recall_worst_5_percent": _figure(artifact.summary, "recall_worst_5_percent"),
        },
        "calibration": {"found": findings.calibration is not None, "missing": findings.missing},
        "warnings": findings.warnings,
        "policies": [asdict(facts) for facts in findings.policies],
        "clusters": describe_clusters(findings),
        "noise": {
            "share": noise.share,
            "too_much": TOO_MUCH,
            "is_high": noise.is_high,
            "alone": int(noise.alone.sum()),
            "unstable": int(noise.unstable.sum()),
        },
        "stability": {
            "spread_median": float(noise.spread.quantile(0.5)),
            "spread_p95": float(noise.spread.quantile(0.95)),
            "spread_most": float(noise.spread.max()),
            "sources": None
            if findings.sources is None
            else [asdict(source) for source in findings.sources],
        },
        "embedding": {
            "explained": list(findings.plane.explained),
            "perplexity": findings.plane.perplexity if findings.plane.tsne is not None else None,
        },
        "distances": _distances(findings.separation),
        "maps": _maps(findings),
        "heads": [_head(findings, index) for index in range(heads.count)],
    }


def _figure(summary: dict[str, Any], name: str) -> float | None:
    value = summary.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def describe_clusters(findings: Findings) -> list[dict[str, Any]]:
    """Size, policies and means of every cluster, the largest first, JSON-ready."""
    heads = findings.heads
    found = []
    for cluster, size in heads.sizes().items():
        members = heads.cluster == cluster
        policies = heads.policy[members]
        pivots = heads.pivot[members & (heads.policy == int(Policy.SHARE))].unique().tolist()
        found.append(
            {
                "cluster": cluster,
                "heads": size,
                "sharing": int((policies == int(Policy.SHARE)).sum()),
                "pivots": [heads.place(pivot) for pivot in pivots],
                "recall": float(heads.recall[members].mean()),
                "density": float(heads.density[members].mean()),
                "spread": float(findings.noise.spread[members].mean()),
                "distance": _mean_distance(findings.separation.distances, members),
            }
        )
    return found


def _mean_distance(distances: Tensor, members: Tensor) -> float | None:
    """The mean distance of every two members."""
    size = int(members.sum())
    if size < 2:
        return None
    return float(distances[members][:, members].sum() / (size * (size - 1)))


def _distances(separation: Separation) -> dict[str, Any]:
    def pairs(spread: Spread) -> dict[str, Any]:
        names = ("p5", "p25", "p50", "p75", "p95")
        quantiles = spread.quantiles or (None,) * len(names)
        return {
            "pairs": spread.pairs,
            **dict(zip(names, quantiles, strict=True)),
            "counts": list(spread.counts),
        }

    tree = separation.tree
    return {
        "measure": separation.measure,
        "edges": list(separation.edges),
        "within": pairs(separation.within),
        "across": pairs(separation.across),
        "silhouette": separation.silhouette,
        "tree": {
            "measure": tree.measure,
            "linkage": tree.linkage,
            "is_artifacts": tree.is_artifacts,
            "cut_height": tree.cut_height,
            "merges": tree.merges.tolist(),
        },
    }


def _maps(findings: Findings) -> dict[str, Any] | None:
    thumbnails, heads = findings.thumbnails, findings.heads
    if thumbnails is None:
        return None
    return {
        "clusters": [
            {
                "cluster": maps.picked.cluster,
                "head": heads.name(maps.picked.head),
                "is_pivot": maps.picked.is_pivot,
                "members": [heads.name(member) for member in maps.picked.members],
                "reconstruction_loss": maps.loss,
            }
            for maps in thumbnails.clusters
        ],
        "clusters_left_out": thumbnails.left_out,
        "heads_left_out": thumbnails.heads_left_out,
    }


def _head(findings: Findings, index: int) -> dict[str, Any]:
    heads, noise, plane = findings.heads, findings.noise, findings.plane
    pivot = int(heads.pivot[index])
    spread = float(noise.spread[index])
    assert math.isfinite(spread)
    return {
        "head": heads.name(index),
        "cluster": int(heads.cluster[index]),
        "policy": Policy(int(heads.policy[index])).label,
        "pivot": None if pivot < 0 else heads.place(pivot),
        "recall": float(heads.recall[index]),
        "density": float(heads.density[index]),
        "spread": spread,
        "alone": bool(noise.alone[index]),
        "unstable": bool(noise.unstable[index]),
        "pca": plane.pca[index].tolist(),
        "tsne": None if plane.tsne is None else plane.tsne[index].tolist(),
    }
