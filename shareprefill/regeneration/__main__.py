"""The worker's process: `python -m shareprefill.regeneration`, with its order as JSON."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from pathlib import Path

from shareprefill.errors import ShareprefillError
from shareprefill.files import atomic_write_text
from shareprefill.regeneration.jobs import load_jobs, select_jobs
from shareprefill.regeneration.pipeline import OUTCOME
from shareprefill.regeneration.worker import run_job


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
