"""One model: made anew, measured, and compared with the artifact that is committed.

As a program, `python -m shareprefill.regeneration.worker` does so with its order as JSON.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
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
from shareprefill.evaluation.config import EvalConfig
from shareprefill.evaluation.suite import evaluate
from shareprefill.files import (
    atomic_write_text,
    locked_folder,
    locked_output,
    make_folder,
    printable,
)
from shareprefill.regeneration.jobs import Job, load_jobs, select_jobs
from shareprefill.regeneration.outcomes import (
    OUTCOME,
    Change,
    Figures,
    Outcome,
    Status,
    changed_settings,
    changes_of,
)
from shareprefill.regeneration.stages import ARTIFACT, EVALUATE, code_digest, make_artifact

logger = logging.getLogger(__name__)

_POLICY = "auto"


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
    out = folder / "evaluation" / code_digest(EVALUATE)[:16]
    found = evaluate(config, out=out, trust_remote_code=trust_remote_code)
    (summary,) = (summary for summary in found.summaries() if summary.policy == _POLICY)
    return Figures(accuracy=summary.accuracy, density=summary.density, recall=summary.recall)


def main() -> None:
    """Runs the job of the order, and writes its outcome beside what the job keeps."""
    order = json.loads(sys.argv[1])
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    _log_progress()
    (job,) = select_jobs(load_jobs(order["path"]), [order["name"]])
    os.chdir(Path(order["path"]).parent)
    folder = Path(order["folder"])
    outcome = run_job(
        job, folder, update=order["update"], trust_remote_code=order["trust_remote_code"]
    )
    atomic_write_text(folder / OUTCOME, json.dumps(outcome.to_dict(), indent=1) + "\n")


def _end_with_the_parent() -> None:
    # Not through sys.stdin, whose lock this thread would hold when the interpreter ends.
    os.read(0, 1)
    os._exit(1)


def _log_progress() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("shareprefill")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except ShareprefillError as error:  # the outcome could not be written
        sys.exit(f"sp: {error}")
