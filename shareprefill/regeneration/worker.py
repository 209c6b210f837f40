"""One model: made anew, measured, and compared with the artifact that is committed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from shareprefill.artifact import (
    Artifact,
    artifact_bytes,
    check_fingerprint,
    load_artifact,
    save_artifact,
)
from shareprefill.clustering.comparison import compare_artifacts
from shareprefill.errors import ArtifactError, DataError, ShareprefillError
from shareprefill.evaluation.config import EvalConfig
from shareprefill.evaluation.suite import evaluate
from shareprefill.files import (
    atomic_write_text,
    kind_of,
    locked_folder,
    locked_output,
    make_folder,
    printable,
    remove,
)
from shareprefill.processes import end_with_parent
from shareprefill.regeneration.jobs import Job
from shareprefill.regeneration.outcomes import (
    OUTCOME,
    Change,
    Figures,
    Outcome,
    Status,
    changed_settings,
    changes_of,
)
from shareprefill.safetensors_reader import canonical_json

logger = logging.getLogger(__name__)

_POLICY = "auto"
ARTIFACT = "artifact.st"
CALIBRATION = "calibration"
_STAMPS = "stages.json"
_EVALUATION = "evaluation"
# All that a run writes.
_OURS = (OUTCOME, _STAMPS, ARTIFACT, CALIBRATION, _EVALUATION)
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
    *("models.py", "processes.py", "tokens.py", "weights.py"),
)
_TRAIN = (*_CAPTURE, "autoencoder")
_CLUSTER = (*_TRAIN, "clustering")
EVALUATE = (*_CLUSTER, "evaluation")
# What figures come from besides: prompts are divided into tokens, and clusters are scipy's.
_LIBRARIES = ("numpy", "scipy", "tokenizers", "torch", "transformers")


def run_job(
    job: Job,
    folder: Path,
    *,
    update: bool = False,
    fresh: bool = False,
    trust_remote_code: bool = False,
) -> Outcome:
    """Makes, measures and compares one model's artifact; an expected error is its outcome.

    Args:
        job: What to do.
        folder: Where its calibration, artifact and outcomes are kept.
        update: Write the artifact where the committed one is, unless that one is equal.
        fresh: Keep nothing of an earlier run in the folder.
        trust_remote_code: Run the model repository's own code.
    """
    started = time.monotonic()

    def timed(outcome: Outcome) -> Outcome:
        return replace(outcome, seconds=time.monotonic() - started)

    try:
        # Nothing is touched before the folder is held: another run may be at it.
        with locked_folder(folder):
            _refuse_others(folder)
            for name in _OURS if fresh else (OUTCOME,):
                remove(folder / name)
            outcome = timed(_outcome_of(job, folder, update, trust_remote_code))
            atomic_write_text(folder / OUTCOME, json.dumps(outcome.to_dict(), indent=1) + "\n")
    except ShareprefillError as error:
        outcome = timed(_outcome(job, "failed", [str(error)]))
    return outcome


def _refuse_others(folder: Path) -> None:
    """Refuses a folder whose calibration is not ours to replace."""
    if kind_of(folder / CALIBRATION) is not None and kind_of(folder / _STAMPS) is None:
        raise DataError(
            f"{printable(folder / CALIBRATION)} was not made by sp regenerate, which would replace "
            "it: name another folder with --work, or move it away"
        )


def _outcome_of(job: Job, folder: Path, update: bool, trust_remote_code: bool) -> Outcome:
    try:
        with ExitStack() as held:
            if update:
                make_folder(job.artifact.parent)
                held.enter_context(locked_output(job.artifact))
            return _run(job, folder, update, trust_remote_code)
    except ShareprefillError as error:
        return _outcome(job, "failed", [str(error)])


def _run(job: Job, folder: Path, update: bool, trust_remote_code: bool) -> Outcome:
    artifact = make_artifact(job, folder, trust_remote_code=trust_remote_code)
    committed = _committed(job, artifact)
    if isinstance(committed, str):
        if not update:
            return _outcome(job, "missing", [f"{committed}; --update writes it"])
        save_artifact(artifact, job.artifact)
        return _outcome(job, "updated", [committed])
    after = measure(job, folder / ARTIFACT, folder, trust_remote_code=trust_remote_code)
    same = artifact_bytes(committed) == artifact_bytes(artifact)
    before = (
        after if same else measure(job, job.artifact, folder, trust_remote_code=trust_remote_code)
    )
    comparison = compare_artifacts(committed, artifact)
    changes = changes_of(comparison, before, after, job.tolerances)
    lines = [change.describe() for change in changes if change.drifted]
    lines += changed_settings(comparison)
    if same:
        status = "equal"
    elif update:
        save_artifact(artifact, job.artifact)
        status = "updated"
    else:
        status = "drifted" if lines else "unchanged"
    return _outcome(job, status, lines, changes, len(comparison.moved), comparison.heads)


def _committed(job: Job, regenerated: Artifact) -> Artifact | str:
    """The committed artifact, or why there is none that could be compared."""
    if not job.artifact.exists():
        return f"{printable(job.artifact)} is missing"
    try:
        committed = load_artifact(job.artifact)
        check_fingerprint(committed, regenerated.fingerprint)
    except ArtifactError as error:
        return str(error)
    if committed.fingerprint != regenerated.fingerprint:
        return (
            f"{printable(job.artifact)} was made for a model whose attention weights differ (hash "
            f"{committed.fingerprint.weights[:12]}, now {regenerated.fingerprint.weights[:12]})"
        )
    return committed


def _outcome(
    job: Job,
    status: Status,
    lines: Sequence[str],
    changes: Sequence[Change] = (),
    moved: int = 0,
    heads: int = 0,
) -> Outcome:
    return Outcome(
        name=job.name,
        status=status,
        artifact=str(job.artifact),
        lines=tuple(lines),
        changes=tuple(changes),
        moved=moved,
        heads=heads,
    )


def measure(job: Job, artifact: Path, folder: Path, *, trust_remote_code: bool = False) -> Figures:
    """Evaluates an artifact on the job's tasks and lengths.

    Args:
        job: Its model, tasks, lengths and seed.
        artifact: The artifact's file.
        folder: Where outcomes are kept, so that dense attention is run once for both artifacts,
            and a killed evaluation goes on.
        trust_remote_code: Run the model repository's own code.

    Raises:
        ShareprefillError: see `evaluate`.
    """
    options = {name: value for name, value in job.evaluation.to_dict().items() if value is not None}
    config = EvalConfig.from_dict(
        {
            "artifact": str(artifact),
            "model": job.calibrate.model,
            "lengths": job.lengths,
            "policies": (_POLICY,),
            "device": job.calibrate.device,
            "dtype": job.calibrate.dtype,
            **options,
        }
    )
    # Outcomes of other code are not this code's.
    out = folder / _EVALUATION / code_digest(EVALUATE)[:16]
    found = evaluate(
        config,
        out=out,
        trust_remote_code=trust_remote_code,
        progress=_announcing(
            job, f"evaluating {printable(artifact.name)}", "outcomes", "evaluated already"
        ),
    )
    (summary,) = (summary for summary in found.summaries() if summary.policy == _POLICY)
    return Figures(accuracy=summary.accuracy, density=summary.density, recall=summary.recall)


def _announcing(job: Job, doing: str, noun: str, done: str) -> Callable[[int, int], None]:
    """A stage's progress, of which the first call alone is told: what is to do, if anything is."""
    told = False

    def tell(kept: int, total: int) -> None:
        nonlocal told
        if told:
            return
        told = True
        if kept == total:
            logger.info("%s: %s", job.name, done)
        else:
            logger.info("%s: %s, %d of %d %s to do", job.name, doing, total - kept, total, noun)

    return tell


def work_on(
    job: Job, place: Path, folder: Path, tell: Connection, *, quiet: bool, **options: bool
) -> None:
    """What a job's process does: `run_job`, whose outcome it tells the one that started it.

    Args:
        job: What to do.
        place: The folder that the job's paths are relative to.
        folder: Where its calibration, artifact and outcome are kept.
        tell: Sends the outcome.
        quiet: Log errors only.
        options: Of `run_job`.
    """
    end_with_parent()
    # What a library prints does not belong to the command's own output.
    os.dup2(2, 1)
    _log_progress(logging.ERROR if quiet else logging.INFO)
    os.chdir(place)
    try:
        tell.send(run_job(job, folder, **options))
    except KeyboardInterrupt:
        sys.exit(130)


def _log_progress(level: int) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("shareprefill")
    logger.addHandler(handler)
    logger.setLevel(level)


def code_digest(parts: Iterable[str]) -> str:
    """SHA-256 of the package's sources in these files and folders, and of the libraries."""
    digest = hashlib.sha256()
    for part in parts:
        place = _PACKAGE / part
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(f"{path.relative_to(_PACKAGE)}\n".encode())
            digest.update(path.read_bytes())
    digest.update(" ".join(version(name) for name in _LIBRARIES).encode())
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
        except (OSError, ValueError, RecursionError) as error:
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
        remove(folder / CALIBRATION)
        stamps.set("calibrate", facts)
    capture_maps(
        job.calibrate,
        folder / CALIBRATION,
        trust_remote_code=trust_remote_code,
        progress=_announcing(job, "calibrating", "prompts", "calibrated already"),
    )


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


def _file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(facts).encode()).hexdigest()
