"""The models that a user has named here: those that were calibrated under `artifacts/`."""

from __future__ import annotations

from pathlib import Path

ARTIFACTS = Path("artifacts")


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
