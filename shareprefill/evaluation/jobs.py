"""What an evaluation has to run: jobs of one prompt each, and the cells of their outcomes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from shareprefill.artifact import Artifact, artifact_bytes, check_fingerprint
from shareprefill.evaluation.cells import make_cell
from shareprefill.evaluation.config import EvalConfig
from shareprefill.evaluation.ledger import Ledger, key_of
from shareprefill.evaluation.measurement import DENSE_VARIANT, Outcome, Variant
from shareprefill.evaluation.questions import Question, make_questions
from shareprefill.evaluation.results import Cell
from shareprefill.models import Fingerprint

Progress = Callable[[int, int], None]
Asked = dict[tuple[str, int], list[Question]]
"""The questions of every task and length."""


@dataclass(frozen=True)
class Subject:
    """What is known of a loaded model without having it.

    Attributes:
        context: The model, the device and the versions that the figures belong to.
        fingerprint: Of its weights.
        longest: Tokens that it reads at most; None: any number.
    """

    context: dict[str, Any]
    fingerprint: Fingerprint
    longest: int | None


@dataclass(frozen=True, eq=False)
class Job:
    """The outcomes of one prompt that are not known yet.

    Attributes:
        question: The prompt.
        length: Tokens a prompt, at most.
        columns: Numbers of the variants to run, dense attention's being 0.
        warm_up: Run dense attention once more before it is timed.
    """

    question: Question
    length: int
    columns: tuple[int, ...]
    warm_up: bool


Result = tuple[Job, int, Outcome]
"""A job, the number of a variant, and what was measured."""
Run = Callable[[Iterable[Job]], Iterator[Result]]
"""Runs jobs, and gives their outcomes as they become known, in any order."""


def variants_of(config: EvalConfig, artifacts: Sequence[Artifact]) -> list[Variant]:
    """What a configuration compares with dense attention, in order.

    Args:
        config: Policies and gammas.
        artifacts: Those that it names, in its order.
    """
    variants = []
    for runtime in config.runtimes():
        if runtime.policy == "auto" and config.others:
            variants += [
                Variant(runtime.policy, {"artifact": name}, artifact, runtime)
                for name, artifact in zip(config.names, artifacts, strict=True)
            ]
        else:
            settings = {} if runtime.gamma is None else {"gamma": runtime.gamma}
            variants.append(Variant(runtime.policy, settings, artifacts[0], runtime))
    return variants


def ask(config: EvalConfig, tokenizer: Any, longest: int | None) -> Asked:
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
    subject: Subject,
    asked: Asked,
    variants: list[Variant],
    config: EvalConfig,
    ledger: Ledger,
    run: Run,
    progress: Progress | None = None,
) -> list[Cell]:
    """A cell for dense attention and every variant, task by task and length by length.

    Args:
        subject: The model.
        asked: What is asked of it.
        variants: What is compared with dense attention.
        config: What is measured of every prompt.
        ledger: Outcomes that are there already; new ones are added.
        run: Runs what is not there.
        progress: Called with (outcomes done, outcomes in all).

    Raises:
        ArtifactError: an artifact is of another model.
        ShareprefillError: what `run` raises.
    """
    for artifact in {id(v.artifact): v.artifact for v in variants}.values():
        if artifact is not None:
            check_fingerprint(artifact, subject.fingerprint)
    every = [DENSE_VARIANT, *variants]
    facts = _facts(subject, every, config)

    def key(question: Question, length: int, column: int) -> dict[str, Any]:
        return {
            **facts[column],
            "prompt": question.digest,
            "length": length,
            "bins": config.bins,
        }

    jobs: list[Job] = []
    planned: set[str] = set()
    for (_, length), questions in asked.items():
        for number, question in enumerate(questions):
            missing = []
            for column in range(len(every)):
                facts_of_one = key(question, length, column)
                # A file may hold a row twice: it is run once.
                name = key_of(facts_of_one)
                if ledger.get(facts_of_one) is None and name not in planned:
                    planned.add(name)
                    missing.append(column)
            if missing:
                jobs.append(Job(question, length, tuple(missing), warm_up=number == 0))
    total = sum(map(len, asked.values())) * len(every)
    done = total - sum(len(job.columns) for job in jobs)
    if progress is not None:
        progress(done, total)
    for job, column, outcome in run(jobs):
        ledger.add(key(job.question, job.length, column), outcome)
        done += 1
        if progress is not None:
            progress(done, total)
    cells = []
    for (task, length), questions in asked.items():
        outcomes = [
            [_known(ledger, key(question, length, column)) for question in questions]
            for column in range(len(every))
        ]
        metrics = {question.metric for question in questions}
        metric = metrics.pop() if len(metrics) == 1 else "mixed"
        cells += [
            make_cell(task, metric, length, variant, found, outcomes[0])
            for variant, found in zip(every, outcomes, strict=True)
        ]
    return cells


def artifact_digest(artifact: Artifact) -> str:
    """SHA-256 of an artifact's content."""
    return hashlib.sha256(artifact_bytes(artifact)).hexdigest()


def _known(ledger: Ledger, facts: dict[str, Any]) -> Outcome:
    outcome = ledger.get(facts)
    assert outcome is not None
    return outcome


def _facts(subject: Subject, variants: list[Variant], config: EvalConfig) -> list[dict[str, Any]]:
    """What an outcome depends on besides its prompt, by variant."""
    context = {k: v for k, v in subject.context.items() if k not in ("threads", "model", "workers")}
    if config.workers > 1:
        # Times beside other processes are not those of one alone; their number matters little.
        context["shared_device"] = True
    digests = {
        id(v.artifact): artifact_digest(v.artifact) for v in variants if v.artifact is not None
    }
    return [
        {
            **context,
            "measure": config.measure,
            "artifact": digests.get(id(variant.artifact)),
            "runtime": None if variant.runtime is None else variant.runtime.to_dict(),
        }
        for variant in variants
    ]
