"""The stages as functions: what `sp calibrate`, `sp cluster` and `sp eval` do, from Python.

Options are the fields of the stages' configurations in `shareprefill.config` and
`shareprefill.evaluation.config`, whose docstrings say what each does. Progress goes to the log, at
level INFO.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shareprefill.artifact import Artifact, save_artifact
from shareprefill.autoencoder.pipeline import train
from shareprefill.calib.pipeline import capture_maps
from shareprefill.clustering import pipeline as clustering
from shareprefill.config import CalibrateConfig, ClusterConfig, TrainConfig
from shareprefill.errors import ConfigError
from shareprefill.evaluation.config import EvalConfig
from shareprefill.evaluation.suite import evaluate as evaluate_config
from shareprefill.files import locked_output, reading_folder
from shareprefill.runtime.policies import policy_text

if TYPE_CHECKING:
    from shareprefill.evaluation.results import Evaluation
    from shareprefill.runtime.policies.base import SelectionPolicy

logger = logging.getLogger(__name__)
Progress = Callable[[int, int], None]


def calibrate(
    model: str,
    *,
    out: str | Path,
    resume: bool = True,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Path:
    """Captures a model's attention maps on prompts, and trains the autoencoder on them.

    ::

        folder = calibrate("org/name", samples=12, length=8192, out="calibration")

    Under torchrun the prompts are spread over the processes; the first one writes.

    Args:
        model: A hub id, a local folder, a GGUF file, or a built-in model's name.
        out: Folder of the calibration.
        resume: Go on with a killed run; False starts anew.
        trust_remote_code: Run the model repository's own code.
        progress: Called with (prompts done, prompts in all); by default they are logged.
        options: Fields of `CalibrateConfig`: `data`, `samples`, `length`, `block_size`, ...

    Returns:
        The folder, for `cluster`.

    Raises:
        ConfigError: an option is not allowed, or the folder holds another calibration.
        ShareprefillError: model or data cannot be used.
    """
    config = CalibrateConfig.from_dict({"model": model, **_listed(options, "data")})
    folder = Path(out)
    store = capture_maps(
        config,
        folder,
        resume=resume,
        trust_remote_code=trust_remote_code,
        progress=progress or _logged("prompts captured"),
    )
    if store is not None:
        train(folder, TrainConfig(seed=config.seed))
    return folder


def cluster(calibration: str | Path, *, out: str | Path | None = None, **options: Any) -> Artifact:
    """Clusters a calibration's heads and chooses every head's policy.

    ::

        artifact = cluster("calibration", target_recall=0.95, out="clusters.st")

    Args:
        calibration: Folder of `calibrate`.
        out: File to write the artifact to, in place of one that is there; None writes none.
        options: Fields of `ClusterConfig`: `k`, `target_recall`, `budget`, `max_kl`, ...

    Returns:
        The artifact, for `share_prefill`.

    Raises:
        ConfigError: an option is not allowed.
        DataError: the calibration is missing, incomplete or damaged.
    """
    config, folder = ClusterConfig.from_dict(options), Path(calibration)
    if out is None:
        with reading_folder(folder):
            return clustering.cluster(folder, config)[0]
    with locked_output(Path(out)), reading_folder(folder):
        artifact, _ = clustering.cluster(folder, config)
        save_artifact(artifact, out)
    return artifact


def evaluate(
    artifact: str | Path | None = None,
    *,
    model: str | None = None,
    policies: str | SelectionPolicy | Sequence[str | SelectionPolicy] = ("auto",),
    out: str | Path | None = None,
    resume: bool = True,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Evaluation:
    """Measures policies against dense attention on prompts that no calibration has seen.

    ::

        evaluate("clusters.st", policies=["auto", "flex"], tasks=["retr_kv"], lengths=[8192])
        evaluate(model="org/name", policies=["flex", Strided(stride=4)], tasks=["perplexity"])

    Args:
        artifact: Path of the artifact; None where no policy needs one.
        model: Where the model is; None: where the artifact says.
        policies: Names, or policies that are objects.
        out: Folder that keeps what was measured of every prompt, to go on with.
        resume: Use what is there; False starts anew.
        trust_remote_code: Run the model repository's own code.
        progress: Called with (outcomes done, outcomes in all); by default they are logged.
        options: Fields of `EvalConfig`: `tasks`, `lengths`, `samples`, `gammas`, ...

    Returns:
        A cell for every task, length, policy and gamma; `summary()` and `cells`.

    Raises:
        ConfigError: an option is not allowed, or a policy needs an artifact.
        ShareprefillError: artifact, model or data cannot be used.
    """
    if isinstance(artifact, Artifact):
        raise ConfigError(
            "evaluate takes the path of an artifact, as its workers read it: write yours with "
            "save_artifact, and name the file"
        )
    if isinstance(policies, str) or not isinstance(policies, Sequence):
        policies = [policies]
    config = EvalConfig.from_dict(
        {
            "artifact": None if artifact is None else str(artifact),
            "model": model,
            "policies": tuple(map(policy_text, policies)),
            **_listed(options, "tasks", "lengths", "gammas"),
        }
    )
    return evaluate_config(
        config,
        out=None if out is None else Path(out),
        fresh=not resume,
        trust_remote_code=trust_remote_code,
        progress=progress or _logged("outcomes measured"),
    )


def _listed(options: dict[str, Any], *names: str) -> dict[str, Any]:
    """Options with single values of some names as lists of one."""
    single = (str, int, float)
    return {
        name: (value,) if name in names and isinstance(value, single) else value
        for name, value in options.items()
    }


def _logged(what: str) -> Progress:
    def log(done: int, total: int) -> None:
        logger.info("%d of %d %s", done, total, what)

    return log
