"""The one use of the evaluation stage: figures of an artifact under its own policies."""

from __future__ import annotations

from pathlib import Path

from shareprefill.evaluation.config import EvalConfig
from shareprefill.evaluation.suite import evaluate
from shareprefill.regeneration.comparing import Figures
from shareprefill.regeneration.jobs import Job
from shareprefill.regeneration.stages import EVALUATE, code_digest

_POLICY = "auto"


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
