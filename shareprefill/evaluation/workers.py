"""Several processes, each with a model of its own, that divide the prompts between them.

One process keeps a GPU busy only where its kernels are long: at a few thousand tokens most of the
time goes into starting them. Processes beside each other fill the gaps.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import torch

from shareprefill.artifact import load_artifact
from shareprefill.errors import ArtifactError, ConfigError, ModelError
from shareprefill.evaluation.config import EvalConfig
from shareprefill.evaluation.questions import Question
from shareprefill.evaluation.runner import (
    ModelContext,
    ModelRunner,
    Outcome,
    PromptJob,
    Result,
    Variant,
    artifact_digest,
    model_name,
    variants_of,
)
from shareprefill.processes import end_with_parent, starting_workers

# Outcomes of a prompt that a worker gives back at once.
_PIECE = 8

_Setting = tuple[EvalConfig, tuple[str, ...], bool]
"""Configuration, the artifacts' digests, and whether the repository's code is run."""


class WorkerPool:
    """The workers of an evaluation, to be entered with `with`; they end with it.

    They begin to load their models at once.

    Args:
        config: Artifacts, model and number of workers.
        digests: Of the artifacts that they must find.
        trust_remote_code: Run the model repository's own code.
    """

    def __init__(self, config: EvalConfig, digests: Sequence[str], trust_remote_code: bool) -> None:
        self._setting = (config, tuple(digests), trust_remote_code)
        threads = max(1, torch.get_num_threads() // config.workers)
        with starting_workers() as context:
            self._pool = ProcessPoolExecutor(
                config.workers, mp_context=context, initializer=_begin, initargs=(threads,)
            )
            # As many as there are workers, so that all of them start.
            self._contexts = [
                self._pool.submit(_context, self._setting) for _ in range(config.workers)
            ]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def context(self) -> ModelContext:
        """The model of the workers.

        Raises:
            ModelError: they do not have the same one.
            ShareprefillError: one of them could not load it; see `suite.evaluate`.
        """
        with self._whole():
            found = [future.result() for future in self._contexts]
        if any(other != found[0] for other in found):
            raise ModelError("the workers have different models: it changed while they loaded it")
        return found[0]

    def run(self, jobs: Iterable[PromptJob]) -> Iterator[Result]:
        """Runs jobs, whichever worker is free taking the next piece.

        Outcomes come piece by piece: long jobs are divided, though dense attention then runs again
        with each piece, so that a run that is killed keeps most of what it did.

        Raises:
            ConfigError: a worker was killed, or the device has too little memory.
        """
        with self._whole():
            futures = {
                self._pool.submit(_outcomes, self._setting, *_sent(piece)): piece
                for job in jobs
                for piece in _pieces(job)
            }
            for future in as_completed(futures):
                job = futures[future]
                for column, outcome in zip(job.columns, future.result(), strict=True):
                    yield job, column, outcome

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Tells in words that a worker is gone."""
        try:
            yield
        except BrokenProcessPool as error:
            raise ConfigError(
                "a worker ended before its work (killed, perhaps for memory): lower --workers "
                f"({self._setting[0].workers}); finished outcomes in --out are used again"
            ) from error


def _pieces(job: PromptJob) -> Iterator[PromptJob]:
    for start in range(0, len(job.columns), _PIECE):
        yield replace(job, columns=job.columns[start : start + _PIECE])


def _sent(job: PromptJob) -> tuple[Any, ...]:
    """A job in plain values: tensors would go through shared memory."""
    question = job.question
    asked = (question.input_ids.tolist(), question.metric, question.reference, question.new_tokens)
    return asked, job.length, job.columns, job.warm_up


def _begin(threads: int) -> None:
    """Prepares a worker."""
    end_with_parent()
    torch.set_num_threads(threads)


def _context(setting: _Setting) -> ModelContext:
    runner, _ = _loaded(setting)
    return runner.context


def _outcomes(
    setting: _Setting,
    asked: tuple[Any, ...],
    length: int,
    columns: tuple[int, ...],
    warm_up: bool,
) -> list[Outcome]:
    runner, variants = _loaded(setting)
    ids, *rest = asked
    job = PromptJob(Question(torch.tensor(ids, device="cpu"), *rest), length, columns, warm_up)
    return [outcome for _, _, outcome in runner.run(variants, [job])]


@functools.cache
def _loaded(setting: _Setting) -> tuple[ModelRunner, list[Variant]]:
    """A worker's model, and what it measures."""
    config, digests, trust_remote_code = setting
    artifacts = [load_artifact(path) for path in config.artifacts]
    for path, artifact, digest in zip(config.artifacts, artifacts, digests, strict=True):
        if artifact_digest(artifact) != digest:
            raise ArtifactError(f"{path} changed while the workers began: run it again")
    name = model_name(config, artifacts)
    runner = ModelRunner.load(name, config, trust_remote_code=trust_remote_code)
    return runner, variants_of(config, artifacts)
