"""The stages of one job, each done again only where something that it depends on changed."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shareprefill.artifact import Artifact, load_artifact, save_artifact
from shareprefill.errors import DataError
from shareprefill.files import atomic_write_text
from shareprefill.regeneration.jobs import Job
from shareprefill.safetensors_reader import canonical_json

logger = logging.getLogger(__name__)

ARTIFACT = "artifact.st"
CALIBRATION = "calibration"
_STAMPS = "stages.json"
_PACKAGE = Path(__file__).parents[1]
# What a stage runs besides what its own configuration says: a change of it makes the stage stale.
_CAPTURE = (
    *(
        "calib",
        "data",
        "runtime",
        "artifact.py",
        "checkpoint.py",
        "config.py",
        "safetensors_reader.py",
    ),
    *("models.py", "tokens.py", "weights.py"),
)
_TRAIN = (*_CAPTURE, "autoencoder")
_CLUSTER = (*_TRAIN, "clustering")
EVALUATE = (*_CLUSTER, "evaluation")


def code_digest(parts: Iterable[str]) -> str:
    """SHA-256 of the package's sources in these files and folders, and of the libraries."""
    digest = hashlib.sha256()
    for part in parts:
        place = _PACKAGE / part
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(f"{path.relative_to(_PACKAGE)}\n".encode())
            digest.update(path.read_bytes())
    digest.update(" ".join(version(name) for name in ("torch", "transformers")).encode())
    return digest.hexdigest()


def make_artifact(job: Job, folder: Path, *, trust_remote_code: bool = False) -> Artifact:
    """Calibrates, trains and clusters, as far as it is not done; the caller holds the folder.

    Args:
        job: What to make.
        folder: Where the calibration and the artifact are kept.
        trust_remote_code: Run the model repository's own code.

    Raises:
        ShareprefillError: a stage cannot be done; see each one.
    """
    stamps = Stamps(folder / _STAMPS)
    _calibrate(job, folder, stamps, trust_remote_code)
    _train(job, folder, stamps)
    return _cluster(job, folder, stamps)


class Stamps:
    """What the stages that are done depended on, in a file.

    Args:
        path: The file; a damaged one counts as none, and then all is done again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[str, str] = {}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            logger.warning("%s is not readable (%s): every stage is done again", path, error)
            return
        if isinstance(found, dict):
            self._found = found

    def has(self, stage: str, facts: dict[str, Any]) -> bool:
        """Whether the stage was done with these facts."""
        return self._found.get(stage) == _digest(facts)

    def set(self, stage: str, facts: dict[str, Any]) -> None:
        """Notes what a stage was done with.

        Raises:
            DataError: the file cannot be written.
        """
        self._found[stage] = _digest(facts)
        atomic_write_text(self._path, json.dumps(self._found, indent=1, sort_keys=True) + "\n")


def _calibrate(job: Job, folder: Path, stamps: Stamps, trust_remote_code: bool) -> None:
    from shareprefill.calib.pipeline import capture_maps

    facts = {"config": job.calibrate.to_dict(), "code": code_digest(_CAPTURE)}
    if not stamps.has("calibrate", facts):
        # Emptied before the stamp is set: the stamp says what a begun calibration was begun with.
        _remove_folder(folder / CALIBRATION)
        stamps.set("calibrate", facts)
    logger.info("%s: calibrating, %d prompts", job.name, job.calibrate.samples)
    capture_maps(job.calibrate, folder / CALIBRATION, trust_remote_code=trust_remote_code)


def _train(job: Job, folder: Path, stamps: Stamps) -> None:
    from shareprefill.autoencoder.pipeline import load_training, train
    from shareprefill.calib.store import MapStore

    store = MapStore.open(folder / CALIBRATION)
    facts = {
        "config": job.train.to_dict(),
        "maps": [record.sha256 for record in store.prompts],
        "code": code_digest(_TRAIN),
    }
    if stamps.has("train", facts):
        try:
            load_training(folder / CALIBRATION)
        except DataError as error:
            logger.warning("%s: %s", job.name, error)
        else:
            logger.info("%s: trained already", job.name)
            return
    logger.info("%s: training", job.name)
    train(folder / CALIBRATION, job.train)
    stamps.set("train", facts)


def _cluster(job: Job, folder: Path, stamps: Stamps) -> Artifact:
    from shareprefill.autoencoder.pipeline import HISTORY
    from shareprefill.clustering.pipeline import cluster

    path = folder / ARTIFACT
    facts = {
        "config": job.cluster.to_dict(),
        # Has the checksums of the weights, the codes and the maps.
        "training": _file_digest(folder / CALIBRATION / HISTORY),
        "calibration": job.calibrate.to_dict(),
        "code": code_digest(_CLUSTER),
    }
    if path.exists() and stamps.has("cluster", {**facts, "artifact": _file_digest(path)}):
        logger.info("%s: clustered already", job.name)
        return load_artifact(path)
    logger.info("%s: clustering", job.name)
    artifact, _ = cluster(folder / CALIBRATION, job.cluster)
    save_artifact(artifact, path)
    stamps.set("cluster", {**facts, "artifact": _file_digest(path)})
    return artifact


def _remove_folder(path: Path) -> None:
    try:
        if path.exists():
            shutil.rmtree(path)
    except OSError as error:
        raise DataError(f"cannot remove {path}: {error.strerror}") from error


def _file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(facts).encode()).hexdigest()
