"""What is here: the calibrations under `artifacts/`, and the models that they name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ARTIFACTS = Path("artifacts")
CLUSTERS = Path("clusters.st")

CalibrationArgument = Annotated[
    Path | None,
    typer.Argument(help="Calibration folder; the newest one under artifacts/ by default."),
]


def calibration_folder(given: Path | None) -> Path:
    """The folder given, or the newest calibration under `artifacts/`, which is said."""
    from shareprefill.calib.store import newest_calibration

    if given is not None:
        return given
    folder = newest_calibration(ARTIFACTS)
    typer.echo(f"calibration: {folder} (the newest)", err=True)
    return folder


def model_of(artifact: Path, given: str | None) -> str:
    """The model that a command loads: the one given, or the artifact's where it is known here.

    Raises:
        ArtifactError: the artifact cannot be read, or names a model that is not known here.
    """
    from shareprefill.artifact import load_artifact, model_to_load

    return model_to_load(load_artifact(artifact), given, known_models(ARTIFACTS))


def known_models(root: Path) -> set[str]:
    """Names of models that `sp calibrate` was given, of the calibrations under `root`.

    What cannot be read names none.
    """
    from shareprefill.calib.store import INDEX, MapStore
    from shareprefill.errors import DataError

    found = set()
    for path in root.glob(f"*/calibration/{INDEX}"):
        try:
            found.add(MapStore.open(path.parent).config.model)
        except DataError:
            continue
    return found
