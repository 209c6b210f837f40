"""The regeneration: every selected model in a process of its own, one after the other."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from shareprefill.files import make_folder
from shareprefill.processes import starting_workers
from shareprefill.regeneration.jobs import Job, load_jobs, select_jobs
from shareprefill.regeneration.outcomes import Outcome
from shareprefill.regeneration.worker import work_on


def regenerate(
    path: str | Path,
    work: str | Path,
    *,
    only: Iterable[str] = (),
    shard: str | None = None,
    update: bool = False,
    fresh: bool = False,
    trust_remote_code: bool = False,
    quiet: bool = False,
    on_outcome: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Makes the artifacts of a file of models anew, and compares them with the committed ones.

    Each model has its own process, so that what one leaves or breaks touches no other one; paths in
    the file are relative to its folder. What is done is kept in `work`, and not done again while
    nothing that it depends on has changed.

    Args:
        path: The file; docs/regenerate.md describes it.
        work: Folder of the calibrations, artifacts and outcomes, one folder in it a model.
        only: Names of models; none: all.
        shard: `i/n`: every n-th of them, from the i-th on.
        update: Write artifacts that differ or are missing.
        fresh: Keep nothing of an earlier run of the selected models.
        trust_remote_code: Run the model repositories' own code.
        quiet: Say nothing of the stages on standard error.
        on_outcome: Called with each outcome as soon as it is there.

    Returns:
        An outcome a model, in the file's order.

    Raises:
        ConfigError: the file holds what is not allowed, or a name or the shard is wrong.
        DataError: the file cannot be read, or `work` cannot be written.
    """
    path = Path(path).absolute()
    jobs = select_jobs(load_jobs(path), only, shard)
    work = make_folder(work).absolute()
    outcomes = []
    for job in jobs:
        outcome = _in_process(
            job,
            path,
            work / job.name,
            update=update,
            fresh=fresh,
            trust_remote_code=trust_remote_code,
            quiet=quiet,
        )
        outcomes.append(outcome)
        if on_outcome is not None:
            on_outcome(outcome)
    return outcomes


def _in_process(job: Job, path: Path, folder: Path, **options: bool) -> Outcome:
    started = time.monotonic()
    with starting_workers() as context:
        told, tell = context.Pipe(duplex=False)
        process = context.Process(
            target=work_on, args=(job, path.parent, folder, tell), kwargs=options
        )
        process.start()
    # The worker's end alone is left, so that this one notices when the worker is gone.
    tell.close()
    outcome = None
    with told, suppress(EOFError):
        outcome = told.recv()
    process.join()
    status = process.exitcode
    assert status is not None
    if status == 0 and outcome is not None:
        return outcome
    ended = f"exit status {status}" if status >= 0 else signal.Signals(-status).name
    return Outcome(
        name=job.name,
        status="failed",
        artifact=str(job.artifact),
        lines=(f"its process ended with {ended}, and said above why, if it could",),
        seconds=time.monotonic() - started,
    )
