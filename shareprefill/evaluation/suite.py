"""The evaluation: an artifact and a configuration in, a cell for every task and policy out."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from shareprefill.artifact import Artifact, check_fingerprint, load_artifact
from shareprefill.errors import DataError
from shareprefill.evaluation.config import EvalConfig
from shareprefill.evaluation.questions import Question, check_length, check_task, make_questions
from shareprefill.evaluation.results import Cell, Evaluation, make_cell
from shareprefill.evaluation.runner import (
    DENSE_VARIANT,
    ModelContext,
    ModelRunner,
    Outcome,
    PromptJob,
    Run,
    Variant,
    artifact_digest,
    model_name,
    variants_of,
)
from shareprefill.evaluation.workers import WorkerPool
from shareprefill.files import locked_folder, sealed, unsealed
from shareprefill.models import load_tokenizer
from shareprefill.runtime.generation import check_positions
from shareprefill.runtime.policies import require_policy, source_digest

Progress = Callable[[int, int], None]
"""Called with (outcomes done, outcomes in all)."""
Questions = dict[tuple[str, int], list[Question]]
"""The questions of every task and length."""
# Outcomes that older versions kept lack figures: they are measured anew.
_FORMAT = 2
_OUTCOMES = "outcomes.jsonl"


def evaluate(
    config: EvalConfig,
    *,
    out: Path | None = None,
    fresh: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Measures artifacts' policies against dense attention on prompts that they have not seen.

    Artifacts and model are loaded once; dense attention answers every prompt once (with several
    workers: once for every few outcomes). With `out`, every outcome is kept in a file there as soon
    as it comes, and used again by a later call that needs the same one.

    Args:
        config: Tasks, lengths, policies and gammas.
        out: Folder of the outcomes; another process that writes there is refused. None keeps none.
        fresh: Forget the outcomes that are there.
        trust_remote_code: Run the model repository's own code.
        progress: Called with (outcomes done, outcomes in all).

    Returns:
        A cell for every task, length, policy and gamma, and for dense attention.

    Raises:
        ConfigError: a task is unknown, a length beyond the model's maximum, or an option is read by
            none of the policies.
        DataError: a file of prompts or the folder cannot be used.
        ArtifactError: an artifact cannot be read, or is of another model.
        ModelError: the model cannot be loaded.
        UnsupportedError: the model's family is not supported.
    """
    for task in config.tasks:
        check_task(task)
    for runtime in config.runtimes():
        require_policy(runtime.policy)
    artifacts = [load_artifact(path) for path in config.artifacts]
    measure = _in_this_process if config.workers == 1 else _in_workers
    with output_folder(out) as folder:
        cache = OutcomeCache(folder, fresh=fresh)
        cells, context = measure(config, artifacts, cache, trust_remote_code, progress)
    first, *others = map(artifact_digest, artifacts) if artifacts else (None,)
    digests = {"artifact": first, "others": others} if others else {"artifact": first}
    return Evaluation(config, {**context, **digests}, tuple(cells))


def _in_this_process(
    config: EvalConfig,
    artifacts: list[Artifact],
    cache: OutcomeCache,
    trust_remote_code: bool,
    progress: Progress | None,
) -> tuple[list[Cell], dict[str, Any]]:
    name, variants = model_name(config, artifacts), variants_of(config, artifacts)
    runner = ModelRunner.load(name, config, trust_remote_code=trust_remote_code)
    cells = measure_variants(runner, variants, cache, progress)
    return cells, runner.context.values


def _in_workers(
    config: EvalConfig,
    artifacts: list[Artifact],
    cache: OutcomeCache,
    trust_remote_code: bool,
    progress: Progress | None,
) -> tuple[list[Cell], dict[str, Any]]:
    name, variants = model_name(config, artifacts), variants_of(config, artifacts)
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    with WorkerPool(config, [*map(artifact_digest, artifacts)], trust_remote_code) as pool:
        # The prompts are made while the workers load their models.
        questions = ask(config, tokenizer, None)
        context = pool.context()
        for length in config.lengths:
            check_length(length, context.longest)
        cells = measure_all(context, questions, variants, config, cache, pool.run, progress)
    return cells, {**context.values, "workers": config.workers}


def measure_variants(
    runner: ModelRunner,
    variants: list[Variant],
    cache: OutcomeCache,
    progress: Progress | None = None,
) -> list[Cell]:
    """A cell for dense attention and every variant, measured on a model in this process.

    Args:
        runner: The model, and what is asked of it.
        variants: What is compared with dense attention.
        cache: Outcomes that are there already; new ones are added.
        progress: Called with (outcomes done, outcomes in all).

    Raises:
        ArtifactError: an artifact is of another model.
        ShareprefillError: see `evaluate`.
    """
    # All prompts first: a task that cannot be used is known before an hour has passed.
    questions = ask(runner.config, runner.tokenizer, runner.context.longest)
    for question in (question for asked in questions.values() for question in asked):
        check_positions(runner.model, len(question.input_ids), max(1, question.new_tokens))
    run = partial(runner.run, variants)
    return measure_all(runner.context, questions, variants, runner.config, cache, run, progress)


def ask(config: EvalConfig, tokenizer: Any, longest: int | None) -> Questions:
    """The questions of every task and length of a configuration, in this order.

    Raises:
        ShareprefillError: see `questions.make_questions`.
    """
    return {
        (task, length): make_questions(task, length, config, tokenizer, longest)
        for task in config.tasks
        for length in config.lengths
    }


def measure_all(
    context: ModelContext,
    questions: Questions,
    variants: list[Variant],
    config: EvalConfig,
    cache: OutcomeCache,
    run: Run,
    progress: Progress | None = None,
) -> list[Cell]:
    """A cell for dense attention and every variant, task by task and length by length.

    Args:
        context: The model.
        questions: What is asked of it.
        variants: What is compared with dense attention.
        config: What is measured of every prompt.
        cache: Outcomes that are there already; new ones are added.
        run: Runs what is not there.
        progress: Called with (outcomes done, outcomes in all).

    Raises:
        ArtifactError: an artifact is of another model.
        ShareprefillError: what `run` raises.
    """
    for artifact in {id(v.artifact): v.artifact for v in variants}.values():
        if artifact is not None:
            check_fingerprint(artifact, context.fingerprint)
    every = [DENSE_VARIANT, *variants]
    facts = _facts(context, every, config)

    def key(question: Question, length: int, column: int) -> dict[str, Any]:
        asked = {"prompt": question.digest, "length": length, "bins": config.bins}
        return {**facts[column], **asked}

    jobs = _missing(questions, key, len(every), cache)
    total = sum(map(len, questions.values())) * len(every)
    done = total - sum(len(job.columns) for job in jobs)
    if progress is not None:
        progress(done, total)
    for job, column, outcome in run(jobs):
        cache.add(key(job.question, job.length, column), outcome)
        done += 1
        if progress is not None:
            progress(done, total)
    cells = []
    for (task, length), asked in questions.items():
        outcomes = [
            [_known(cache, key(question, length, column)) for question in asked]
            for column in range(len(every))
        ]
        metrics = {question.metric for question in asked}
        metric = metrics.pop() if len(metrics) == 1 else "mixed"
        cells += [
            make_cell(task, metric, length, variant.policy, variant.settings, found, outcomes[0])
            for variant, found in zip(every, outcomes, strict=True)
        ]
    return cells


def _missing(
    questions: Questions,
    key: Callable[[Question, int, int], dict[str, Any]],
    columns: int,
    cache: OutcomeCache,
) -> list[PromptJob]:
    """A job for every prompt that has outcomes to be measured."""
    jobs: list[PromptJob] = []
    planned: set[str] = set()
    for (_, length), asked in questions.items():
        for number, question in enumerate(asked):
            missing = []
            for column in range(columns):
                facts = key(question, length, column)
                # A file may hold a row twice: it is run once.
                name = key_of(facts)
                if cache.get(facts) is None and name not in planned:
                    planned.add(name)
                    missing.append(column)
            if missing:
                jobs.append(PromptJob(question, length, tuple(missing), warm_up=number == 0))
    return jobs


def _known(cache: OutcomeCache, facts: dict[str, Any]) -> Outcome:
    outcome = cache.get(facts)
    assert outcome is not None
    return outcome


def _facts(
    context: ModelContext, variants: list[Variant], config: EvalConfig
) -> list[dict[str, Any]]:
    """What an outcome depends on besides its prompt, by variant."""
    values = {k: v for k, v in context.values.items() if k not in ("threads", "model", "workers")}
    if config.workers > 1:
        # Times beside other processes are not those of one alone; their number matters little.
        values["shared_device"] = True
    digests = {
        id(v.artifact): artifact_digest(v.artifact) for v in variants if v.artifact is not None
    }
    return [
        {
            **values,
            "format": _FORMAT,
            "measure": config.measure,
            "repeats": config.repeats,
            "artifact": digests.get(id(variant.artifact)),
            "runtime": None if variant.runtime is None else variant.runtime.to_dict(),
            **_source(variant),
        }
        for variant in variants
    ]


def _source(variant: Variant) -> dict[str, str]:
    """The file of a policy from outside, which its author changes between evaluations."""
    digest = source_digest(variant.policy)
    return {} if digest is None else {"policy_source": digest}


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


class OutcomeCache:
    """Outcomes by a key that names all that they depend on.

    Args:
        folder: Where the outcomes are kept; None: in memory. The caller holds the folder's lock.
        fresh: Forget what is there.

    Raises:
        DataError: the file cannot be read or written.
    """

    def __init__(self, folder: Path | None, *, fresh: bool = False) -> None:
        self._found: dict[str, Outcome] = {}
        self._path = None if folder is None else folder / _OUTCOMES
        if self._path is not None:
            if fresh:
                self._forget(self._path)
            elif self._path.exists():
                self._read(self._path)

    def get(self, facts: dict[str, Any]) -> Outcome | None:
        """The outcome of these facts, if it is there."""
        return self._found.get(key_of(facts))

    def add(self, facts: dict[str, Any], outcome: Outcome) -> None:
        """Keeps an outcome; it is on the disk when this returns.

        Raises:
            DataError: the file cannot be written.
        """
        key = key_of(facts)
        self._found[key] = outcome
        if self._path is None:
            return
        values = {"key": key, **facts, "outcome": outcome.to_dict()}
        line = json.dumps(sealed(values), allow_nan=False)
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise DataError(f"cannot write {self._path}: {error.strerror}") from error

    def _forget(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise DataError(f"cannot remove {path}: {error.strerror}") from error

    def _read(self, path: Path) -> None:
        try:
            data = path.read_bytes()
            # A killed run may have left part of a line, and a later one must not go on within it.
            whole = data[: data.rfind(b"\n") + 1]
            if len(whole) < len(data):
                with path.open("r+b") as file:
                    file.truncate(len(whole))
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                values = unsealed(json.loads(line))
                self._found[values["key"]] = Outcome.from_dict(values["outcome"])
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise DataError(
                    f"line {number} of {path} is damaged ({error}): use --fresh to start anew"
                ) from error


def key_of(facts: dict[str, Any]) -> str:
    """The name of an outcome: the same for equal facts."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
