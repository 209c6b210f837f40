"""`sp cluster`: the artifact of a calibration."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shareprefill.commands.inspect import describe, summarize
from shareprefill.commands.known import CLUSTERS, CalibrationArgument, calibration_folder
from shareprefill.commands.options import JsonOption, number_or_auto, options_of
from shareprefill.config import ClusterConfig
from shareprefill.errors import ArtifactError, DataError
from shareprefill.files import printable

if TYPE_CHECKING:
    from shareprefill.clustering.pipeline import Clustering

_SHOWN = 8


@options_of(ClusterConfig, k=number_or_auto, pivot_rows=number_or_auto)
def cluster_command(
    options: dict[str, Any],
    calibration: CalibrationArgument = None,
    out: Annotated[Path, typer.Option(help="The artifact to write.")] = CLUSTERS,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a file that is of another model, or none.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Cluster the heads of a calibration, choose every head's policy, and write the artifact.

    Examples:
      sp cluster
      sp cluster artifacts/sp-tiny/calibration --budget 0.2 --out fifth.st
    """
    config = ClusterConfig(**options)
    from shareprefill.artifact import save_artifact
    from shareprefill.clustering.pipeline import cluster
    from shareprefill.console import status
    from shareprefill.files import locked_output, reading_folder

    folder = calibration_folder(calibration)
    with locked_output(out), reading_folder(folder), status("clustering"):
        if not force:
            _refuse_to_replace(out, folder)
        artifact, trials = cluster(folder, config)
        save_artifact(artifact, out)
    if as_json:
        tried = [{**asdict(trial), "silhouette": _defined(trial.silhouette)} for trial in trials]
        typer.echo(json.dumps({"path": str(out), "tried": tried, **describe(artifact, out)}))
        return
    show_clusterings(trials)
    summarize(artifact, out)


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value


def show_clusterings(trials: list[Clustering]) -> None:
    """The numbers of clusters that were tried, the one that was taken marked."""
    from shareprefill.console import show_line, show_table

    # Those that cost least, and what was taken.
    cheapest = sorted(trials, key=lambda trial: trial.cost)[:_SHOWN]
    shown = [trial for trial in trials if trial.is_best or trial in cheapest]
    rows = [
        (
            f"{trial.k} *" if trial.is_best else f"{trial.k}",
            f"{trial.cost:.4f}",
            f"{trial.recall:.4f}",
            "-" if math.isnan(trial.silhouette) else f"{trial.silhouette:.3f}",
            f"{trial.sharing}",
        )
        for trial in shown
    ]
    columns = ("k", "cost", "recall", "silhouette", "sharing heads")
    show_table("predicted on held-out prompts", columns, rows, less_important=("silhouette",))
    if len(shown) < len(trials):
        show_line(f"* taken; --json has the other {len(trials) - len(shown)} that were tried")


def _refuse_to_replace(out: Path, calibration: Path) -> None:
    """Refuses to write over a file that is no artifact of the calibration's model."""
    from shareprefill.artifact import load_artifact
    from shareprefill.calib.store import MapStore
    from shareprefill.files import kind_of

    if kind_of(out) is None:
        return
    try:
        there = load_artifact(out)
    except ArtifactError:
        raise DataError(
            f"{printable(out)} is there and no artifact that can be read: use --force to replace "
            "it, or --out"
        ) from None
    if there.fingerprint != MapStore.open(calibration).fingerprint:
        raise DataError(
            f"{printable(out)} is an artifact of another model, {printable(there.model)}: use "
            "--force to replace it, or --out"
        )
