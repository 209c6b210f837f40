"""One model: made anew, measured, and compared with the artifact that is committed."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from shareprefill.artifact import (
    Artifact,
    artifact_bytes,
    check_fingerprint,
    load_artifact,
    save_artifact,
)
from shareprefill.clustering.comparison import compare_artifacts
from shareprefill.errors import ArtifactError, ShareprefillError
from shareprefill.files import locked_folder, locked_output, make_folder, printable
from shareprefill.regeneration.comparing import Change, changed_settings, changes_of
from shareprefill.regeneration.jobs import Job
from shareprefill.regeneration.measuring import measure
from shareprefill.regeneration.outcomes import Outcome, Status
from shareprefill.regeneration.stages import ARTIFACT, make_artifact

logger = logging.getLogger(__name__)


def run_job(
    job: Job, folder: Path, *, update: bool = False, trust_remote_code: bool = False
) -> Outcome:
    """Makes, measures and compares one model's artifact; an expected error is its outcome.

    Args:
        job: What to do.
        folder: Where its calibration, artifact and outcomes are kept.
        update: Write the artifact where the committed one is, unless that one is equal.
        trust_remote_code: Run the model repository's own code.
    """
    started = time.monotonic()
    try:
        with ExitStack() as held:
            held.enter_context(locked_folder(folder))
            if update:
                make_folder(job.artifact.parent)
                held.enter_context(locked_output(job.artifact))
            outcome = _run(job, folder, update, trust_remote_code)
    except ShareprefillError as error:
        outcome = _outcome(job, "failed", [str(error)])
    return replace(outcome, seconds=time.monotonic() - started)


def _run(job: Job, folder: Path, update: bool, trust_remote_code: bool) -> Outcome:
    artifact = make_artifact(job, folder, trust_remote_code=trust_remote_code)
    committed = _committed(job, artifact)
    if isinstance(committed, str):
        if not update:
            return _outcome(job, "missing", [f"{committed}; --update writes it"])
        save_artifact(artifact, job.artifact)
        return _outcome(job, "updated", [committed])
    logger.info("%s: evaluating", job.name)
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
