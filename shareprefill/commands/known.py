"""What is here: the calibrations under `artifacts/`, and the models that they name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from shareprefill.errors import ArtifactError
from shareprefill.policy_names import WITHOUT_ARTIFACT, is_planned

ARTIFACTS = Path("artifacts")
CLUSTERS = Path("clusters.st")

CalibrationArgument = Annotated[
    Path | None,
    typer.Argument(help="Calibration folder; the newest one under artifacts/ by default."),
]

ArtifactOption = Annotated[
    Path | None,
    typer.Option(help="Artifact of the model; clusters.st by default, if it is needed."),
]


def calibration_folder(given: Path | None) -> Path:
    """The folder given, or the newest calibration under `artifacts/`, which is said."""
    from shareprefill.calib.store import newest_calibration
    from shareprefill.console import note

    if given is not None:
        return given
    folder = newest_calibration(ARTIFACTS)
    note(f"calibration: {folder} (the newest)")
    return folder


def artifact_here(model: str | None, policies: Sequence[str]) -> Path | None:
    """The artifact that a command reads where none is named; None where none is needed.

    That is the folder's own, `clusters.st`. Where no policy needs one, it is read if it names the
    model.

    Args:
        model: The model that the user named; None for none.
        policies: What is to be run.

    Raises:
        ArtifactError: there is none, and one is needed; or it cannot be read.
    """
    from shareprefill.artifact import load_artifact
    from shareprefill.files import kind_of, printable

    needing = [policy for policy in policies if is_planned(policy)]
    is_there = kind_of(CLUSTERS) is not None
    if not is_there and needing:
        raise ArtifactError(
            f"policy {needing[0]!r} needs an artifact, and there is no {CLUSTERS} in this folder: "
            "name one with --artifact, make one with sp calibrate and sp cluster, or name a model "
            f"with --model and a policy that plans nothing, like --policy {WITHOUT_ARTIFACT}"
        )
    if not is_there and model is None:
        raise ArtifactError(
            f"there is no {CLUSTERS} in this folder: name a model with --model, or an artifact "
            "with --artifact"
        )
    if not is_there or needing or model is None:
        return CLUSTERS if is_there else None
    named = load_artifact(CLUSTERS).model
    if named == model:
        return CLUSTERS
    typer.echo(
        f"{CLUSTERS} is of the model {printable(named)} and not read; --artifact {CLUSTERS} "
        "reads it",
        err=True,
    )
    return None


def model_of(artifact: Path | None, given: str | None, *, trust_remote_code: bool = False) -> str:
    """The model that a command loads: the one given, or the artifact's (`model_to_load`).

    Args:
        artifact: The artifact; None for none, where a model is given.
        given: The model that the user named; None for none.
        trust_remote_code: Whether code of the model's repository is to be run.

    Raises:
        ArtifactError: the artifact cannot be read, or names a model that is not loaded by itself.
    """
    from shareprefill.artifact import load_artifact, model_to_load

    if artifact is None:
        assert given is not None
        return given
    return model_to_load(
        load_artifact(artifact),
        given,
        known_models(ARTIFACTS),
        trust_remote_code=trust_remote_code,
    )


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
