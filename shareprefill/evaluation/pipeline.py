"""The evaluation: an artifact and a configuration in, a cell for every task and policy out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shareprefill.artifact import Artifact, load_artifact
from shareprefill.evaluation.bench import Bench
from shareprefill.evaluation.config import EvalConfig
from shareprefill.evaluation.jobs import Progress, artifact_digest, ask, measure_all, variants_of
from shareprefill.evaluation.ledger import Ledger
from shareprefill.evaluation.questions import check_length, check_task
from shareprefill.evaluation.results import Cell, Evaluation
from shareprefill.evaluation.workers import WorkerPool
from shareprefill.files import locked_folder
from shareprefill.models import load_tokenizer


def evaluate(
    config: EvalConfig,
    *,
    out: Path | None = None,
    fresh: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Measures artifacts' policies against dense attention on prompts that they have not seen.

    Artifacts and model are loaded once; dense attention is run once for every prompt (with several
    workers: for every few outcomes). With `out`, every outcome is kept in a file there as soon as
    it comes, and used again by a later call that needs the same one.

    Args:
        config: Tasks, lengths, policies and gammas.
        out: Folder of the outcomes; another process that writes there is refused. None keeps none.
        fresh: Forget the outcomes that are there.
        trust_remote_code: Run the model repository's own code.
        progress: Called with (outcomes done, outcomes in all).

    Returns:
        A cell for every task, length, policy and gamma, and for dense attention.

    Raises:
        ConfigError: a task is unknown, or a length beyond the model's maximum.
        DataError: a file of prompts or the folder cannot be used.
        ArtifactError: an artifact cannot be read, or is of another model.
        ModelError: the model cannot be loaded.
        UnsupportedError: the model's family is not supported.
    """
    for task in config.tasks:
        check_task(task)
    artifacts = [load_artifact(path) for path in config.artifacts]
    measure = _alone if config.workers == 1 else _divided
    with output_folder(out) as folder:
        ledger = Ledger(folder, fresh=fresh)
        cells, context = measure(config, artifacts, ledger, trust_remote_code, progress)
    first, *others = map(artifact_digest, artifacts)
    digests = {"artifact": first, "others": others} if others else {"artifact": first}
    return Evaluation(config, {**context, **digests}, tuple(cells))


def _alone(
    config: EvalConfig,
    artifacts: list[Artifact],
    ledger: Ledger,
    trust_remote_code: bool,
    progress: Progress | None,
) -> tuple[list[Cell], dict[str, Any]]:
    name = config.model or artifacts[0].model
    bench = Bench.load(name, config, trust_remote_code=trust_remote_code)
    cells = bench.measure(variants_of(config, artifacts), ledger, progress)
    return cells, bench.subject.context


def _divided(
    config: EvalConfig,
    artifacts: list[Artifact],
    ledger: Ledger,
    trust_remote_code: bool,
    progress: Progress | None,
) -> tuple[list[Cell], dict[str, Any]]:
    name = config.model or artifacts[0].model
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    with WorkerPool(config, [*map(artifact_digest, artifacts)], trust_remote_code) as pool:
        # The prompts are made while the workers load their models.
        asked = ask(config, tokenizer, None)
        subject = pool.subject()
        for length in config.lengths:
            check_length(length, subject.longest)
        variants = variants_of(config, artifacts)
        cells = measure_all(subject, asked, variants, config, ledger, pool.run, progress)
    return cells, {**subject.context, "workers": config.workers}


@contextmanager
def output_folder(out: Path | None) -> Iterator[Path | None]:
    """Holds the folder of the outcomes for this process alone; None for none.

    Raises:
        DataError: another process holds it, or it cannot be written.
    """
    if out is None:
        yield None
    else:
        with locked_folder(out) as folder:
            yield folder
