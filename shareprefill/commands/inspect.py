"""`sp inspect`: what is in an artifact."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shareprefill.commands.known import CLUSTERS
from shareprefill.commands.options import JsonOption
from shareprefill.commands.verdicts import judge_artifact

if TYPE_CHECKING:
    from torch import Tensor

    from shareprefill.artifact import Artifact


def inspect_command(
    artifact: Annotated[Path, typer.Argument(help="An artifact.")] = CLUSTERS,
    as_json: JsonOption = False,
) -> None:
    """Print what is in an artifact.

    Example:
      sp inspect clusters.st
    """
    from shareprefill.artifact import load_artifact

    loaded = load_artifact(artifact)
    if as_json:
        typer.echo(json.dumps(describe(loaded, artifact), indent=1))
    else:
        summarize(loaded, artifact)


def summarize(artifact: Artifact, path: Path) -> None:
    """An artifact in tables: its origin, its heads by policy, and its sharing clusters."""
    from shareprefill.console import show_line, show_table

    facts = describe(artifact, path)
    policies = [
        (row["policy"], f"{row['heads']}", _figure(row["recall"]), _figure(row["density"]))
        for row in facts["policies"]
    ]
    show_table("heads by policy", ("policy", "heads", "recall", "density"), policies)
    clusters = [
        (
            f"{row['cluster']}",
            f"{row['heads']}",
            " ".join(row["pivots"]),
            f"{row['sharing']}",
            f"{row['recall']:.3f}",
        )
        for row in facts["clusters"]
    ]
    if clusters:
        columns = ("cluster", "heads", "pivots", "sharing", "recall")
        show_table("sharing clusters", columns, clusters, prose=("pivots",))
    show_line(
        f"{path}: {facts['model']}, {facts['heads']} heads, block {facts['block_size']}, "
        f"{facts['sharing_share']:.0%} of heads share; expected density "
        f"{facts['density']:.3f}, recall {facts['recall']:.3f}"
    )
    if facts["unmeasured_layers"]:
        show_line(
            f"not measured: {_ranges(facts['unmeasured_layers'])}, without full causal attention "
            "when it was calibrated; figures are of the others"
        )
    show_line(f"calibrated on {facts['origin']}; planned for {facts['target']}")
    judge_artifact(artifact, path).show()


def describe(artifact: Artifact, path: Path) -> dict[str, Any]:
    """An artifact as a JSON-ready object."""
    from shareprefill.artifact import Policy
    from shareprefill.files import printable

    policy = artifact.policy.flatten()
    measured = artifact.measured_layers
    recall, density = (values.flatten().double() for values in (artifact.recall, artifact.density))
    rows = []
    for kind in Policy:
        chosen = policy == kind
        if chosen.any():
            rows.append(
                {
                    "policy": kind.label,
                    "heads": int(chosen.sum()),
                    "recall": _mean(recall[chosen]),
                    "density": _mean(density[chosen]),
                }
            )
    sharing = policy == Policy.SHARE
    return {
        "model": printable(artifact.model),
        "fingerprint": asdict(artifact.fingerprint),
        "heads": artifact.heads,
        "block_size": artifact.block_size,
        "thresholds": asdict(artifact.thresholds),
        "rows": asdict(artifact.rows),
        "density": artifact.expected("density"),
        "recall": artifact.expected("recall"),
        "unmeasured_layers": [n for n in range(len(artifact.policy)) if n not in measured],
        "sharing_share": sharing.double().mean().item(),
        "policies": rows,
        "clusters": _sharing_clusters(artifact),
        "origin": _origin(artifact.configuration.get("calibrate", {})),
        "target": artifact.goal_in_words,
        "verdict": judge_artifact(artifact, path).to_dict(),
        "configuration": artifact.configuration,
        "summary": artifact.summary,
    }


def _mean(values: Tensor) -> float | None:
    """Of heads that were measured; None where none was."""
    mean = values.nanmean().item()
    return None if math.isnan(mean) else mean


def _figure(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"


def _ranges(layers: list[int]) -> str:
    """Layers in words, runs as ranges.

    >>> _ranges([0, 1, 2, 4, 6, 7])
    'layers 0-2, 4, 6-7'
    """
    runs = list[list[int]]()
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], layer]
        else:
            runs.append([layer])
    words = ", ".join("-".join(map(str, run)) for run in runs)
    return f"layer{'s' * (len(layers) > 1)} {words}"


def _origin(calibration: dict[str, Any]) -> str:
    """Data and lengths of a calibration, in words."""
    from shareprefill.files import printable

    if not {"samples", "length", "data"} <= calibration.keys():
        return "data that the artifact does not name"
    data = ", ".join(printable(each, 60) for each in calibration["data"])
    return f"{calibration['samples']} prompts of {calibration['length']} tokens at most ({data})"


def _sharing_clusters(artifact: Artifact) -> list[dict[str, Any]]:
    """The clusters in which a head shares, largest first; pivots as layer.head."""
    from shareprefill.artifact import Policy

    heads = artifact.policy.shape[1]
    cluster, policy = artifact.cluster.flatten(), artifact.policy.flatten()
    found = []
    for label in cluster[policy == Policy.SHARE].unique().tolist():
        members = cluster == label
        pivots = (members & (policy == Policy.PIVOT)).nonzero()[:, 0].tolist()
        sharing = members & (policy == Policy.SHARE)
        found.append(
            {
                "cluster": label,
                "heads": int(members.sum()),
                "pivots": [f"{pivot // heads}.{pivot % heads}" for pivot in pivots],
                "sharing": int(sharing.sum()),
                "recall": artifact.recall.flatten()[sharing].mean().item(),
            }
        )
    return sorted(found, key=lambda row: (-row["sharing"], row["cluster"]))
