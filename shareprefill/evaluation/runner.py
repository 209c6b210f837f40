"""A loaded model that is measured: its prompts one after the other, under every variant."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from shareprefill import __version__
from shareprefill.artifact import Artifact, artifact_bytes
from shareprefill.errors import ConfigError
from shareprefill.evaluation.config import EvalConfig
from shareprefill.evaluation.measurement import DENSE_VARIANT, PromptMeasurement, Variant
from shareprefill.evaluation.outcomes import Outcome
from shareprefill.evaluation.questions import Question
from shareprefill.models import Fingerprint, fingerprint, load_model, load_tokenizer, max_length


@dataclass(frozen=True)
class ModelContext:
    """What is known of a loaded model without having it.

    Attributes:
        values: The model, the device and the versions that the figures belong to.
        fingerprint: Of its weights.
        longest: Tokens that it reads at most; None: any number.
    """

    values: dict[str, Any]
    fingerprint: Fingerprint
    longest: int | None


@dataclass(frozen=True, eq=False)
class PromptJob:
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


Result = tuple[PromptJob, int, Outcome]
"""A job, the number of a variant, and what was measured."""
Run = Callable[[Iterable[PromptJob]], Iterator[Result]]
"""Runs jobs, and gives their outcomes as they become known, in any order."""


@dataclass(frozen=True, eq=False)
class ModelRunner:
    """A model with its tokenizer, and what is measured of its prompts.

    Attributes:
        name: The model's name.
        model: A transformers decoder, in eval mode.
        tokenizer: Its tokenizer.
        config: Tasks, lengths, number of prompts and seed.
    """

    name: str
    model: Any
    tokenizer: Any
    config: EvalConfig

    @classmethod
    def load(cls, name: str, config: EvalConfig, *, trust_remote_code: bool = False) -> ModelRunner:
        """Loads the model of a configuration.

        Raises:
            ConfigError: device or dtype is no such thing.
            ModelError: the model cannot be loaded.
        """
        tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
        model = load_model(
            name, device=config.device, dtype=config.dtype, trust_remote_code=trust_remote_code
        )
        return cls(name, model, tokenizer, config)

    @cached_property
    def context(self) -> ModelContext:
        """What the figures belong to."""
        import transformers

        device = next(self.model.parameters()).device
        cuda = device.type == "cuda"
        print_ = fingerprint(self.model)
        values = {
            "model": self.name,
            "weights": print_.weights,
            "device": torch.cuda.get_device_name(device) if cuda else "CPU",
            "threads": torch.get_num_threads(),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "shareprefill": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        return ModelContext(values, print_, max_length(self.model))

    def run(self, variants: list[Variant], jobs: Iterable[PromptJob]) -> Iterator[Result]:
        """Runs jobs in this process, one after the other.

        Raises:
            ConfigError: the device has too little memory.
        """
        every = [DENSE_VARIANT, *variants]
        for job in jobs:
            measurement = PromptMeasurement(
                self.model,
                self.tokenizer,
                job.question,
                length=job.length,
                bins=self.config.bins,
                measure=self.config.measure,
                repeats=self.config.repeats,
                warm_up=job.warm_up,
            )
            for column in job.columns:
                outcome = _run(measurement, every[column], len(job.question.input_ids))
                yield job, column, outcome


def _run(measurement: PromptMeasurement, variant: Variant, tokens: int) -> Outcome:
    try:
        return measurement.run(variant)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the device has too little memory for a prompt of {tokens} tokens under policy "
            f"{variant.policy}: lower --lengths, choose a smaller --dtype, or leave out recall and "
            "errors with --no-measure"
        ) from error


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


def artifact_digest(artifact: Artifact) -> str:
    """SHA-256 of an artifact's content."""
    return hashlib.sha256(artifact_bytes(artifact)).hexdigest()
